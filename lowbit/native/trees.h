// Sums have one meaning (lowbit/backends/reference.py): a tree of halves.
#pragma once
#include "arithmetic.h"
#include "lanes.h"

namespace LB_SPACE {

// The sum of n values, n a power of two up to 256, by halving: x[i] + x[i + n/2]. Overwrites x.
template <int N> static float halve_all(float *x) {  // of a known count, so that all loops unroll
  LB_IVDEP for (int i = 0; i < N / 2; ++i) x[i] = x[i] + x[i + N / 2];
  return halve_all<N / 2>(x);
}
template <> float halve_all<1>(float *x) { return x[0]; }

static float halve_block(float *x) {
#ifdef LB_AVX2
  Lanes lanes[LB_BLOCK / Lanes::COUNT];
  for (int k = 0; k < LB_BLOCK / Lanes::COUNT; ++k) lanes[k] = Lanes::load(x + k * Lanes::COUNT);
  return halve_lanes<LB_BLOCK / Lanes::COUNT>(lanes);
#else
  return halve_all<LB_BLOCK>(x);
#endif
}

static float halve(float *x, int n) {
  if (n == LB_BLOCK) return halve_block(x);
  if (n == 16) return halve_all<16>(x);
  if (n == 32) return halve_all<32>(x);
  for (int half = n / 2; half >= 1; half /= 2) {
    LB_IVDEP for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  }
  return x[0];
}

// The sum of n values, at most 256, by halving. Zeros are put after them, up to a power of two.
static float sum_few(float *x, int n) {
  int width = 1;
  while (width < n) width *= 2;
  for (int k = n; k < width; ++k) x[k] = 0.0f;
  return halve(x, width);
}

// The same for any count of doubles: what is missing to a power of two counts as 0. Overwrites x.
static double halve(double *x, int64_t n) {
  if (n == 0) return 0.0;
  int64_t half = 1;
  while (half < n) half *= 2;
  for (half /= 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i + half < n; ++i) x[i] = x[i] + x[i + half];
    for (int64_t i = n - half > 0 ? n - half : 0; i < half && i < n; ++i) x[i] = x[i] + 0.0;  // -0 + 0 = 0
    n = n < half ? n : half;
  }
  return x[0];
}

}  // namespace LB_SPACE
