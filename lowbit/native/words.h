// The words of lowbit/words.py in C++, bit for bit (a NaN's payload aside): one arithmetic for the CPU and for CUDA.
//
// Branch-free, so that loops over them vectorise. The build forbids contraction and fast-math (`-ffp-contract=off`,
// `-fmad=false`), and nvcc's and NVRTC's own defaults keep division and subnormals as IEEE 754 has them.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) || defined(LB_DEVICE)
#define LB_FN [[maybe_unused]] static __device__ __forceinline__
#else
#define LB_FN static inline __attribute__((always_inline))
#endif

// Before a loop over values: an output may be the same memory as an input, value for value; else nothing overlaps.
#ifdef __clang__
#define LB_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define LB_IVDEP _Pragma("GCC ivdep")
#endif

namespace lb {

// A number that is the same for all values: for one value at a time, a float like any other.
template <class F> struct Same {
  using type = F;
};
template <class F> using constant = typename Same<F>::type;

#ifdef __CUDACC__
LB_FN uint32_t bits_of(float a) { return __float_as_uint(a); }
LB_FN float float_of(uint32_t bits) { return __uint_as_float(bits); }
LB_FN float sqrt(float a) { return __fsqrt_rn(a); }
LB_FN int64_t bits_of(double a) { return __double_as_longlong(a); }
LB_FN double double_of(int64_t bits) { return __longlong_as_double(bits); }
#else
LB_FN uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
}
LB_FN float float_of(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
}
LB_FN float sqrt(float a) { return __builtin_sqrtf(a); }
LB_FN int64_t bits_of(double a) {
  int64_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
}
LB_FN double double_of(int64_t bits) {
  double a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
}
#endif

// The larger of a magnitude, as its bits, and that of a value: NaN > infinity > finite. Signed, for SSE2's sake.
LB_FN int32_t peak_of(int32_t most, float a) {
  const int32_t magnitude = (int32_t)(bits_of(a) & 0x7FFFFFFFu);
  return magnitude > most ? magnitude : most;
}

LB_FN float where(bool condition, float a, float b) { return condition ? a : b; }

// words.py chooses between a + w * (b - a) and b - (1 - w) * (b - a). Negation is exact, so it is the same to choose
// the operands first and to multiply once; with a weight that does not change in a loop, that leaves -, a blend, *, +.
LB_FN float lerp(float a, float b, float weight) {
  return (weight < 0.5f ? a : b) + (weight < 0.5f ? weight : -(1.0f - weight)) * (b - a);
}

LB_FN float reciprocal(float a) { return 1.0f / a; }

LB_FN float binade(float a) {
  const float power = float_of(bits_of(a) & 0x7F800000u);
  return power > 0x1p-126f ? power : 0x1p-126f;
}

LB_FN float abs(float a) { return float_of(bits_of(a) & 0x7FFFFFFFu); }

LB_FN float sign(float a) { return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a; }

LB_FN float maximum(float a, float b) { return b > a ? b : a; }

LB_FN float minimum(float a, float b) { return b < a ? b : a; }

LB_FN float clip(float a, float low, float high) { return minimum(maximum(a, low), high); }

}  // namespace lb
