// Operands of products in memory: a dense bf16 matrix and one that is stored in at most 8 bits; and the tensor cores'
// fragments that lanes make of them.
//
// Terms of a contraction are numbered so that a lane takes eight which lie side by side: a chunk, four pairs of bf16.
#pragma once
#include "formats.h"
#include "mma.h"
#include "spec.h"

namespace lb {

struct Dense {
  const uint16_t *values;
  int rows, cols;
};
struct Packed {
  const uint8_t *codes;
  const float *scale;
  const void *extra;  // zero points or bases, if the format has such
  int rows, cols;
};

LB_FN int thread() { return (int)threadIdx.x; }

// The codec of the weight. Of integers it has a constant in shared memory: a permutation takes one, and a compiler that
// knows both of those that make a float of a code copies one of them into a register for each value.
template <class Fmt, bool INTEGERS> struct Decoders : Codec<Fmt> {};
template <class Fmt> struct Decoders<Fmt, true> {
  struct Shared {
    uint32_t natural;
  };
  LB_FN void prepare(Shared &shared) {
    uint32_t natural = NATURAL_BITS;
    LB_KEEP_NUMBER(natural);
    if (thread() == 0) shared.natural = natural;
  }
  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float scale, float, const Shared &shared, float (&x)[V]) {
    Codec<Fmt>::template decode_with<V>(shared.natural, codes, scale, x);
  }
};
using Decoder = Decoders<Weight, Weight::KIND == LB_KIND_INTEGER>;
using Tables = Decoder::Shared;
constexpr bool EXTRA = Weight::KIND == LB_KIND_AFFINE || Weight::KIND == LB_KIND_LOG;

// ---- the packed operand

// V neighbouring values of a row, as they are stored; V and blocks are multiples of 8.
template <int V> struct Piece {
  static constexpr int BLOCKS = Weight::BLOCK % V == 0 ? 1 : V / 8;
  Words<V * Weight::BITS / 8> codes;
  float scale[BLOCKS], extra[BLOCKS];
};

LB_FN float extra_of(const Packed &w, int64_t block) {
  if constexpr (Weight::KIND == LB_KIND_AFFINE) return (float)((const uint8_t *)w.extra)[block];
  else if constexpr (Weight::KIND == LB_KIND_LOG) return ((const float *)w.extra)[block];
  else return 0.0f;
}

// WHOLE: every access is aligned and within the row. Otherwise what lies beyond the end of the matrix is 0.
template <int V, bool WHOLE> LB_FN Piece<V> fetch(const Packed &w, int row, int col) {
  constexpr int BYTES = V * Weight::BITS / 8;
  constexpr uint32_t BITS = Weight::BITS;
  const int64_t row_bytes = ((int64_t)w.cols * BITS + 7) / 8, offset = (uint32_t)col / 8 * BITS;
  const int64_t blocks = (w.cols - 1) / Weight::BLOCK + 1;
  Piece<V> to;
  if constexpr (WHOLE) {
    to.codes = load_aligned<BYTES>(w.codes + row * row_bytes + offset);
  } else {
    const int64_t left = row < w.rows ? row_bytes - offset : 0;
    to.codes = load<BYTES>(w.codes + row * row_bytes + offset, left < BYTES ? (int)left : BYTES);
  }
  LB_UNROLL for (int k = 0; k < Piece<V>::BLOCKS; ++k) {
    const uint32_t first = (uint32_t)col + 8 * k;
    const bool there = WHOLE || (row < w.rows && first < (uint32_t)w.cols);
    to.scale[k] = there ? w.scale[row * blocks + first / Weight::BLOCK] : 0.0f;
    to.extra[k] = there ? extra_of(w, row * blocks + first / Weight::BLOCK) : 0.0f;
  }
  return to;
}

// The q-th eight of its values.
template <int V> LB_FN void decode(const Piece<V> &piece, int q, const Tables &tables, float (&x)[8]) {
  constexpr int BITS = Weight::BITS;
  Words<BITS> codes;
  LB_UNROLL for (int k = 0; k < Words<BITS>::COUNT; ++k) {
    const uint32_t word = piece.codes.word[q * BITS / 4 + k];
    codes.word[k] = BITS < 4 ? word >> q * BITS * 8 % 32 & ((1u << BITS * 8 % 32) - 1u) : word;
  }
  const int block = Piece<V>::BLOCKS == 1 ? 0 : q;
  Decoder::template decode<8>(codes, piece.scale[block], piece.extra[block], tables, x);
}
template <int V> LB_FN Four decode_chunk(const Piece<V> &piece, int q, const Tables &tables) {
  float x[8];
  decode(piece, q, tables, x);
  return Four{pair_bf16(x[0], x[1]), pair_bf16(x[2], x[3]), pair_bf16(x[4], x[5]), pair_bf16(x[6], x[7])};
}

// ---- the dense operand: a chunk is 8 values of a row

template <bool WHOLE> LB_FN Four fetch(const Dense &x, int row, int col) {
  Words<16> words;
  if constexpr (WHOLE) {
    words = load_aligned<16>(x.values + (int64_t)(row < x.rows ? row : x.rows - 1) * x.cols + col);
  } else {
    const int left = row < x.rows ? x.cols - col : 0;
    words = load<16>(x.values + (int64_t)row * x.cols + col, left < 8 ? 2 * left : 16);
  }
  return Four{words.word[0], words.word[1], words.word[2], words.word[3]};
}

// ---- fragments

// Eight terms of each lane: two multiplications of 16 terms, to which each lane of four brings four.
struct Fragment {
  Four low, high;
};
LB_FN Fragment fragment(const Four &a, const Four &below) {  // of rows g and g + 8
  return Fragment{{a.x, below.x, a.y, below.y}, {a.z, below.z, a.w, below.w}};
}
LB_FN void multiply_eight(float (&sum)[4], const Fragment &a, const Four &b) {
  const uint32_t low[4] = {a.low.x, a.low.y, a.low.z, a.low.w}, low_b[2] = {b.x, b.y};
  const uint32_t high[4] = {a.high.x, a.high.y, a.high.z, a.high.w}, high_b[2] = {b.z, b.w};
  mma_16x8x16(sum, low, low_b);
  mma_16x8x16(sum, high, high_b);
}

}  // namespace lb
