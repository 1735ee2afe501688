// Values of many blocks at once, each in units of its block's scale: what is left is one block of scale 1. And the scales
// of short blocks.
#pragma once
#include "blocks.h"
#include "scale_bytes.h"
#include "trees.h"

namespace LB_SPACE {

struct Desk {  // room for one thread
  alignas(64) float values[SPAN];
  alignas(64) float out[SPAN];
  alignas(64) float absmax[SPAN], scale[SPAN], inverse[SPAN];  // of short blocks
  alignas(64) uint8_t codes[SPAN];
  Draws draws;
};

static int part_of(int64_t n) { return (int)(n < SPAN ? n : SPAN); }

// The scales of n values from a column on, block after block.
struct Scales {
  const float *inverse, *scale;
};

// to[i] = x[i] * by[its block]. A span may begin and end inside a block.
static void multiply(const lb_format &f, const float *x, int64_t col, int n, const float *by, float *to) {
  const int64_t block = f.block;
  int64_t i = 0;
  if (block % 16 == 0 && col % block == 0) {
    for (; i + block <= n; ++by) {
      const float number = *by;
      for (const int64_t end = i + block; i < end; i += 16) {
        LB_IVDEP for (int k = 0; k < 16; ++k) to[i + k] = x[i + k] * number;
      }
    }
  }
  for (int64_t end = i + block - (col + i) % block; i < n; i = end, end += block, ++by) {
    const float number = *by;
    const int64_t stop = end < n ? end : n;
    LB_IVDEP for (int64_t k = i; k < stop; ++k) to[k] = x[k] * number;
  }
}

// Rounded values of n values in units of their scales: codes, one to a byte, into the desk.
static void encode_units(const lb_format &f, const float *x, int64_t col, int n, const Scales &s, const uint16_t *draws,
                         Desk &desk) {
  const Block one = {1.0f, 0.0f, false, false};
  multiply(f, x, col, n, s.inverse, desk.values);
  encode(f, desk.values, n, one, draws, desk.codes);
}

static void decode_units(const lb_format &f, int64_t col, int n, const Scales &s, float *to, Desk &desk) {
  decode(f, desk.codes, n, 1.0f, nullptr, desk.out);
  multiply(f, desk.out, col, n, s.scale, to);
}

// ---- scales

static Scales given(const lb_matrix &m, int64_t row, int64_t col) {
  const int64_t number = row / m.tile * m.packed.scales + col / m.packed.format->block;
  return {m.inverse + number, m.packed.scale + number};
}

// The largest magnitude of each block of n values. Fills up to a multiple of 16.
static void peaks(const float *x, int n, int block, float *to) {
  int b = 0;
#ifdef LB_AVX2
  if (block % 16 == 0) {
    for (; (b + 1) * block <= n; ++b) {
      Peak most;
      for (int i = b * block; i < (b + 1) * block; i += Lanes::COUNT) most.see(Lanes::load(x + i));
      to[b] = float_of(most.of_all());
    }
  }
#endif
  for (; b * block < n; ++b) to[b] = float_of(peak(x + b * block, n - b * block < block ? n - b * block : block));
  for (; b % 16; ++b) to[b] = 1.0f;
}

static Scales derive_short(const lb_format &f, const float *x, int n, Desk &desk) {
  const int count = (n + f.block - 1) / f.block;
  peaks(x, n, f.block, desk.absmax);
  scales(f, desk.absmax, count, desk.scale, desk.inverse);
  return {desk.inverse, desk.scale};
}

// What bytes stand for.
static Scales look_up(const lb_matrix &m, const uint8_t *bytes, int count, Desk &desk) {
  for (int b = 0; b < count; ++b) desk.scale[b] = m.multipliers[bytes[b]];
  for (int b = 0; m.inverses && b < count; ++b) desk.inverse[b] = m.inverses[bytes[b]];
  return {desk.inverse, desk.scale};
}

// The squares of what rounding n values to nearest loses: the sum over each block, as blocks.total has it.
static void losses(const lb_format &f, const float *x, int64_t col, int n, const Scales &s, float *to, Desk &desk) {
  alignas(64) float each[SPAN];
  encode_units(f, x, col, n, s, nullptr, desk);
  decode_units(f, col, n, s, each, desk);
  LB_IVDEP for (int i = 0; i < n; ++i) each[i] = (each[i] - x[i]) * (each[i] - x[i]);
  sum_blocks(each, n, f.block, to);
}

// From the largest magnitude of each block of n values to the root of its mean square (scales.statistic).
static void root_mean_squares(const lb_format &f, const float *x, int n, Desk &desk) {
  alignas(64) float by[SPAN], sums[SPAN];
  const int block = f.block, count = (n + block - 1) / block;
  float *statistic = desk.absmax;
  LB_IVDEP for (int b = 0; b < count; ++b) by[b] = statistic[b] > 0.0f ? 1.0f / lb::binade(statistic[b]) : 1.0f;
  multiply(f, x, 0, n, by, desk.values);
  LB_IVDEP for (int i = 0; i < n; ++i) desk.values[i] = desk.values[i] * desk.values[i];
  sum_blocks(desk.values, n, block, sums);
  LB_IVDEP for (int b = 0; b < count; ++b) {
    statistic[b] = rms_of(statistic[b], (double)sums[b] / (n - b * block < block ? n - b * block : block));
  }
}

// Bytes of whole blocks; of two candidates the one that loses less, the first of equals.
static Scales derive_bytes(const lb_matrix &m, const float *x, int64_t col, int n, uint8_t *bytes, Desk &desk) {
  const lb_format &f = *m.packed.format;
  const int count = (n - 1) / f.block + 1;
  float first[SPAN / 8], second[SPAN / 8];
  uint8_t other[SPAN / 8];
  peaks(x, n, f.block, desk.absmax);
  if (f.rms) root_mean_squares(f, x, n, desk);
  for (int b = 0; b < count; ++b) bytes[b] = (uint8_t)byte_of(f, desk.absmax[b], m.outer, f.candidates[0]);
  if (f.tries > 1) {
    for (int b = 0; b < count; ++b) other[b] = (uint8_t)byte_of(f, desk.absmax[b], m.outer, f.candidates[1]);
    losses(f, x, col, n, look_up(m, bytes, count, desk), first, desk);
    losses(f, x, col, n, look_up(m, other, count, desk), second, desk);
    for (int b = 0; b < count; ++b) bytes[b] = second[b] < first[b] ? other[b] : bytes[b];
  }
  return look_up(m, bytes, count, desk);
}

}  // namespace LB_SPACE
