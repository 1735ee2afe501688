// y = x Wᵀ for few rows of x.
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
extern "C" __global__ void __launch_bounds__(256) linear_sum(const float *partial, uint16_t *y, int64_t count, int parts) {
  const int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (at >= count) return;
  float total = 0.0f;
  for (int part = 0; part < parts; ++part) total += partial[part * count + at];
  y[at] = narrow_bf16(total);
}
