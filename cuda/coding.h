// What codec.cu does with a lane's values in a turn: codes of them, what codes stand for, a mask, and the way back.
//
// Of spec.h: STOCHASTIC, LIVE: how values are rounded.
#pragma once
#include "derive.h"

namespace lb {

constexpr bool LONE = SCALED && Fmt::BLOCK % V != 0;  // the values of a lane may differ in scale
static_assert(ROTATION == 0 || AT_ONCE, "what is rotated on the way is encoded in one pass");

LB_FN Block known(const Matrix &m, int64_t row, int64_t col) {
  return GIVEN ? given(m, row, col) : kept(m, row, col);
}

// A lane's codes. A scale that was found here bounds what it was found from, unless that is not finite: then all codes are
// those of 0. Other scales than the largest magnitude's may leave values beyond the top.
template <class Format>
LB_FN Codes<Format, V> encode_lane(float (&x)[V], const Block &b, const uint32_t (&draws)[V], const Tables &shared) {
  // Whether nothing asks for x any more: then no copy is kept of it.
  constexpr bool FORGOTTEN = Format::SIGNED && !Format::SQUARE && !LIVE && RUN == 0;
  constexpr bool LADDER = Format::KIND == LB_KIND_INTEGER || Format::KIND == LB_KIND_CODEBOOK;
  float source[V], inverse = b.inverse;
  if constexpr (!AT_ONCE || !LADDER) {
    LB_UNROLL for (int i = 0; i < V; ++i) source[i] = source_of(x[i]);
    return Codec<Format>::template encode<V, STOCHASTIC, LIVE, false>(x, source, inverse, b.base, draws, shared);
  } else {
    const bool odd = any<32>(!finite_bits(magnitude_bits(b.scale)) || !finite_bits(magnitude_bits(inverse)));
    if constexpr (PLAIN) {  // the inverse of such a scale is 0
      if (odd && FORGOTTEN) {
        LB_UNROLL for (int i = 0; i < V; ++i) x[i] = finite_or_0(x[i]);
      }
      LB_UNROLL for (int i = 0; i < V; ++i) source[i] = source_of(x[i]);
      if (odd && !FORGOTTEN) {
        LB_UNROLL for (int i = 0; i < V; ++i) source[i] = finite_or_0(source[i]);
      }
    } else {
      constexpr float LEAST = Codec<Format>::LEAST;
      LB_UNROLL for (int i = 0; i < V; ++i) source[i] = x[i] * inverse;
      if (odd) {
        LB_UNROLL for (int i = 0; i < V; ++i) source[i] = in_units(x[i], inverse);
      }
      LB_UNROLL for (int i = 0; i < V; ++i) source[i] = smaller(larger(source[i], LEAST), Format::TOP);
      inverse = 1.0f;
    }
    return Codec<Format>::template encode<V, STOCHASTIC, LIVE, true>(x, source, inverse, b.base, draws, shared);
  }
}

LB_FN bool inside(const Matrix &m, float x, const Block &b) { return lb::abs(in_units(x, b.inverse)) <= m.edge; }

// Codes beyond the end of a row are 0; and so are bits.
LB_FN void store_codes(const Matrix &m, const Place &p, Codes<Fmt, V> &codes) {
  if constexpr (!LINEAR && SCALED && Fmt::BITS < 8) keep_codes<Fmt, V>(codes, p.count);
  char *to = (char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8;
  store_part<V * Fmt::BITS / 8>(to, codes, (p.count * Fmt::BITS + 7) / 8);
}

LB_FN void store_bits(const Matrix &m, const Place &p, uint32_t bits) {
  if (p.count) m.mask[p.row * ((m.cols + 7) / 8) + p.col / 8] = (uint8_t)(bits & ((1u << p.count) - 1u));
}

// Values that may differ in scale, one at a time.
LB_FN void encode_each(const Matrix &m, const Place &p, const float (&x)[V], const uint32_t (&draws)[V], const Tables &shared) {
  Codes<Fmt, V> codes = {};
  uint32_t bits = 0u;
  LB_UNROLL for (int i = 0; i < V; ++i) {
    if (i >= p.count) break;
    const Block b = known(m, p.row, p.col + i);
    const float source[1] = {source_of(x[i])}, value[1] = {x[i]};
    const uint32_t drawn[1] = {draws[i]};
    const auto code = Codec<Fmt>::encode<1, STOCHASTIC, LIVE, false>(value, source, b.inverse, b.base, drawn, shared);
    put_code<Fmt, V>(codes, i, code.word[0]);
    bits |= inside(m, x[i], b) ? 1u << i : 0u;
    if (!m.out) continue;
    float out[1];
    Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
    write(m.out, p.row * m.cols + p.col + i, 1, out);
  }
  if (m.codes) store_codes(m, p, codes);
  if (m.mask) store_bits(m, p, bits);
}

// A lane's values in a turn: its scale, codes, what they stand for, a mask, as far as somebody asks for them.
LB_FN void encode_turn(const Matrix &m, const Place &p, const Raw &raw, const Tables &shared) {
  float x[V], outer = 0.0f;
  widen(m, p, raw, x);
  uint32_t draws[V] = {};
  if (STOCHASTIC) draw(m, p, draws);
  if constexpr (LONE) return encode_each(m, p, x, draws, shared);
  Block b = {1.0f, 1.0f, 0.0f, 0u};
  if constexpr (SCALED && AT_ONCE && PLAIN) {
    b = plain_block(x);
  } else if constexpr (SCALED && AT_ONCE) {
    b = derived_block(m, p, x, shared, outer);
  } else if (p.count) {
    b = known(m, p.row, p.col);
  }
  Codes<Fmt, V> codes = encode_lane<Fmt>(x, b, draws, shared);
  if (!BACK && m.mask) {
    uint32_t bits = 0u;
    LB_UNROLL for (int i = 0; i < V; ++i) bits |= inside(m, x[i], b) ? 1u << i : 0u;
    store_bits(m, p, bits);
  }
  if constexpr (RUN > 0) b = corrected(m, p, x, codes, b, outer, shared);
  if (m.out) {
    float out[V];
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, out);
    write(m.out, p.row * m.cols + p.col, p.count, out);
  }
  if (SCALED && AT_ONCE && m.codes && p.count) {
    if (lane() % LANES == 0) keep(m, number_of(m, p.row, p.col), b);
    if (Way::OUTER && lane() % OUTER_LANES == 0) m.outer[outer_number(m, p.row, p.col)] = outer;
    if (WHOLE && p.row == 0 && p.col == 0) m.outer[0] = outer;
  }
  if (m.codes) store_codes(m, p, codes);
}

LB_FN void decode_turn(const Matrix &m, const Place &p, const Tables &shared) {
  const char *from = (const char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8;
  const auto codes = load_part<V * Fmt::BITS / 8>(from, (p.count * Fmt::BITS + 7) / 8);
  float x[V] = {};
  if constexpr (LONE) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i >= p.count) break;
      const Block b = kept(m, p.row, p.col + i);
      const Codes<Fmt, 1> code = {{code_at<Fmt, V>(codes, i)}};
      float out[1];
      Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
      x[i] = out[0];
    }
  } else {
    const Block b = kept(m, p.row, p.col);
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, x);
  }
  write(m.out, p.row * m.cols + p.col, p.count, x);
}

}  // namespace lb
