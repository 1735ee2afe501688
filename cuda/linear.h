// Products of a dense bf16 matrix with a packed one, in tiles of 128 x 128 results.
//
// Operands lie in shared memory as pairs of bf16 along the contraction. Its terms are numbered so that lane 4 g + t
// takes terms 8 t .. 8 t + 7 of 32: four pairs which lie side by side, a chunk of 16 bytes. Chunks are stored in such an
// order that eight neighbouring lanes touch every bank of shared memory once, when they read and when they write.
#pragma once
#include "packed.h"

namespace lb {

constexpr int TILE = 128;     // results of a block of threads, along either side
constexpr int THREADS = 128;  // of which each of 4 warps has 64 x 64
constexpr int DEPTH = 32;     // terms of a step
constexpr int CHUNKS = DEPTH / 8;

struct Tile {
  Four chunk[TILE * CHUNKS];
};

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

  Decoder::prepare(tables);
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

}  // namespace lb
