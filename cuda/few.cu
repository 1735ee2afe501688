// y = x Wᵀ for few rows of x, m <= 64: what a language model does for each token. W is read and decoded once
// for up to 32 rows.
//
// spec.h says how W is stored (Weight), whether every access is aligned and every turn whole (WHOLE), and how many
// groups of eight rows of x a block of threads has (GROUPS: 1, 2 or 4).
//
//   bytes         n k bits / 8 of codes and the scales; x once for every 16 rows of W, or 32 where x has more than 16.
//   under way     AHEAD turns of two or four loads of 16 bytes a lane, and their scales: in 4 or 8 bits, with up to 16
//                 rows of x, 64 KB of a multiprocessor's 512 threads, and 48 KB when a turn has been used up and is not
//                 yet asked for. With more rows it is 32 and 16 KB. An H100 that reads 3.35 TB/s with 700 ns between
//                 question and answer needs 2.3 MB under way, 18 KB for each of 132 multiprocessors.
//   instructions  of a value, on sm_90a, all of the loop divided by the values that are decoded: int4 4.7 for 8 rows of
//                 x, 4.9 for 16, 5.1 for 32; int8 4.8, nf4 5.2. Of int4's 4.7 decoding takes 4: a permutation, a
//                 subtraction, a product, half a rounding to bf16, and one and a half to take words apart and x apart.
//
// So 4096 x 4096 values in 4 bits take 9 MB, 2.7 us of an H100's memory, and 4.7 instructions each, 2.6 us of its 528
// schedulers at 1.75 GHz; both go on at once.
//
// A small W has few tiles: 64 blocks of threads where n = 1024. Then its terms are divided among several blocks, until
// there are about two for each multiprocessor, and linear_sum adds what they leave: in one order, whoever was first,
// and no block waits for another.
#include "few.h"

using namespace lb;

extern "C" __global__ void __launch_bounds__(32 * WARPS, TOGETHER)
    linear_few(const uint16_t *x, const uint8_t *codes, const float *scale, const void *extra, uint16_t *y,
               float *partial, int m, int n, int k, int span) {
  __shared__ float sums[WARPS][EACH];
  __shared__ Tables tables;
  multiply_few<WHOLE>(Dense{x, m, k}, Packed{codes, scale, extra, n, k}, span, sums, tables, y, partial);
}

// The sums of all parts, always in the same order.
extern "C" __global__ void __launch_bounds__(256)
    linear_sum(const float *partial, uint16_t *y, int64_t count, int parts) {
  const int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (at >= count) return;
  float total = 0.0f;
  for (int part = 0; part < parts; ++part) total += partial[part * count + at];
  y[at] = narrow_bf16(total);
}
