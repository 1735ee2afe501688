// A whole matrix on the device: which values a lane has of it, how they are read, rotated and written, and their random
// bits. spec.h has the types Fmt (the codes), Values (what is read) and Out (what is written in place of codes), and
// ROTATION: how many values a Hadamard rotation mixes on the way (lowbit/rotation.py), 0 for none, negative for back.
#pragma once
#include "formats.h"
#include "spec.h"

namespace lb {

constexpr int V = 8, THREADS = 256;  // values of a lane in a turn, lanes of a block
constexpr bool BACK = ROTATION < 0;
constexpr int TURNED = BACK ? -ROTATION : ROTATION;

// What is divided by again and again; lowbit/backends/cuda_codec.py knows by what to multiply instead, and how far to shift.
struct Divisor {
  uint32_t magic, shift;
  int64_t by;
};

LB_FN int64_t divided(int64_t n, const Divisor &d) {
  const uint32_t low = (uint32_t)n;
  return n >> 31 ? n / d.by : (int64_t)((upper_product(low, d.magic) + low) >> d.shift);
}

// lowbit/backends/cuda_codec.py states the same layout. What nobody asks for is null.
struct Matrix {
  const void *values;  // of the dtype of Values, [rows, filled]; zeros follow them
  void *out;           // what codes stand for, of the dtype of Out, [rows, cols]
  void *codes;
  void *scale;           // as they are stored, or what is given to multiply with
  const float *inverse;  // GIVEN: what to multiply by before
  void *extra;           // zero points (uint8) or bases (float)
  float *outer;          // tensor_scale
  uint32_t *most;        // the largest that a block's scale is to send to the top, of all blocks
  uint8_t *mask;         // a bit for each value: written; or read, where values are rotated back
  int64_t rows, cols, filled, stride;  // stride: of the numbering of elements, for random bits
  int64_t row_bytes, scales;           // of a row's codes; scales of a row
  int64_t lanes;                       // that have values; those of rows that are filled up too
  Divisor across;                      // lanes of a row
  Divisor tile, width;                 // rows and columns of a block
  uint32_t key[2];                     // of random bits
  uint32_t signs[2];                   // of the hash that a rotation takes its signs from
  uint32_t flips;                      // whether it changes signs
  float edge;                          // of the mask
  int32_t turns;                       // of a block of threads
};

// The number of a lane in a turn, among all. LINEAR: the matrix is one row, every lane has all of its values, and they and
// their codes lie on multiples of their size; there are less than 2**31 lanes.
template <bool NARROW> struct Ordinals {
  using Type = int64_t;
};
template <> struct Ordinals<true> {
  using Type = uint32_t;
};
using Ordinal = Ordinals<LINEAR>::Type;

// The place of a lane in a turn. Lanes beyond the last row come along, with nothing to do.
struct Place {
  int64_t row, col;
  int count;  // values, V at most
  LB_FN Place of(const Matrix &m, Ordinal number) {
    if (LINEAR) return {0, (int64_t)((uint64_t)number * V), number < (Ordinal)m.lanes ? V : 0};
    Place p;
    p.row = m.rows == 1 ? (number >= m.lanes ? 1 : 0) : divided(number, m.across);
    p.col = (number - p.row * m.across.by) * V;
    p.count = p.row < m.rows ? held(m.cols - p.col) : 0;
    return p;
  }
  LB_FN int held(int64_t left) { return (int)(left < 0 ? 0 : left < V ? left : V); }
};

LB_FN Ordinal first_number(const Matrix &m) { return (Ordinal)blockIdx.x * (Ordinal)m.turns * THREADS + threadIdx.x; }

// A lane's turns, as long as its warp has values: f(its number, that of its next turn, or one beyond all).
template <class F> LB_FN void by_turns(const Matrix &m, F f) {
  const Ordinal lanes = (Ordinal)m.lanes, first = first_number(m), of_warp = first - (Ordinal)lane();
  const Ordinal ahead = of_warp < lanes ? (lanes - of_warp + (THREADS - 1)) / THREADS : 0;
  int left = ahead < (Ordinal)m.turns ? (int)ahead : m.turns;
  LB_KEEP_NUMBER(left);  // else it is made anew each turn
  LB_ONE_AT_A_TIME for (Ordinal number = first; left > 0; --left, number += THREADS) {
    f(number, left > 1 ? number + THREADS : lanes);
  }
}

// ---- values in memory; those beyond the end of a row are 0

template <int BYTES> LB_FN Words<BYTES> load_part(const void *from, int count) {
  if (!LINEAR) return load<BYTES>(from, count);
  Words<BYTES> to = {};
  if (count) to = load_aligned<BYTES>(from);
  return to;
}

template <int BYTES> LB_FN void store_part(void *to, const Words<BYTES> &from, int count) {
  if (!LINEAR) return store<BYTES>(to, from, count);
  if (count) store_aligned<BYTES>(to, from);
}

template <int N> LB_FN Codes<Values, N> fetch(const void *values, int64_t at, int count) {
  constexpr int SIZE = Values::BITS / 8;
  return load_part<N * SIZE>((const char *)values + at * SIZE, count * SIZE);
}

template <int N> LB_FN void read(const void *values, int64_t at, int count, float (&x)[N]) {
  Codec<Values>::template decode<N>(fetch<N>(values, at, count), 1.0f, 0.0f, {}, x);
}

template <int N> LB_FN void write(void *values, int64_t at, int count, const float (&x)[N]) {
  constexpr int SIZE = Out::BITS / 8;
  const uint32_t draws[N] = {};
  const auto raw = Codec<Out>::template encode<N, false, false, false>(x, x, 1.0f, 0.0f, draws, {});
  store_part<N * SIZE>((char *)values + at * SIZE, raw, count * SIZE);
}

// ---- the rotation: signs, then sums and differences at growing distances, then the norm; back, signs come last

LB_FN void flip(const Matrix &m, int64_t col, float (&x)[V]) {
  const uint32_t hashed = hash((uint32_t)(col / 32), m.signs[0], m.signs[1]) >> (uint32_t)(col % 32);
  const uint32_t bits = m.flips ? hashed : 0u;
  LB_UNROLL for (int i = 0; i < V; ++i) x[i] = float_of(bits_of(x[i]) ^ (bits >> i & 1u) << 31);
}

LB_FN void rotate(const Matrix &m, int64_t col, float (&x)[V]) {
  constexpr float ROOT = 0x1.6a09e6p-3f;  // 1 / sqrt(32)
  constexpr float NORM = TURNED == 16 ? 0.25f : TURNED == 32 ? ROOT : TURNED == 64 ? 0.125f : ROOT / 2.0f;
  if (!BACK) flip(m, col, x);
  LB_UNROLL for (int apart = 1; apart < V; apart *= 2) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i & apart) continue;
      const float a = x[i], b = x[i | apart];
      x[i] = a + b, x[i | apart] = a - b;
    }
  }
  LB_UNROLL for (int apart = 1; apart < TURNED / V; apart *= 2) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const float other = __shfl_xor_sync(WHOLE_WARP, x[i], apart);
      x[i] = lane() & apart ? other - x[i] : x[i] + other;
    }
  }
  LB_UNROLL for (int i = 0; i < V; ++i) x[i] = x[i] * NORM;
  if (BACK) flip(m, col, x);
}

// A lane's values as they are read.
struct Raw {
  Codes<Values, V> words;
  uint32_t bits;  // of the mask, if there is one
  LB_FN Raw of(const Matrix &m, const Place &p) {
    const int count = LINEAR || p.count == 0 ? p.count : Place::held(m.filled - p.col);
    const bool masked = BACK && m.mask && count;
    return {fetch<V>(m.values, p.row * m.filled + p.col, count),
            masked ? m.mask[p.row * ((m.filled + 7) / 8) + p.col / 8] : 0u};
  }
};

// The numbers, rotated. All lanes of a warp come here.
LB_FN void widen(const Matrix &m, const Place &p, const Raw &raw, float (&x)[V]) {
  Codec<Values>::template decode<V>(raw.words, 1.0f, 0.0f, {}, x);
  if (BACK && m.mask) {
    LB_UNROLL for (int i = 0; i < V; ++i) x[i] = x[i] * (raw.bits >> i & 1u ? 1.0f : 0.0f);
  }
  if (ROTATION) rotate(m, p.col, x);
}

// ---- random bits, 16 for each number

LB_FN uint32_t two_draws(const Matrix &m, uint64_t pair) {
  return hash((uint32_t)pair, m.key[0], (uint32_t)(pair >> 32) * 0x9E3779B1u + m.key[1]);
}

LB_FN void draw(const Matrix &m, const Place &p, uint32_t (&draws)[V]) {
  const uint64_t pair = (uint64_t)(p.row * m.stride + p.col) / 2;  // rows are numbered from even numbers on, or alone
  const uint32_t second = (uint32_t)(pair >> 32) * 0x9E3779B1u + m.key[1];
  const uint32_t odd = (uint32_t)(p.row * m.stride & 1);  // rows of one value
  LB_UNROLL for (int i = 0; i < V; i += 2) {
    const uint32_t both = hash((uint32_t)pair + (uint32_t)i / 2, m.key[0], second);
    draws[i] = i == 0 && odd ? both >> 16 : both & 0xFFFFu;
    draws[i + 1] = both >> 16;
  }
}

}  // namespace lb
