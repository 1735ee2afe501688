// The tensor cores, and all PTX there is: each function has a twin that computes the same without.
//
// mma_16x8x16: c (16 x 8, fp32) += a (16 x 16, bf16) * b (16 x 8, bf16), by one warp.
//
// What lane 4 g + t holds, two bf16 numbers to a word, the first in the low half
// (https://docs.nvidia.com/cuda/parallel-thread-execution/, "Matrix fragments for mma.m16n8k16"):
//
//   a  row g: columns 2 t, 2 t + 1; row g + 8: the same; row g: columns 2 t + 8, 2 t + 9; row g + 8: the same
//   b  column g: rows 2 t, 2 t + 1; then rows 2 t + 8, 2 t + 9
//   c  row g: columns 2 t, 2 t + 1; row g + 8: the same
//
// In which order the hardware adds is not known, so results are held to a tolerance and not to bits. A contraction may
// number its 16 terms as it likes, if it does so for a and b alike.
#pragma once
#include "device.h"

namespace lb {

#ifdef __CUDACC__

LB_FN void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers as a word of a fragment, rounded to nearest even as by narrow_bf16, in one instruction instead of a dozen.
LB_FN uint32_t pair_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#else

// Its twin asks the lanes that hold a row of a and a column of b, and adds in fp32, term after term.
LB_FN void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int g = lane() / 4, t = lane() % 4;
  for (int half = 0; half < 2; ++half) {
    for (int from = 0; from < 4; ++from) {
      uint32_t row[2], column[2];
      for (int k = 0; k < 2; ++k) {
        row[k] = __shfl_sync(WHOLE_WARP, a[2 * half + k], 4 * g + from);
        column[k] = __shfl_sync(WHOLE_WARP, b[half], 4 * (2 * t + k) + from);
      }
      for (int k = 0; k < 4; ++k) {
        const uint32_t left = row[k / 2], right = column[k % 2];
        c[k] += widen_bf16((uint16_t)left) * widen_bf16((uint16_t)right);
        c[k] += widen_bf16((uint16_t)(left >> 16)) * widen_bf16((uint16_t)(right >> 16));
      }
    }
  }
}

LB_FN uint32_t pair_bf16(float low, float high) {
  return (uint32_t)narrow_bf16(low) | (uint32_t)narrow_bf16(high) << 16;
}

#endif

}  // namespace lb
