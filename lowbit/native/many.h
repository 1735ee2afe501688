// Values of many blocks at once, each in units of its block's scale: what is left is one block of scale 1. And the scales
// of short blocks.
#pragma once
#include "encode.h"
#include "scale_bytes.h"
#include "trees.h"

namespace LB_SPACE {

struct Desk {  // room for one thread
  alignas(64) float values[SPAN];
  alignas(64) float out[SPAN];
  alignas(64) float absmax[SPAN], scale[SPAN], inverse[SPAN], outer[SPAN];  // of short blocks
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

#ifdef LB_AVX2
// Whole blocks in units of their scales, rounded, and times the scales: what codes would stand for, without making them.
template <bool DRAWN>
static void round_minifloat(const lb_format &f, const float *x, int n, const Scales &s, const uint16_t *draws, float *to) {
  const Minifloat floats(f);
  const int block = f.block;
  for (int i = 0, b = 0; i < n; ++b) {
    const Lanes inverse = s.inverse[b], scale = s.scale[b];
    for (const int end = i + block; i < end; i += Lanes::COUNT) {
      const Minifloat::Rounded r = floats.round<DRAWN>(Lanes::load(x + i) * inverse, DRAWN ? draws + i : nullptr);
      (with_sign(r.value, r.sign) * scale).store(to + i);
    }
  }
}
#endif

static void decode_units(const lb_format &f, int64_t col, int n, const Scales &s, float *to, Desk &desk) {
  decode(f, desk.codes, n, 1.0f, nullptr, desk.out);
  multiply(f, desk.out, col, n, s.scale, to);
}

static void round_units(const lb_format &f, const float *x, int64_t col, int n, const Scales &s, const uint16_t *draws,
                        float *to, Desk &desk) {
  int done = 0;
#ifdef LB_AVX2
  if (f.grid_bits && f.block % 16 == 0 && col % f.block == 0) {
    done = n / f.block * f.block;
    (draws ? round_minifloat<true> : round_minifloat<false>)(f, x, done, s, draws, to);
  }
#endif
  if (done == n) return;
  const Scales rest = {s.inverse + done / f.block, s.scale + done / f.block};
  encode_units(f, x + done, col + done, n - done, rest, draws ? draws + done : nullptr, desk);
  decode_units(f, col + done, n - done, rest, to + done, desk);
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
  b = join_short<Most>(x, n, block, to) / block;
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
    statistic[b] = rms_of(statistic[b], (float)((double)sums[b] / (n - b * block < block ? n - b * block : block)));
  }
}

// What the scale of each block of n values is to send to the top.
static void find_wanted(const lb_format &f, const float *x, int n, Desk &desk) {
  peaks(x, n, f.block, desk.absmax);
  if (f.rms) root_mean_squares(f, x, n, desk);
  for (int b = 0; b * f.block < n; ++b) desk.absmax[b] = wanted_of(f.gain, desk.absmax[b]);
}

static Scales derive_short(const lb_format &f, const float *x, int n, Desk &desk) {
  find_wanted(f, x, n, desk);
  scales(f, desk.absmax, (n + f.block - 1) / f.block, desk.scale, desk.inverse);
  return {desk.inverse, desk.scale};
}

// ---- scales that are stored in bytes

// What bytes stand for: by tables, or next to the outer scales of their blocks.
static Scales look_up(const lb_matrix &m, const uint8_t *bytes, int count, Desk &desk) {
  if (m.multipliers) {
    for (int b = 0; b < count; ++b) desk.scale[b] = m.multipliers[bytes[b]];
    for (int b = 0; m.inverses && b < count; ++b) desk.inverse[b] = m.inverses[bytes[b]];
  } else {
    const float most = m.packed.format->max_scale;
    LB_IVDEP for (int b = 0; b < count; ++b) {
      const float held = widen_e4m3(bytes[b]), both = held * desk.outer[b];
      desk.scale[b] = both > most ? most : both;
      desk.inverse[b] = two_level_inverse(held, desk.outer[b]);
    }
  }
  return {desk.inverse, desk.scale};
}

// The outer scale of each block: what makes the largest of those that share it `peak`.
static void find_outer(const lb_format &f, int count, Desk &desk) {
  const int each = f.outer / f.block;
  for (int b = 0; b < count; b += each) {
    const int end = b + each < count ? b + each : count;
    float most = 0.0f;
    for (int k = b; k < end; ++k) most = desk.absmax[k] > most ? desk.absmax[k] : most;  // NaN is not
    const float outer = outer_of(most, f.peak);
    for (int k = b; k < end; ++k) desk.outer[k] = outer;
  }
}

static int64_t outers(const lb_matrix &m) { return (m.cols + m.packed.format->outer - 1) / m.packed.format->outer; }

static void load_outer(const lb_matrix &m, int64_t row, int64_t col, int count, Desk &desk) {
  const lb_format &f = *m.packed.format;
  const int64_t each = f.outer / f.block, first = col / f.block;
  for (int b = 0; b < count; ++b) desk.outer[b] = m.outers[row * outers(m) + (first + b) / each];
}

static void store_outer(const lb_matrix &m, int64_t row, int64_t col, int count, const Desk &desk) {
  const lb_format &f = *m.packed.format;
  const int each = f.outer / f.block;
  for (int b = 0; b < count; b += each) m.outers[row * outers(m) + col / f.outer + b / each] = desk.outer[b];
}

// The squares of what rounding n values to nearest loses: the sum over each block, as blocks.total has it.
static void losses(const lb_format &f, const float *x, int64_t col, int n, const Scales &s, float *to, Desk &desk) {
  alignas(64) float each[SPAN];
  round_units(f, x, col, n, s, nullptr, each, desk);
  LB_IVDEP for (int i = 0; i < n; ++i) each[i] = (each[i] - x[i]) * (each[i] - x[i]);
  sum_blocks(each, n, f.block, to);
}

static void find_bytes(const lb_format &f, int count, float candidate, uint8_t *bytes, const Desk &desk) {
  const float top = f.top, smallest = f.smallest;  // copies: a store to a byte might change the format
  if (f.stored == LB_SCALE_E8M0) {
    const PowerRule powers = {f.power, f.exponent, f.mantissa, f.last, top};
    for (int b = 0; b < count; ++b) bytes[b] = (uint8_t)byte_e8m0(powers, times(desk.absmax[b], candidate));
  } else {
    LB_IVDEP for (int b = 0; b < count; ++b) {
      bytes[b] = (uint8_t)byte_e4m3(top, smallest, desk.absmax[b], desk.outer[b], candidate);
    }
  }
}

// Bytes of whole blocks; of two candidates the one that loses less, the first of equals.
static Scales derive_bytes(const lb_matrix &m, const float *x, int64_t col, int n, uint8_t *bytes, Desk &desk) {
  const lb_format &f = *m.packed.format;
  const int count = (n - 1) / f.block + 1;
  alignas(64) float first[SPAN / 8], second[SPAN / 8];
  uint8_t other[SPAN / 8];
  find_wanted(f, x, n, desk);
  if (f.outer) find_outer(f, count, desk);
  for (int b = 0; !f.outer && b < count; ++b) desk.outer[b] = m.outer;
  find_bytes(f, count, f.candidates[0], bytes, desk);
  if (f.tries > 1) {
    find_bytes(f, count, f.candidates[1], other, desk);
    losses(f, x, col, n, look_up(m, bytes, count, desk), first, desk);
    losses(f, x, col, n, look_up(m, other, count, desk), second, desk);
    for (int b = 0; b < count; ++b) bytes[b] = second[b] < first[b] ? other[b] : bytes[b];
  }
  return look_up(m, bytes, count, desk);
}

// MS-EDEN: what rounding has lost of a run goes into the scales of its blocks, which are drawn anew.
static void correct(const lb_matrix &m, int64_t row, int64_t col, int n, uint8_t *bytes, Desk &desk) {
  const lb_format &f = *m.packed.format;
  const int count = n / f.block, each = m.run / f.block;
  alignas(64) float terms[SPAN], squares[SPAN / 8], products[SPAN / 8], held[SPAN / 8];
  alignas(64) float shares[SPAN / 8], corrections[SPAN / 8];
  double up[SPAN / 8], down[SPAN / 8];
  LB_IVDEP for (int i = 0; i < n; ++i) terms[i] = desk.values[i] * desk.values[i];
  sum_blocks(terms, n, f.block, squares);
  decode(f, desk.codes, n, 1.0f, nullptr, desk.out);
  LB_IVDEP for (int i = 0; i < n; ++i) terms[i] = desk.values[i] * desk.out[i];
  sum_blocks(terms, n, f.block, products);
  const uint16_t *draws = desk.draws.fill(m.key, row * m.stride + col / f.block, count);
  LB_IVDEP for (int b = 0; b < count; ++b) {
    held[b] = widen_e4m3(bytes[b]);
    shares[b] = 1.0f - uniform(draws[b]);
    up[b] = weighed(held[b], squares[b]);
    down[b] = weighed(held[b], products[b]);
  }
  for (int b = 0; b < count; b += each) {
    const float correction = correction_of(halve(up + b, each), halve(down + b, each));
    for (int k = b; k < b + each; ++k) corrections[k] = correction;
  }
  LB_IVDEP for (int b = 0; b < count; ++b) {
    bytes[b] = (uint8_t)corrected_e4m3(bytes[b], corrections[b], shares[b]);
  }
  look_up(m, bytes, count, desk);
}

}  // namespace LB_SPACE
