// What kernels use of the machine, and nothing of any rule or format: warps, wide accesses, a few words of arithmetic.
//
// The emulator's twin of everything that CUDA brings by itself (threadIdx, shuffles, barriers) is
// tests/emulator/shim.h, which is included before this file when g++ compiles kernels.
#pragma once
#include "arithmetic.h"

#ifdef __CUDACC__
#define LB_UNROLL _Pragma("unroll")
#define LB_ONE_AT_A_TIME _Pragma("unroll 1")
#define LB_KEEP(pointer) asm("" : "+l"(pointer))  // as it is: what it was made of is not to be added up again at each use
#define LB_KEEP_NUMBER(number) asm("" : "+r"(number))
#define LB_BRANCH() asm volatile("")  // here a branch is one: a compiler may not do both ways and choose
#define LB_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))  // else every access finds out what it accesses
#define LB_SHARED(pointer) __builtin_assume(__isShared(pointer))  // the same of shared memory
#define LB_REREAD() asm volatile("" ::: "memory")  // what was read before is not what memory has now
// The bytes of shared memory that the launch asks for; the shim has its own.
#define LB_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define LB_KEEP(pointer)
#define LB_KEEP_NUMBER(number)
#define LB_BRANCH()
#define LB_GLOBAL(pointer)
#define LB_SHARED(pointer)
#define LB_REREAD()
#define LB_UNROLL
#define LB_ONE_AT_A_TIME
#endif

namespace lb {

constexpr uint32_t WHOLE_WARP = 0xFFFFFFFFu;

LB_FN int lane() { return (int)(threadIdx.x & 31u); }
LB_FN int warp() { return (int)(threadIdx.x >> 5); }

#ifdef __CUDACC__
LB_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
LB_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// A number that nothing writes while a kernel runs: what is loaded once need not be loaded again.
LB_FN float unchanging(const float *at) { return __ldg(at); }

// The larger of a magnitude and that of a value; NaN if one is.
LB_FN float larger_magnitude(float most, float x) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  float found;
  asm("{ .reg .f32 size; abs.f32 size, %2; max.NaN.f32 %0, %1, size; }" : "=f"(found) : "f"(most), "f"(x));
  return found;
#else
  return float_of((uint32_t)peak_of((int32_t)bits_of(most), x));
#endif
}

// Of two sums of 16 bits, each plus 0 times a bf16 number: NaN from the first that is not finite.
LB_FN uint32_t nothing_plus(uint32_t sums, uint32_t numbers) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sums) : "r"(numbers), "r"(0u));
#else
  if ((numbers & 0x7F80u) == 0x7F80u) sums |= 0x7FFFu;
  if ((numbers & 0x7F800000u) == 0x7F800000u) sums |= 0x7FFF0000u;
#endif
  return sums;
}

// Two numbers to 16 bits each, rounded to nearest, and one back; a NaN's payload is the machine's.
#ifdef __CUDACC__
LB_FN uint32_t two_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
LB_FN uint32_t two_fp16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
LB_FN float value_fp16(uint32_t raw) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((uint16_t)raw));
  return value;
}
#else
LB_FN float value_fp16(uint32_t raw) { return widen_fp16((uint16_t)raw); }
LB_FN uint32_t two_bf16(float low, float high) { return narrow_bf16(low) | (uint32_t)narrow_bf16(high) << 16; }
LB_FN uint32_t two_fp16(float low, float high) { return narrow_fp16(low) | (uint32_t)narrow_fp16(high) << 16; }
#endif

// The upper half of a product.
#ifdef __CUDACC__
LB_FN uint32_t upper_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#else
LB_FN uint32_t upper_product(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
#endif

// ---- tables in shared memory

// The entry `offset & MASK` bytes from the beginning: a mask is all that an address takes, since accesses add up the rest.
template <uint32_t MASK, class T> LB_FN T entry(const T *table, uint32_t offset) {
  LB_SHARED(table);
  return *(const T *)((const char *)table + (offset & MASK));
}

// ---- reductions over LANES neighbouring lanes, a power of two; every lane of the warp takes part and gets the result

template <int LANES> LB_FN uint32_t largest(uint32_t x) {
  if constexpr (LANES == 32) {
    return __reduce_max_sync(WHOLE_WARP, x);
  } else if constexpr (LANES == 16) {
    const bool above = lane() >= 16;
    const uint32_t low = __reduce_max_sync(WHOLE_WARP, above ? 0u : x);
    const uint32_t high = __reduce_max_sync(WHOLE_WARP, above ? x : 0u);
    return above ? high : low;
  } else {
    LB_UNROLL for (int apart = LANES / 2; apart > 0; apart /= 2) {
      const uint32_t other = __shfl_xor_sync(WHOLE_WARP, x, apart);
      x = other > x ? other : x;
    }
    return x;
  }
}

template <int LANES> LB_FN bool any(bool x) {
  if (LANES == 32) return __any_sync(WHOLE_WARP, x) != 0;
  const uint32_t votes = __ballot_sync(WHOLE_WARP, x);
  const uint32_t mine = ((1u << LANES % 32) - 1u) << (lane() / LANES * LANES);
  return (votes & mine) != 0u;
}

// ---- BYTES neighbouring bytes as 32-bit words, in accesses as wide as their address allows

template <int BYTES> struct Words {
  static constexpr int COUNT = (BYTES + 3) / 4;
  uint32_t word[COUNT];
};

struct alignas(16) Four {
  uint32_t x, y, z, w;
};
struct alignas(8) Two {
  uint32_t x, y;
};

// `from` is a multiple of what BYTES is a multiple of, 16 at most.
template <int BYTES> LB_FN Words<BYTES> load_aligned(const void *from) {
  Words<BYTES> to;
  if constexpr (BYTES % 16 == 0) {
    LB_UNROLL for (int k = 0; k < BYTES / 16; ++k) {
      const Four x = ((const Four *)from)[k];
      to.word[4 * k] = x.x, to.word[4 * k + 1] = x.y, to.word[4 * k + 2] = x.z, to.word[4 * k + 3] = x.w;
    }
  } else if constexpr (BYTES == 8) {
    const Two x = *(const Two *)from;
    to.word[0] = x.x, to.word[1] = x.y;
  } else if constexpr (BYTES == 6) {  // eight codes of 6 bits
    const uint16_t *halves = (const uint16_t *)from;
    to.word[0] = halves[0] | (uint32_t)halves[1] << 16, to.word[1] = halves[2];
  } else if constexpr (BYTES == 4) {
    to.word[0] = *(const uint32_t *)from;
  } else if constexpr (BYTES == 2) {
    to.word[0] = *(const uint16_t *)from;
  } else {
    static_assert(BYTES == 1, "a power of two, 6, or a multiple of 16");
    to.word[0] = *(const uint8_t *)from;
  }
  return to;
}

template <int BYTES> LB_FN void store_aligned(void *to, const Words<BYTES> &from) {
  if constexpr (BYTES % 16 == 0) {
    LB_UNROLL for (int k = 0; k < BYTES / 16; ++k) {
      ((Four *)to)[k] = Four{from.word[4 * k], from.word[4 * k + 1], from.word[4 * k + 2], from.word[4 * k + 3]};
    }
  } else if constexpr (BYTES == 8) {
    *(Two *)to = Two{from.word[0], from.word[1]};
  } else if constexpr (BYTES == 6) {
    uint16_t *halves = (uint16_t *)to;
    halves[0] = (uint16_t)from.word[0], halves[1] = (uint16_t)(from.word[0] >> 16), halves[2] = (uint16_t)from.word[1];
  } else if constexpr (BYTES == 4) {
    *(uint32_t *)to = from.word[0];
  } else if constexpr (BYTES == 2) {
    *(uint16_t *)to = (uint16_t)from.word[0];
  } else {
    static_assert(BYTES == 1, "a power of two, 6, or a multiple of 16");
    *(uint8_t *)to = (uint8_t)from.word[0];
  }
}

template <int BYTES> LB_FN bool aligned(const void *at) {
  constexpr int EVEN = BYTES & -BYTES;  // 2 of 6
  return ((uintptr_t)at & (uintptr_t)((EVEN < 16 ? EVEN : 16) - 1)) == 0;
}

// The first `count` elements of EACH bytes, the others 0: wherever they lie, but elements on multiples of their size.
template <int BYTES, int EACH = 1> LB_FN Words<BYTES> load(const void *from, int count) {
  if (count * EACH >= BYTES && aligned<BYTES>(from)) return load_aligned<BYTES>(from);
  Words<BYTES> to;
  LB_UNROLL for (int k = 0; k < Words<BYTES>::COUNT; ++k) to.word[k] = 0u;
  LB_UNROLL for (int k = 0; k < BYTES / EACH; ++k) {
    if (k >= count) break;
    if (EACH == 4) to.word[k] = ((const uint32_t *)from)[k];
    else if (EACH == 2) to.word[k / 2] |= (uint32_t)((const uint16_t *)from)[k] << (k % 2 * 16);
    else to.word[k / 4] |= (uint32_t)((const uint8_t *)from)[k] << (k % 4 * 8);
  }
  return to;
}

template <int BYTES, int EACH = 1> LB_FN void store(void *to, const Words<BYTES> &from, int count) {
  if (count * EACH >= BYTES && aligned<BYTES>(to)) return store_aligned<BYTES>(to, from);
  LB_UNROLL for (int k = 0; k < BYTES / EACH; ++k) {
    if (k >= count) break;
    if (EACH == 4) ((uint32_t *)to)[k] = from.word[k];
    else if (EACH == 2) ((uint16_t *)to)[k] = (uint16_t)(from.word[k / 2] >> (k % 2 * 16));
    else ((uint8_t *)to)[k] = (uint8_t)(from.word[k / 4] >> (k % 4 * 8));
  }
}

}  // namespace lb
