// y [m, n] = x Wᵀ for few rows of x: W streams through registers. few.cu says what that costs.
//
// A block of threads has 8 * GROUPS rows of x, ROWS rows of W, and a part of the terms, of which its warps take turns.
// In a turn each lane takes 16 bytes of codes of every eighth row: W is the left operand, whose 16 rows a
// multiplication wants anyway, and x the right one, eight rows at a time. Columns of a product do not know of each
// other, so a group of x that is not full repeats its last row, and what comes of that is not stored.
#pragma once
#include "packed.h"

namespace lb {

constexpr int WARPS = 8;
constexpr int LONG = 128 / Weight::BITS, TURN = 4 * LONG, SWEEP = WARPS * TURN;  // terms of a lane, of a warp, of all
constexpr int TILES = GROUPS > 2 ? 2 : 1, ROWS = 16 * TILES;  // many rows of x are read for more rows of W at once
constexpr int EACH = 128 * GROUPS;                            // results of a tile
constexpr int TOGETHER = GROUPS > 2 ? 1 : 2;                  // blocks of threads on a multiprocessor

// Turns whose codes are under way: as many as 56 registers hold, two at least.
constexpr int WORDS = 2 * TILES * (4 + Piece<LONG>::BLOCKS * (EXTRA ? 2 : 1));
constexpr int AHEAD = 56 / WORDS < 2 ? 2 : 56 / WORDS < 4 ? 56 / WORDS : 4;
// Eights of terms for which x is loaded together.
constexpr int BATCH = LONG / 8 * GROUPS <= 8 ? LONG / 8 : 8 / GROUPS;

struct Turn {
  Piece<LONG> row[2 * TILES];
};

// The terms of a part are `span`, whole sweeps, or what is left. Of several parts each stores its sums in `partial`
// [parts, m, n]; one alone rounds them.
template <bool WHOLE>
LB_FN void multiply_few(const Dense &x, const Packed &w, int span, float (&sums)[WARPS][EACH], Tables &tables,
                        uint16_t *y, float *partial) {
  const int across = (x.rows - 1) / (8 * GROUPS) + 1, tiles = (w.rows - 1) / ROWS + 1;
  const int top = (int)blockIdx.x % across * 8 * GROUPS, rest = (int)blockIdx.x / across;  // neighbours share W
  const int row = rest % tiles * ROWS, part = rest / tiles, g = lane() / 4, t = lane() % 4;
  const int mine = __shfl_sync(WHOLE_WARP, warp(), 0);  // that it is the same for a warp can now be seen
  const int begin = part * span, end = x.cols - begin < span ? x.cols : begin + span;

  const auto load_turn = [&](Turn &to, int term) {
    LB_UNROLL for (int k = 0; k < 2 * TILES; ++k) {
      const int from = row + 8 * k + g;
      to.row[k] = fetch<LONG, WHOLE>(w, WHOLE && from >= w.rows ? w.rows - 1 : from, term + t * LONG);
    }
  };
  float sum[TILES][GROUPS][4] = {};
  const auto multiply_turn = [&](const Turn &turn, int term) {
    LB_UNROLL for (int first = 0; first < LONG / 8; first += BATCH) {
      Four right[BATCH][GROUPS];
      LB_UNROLL for (int k = 0; k < BATCH * GROUPS; ++k) {
        const int down = top + k % GROUPS * 8 + g, last = x.rows - 1;
        right[k / GROUPS][k % GROUPS] =
            fetch<WHOLE>(x, down < last ? down : last, term + t * LONG + 8 * (first + k / GROUPS));
      }
      LB_UNROLL for (int k = 0; k < BATCH * TILES; ++k) {
        const int q = first + k / TILES, tile = k % TILES;
        const Fragment left = fragment(decode_chunk(turn.row[2 * tile], q, tables),
                                       decode_chunk(turn.row[2 * tile + 1], q, tables));
        LB_UNROLL for (int group = 0; group < GROUPS; ++group) {
          multiply_eight(sum[tile][group], left, right[k / TILES][group]);
        }
      }
    }
  };

  Turn turns[AHEAD] = {};
  LB_UNROLL for (int k = 0; k < AHEAD; ++k) {
    const int term = begin + mine * TURN + k * SWEEP;
    if (term < end) load_turn(turns[k], term);
  }
  Decoder::prepare(tables);
  __syncthreads();  // tables are filled
  for (int next = begin + mine * TURN; next < end; next += AHEAD * SWEEP) {
    LB_UNROLL for (int k = 0; k < AHEAD; ++k) {
      const int term = next + k * SWEEP;
      if (term >= end) break;
      multiply_turn(turns[k], term);
      if (term + AHEAD * SWEEP < end) load_turn(turns[k], term + AHEAD * SWEEP);
    }
  }

  LB_UNROLL for (int tile = 0; tile < TILES; ++tile) {
    if (tile > 0) __syncthreads();  // the last tile's sums have been read
    LB_UNROLL for (int k = 0; k < 4 * GROUPS; ++k) sums[mine][32 * k + lane()] = sum[tile][k / 4][k % 4];
    __syncthreads();  // before threads add up what all warps stored
    for (int number = thread(); number < EACH; number += 32 * WARPS) {
      const int c = number % 16, r = number / 16;  // neighbours store neighbours
      const int from = (r / 8 * 4 + c / 8 * 2 + r % 2) * 32 + c % 8 * 4 + r % 8 / 2;
      float total = 0.0f;
      LB_UNROLL for (int k = 0; k < WARPS; ++k) total += sums[k][from];
      const int down = top + r, col = row + 16 * tile + c;
      if (down >= x.rows || col >= w.rows) continue;
      if (partial) partial[((int64_t)part * x.rows + down) * w.rows + col] = total;
      else y[(int64_t)down * w.rows + col] = narrow_bf16(total);
    }
  }
}

}  // namespace lb
