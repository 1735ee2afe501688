// How a tensor is cut for a step, and what a thread needs room for.
#pragma once
#include "encode.h"

namespace LB_SPACE {

constexpr int TILE = 512, CHUNK = 64;  // rows of a tile of columns, spans of a chunk

// How a tensor is cut. Blocks are left untouched together; spans, a few blocks that follow each other in memory, are
// worked on together. Spans stay inside a row unless rows are made of whole blocks.
struct Cut {
  int64_t stride, per_row;  // elements of a row with its padding; blocks of a row
  int64_t across, spans;    // spans of a row (0: spans do not mind rows); spans of the tensor
  int width, shift;         // of a block; its logarithm
};

static Cut cut(const lb_job &job) {
  Cut c = {};
  c.width = LB_BLOCK;
  while (c.width / 2 >= job.cols && c.width > 1) c.width /= 2;
  while (1 << c.shift < c.width) ++c.shift;
  c.per_row = (job.cols + c.width - 1) / c.width;
  c.stride = c.per_row * c.width;
  bool dense = job.cols % c.width == 0;
  for (int k = 0; k < job.program->moments; ++k) {  // rows of codes must follow each other without a gap
    const lb_format &f = *job.moments[k].format;
    dense &= f.kind == LB_KIND_FLOAT || job.cols * f.bits % 8 == 0;
  }
  if (job.weight.format) dense &= job.cols * job.weight.format->bits % 8 == 0;
  const int64_t each = SPAN / c.width;
  c.across = dense ? 0 : (c.per_row + each - 1) / each;
  c.spans = dense ? (job.rows * c.per_row + each - 1) / each : job.rows * c.across;
  return c;
}

struct Span {
  int64_t row, col;    // of the first value
  int64_t at, number;  // its offset in memory, and its number for random bits
  int64_t block;       // number of the first block
  int n, blocks;       // values, blocks; only a row's last block may be short
};

static Span span(const lb_job &job, const Cut &c, int64_t k) {
  Span s;
  const int64_t each = SPAN / c.width;
  int64_t blocks;
  if (c.across) {
    const int64_t first = k % c.across * each;
    s.row = k / c.across;
    s.col = first * c.width;
    s.block = s.row * c.per_row + first;
    blocks = c.per_row - first;
  } else {
    s.block = k * each;
    s.row = s.block / c.per_row;
    s.col = s.block % c.per_row * c.width;
    blocks = job.rows * c.per_row - s.block;
  }
  s.blocks = (int)(blocks < each ? blocks : each);
  s.n = s.blocks * c.width;
  if (c.across && job.cols - s.col < s.n) s.n = (int)(job.cols - s.col);
  s.at = s.row * job.cols + s.col;
  s.number = s.row * c.stride + s.col;
  return s;
}

// A span of one block.
static Span one_block(const lb_job &job, const Cut &c, int64_t row, int64_t col, int64_t block) {
  const int64_t left = job.cols - col;
  return {row, col, row * job.cols + col, row * c.stride + col, block, (int)(left < c.width ? left : c.width), 1};
}

// Values of a span's block.
static int values_of(const Span &s, const Cut &c, int block) {
  const int left = s.n - block * c.width;
  return left < c.width ? left : c.width;
}

// What a first sweep notes of a block, so that a later one need not read it again: the sum of squares, the largest
// magnitude, and the smallest but 0 (infinite if there is none).
struct Survey {
  float squares, most, least;
};

// One tensor while a step runs.
struct Run {
  const lb_job *job;
  Cut cut;
  int next;        // the stage to go on with
  int wanted;      // a bit per slot: what a sweep must load
  int written;     // a bit per slot: what updates write
  int gauge;       // the update that reads the gradient as it came, and reports its peak; -1 for none
  int rooted;      // a bit per slot: of which the last update leaves the root, as it will be stored
  bool waiting, skip;  // for a total over all tensors; the tensor is left alone
  int64_t lost;
  float scalars[LB_SCALARS];
  float *vectors[LB_ARRAYS];     // what this step makes of them, persistent ones first
  int64_t lengths[LB_ARRAYS];
  int first, foreseen;  // the measurement of the first sweep, and one that it finds out as well; -1 for none
  Survey *surveys;      // per block: what it has noted for that
  double total;         // of the tensor: sum or maximum
  float *x;             // the measurement, one number per element of what it runs over
  float *partial;       // per block: sum (or maximum)
  double *sums;         // per row (or per tile and column)
  uint32_t key[LB_MOMENTS + 1][2];
};

// Stages run in pieces of 256 or 128 values where each piece's peaks are those of a scale.
constexpr int PIECE = LB_BLOCK / 2, PIECES = SPAN / PIECE;

// Memory that will be needed soon, asked for little by little while there is work: a processor looks ahead by itself
// only inside a page, which a span finishes in one go, and takes only some twenty requests at a time.
struct Feed {
  struct {
    const char *at, *end;
  } range[LB_MOMENTS + 3];
  int count = 0;
  void add(const void *from, int64_t bytes) { range[count++] = {(const char *)from, (const char *)from + bytes}; }
  void some() {
    constexpr int LINES = 8;
    for (int line = 0; line < LINES && count; ++line) {
      auto &r = range[count - 1];
      __builtin_prefetch(r.at, 0, 2);
      r.at += 64;
      if (r.at >= r.end) --count;
    }
  }
};

// Room for one thread.
struct Room {
  alignas(64) float array[LB_ARRAYS][SPAN];
  alignas(64) float value[SPAN];
  alignas(64) uint16_t narrow[LB_MOMENTS][SPAN];
  alignas(64) uint16_t parameter[SPAN];
  alignas(64) uint8_t codes[SPAN];
  Draws draws;
  Feed feed;
  alignas(64) float scale[LB_MOMENTS][SPAN], inverse[LB_MOMENTS][SPAN], base[LB_MOMENTS][SPAN];
  alignas(64) int8_t rest[SPAN];
  float multipliers[SPAN];  // of a stored weight's blocks
  bool finite;              // whether all of its new values are
  float companion[SPAN];
  uint32_t peaks[LB_ARRAYS][PIECES];  // of what updates wrote to each slot, per piece
  uint32_t value_peaks[PIECES];       // of what was measured
  uint32_t gradient[PIECES];          // of the gradient as it came
  uint32_t work[LB_BLOCK];
  const float *at[LB_ARRAYS];         // where each slot's values are now
};

static int block_shift(const lb_format &f) { return __builtin_ctz((unsigned)f.block); }  // blocks divide 256

// Values that share a scale inside a span.
static int sub_block(const lb_format &f, const Cut &c) { return f.block < c.width ? f.block : c.width; }

static void clear_tail(float *values, int n) {
  if (n % 16) memset(values + n, 0, 4 * (16 - n % 16));
}

static const Half &half_of(int dtype) { return dtype == LB_BFLOAT16 ? BF16 : FP16; }

}  // namespace LB_SPACE
