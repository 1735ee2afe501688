// The CUDA language for g++: what nvcc and NVRTC know by themselves, in the words of runtime.h. It comes before a
// kernel's text. Only what kernels of this library use is here: what is missing is a question, not an oversight.
#pragma once
#include <stdint.h>

#include "runtime.h"

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __grid_constant__
#define __constant__ __attribute__((visibility("default")))
// emulator.py looks for these two, makes the list of kernels of them and takes them away.
#define __global__ emulator_global
#define __launch_bounds__(...) emulator_bounds(__VA_ARGS__)

// One block runs at a time, so memory of a block is static memory. It is in a section of its own, so that it can be
// filled with garbage before each block; AddressSanitizer surrounds only what is in no section.
#ifdef EMULATOR_ADDRESS_SANITIZER
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emulator_shared")))
#endif
#define LB_DYNAMIC_SHARED(name) unsigned char *const name = emulator::dynamic_memory

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
constexpr int warpSize = 32;

namespace emulator {

#define EMULATOR_FN inline __attribute__((always_inline))

template <class V> struct Same {  // an argument of which no type is deduced
  using type = V;
};

template <class To, class From> EMULATOR_FN To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V> EMULATOR_FN uint64_t post(V value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 32 or 64 bits");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class V> EMULATOR_FN V shuffle(Operation op, unsigned mask, V value, int source, Site site) {
  const uint64_t bits = meet(op, mask, post(value), source, site);
  V result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

EMULATOR_FN int lane() {
  return (int)((thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) & 31u);
}

EMULATOR_FN int last_of_group(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("the width of a shuffle is a power of two", site);
  return lane() | (width - 1);
}

}  // namespace emulator

// ---- threads that wait for each other

// As default arguments, these are where the call is.
#define EMULATOR_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_SITE emulator::Site{file, line}

EMULATOR_FN void __syncthreads(EMULATOR_AT) { emulator::barrier(false, EMULATOR_SITE); }
EMULATOR_FN int __syncthreads_count(int yes, EMULATOR_AT) { return (int)emulator::barrier(yes != 0, EMULATOR_SITE); }
EMULATOR_FN int __syncthreads_or(int yes, EMULATOR_AT) { return emulator::barrier(yes != 0, EMULATOR_SITE) != 0; }
EMULATOR_FN int __syncthreads_and(int yes, EMULATOR_AT) { return emulator::barrier(yes == 0, EMULATOR_SITE) == 0; }
EMULATOR_FN void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_AT) {
  emulator::meet(emulator::SYNC, mask, 0, 0, EMULATOR_SITE);
}
EMULATOR_FN void __threadfence() { emulator::fence(); }
EMULATOR_FN void __threadfence_block() { emulator::fence(); }

template <class V> EMULATOR_FN V __shfl_sync(unsigned mask, V value, int from, int width = 32, EMULATOR_AT) {
  const int last = emulator::last_of_group(width, EMULATOR_SITE), first = last - (width - 1);
  return emulator::shuffle(emulator::SHUFFLE, mask, value, first | (from & (width - 1)), EMULATOR_SITE);
}
template <class V> EMULATOR_FN V __shfl_up_sync(unsigned mask, V value, unsigned by, int width = 32, EMULATOR_AT) {
  const int last = emulator::last_of_group(width, EMULATOR_SITE), from = emulator::lane() - (int)by;
  const int source = from < last - (width - 1) ? emulator::lane() : from;
  return emulator::shuffle(emulator::SHUFFLE_UP, mask, value, source, EMULATOR_SITE);
}
template <class V> EMULATOR_FN V __shfl_down_sync(unsigned mask, V value, unsigned by, int width = 32, EMULATOR_AT) {
  const int last = emulator::last_of_group(width, EMULATOR_SITE), from = emulator::lane() + (int)by;
  return emulator::shuffle(emulator::SHUFFLE_DOWN, mask, value, from > last ? emulator::lane() : from, EMULATOR_SITE);
}
template <class V> EMULATOR_FN V __shfl_xor_sync(unsigned mask, V value, int with, int width = 32, EMULATOR_AT) {
  const int last = emulator::last_of_group(width, EMULATOR_SITE), from = emulator::lane() ^ with;
  return emulator::shuffle(emulator::SHUFFLE_XOR, mask, value, from > last ? emulator::lane() : from, EMULATOR_SITE);
}

EMULATOR_FN unsigned __ballot_sync(unsigned mask, int yes, EMULATOR_AT) {
  return (unsigned)emulator::meet(emulator::BALLOT, mask, yes != 0, 0, EMULATOR_SITE);
}
EMULATOR_FN int __any_sync(unsigned mask, int yes, EMULATOR_AT) {
  return (int)emulator::meet(emulator::ANY, mask, yes != 0, 0, EMULATOR_SITE);
}
EMULATOR_FN int __all_sync(unsigned mask, int yes, EMULATOR_AT) {
  return (int)emulator::meet(emulator::ALL, mask, yes != 0, 0, EMULATOR_SITE);
}

#define EMULATOR_REDUCE(name, operation)                                      \
  EMULATOR_FN unsigned name(unsigned mask, unsigned value, EMULATOR_AT) {     \
    return (unsigned)emulator::meet(emulator::operation, mask, value, 0, EMULATOR_SITE); \
  }
EMULATOR_REDUCE(__reduce_max_sync, MAX)
EMULATOR_REDUCE(__reduce_min_sync, MIN)
EMULATOR_REDUCE(__reduce_add_sync, ADD)
EMULATOR_REDUCE(__reduce_and_sync, AND)
EMULATOR_REDUCE(__reduce_or_sync, OR)
EMULATOR_REDUCE(__reduce_xor_sync, XOR)
#undef EMULATOR_REDUCE

// ---- atomics: they order nothing but themselves

template <class V> using emulator_same = typename emulator::Same<V>::type;

template <class V, class F> EMULATOR_FN V emulator_change(V *at, F change) {
  emulator::atomic(at);
  V old = __atomic_load_n(at, __ATOMIC_RELAXED), to = change(old);
  while (!__atomic_compare_exchange_n(at, &old, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) to = change(old);
  return old;
}
template <class V> EMULATOR_FN V atomicAdd(V *at, emulator_same<V> x) {
  emulator::atomic(at);
  return __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
}
template <> EMULATOR_FN float atomicAdd(float *at, float x) {
  const auto add = [x](uint32_t old) { return emulator::same_bits<uint32_t>(emulator::same_bits<float>(old) + x); };
  return emulator::same_bits<float>(emulator_change((uint32_t *)at, add));
}
template <> EMULATOR_FN double atomicAdd(double *at, double x) {
  const auto add = [x](uint64_t old) { return emulator::same_bits<uint64_t>(emulator::same_bits<double>(old) + x); };
  return emulator::same_bits<double>(emulator_change((uint64_t *)at, add));
}
template <class V> EMULATOR_FN V atomicSub(V *at, emulator_same<V> x) {
  emulator::atomic(at);
  return __atomic_fetch_sub(at, x, __ATOMIC_RELAXED);
}
template <class V> EMULATOR_FN V atomicMax(V *at, emulator_same<V> x) {
  return emulator_change(at, [x](V old) { return old > x ? old : x; });
}
template <class V> EMULATOR_FN V atomicMin(V *at, emulator_same<V> x) {
  return emulator_change(at, [x](V old) { return old < x ? old : x; });
}
template <class V> EMULATOR_FN V atomicOr(V *at, emulator_same<V> x) {
  emulator::atomic(at);
  return __atomic_fetch_or(at, x, __ATOMIC_RELAXED);
}
template <class V> EMULATOR_FN V atomicAnd(V *at, emulator_same<V> x) {
  emulator::atomic(at);
  return __atomic_fetch_and(at, x, __ATOMIC_RELAXED);
}
template <class V> EMULATOR_FN V atomicExch(V *at, emulator_same<V> x) {
  emulator::atomic(at);
  V old;
  emulator_same<V> to = x;
  __atomic_exchange(at, &to, &old, __ATOMIC_RELAXED);
  return old;
}
template <class V> EMULATOR_FN V atomicCAS(V *at, emulator_same<V> expected, emulator_same<V> x) {
  emulator::atomic(at);
  __atomic_compare_exchange_n(at, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ---- arithmetic of one thread

EMULATOR_FN unsigned __float_as_uint(float x) { return emulator::same_bits<unsigned>(x); }
EMULATOR_FN int __float_as_int(float x) { return emulator::same_bits<int>(x); }
EMULATOR_FN float __uint_as_float(unsigned x) { return emulator::same_bits<float>(x); }
EMULATOR_FN float __int_as_float(int x) { return emulator::same_bits<float>(x); }
EMULATOR_FN long long __double_as_longlong(double x) { return emulator::same_bits<long long>(x); }
EMULATOR_FN double __longlong_as_double(long long x) { return emulator::same_bits<double>(x); }

EMULATOR_FN float __fadd_rn(float a, float b) { return a + b; }
EMULATOR_FN float __fsub_rn(float a, float b) { return a - b; }
EMULATOR_FN float __fmul_rn(float a, float b) { return a * b; }
EMULATOR_FN float __fdiv_rn(float a, float b) { return a / b; }
EMULATOR_FN float __frcp_rn(float a) { return 1.0f / a; }
EMULATOR_FN float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
EMULATOR_FN float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMULATOR_FN double __dadd_rn(double a, double b) { return a + b; }
EMULATOR_FN double __dmul_rn(double a, double b) { return a * b; }
EMULATOR_FN double __ddiv_rn(double a, double b) { return a / b; }
EMULATOR_FN double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
EMULATOR_FN double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

EMULATOR_FN int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATOR_FN int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATOR_FN int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
EMULATOR_FN int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
EMULATOR_FN int __ffs(int x) { return __builtin_ffs(x); }
EMULATOR_FN int __ffsll(long long x) { return __builtin_ffsll(x); }
EMULATOR_FN unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
EMULATOR_FN unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return (unsigned)((((uint64_t)high << 32 | low) << (by & 31u)) >> 32);
}
EMULATOR_FN unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31u));
}
EMULATOR_FN unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) {
    const unsigned nibble = selector >> (4 * k) & 15u;
    const unsigned byte = (unsigned)(bytes >> (8 * (nibble & 7u))) & 255u;
    result |= (nibble & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * k);
  }
  return result;
}
template <class V> EMULATOR_FN V __ldg(const V *at) { return *at; }
template <class V> EMULATOR_FN V __ldcs(const V *at) { return *at; }
template <class V> EMULATOR_FN void __stcs(V *at, V x) { *at = x; }
