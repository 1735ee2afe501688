// The scale of a block: found by the LANES lanes that have its values, or read as it is stored. What scales mean and how
// they become bytes is in lowbit/native (scaling.h, scale_bytes.h), for CPUs too; lowbit/scales.py has the rules.
//
// Of spec.h: Way has the constants of the format's scaling; PLAIN says that a scale is absmax / top in fp32; AT_ONCE that
// a warp finds its scales itself; RUN, how many values share a correction by MS-EDEN (lowbit/eden.py), 0 for none.
#pragma once
#include "places.h"
#include "scale_bytes.h"
#include "sums.h"

namespace lb {

constexpr bool SCALED = Fmt::KIND != LB_KIND_FLOAT;
constexpr int WIDTH = Fmt::BLOCK ? Fmt::BLOCK : 1;  // columns of a block, where that is known here
constexpr int LANES = SCALED && AT_ONCE ? WIDTH / V : 1;
constexpr int OUTER_LANES = AT_ONCE && Way::OUTER ? Way::OUTER / V : 1;  // that share an outer scale of a part of a row
constexpr bool WHOLE = Way::PEAK > 0.0f && !Way::OUTER;        // there is one of the tensor
using Tables = Codec<Fmt>::Shared;

struct Block {
  float scale, inverse, base;
  uint32_t raw;  // as the scale is stored
};

LB_FN float source_of(float x) { return Fmt::SQUARE ? lb::sqrt(x) : x; }

// ---- as they are stored

LB_FN Block block_of(uint32_t raw, float outer) {
  const Scaling s = {Way::STORED, Way::LAST, Way::LEAST, Fmt::TOP, Fmt::MIN_SCALE, Fmt::MAX_SCALE, Way::PEAK > 0.0f, outer};
  const float scale = multiplier_of(s, raw);
  return {scale * Way::HEADROOM, inverse_of(s, raw, scale) * Way::UNROOM, 0.0f, raw};
}

// The block of a value.
LB_FN int64_t number_of(const Matrix &m, int64_t row, int64_t col) {
  if constexpr (!Way::TILED) return row * m.scales + col / WIDTH;
  return divided(row, m.tile) * m.scales + divided(col, m.width);
}

LB_FN int64_t outer_number(const Matrix &m, int64_t row, int64_t col) {
  constexpr int SHARE = Way::OUTER ? Way::OUTER : 1;
  return Way::OUTER ? row * ((m.cols + SHARE - 1) / SHARE) + col / SHARE : 0;
}

LB_FN Block kept(const Matrix &m, int64_t row, int64_t col) {
  if constexpr (!SCALED) return {1.0f, 1.0f, 0.0f, 0u};
  const int64_t number = number_of(m, row, col);
  const uint32_t raw = Way::STORED == LB_SCALE_FP32   ? ((const uint32_t *)m.scale)[number]
                       : Way::STORED == LB_SCALE_BF16 ? ((const uint16_t *)m.scale)[number]
                                                      : ((const uint8_t *)m.scale)[number];
  Block b = block_of(raw, Way::PEAK > 0.0f ? m.outer[outer_number(m, row, col)] : 0.0f);
  if (Fmt::KIND == LB_KIND_AFFINE) b.base = (float)((const uint8_t *)m.extra)[number];
  if (Fmt::KIND == LB_KIND_LOG) b.base = ((const float *)m.extra)[number];
  return b;
}

LB_FN Block given(const Matrix &m, int64_t row, int64_t col) {
  const int64_t number = number_of(m, row, col);
  return {((const float *)m.scale)[number], m.inverse[number], 0.0f, 0u};
}

LB_FN void keep(const Matrix &m, int64_t number, const Block &b) {
  if (Way::STORED == LB_SCALE_FP32) ((uint32_t *)m.scale)[number] = b.raw;
  else if (Way::STORED == LB_SCALE_BF16) ((uint16_t *)m.scale)[number] = (uint16_t)b.raw;
  else ((uint8_t *)m.scale)[number] = (uint8_t)b.raw;
  if (Fmt::KIND == LB_KIND_AFFINE) ((uint8_t *)m.extra)[number] = (uint8_t)(int32_t)b.base;
  if (Fmt::KIND == LB_KIND_LOG) ((float *)m.extra)[number] = b.base;
}

// ---- absmax / top

// The largest magnitudes that count for a scale: of affine formats, of what is below 0 and of what is above.
struct Range {
  uint32_t below, above;
  LB_FN Range of(float source) {
    const uint32_t magnitude = magnitude_bits(source);
    if (Fmt::KIND != LB_KIND_AFFINE) return {0u, magnitude};
    const bool odd = source != source;
    return {source < 0.0f || odd ? magnitude : 0u, source > 0.0f || odd ? magnitude : 0u};
  }
  LB_FN Range both(Range a, Range b) {
    return {a.below > b.below ? a.below : b.below, a.above > b.above ? a.above : b.above};
  }
};

// All but the base of powers.
LB_FN Block block_of(Range range) {
  Block b = {};
  if (Fmt::KIND == LB_KIND_AFFINE) {
    const float low = range.below ? -float_of(range.below) : 0.0f;
    b.scale = affine_scale(low, float_of(range.above), (float)Fmt::LIMIT, Fmt::MIN_SCALE, Fmt::MAX_SCALE, &b.base);
  } else {
    b.scale = scale_of<Fmt>(float_of(range.above));
  }
  b.inverse = inverse(b.scale);
  b.raw = bits_of(b.scale);
  return b;
}

LB_FN Block plain_block(const float (&x)[V]) {
  Range range = {0u, 0u};
  LB_UNROLL for (int i = 0; i < V; ++i) range = Range::both(range, Range::of(source_of(x[i])));
  range.above = largest<LANES>(range.above);
  if (Fmt::KIND == LB_KIND_AFFINE) range.below = largest<LANES>(range.below);
  Block b = block_of(range);
  if constexpr (Fmt::KIND == LB_KIND_LOG) {
    b.base = log_base<Fmt, V, LANES>(x, b.scale);
  }
  return b;
}

// ---- other scales of linear codes

// What the scale is to send to the top; NaN for a block that is not finite.
LB_FN float wanted_of(const Matrix &m, const Place &p, const float (&x)[V]) {
  uint32_t most = 0u;
  LB_UNROLL for (int i = 0; i < V; ++i) most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
  float statistic = float_of(largest<LANES>(most));
  if constexpr (Way::RMS) {
    float each[V];
    const float by = statistic > 0.0f ? 1.0f / binade(statistic) : 1.0f;
    LB_UNROLL for (int i = 0; i < V; ++i) each[i] = x[i] * by * (x[i] * by);
    const float sum = block_sum<LANES, V>(each);
    const int64_t left = m.cols - p.col / WIDTH * WIDTH;
    // A quotient by a power of two is rounded as the product with its inverse is.
    const float mean = left >= WIDTH ? sum * (1.0f / WIDTH) : (float)((double)sum / (double)(left > 0 ? left : 1));
    statistic = rms_of(statistic, mean);
  }
  return wanted_of(Way::GAIN, statistic);
}

LB_FN uint32_t raw_of(float wanted, float outer, float candidate) {
  if constexpr (Way::STORED == LB_SCALE_E4M3) {
    return (uint32_t)byte_e4m3(Fmt::TOP, Way::LEAST, wanted, outer, candidate);
  }
  wanted = times(wanted, candidate);
  if constexpr (Way::STORED == LB_SCALE_E8M0) {
    return (uint32_t)byte_e8m0({Way::POWER, Way::EXPONENT, Way::MANTISSA, Way::LAST, Fmt::TOP}, wanted);
  }
  const uint32_t bits = bits_of(derive_scale(wanted, Fmt::TOP, Fmt::MIN_SCALE, Fmt::MAX_SCALE));
  if constexpr (Way::STORED == LB_SCALE_FP32) return bits;
  if constexpr (Way::UP) return finite_bits(bits) ? (bits + 0xFFFFu) >> 16 : 0x7FC0u;
  return narrow_bf16(float_of(bits));
}

// The squares of what rounding to nearest loses, as blocks.total in Python adds them.
LB_FN float loss_of(const float (&x)[V], const Block &b, const Tables &shared) {
  const uint32_t draws[V] = {};
  float out[V];
  const auto codes = Codec<Fmt>::template encode<V, false, false, false>(x, x, b.inverse, b.base, draws, shared);
  Codec<Fmt>::template decode<V>(codes, b.scale, b.base, shared, out);
  LB_UNROLL for (int i = 0; i < V; ++i) out[i] = (out[i] - x[i]) * (out[i] - x[i]);
  return block_sum<LANES, V>(out);
}

LB_FN float finite_or_0(float x) { return finite_bits(magnitude_bits(x)) ? x : 0.0f; }

// Of two candidates the one that loses less, the first of equals. `outer` becomes the outer scale, if there is one.
LB_FN Block derived_block(const Matrix &m, const Place &p, const float (&x)[V], const Tables &shared, float &outer) {
  const float wanted = wanted_of(m, p, x);
  if constexpr (WHOLE) outer = outer_of(float_of(*m.most), Way::PEAK);
  if constexpr (Way::OUTER > 0) outer = outer_of(float_of(largest<OUTER_LANES>(bits_of(finite_or_0(wanted)))), Way::PEAK);
  Block b = block_of(raw_of(wanted, outer, Way::CANDIDATE), outer);
  if constexpr (Way::TRIES > 1) {
    const Block other = block_of(raw_of(wanted, outer, Way::OTHER), outer);
    if (loss_of(x, other, shared) < loss_of(x, b, shared)) b = other;
  }
  return b;
}

// What rounding has lost of a run goes into the scales of its blocks, which are drawn anew.
LB_FN Block corrected(const Matrix &m, const Place &p, const float (&x)[V], const Codes<Fmt, V> &codes, const Block &b,
                      float outer, const Tables &shared) {
  const float held = widen_e4m3(b.raw);
  float square[V], product[V];
  Codec<Fmt>::template decode<V>(codes, 1.0f, 0.0f, shared, product);
  LB_UNROLL for (int i = 0; i < V; ++i) {
    const float unit = x[i] * b.inverse;
    square[i] = unit * unit, product[i] = unit * product[i];
  }
  double squares = weighed(held, block_sum<LANES, V>(square));
  double products = weighed(held, block_sum<LANES, V>(product));
  LB_UNROLL for (int apart = RUN / V / 2; apart >= LANES; apart /= 2) {
    squares = squares + __shfl_xor_sync(WHOLE_WARP, squares, apart);
    products = products + __shfl_xor_sync(WHOLE_WARP, products, apart);
  }
  const uint64_t number = (uint64_t)(p.row * m.stride + p.col / WIDTH);  // of random bits: one for each block
  const uint32_t both = two_draws(m, number / 2), bits = number % 2 ? both >> 16 : both & 0xFFFFu;
  return block_of((uint32_t)corrected_e4m3((int32_t)b.raw, correction_of(squares, products), share_of(bits)), outer);
}

}  // namespace lb
