// Sums have one meaning (lowbit/backends/reference.py): a tree of halves.
#pragma once
#include <string.h>

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

#ifdef LB_AVX2
struct Sum {
  LB_FN Lanes leaf(const float *x) { return Lanes::load(x); }
  LB_FN Lanes both(Lanes a, Lanes b) { return a + b; }
};
struct Most {  // magnitudes as integers: NaN > infinity > finite
  LB_FN Lanes leaf(const float *x) { return and_bits(Lanes::load(x), 0x7FFFFFFFu); }
  LB_FN Lanes both(Lanes a, Lanes b) { return most_bits(a, b); }
};

// The trees of COUNT blocks at once. The last step of a halving tree joins those of numbers in even and in odd places.
template <class Of, int REGISTERS> LB_FN Lanes joined(const float *x, int apart) {
  if constexpr (REGISTERS == 1) return Of::leaf(x);
  else return Of::both(joined<Of, REGISTERS / 2>(x, 2 * apart), joined<Of, REGISTERS / 2>(x + apart, 2 * apart));
}
template <class Of, int BLOCK, int COUNT> LB_FN Lanes joined_blocks(const float *x) {
  if constexpr (COUNT == 1) {
    return joined<Of, BLOCK / Lanes::COUNT>(x, Lanes::COUNT);
  } else {
    constexpr int APART = Lanes::COUNT / COUNT;
    const Lanes a = joined_blocks<Of, BLOCK, COUNT / 2>(x), b = joined_blocks<Of, BLOCK, COUNT / 2>(x + COUNT / 2 * BLOCK);
    return Of::both(first_halves<APART>(a, b), second_halves<APART>(a, b));
  }
}
template <class Of, int BLOCK> static int join_blocks(const float *x, int n, float *to) {
  int i = 0;
  for (; i + Lanes::COUNT * BLOCK <= n; i += Lanes::COUNT * BLOCK, to += Lanes::COUNT) {
    in_order(joined_blocks<Of, BLOCK, Lanes::COUNT>(x + i)).store(to);
  }
  return i;
}

// One number for each block of n values, as many as that is quick for; returns of how many values.
template <class Of> static int join_short(const float *x, int n, int block, float *to) {
  return block == 16 ? join_blocks<Of, 16>(x, n, to) : block == 32 ? join_blocks<Of, 32>(x, n, to) : 0;
}
#endif

// The sums of blocks of n values, each at most 256 long; the last may be short.
static void sum_blocks(const float *x, int n, int block, float *to) {
  int i = 0;
#ifdef LB_AVX2
  i = join_short<Sum>(x, n, block, to);
#endif
  alignas(64) float one[LB_BLOCK];
  for (to += i / block; i < n; i += block) {
    const int count = n - i < block ? n - i : block;
    memcpy(one, x + i, sizeof(float) * count);
    *to++ = sum_few(one, count);
  }
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
