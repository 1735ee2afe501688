// Products of a dense bf16 matrix with a packed one: tiles of 128 x 128 results, or few rows.
//
// Operands lie in shared memory as pairs of bf16 along the contraction. Its terms are numbered so that lane 4 g + t
// takes terms 8 t .. 8 t + 7 of 32: four pairs which lie side by side, a chunk of 16 bytes. Chunks are stored in such an
// order that eight neighbouring lanes touch every bank of shared memory once, when they read and when they write.
#pragma once
#include "formats.h"
#include "mma.h"
#include "spec.h"

namespace lb {

constexpr int TILE = 128;     // results of a block of threads, along either side
constexpr int THREADS = 128;  // of which each of 4 warps has 64 x 64
constexpr int DEPTH = 32;     // terms of a step
constexpr int CHUNKS = DEPTH / 8;

struct Tile {
  Four chunk[TILE * CHUNKS];
};
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

using Tables = Codec<Weight>::Shared;

LB_FN int thread() { return (int)threadIdx.x; }


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
  const int64_t row_bytes = ((int64_t)w.cols * Weight::BITS + 7) / 8, offset = (int64_t)col / 8 * Weight::BITS;
  const int64_t blocks = (w.cols - 1) / Weight::BLOCK + 1;
  Piece<V> to;
  if constexpr (WHOLE) {
    to.codes = load_aligned<BYTES>(w.codes + row * row_bytes + offset);
  } else {
    const int64_t left = row < w.rows ? row_bytes - offset : 0;
    to.codes = load<BYTES>(w.codes + row * row_bytes + offset, left < BYTES ? (int)left : BYTES);
  }
  LB_UNROLL for (int k = 0; k < Piece<V>::BLOCKS; ++k) {
    const int first = col + 8 * k;
    const bool there = WHOLE || (row < w.rows && first < w.cols);
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
  Codec<Weight>::template decode<8>(codes, piece.scale[block], piece.extra[block], tables, x);
}
template <int V> LB_FN Four decode_chunk(const Piece<V> &piece, int q, const Tables &tables) {
  float x[8];
  decode(piece, q, tables, x);
  return Four{pair_bf16(x[0], x[1]), pair_bf16(x[2], x[3]), pair_bf16(x[4], x[5]), pair_bf16(x[6], x[7])};
}

// W as the right operand of y = x Wᵀ: a column of the tile is a row of W.
template <bool WHOLE> struct Rows {
  using Fetched = Piece<DEPTH>;

  LB_FN Fetched fetch(const Packed &w, int term, int first) {
    const int row = first + thread();
    return lb::fetch<DEPTH, WHOLE>(w, WHOLE && row >= w.rows ? w.rows - 1 : row, term);
  }
  LB_FN void put(const Fetched &from, const Tables &tables, Tile &tile) {
    LB_UNROLL for (int q = 0; q < CHUNKS; ++q) tile.chunk[place(thread(), q)] = decode_chunk(from, q, tables);
  }
  LB_FN Four column(const Tile &tile, int col, int t) { return tile.chunk[place(col, t)]; }
  LB_FN int place(int col, int chunk) { return col * CHUNKS + (chunk ^ (col / 2 % 4)); }
};

// W as the right operand of dx = dy W: a column of the tile is a column of W, and a pair is of two of its rows. The
// pairs of two rows lie side by side, in chunks of four columns.
template <bool WHOLE> struct Columns {
  struct Fetched {
    Piece<16> row[2];
  };

  LB_FN Fetched fetch(const Packed &w, int term, int first) {
    const int row = term + thread() / 8 * 2, col = first + thread() % 8 * 16;
    const int within = WHOLE && col >= w.cols ? w.cols - 16 : col;
    return Fetched{{lb::fetch<16, WHOLE>(w, row, within), lb::fetch<16, WHOLE>(w, row + 1, within)}};
  }
  LB_FN void put(const Fetched &from, const Tables &tables, Tile &tile) {
    LB_UNROLL for (int q = 0; q < 2; ++q) {
      float x[2][8];
      LB_UNROLL for (int k = 0; k < 2; ++k) decode(from.row[k], q, tables, x[k]);
      LB_UNROLL for (int k = 0; k < 8; k += 4) {
        tile.chunk[word(thread() / 8, thread() % 8 * 16 + 8 * q + k) / 4] =
            Four{pair_bf16(x[0][k], x[1][k]), pair_bf16(x[0][k + 1], x[1][k + 1]),
                 pair_bf16(x[0][k + 2], x[1][k + 2]), pair_bf16(x[0][k + 3], x[1][k + 3])};
      }
    }
  }
  LB_FN Four column(const Tile &tile, int col, int t) {
    const uint32_t *const from = (const uint32_t *)tile.chunk + word(4 * t, col);
    return Four{from[0], from[TILE], from[2 * TILE], from[3 * TILE]};
  }
  LB_FN int word(int pair, int col) { return pair * TILE + (col ^ (pair / 4 * 8) ^ (col / 32 * 4)); }
};

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

// The same for few rows: 0 beyond the matrix.
template <bool WHOLE> LB_FN Four fetch_few(const Dense &x, int row, int col) {
  return !WHOLE || (row < x.rows && col < x.cols) ? fetch<WHOLE>(x, row, col) : Four{0u, 0u, 0u, 0u};
}

// ---- results

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

// The left operand lies in shared memory as fragments, so that the registers of a multiplication are loaded as they
// stand: number 8 r + g is of rows 16 r + g and 16 r + g + 8.
LB_FN int place(int number, int t, int half) { return number * 8 + 2 * t + (half ^ (number & 1)); }

// out [left.rows, cols] = left * right: one tile for each block, tiles handed out down the columns, so that blocks which
// run together share W's codes. Of two buffers one is read while the other is filled from registers, which were loaded
// a step before.
template <class Right, bool WHOLE>
LB_FN void multiply(const Dense &left, const Packed &right, int cols, Tile (&lefts)[2], Tile (&rights)[2],
                    Tables &tables, uint16_t *out) {
  const int down = (left.rows - 1) / TILE + 1, g = lane() / 4, t = lane() % 4;
  const int row = (int)blockIdx.x % down * TILE, col = (int)blockIdx.x / down * TILE;
  const int warp_row = warp() / 2 * 64, warp_col = warp() % 2 * 64;
  float sum[4][8][4];
  LB_UNROLL for (int i = 0; i < 128; ++i) sum[i / 32][i / 4 % 8][i % 4] = 0.0f;

  Four dense[2][2];
  typename Right::Fetched packed;
  const auto load_step = [&](int term) {
    LB_UNROLL for (int k = 0; k < 4; ++k) {
      const int from = row + thread() / 32 * 16 + thread() / 4 % 8 + k / 2 * 64 + k % 2 * 8;
      dense[k / 2][k % 2] = fetch<WHOLE>(left, from, term + thread() % 4 * 8);
    }
    packed = Right::fetch(right, term, col);
  };
  const auto store_step = [&](int buffer) {
    LB_UNROLL for (int k = 0; k < 2; ++k) {
      const Fragment both = fragment(dense[k][0], dense[k][1]);
      lefts[buffer].chunk[place(thread() / 4 + 32 * k, t, 0)] = both.low;
      lefts[buffer].chunk[place(thread() / 4 + 32 * k, t, 1)] = both.high;
    }
    Right::put(packed, tables, rights[buffer]);
  };

  Codec<Weight>::prepare(tables);
  load_step(0);
  __syncthreads();
  store_step(0);
  __syncthreads();
  for (int term = 0; term < left.cols; term += DEPTH) {
    const int buffer = term / DEPTH % 2;
    const bool more = term + DEPTH < left.cols;
    if (more) load_step(term + DEPTH);
    Four b[8];
    LB_UNROLL for (int j = 0; j < 8; ++j) b[j] = Right::column(rights[buffer], warp_col + 8 * j + g, t);
    LB_UNROLL for (int i = 0; i < 4; ++i) {
      const int number = warp_row / 2 + 8 * i + g;
      const Fragment a = {lefts[buffer].chunk[place(number, t, 0)], lefts[buffer].chunk[place(number, t, 1)]};
      LB_UNROLL for (int j = 0; j < 8; ++j) multiply_eight(sum[i][j], a, b[j]);
    }
    if (more) store_step(1 - buffer);
    __syncthreads();  // the next step reads what was stored, and stores where this one has read
  }

  LB_UNROLL for (int i = 0; i < 8; ++i) {
    const int y = row + warp_row + 8 * i + g;
    LB_UNROLL for (int j = 0; j < 8; ++j) {
      const int x = col + warp_col + 8 * j + 2 * t;
      uint16_t *const to = out + (int64_t)y * cols + x;
      const uint32_t pair = pair_bf16(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      if (WHOLE && y < left.rows && x < cols) *(uint32_t *)to = pair;
      if (!WHOLE && y < left.rows && x < cols) to[0] = (uint16_t)pair;
      if (!WHOLE && y < left.rows && x + 1 < cols) to[1] = (uint16_t)(pair >> 16);
    }
  }
}

// out [x.rows, w.rows] = x Wᵀ for few rows of x. A block has 16 rows of x, and 16 of W, of which its 8 warps take turns
// of 4 lanes times 16 bytes of codes, loaded a turn before. Groups of x are handed out first, so that they share W's codes.
template <bool WHOLE>
LB_FN void multiply_few(const Dense &x, const Packed &w, float (&sums)[8][256], Tables &tables, uint16_t *out) {
  constexpr int LONG = 128 / Weight::BITS, TURN = 4 * LONG;
  const int groups = (x.rows - 1) / 16 + 1, g = lane() / 4, t = lane() % 4;
  const int row = (int)blockIdx.x % groups * 16, col = (int)blockIdx.x / groups * 16;
  float sum[2][4];
  LB_UNROLL for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = 0.0f;

  Piece<LONG> next[2];
  const auto load_turn = [&](int turn) {
    const int term = turn + t * LONG, within = !WHOLE || term < x.cols ? term : 0;
    LB_UNROLL for (int j = 0; j < 2; ++j) {
      const int from = col + 8 * j + g;
      next[j] = fetch<LONG, WHOLE>(w, WHOLE && from >= w.rows ? w.rows - 1 : from, within);
    }
  };
  Codec<Weight>::prepare(tables);
  load_turn(warp() * TURN);
  __syncthreads();
  for (int turn = warp() * TURN; turn < x.cols; turn += 8 * TURN) {
    const Piece<LONG> piece[2] = {next[0], next[1]};
    if (turn + 8 * TURN < x.cols) load_turn(turn + 8 * TURN);
    LB_UNROLL for (int q = 0; q < LONG / 8; ++q) {
      const int term = turn + t * LONG + 8 * q;
      const Four a = fetch_few<WHOLE>(x, row + g, term), below = fetch_few<WHOLE>(x, row + g + 8, term);
      const Fragment both = fragment(a, below);
      LB_UNROLL for (int j = 0; j < 2; ++j) multiply_eight(sum[j], both, decode_chunk(piece[j], q, tables));
    }
  }

  LB_UNROLL for (int i = 0; i < 8; ++i) sums[warp()][32 * i + lane()] = sum[i / 4][i % 4];
  __syncthreads();  // before a warp adds up what all of them stored
  float total = 0.0f;
  LB_UNROLL for (int k = 0; k < 8; ++k) total += sums[k][thread()];
  const int down = row + g + warp() % 4 / 2 * 8, across = col + warp() / 4 * 8 + 2 * t + warp() % 2;
  if (down < x.rows && across < w.rows) out[(int64_t)down * w.rows + across] = narrow_bf16(total);
}

}  // namespace lb
