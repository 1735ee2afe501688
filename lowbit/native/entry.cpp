// What the library says about itself: what it was built from, and the best instruction set this machine has.
#define LB_EXPORT extern "C" __attribute__((visibility("default")))

#ifndef LB_FINGERPRINT
#define LB_FINGERPRINT "none"
#endif

LB_EXPORT const char *lb_fingerprint(void) { return LB_FINGERPRINT; }

LB_EXPORT const char *lb_best(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return "avx2";
#endif
  return "baseline";
}

LB_EXPORT int lb_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
