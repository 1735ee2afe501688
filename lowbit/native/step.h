// One optimizer step on the CPU: every tensor of every group in one call and one parallel region.
//
// The work is a few sweeps over all tensors, each cut into chunks that threads take one after the other:
//
//     plan    one thread: folds, up to each tensor's next measurement
//     sweep   all threads: measure every block, or (last) update every block
//     reduce  all threads: each tensor's measurement from its blocks
//
// A block is up to 256 values of a row (several rows where rows are short powers of two). It is decoded into the
// first-level cache, run through the printed stages, checked, encoded and stored: no value leaves a block as fp32.
// What is computed, to the bit, is said by lowbit/backends/reference.py.
#pragma once
#include <stdlib.h>

#include "blocks.h"

namespace LB_SPACE {

constexpr int TILE = 512, CHUNK = 16;  // rows of a tile of columns, spans of a chunk

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

// Values of a span's block.
static int values_of(const Span &s, const Cut &c, int block) {
  const int left = s.n - block * c.width;
  return left < c.width ? left : c.width;
}

// One tensor while a step runs.
struct Run {
  const lb_job *job;
  Cut cut;
  int next, last;  // the stage to go on with; the latest measurement
  int wanted;      // a bit per slot: what a sweep must load
  int written;     // a bit per slot: what updates write
  int gauge;       // the update that reads the gradient as it came, and reports its peak; -1 for none
  int rooted;      // a bit per slot: of which the last update leaves the root, as it will be stored
  bool waiting, skip, measured;
  int64_t lost;
  float scalars[LB_SCALARS];
  float *vectors[LB_ARRAYS];     // what this step makes of them, persistent ones first
  int64_t lengths[LB_ARRAYS];
  uint32_t most;        // max: bits of the magnitude
  double total;         // of the tensor: sum or maximum
  float *x;             // the measurement, one number per element of what it runs over
  int64_t elements;
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
  } range[LB_MOMENTS + 2];
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
  alignas(64) float array[LB_ARRAYS][SPAN + 16];  // 80: not all at the same offset in a page, where caches collide
  alignas(64) float value[SPAN];
  alignas(64) uint16_t narrow[LB_MOMENTS][SPAN];
  alignas(64) uint16_t parameter[SPAN];
  alignas(64) uint8_t codes[SPAN];
  Draws draws;
  Feed feed;
  alignas(64) float scale[LB_MOMENTS][SPAN], inverse[LB_MOMENTS][SPAN], base[LB_MOMENTS][SPAN];
  float companion[SPAN];
  uint32_t peaks[LB_ARRAYS][PIECES];  // of what updates wrote to each slot, per piece
  uint32_t value_peaks[PIECES];       // of what was measured
  uint32_t gradient[PIECES];          // of the gradient as it came
  uint32_t work[LB_BLOCK];
  const float *at[LB_ARRAYS];         // where each slot's values are now
};

static void clear_tail(float *values, int n) {
  if (n % 16) memset(values + n, 0, 4 * (16 - n % 16));
}

static const Half &half_of(int dtype) { return dtype == LB_BFLOAT16 ? BF16 : FP16; }

// ---- loading

static void load_parameter(const Run &run, const Span &s, Room &room) {
  const lb_job &job = *run.job;
  float *p = room.array[0];
  room.at[0] = p;
  const int n = s.n, dtype = job.param_dtype;
  if (dtype == LB_FLOAT32) {
    const float *from = (const float *)job.param + s.at;
    if (n % 16 == 0) room.at[0] = from;
    else memcpy(p, from, 4 * n);
    return;
  }
  widen(job.param, dtype, s.at, n, p);
  const Half half = half_of(dtype);
  if (job.master == LB_MASTER32) {
    const float *kept = (const float *)job.companion + s.at;
    const uint16_t *own = (const uint16_t *)job.param + s.at;
    uint16_t *rounded = room.parameter;
    narrow(kept, dtype, n, nullptr, rounded);
    for (int i = 0; i < n; ++i) {  // -0 equals 0, NaN nothing
      const bool same = rounded[i] == own[i] || ((rounded[i] | own[i]) & 0x7FFF) == 0;
      p[i] = same && p[i] == p[i] ? kept[i] : p[i];
    }
  } else if (job.master == LB_KAHAN) {
    widen(job.companion, dtype, s.at, n, room.companion);
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_kahan(p[i], room.companion[i], half);
  } else if (job.master == LB_SPLIT8) {
    const int8_t *kept = (const int8_t *)job.companion + s.at;
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_share(p[i], (float)kept[i], 127.0f, half);
  } else if (job.master == LB_SPLIT16 && dtype == LB_FLOAT16) {
    const int16_t *kept = (const int16_t *)job.companion + s.at;
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_share(p[i], (float)kept[i], 8192.0f, half);
  } else if (job.master == LB_SPLIT16) {
    const int16_t *kept = (const int16_t *)job.companion + s.at;
    const uint16_t *own = (const uint16_t *)job.param + s.at;
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_split16(own[i], kept[i]);
  }
}

static void load_gradient(const Run &run, const Span &s, Room &room) {
  const lb_job &job = *run.job;
  room.at[1] = room.array[1];
  if (job.grad_dtype == LB_FLOAT32 && s.n % 16 == 0) room.at[1] = (const float *)job.grad + s.at;
  else widen(job.grad, job.grad_dtype, s.at, s.n, room.array[1]);
}

// Values that share a scale inside a span.
static int sub_block(const lb_format &f, const Cut &c) { return f.block < c.width ? f.block : c.width; }

static void load_moment(const Run &run, const Span &s, int k, Room &room) {
  const lb_operand &o = run.job->moments[k];
  const lb_format &f = *o.format;
  float *to = room.array[2 + k];
  room.at[2 + k] = to;
  if (f.kind == LB_KIND_FLOAT) {
    if (f.dtype == LB_FLOAT32 && s.n % 16 == 0) room.at[2 + k] = (const float *)o.codes + s.at;
    else widen(o.codes, f.dtype, s.at, s.n, to);
    return;
  }
  const uint8_t *codes = (const uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  if (f.bits != 8) {
    unpack(codes, f.bits, s.n, room.codes);
    codes = room.codes;
  }
  const int each = sub_block(f, run.cut);
  int64_t scale = s.row * o.scales + s.col / f.block;
  for (int i = 0; i < s.n; i += each, ++scale) {
    const int n = s.n - i < each ? s.n - i : each;
    room.feed.some();
    decode(f, codes + i, n, o.scale[scale], o.extra ? (const float *)o.extra + scale : nullptr, to + i);
  }
}

static void load_vector(const Run &run, const Span &s, int slot, int over, const float *values, Room &room) {
  float *to = room.array[slot];
  room.at[slot] = to;
  const Cut &c = run.cut;
  const int64_t group = over == LB_GROUP ? run.job->group_rows : 1;
  int64_t row = s.row, col = s.col;
  for (int b = 0; b < s.blocks; ++b) {
    const int n = values_of(s, c, b);
    if (over == LB_COLUMN) {
      memcpy(to, values + col, 4 * n);
    } else {
      const float value = values[row / group];
      for (int i = 0; i < n; ++i) to[i] = value;
    }
    to += n;
    col += n;
    if (col >= run.job->cols) {
      col = 0;
      ++row;
    }
  }
}

static void load(const Run &run, const Span &s, int wanted, Room &room) {
  const lb_program &program = *run.job->program;
  if (wanted & 1) load_parameter(run, s, room);
  load_gradient(run, s, room);
  for (int k = 0; k < program.moments; ++k) {
    if (wanted >> (2 + k) & 1) load_moment(run, s, k, room);
  }
  const int first = 2 + program.moments;
  for (int k = 0; k < program.vectors + program.temporaries; ++k) {
    if (wanted >> (first + k) & 1) load_vector(run, s, first + k, program.over[k], run.vectors[k], room);
  }
  if (s.n % 16) {  // stages run over multiples of 16 values
    for (int slot = 0; slot < first + program.vectors + program.temporaries; ++slot) {
      if (slot == 1 || wanted >> slot & 1) clear_tail(room.array[slot], s.n);
    }
  }
}

// ---- stages

// Run an update or measurement over a span, in pieces that share a scale, so that the peaks it reports are theirs.
// `gauged`: it reads the gradient as it came, and its peaks are wanted.
static void run_stage(const Run &run, const lb_stage &stage, const Span &s, int piece, uint32_t roots, bool gauged,
                      Room &room) {
  const bool measure = stage.kind == LB_MEASURE;
  const int writes = measure ? 1 : stage.writes, each = writes + stage.reads_g;  // peaks of a piece
  lb_frame f;
  uint32_t peaks[PIECES * (LB_ARRAYS + 1)] = {};
  f.s = (float *)run.scalars;
  f.si = stage.s;
  f.c = run.job->constants;
  f.ci = stage.c;
  f.x = nullptr;
  f.piece = piece;
  f.roots = roots;
  f.peaks = peaks;
  for (int k = 0; k < stage.reads; ++k) f.in[k] = room.at[stage.read[k]];
  for (int k = 0; k < writes; ++k) f.out[k] = measure ? room.value : room.array[stage.write[k]];
  for (int left = (s.n + 15) / 16 * 16; left > 0; left -= LB_BLOCK) {
    room.feed.some();
    f.n = left < LB_BLOCK ? left : LB_BLOCK;
    stage.kernel(&f);
    for (int k = 0; k < stage.reads; ++k) f.in[k] += LB_BLOCK;
    for (int k = 0; k < writes; ++k) f.out[k] += LB_BLOCK;
    f.peaks += LB_BLOCK / piece * each;
  }
  const int last = (s.n - 1) / piece;
  for (int k = 0; k < writes; ++k) {
    float *values = measure ? room.value : room.array[stage.write[k]];
    uint32_t *found = measure ? room.value_peaks : room.peaks[stage.write[k]];
    for (int number = 0; number <= last; ++number) found[number] = peaks[number * each + k];
    if (!measure) room.at[stage.write[k]] = values;
    if (s.n % 16 == 0) continue;
    clear_tail(values, s.n);  // what a stage makes of the zeros beyond a row's end is no value
    found[last] = peak(values + last * piece, s.n - last * piece);
  }
  for (int number = 0; gauged && number <= last; ++number) room.gradient[number] = peaks[number * each + writes];
}

// ---- a measuring sweep

// What a later span will read.
static void look_ahead(const Run &run, const Span &s, int wanted, Feed &feed) {
  const lb_job &job = *run.job;
  const int of_parameter = job.param_dtype == LB_FLOAT32 ? 4 : 2, of_gradient = job.grad_dtype == LB_FLOAT32 ? 4 : 2;
  feed.count = 0;
  if (wanted & 1) feed.add((const char *)job.param + s.at * of_parameter, s.n * of_parameter);
  feed.add((const char *)job.grad + s.at * of_gradient, s.n * of_gradient);
  for (int k = 0; k < job.program->moments; ++k) {
    if (!(wanted >> (2 + k) & 1)) continue;
    const lb_operand &o = job.moments[k];
    const int bits = o.format->bits;
    const int64_t at = o.format->kind == LB_KIND_FLOAT ? s.at * bits / 8 : s.row * o.row_bytes + s.col * bits / 8;
    feed.add((const char *)o.codes + at, s.n * bits / 8);
  }
}

// The stage that reads the gradient as it came, among the updates before stage `end` and that stage; -1 for none.
static int gauge(const lb_program &program, int end) {
  for (int k = 0; k <= end && k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind != LB_UPDATE && k != end) continue;
    if (stage.reads_g) return k;
    for (int i = 0; i < stage.writes; ++i) {
      if (stage.write[i] == 1) return -1;
    }
  }
  return -1;
}

static void measure_span(Run &run, const Span &s, const Span *ahead, Room &room) {
  const lb_program &program = *run.job->program;
  const lb_stage &stage = program.stages[run.next];
  const int reader = gauge(program, run.next), width = run.cut.width;
  room.feed.count = 0;
  if (ahead) look_ahead(run, *ahead, 1 << 1, room.feed);
  load(run, s, run.wanted, room);
  bool finite = reader >= 0 || !program.guarded || finite_bits(peak(room.at[1], s.n));
  for (int k = 0; k <= run.next; ++k) {
    if (program.stages[k].kind != LB_UPDATE && k != run.next) continue;
    run_stage(run, program.stages[k], s, LB_BLOCK, 0, k == reader, room);
  }
  for (int number = 0; reader >= 0 && number * LB_BLOCK < s.n; ++number) finite &= finite_bits(room.gradient[number]);
  if (program.guarded && !finite) __atomic_store_n(&run.skip, true, __ATOMIC_RELAXED);
  if (stage.over == LB_COLUMN) return;  // the caller adds the values up
  for (int b = 0; b < s.blocks; ++b) {
    float *values = room.value + b * width;
    const int n = values_of(s, run.cut, b);
    if (stage.reduce == LB_MAX) {
      run.partial[s.block + b] = float_of(width == LB_BLOCK ? room.value_peaks[b] : peak(values, n));
    } else {
      if (n < width) memset(values + n, 0, 4 * (width - n));
      run.partial[s.block + b] = halve(values, width);
    }
  }
}

// A tile of rows and a block of columns: sums from the first row down.
static void measure_columns(Run &run, int64_t unit, Room &room) {
  const lb_job &job = *run.job;
  const Cut &c = run.cut;
  const bool max = job.program->stages[run.next].reduce == LB_MAX;
  const int64_t tile = unit / c.per_row, first = tile * TILE;
  const int64_t last = first + TILE < job.rows ? first + TILE : job.rows;
  Span s = {};
  s.blocks = 1;
  s.col = unit % c.per_row * c.width;
  s.n = (int)(job.cols - s.col < c.width ? job.cols - s.col : c.width);
  double *sums = run.sums + tile * job.cols + s.col;
  for (s.row = first; s.row < last; ++s.row) {
    s.at = s.row * job.cols + s.col;
    s.number = s.row * c.stride + s.col;
    s.block = s.row * c.per_row + s.col / c.width;
    measure_span(run, s, nullptr, room);
    for (int i = 0; i < s.n; ++i) {
      const float value = room.value[i];
      if (max) {
        const double old = s.row == first ? 0.0 : sums[i];
        sums[i] = magnitude_bits(value) > magnitude_bits((float)old) ? (double)lb::abs(value) : old;
      } else {
        sums[i] = s.row == first ? (double)value : sums[i] + (double)value;
      }
    }
  }
}

static double largest(const float *x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
  return (double)float_of(most);
}

// From blocks to what the stage runs over. `work` has room for a row of blocks, a group of rows or a column of tiles.
static void reduce_run(Run &run, double *work) {
  const lb_job &job = *run.job;
  const lb_stage &stage = job.program->stages[run.next];
  const bool max = stage.reduce == LB_MAX;
  const double mean = stage.reduce == LB_MEAN ? 1.0 : 0.0;
  const int64_t rows = job.rows, cols = job.cols, per_row = run.cut.per_row;
  if (stage.over == LB_COLUMN) {
    const int64_t tiles = (rows + TILE - 1) / TILE;
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t t = 0; t < tiles; ++t) work[t] = run.sums[t * cols + c];
      double value = 0.0;
      if (max) {
        for (int64_t t = 0; t < tiles; ++t) value = work[t] > value || work[t] != work[t] ? work[t] : value;
      } else {
        value = halve(work, tiles);
      }
      run.x[c] = (float)(mean != 0.0 ? value / (double)rows : value);
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float *blocks = run.partial + row * per_row;
    if (max) {
      run.sums[row] = largest(blocks, per_row);
    } else {
      for (int64_t b = 0; b < per_row; ++b) work[b] = (double)blocks[b];
      run.sums[row] = halve(work, per_row);
    }
  }
  const int64_t group = stage.over == LB_ROW ? 1 : stage.over == LB_GROUP ? job.group_rows : rows;
  for (int64_t first = 0, k = 0; first < rows; first += group, ++k) {
    const int64_t n = rows - first < group ? rows - first : group;
    double value = 0.0;
    if (max) {
      for (int64_t i = 0; i < n; ++i) {
        const double each = run.sums[first + i];
        value = each > value || each != each ? each : value;
      }
    } else {
      value = halve(run.sums + first, n);
    }
    if (mean != 0.0) value = value / ((double)n * (double)cols);
    run.total = value;
    run.x[k] = (float)value;
  }
}

// ---- the updating sweep

// The largest magnitude of a part of a span: from the peaks of its pieces, or looked for.
static uint32_t peak_of(const uint32_t *peaks, int piece, const float *x, int start, int n) {
  if (!piece) return peak(x + start, n);
  uint32_t most = 0;
  for (int k = start / piece; k * piece < start + n; ++k) most = peaks[k] > most ? peaks[k] : most;
  return most;
}

// The scales that a moment is going to have. False, and `good` for blocks, where it cannot be stored.
static bool prepare_moment(const Run &run, const Span &s, int k, int piece, bool *good, Room &room) {
  const lb_operand &o = run.job->moments[k];
  const lb_format &f = *o.format;
  const float *x = room.at[2 + k];
  const int width = run.cut.width;
  bool fine = true;
  if (!(run.written >> (2 + k) & 1)) piece = 0;
  if (f.square && !(run.rooted >> (2 + k) & 1)) {
    float *roots = room.array[2 + k];
    LB_IVDEP for (int i = 0; i < s.n; ++i) roots[i] = lb::sqrt(x[i]);
    piece = 0;
  }
  if (f.kind == LB_KIND_FLOAT) {
    if (f.dtype != LB_FLOAT32) {
      uint16_t *to = room.narrow[k];
      const uint16_t *draws = o.stochastic ? room.draws.fill(run.key[1 + k], s.number, s.n) : nullptr;
      narrow(x, f.dtype, s.n, draws, to);
      if (o.live) {
        LB_IVDEP for (int i = 0; i < s.n; ++i) to[i] = x[i] > 0.0f && (to[i] & 0x7FFF) == 0 ? 1 : to[i];
      }
    }
    for (int b = 0; b < s.blocks; ++b) {
      const int n = values_of(s, run.cut, b), start = b * width;
      const bool ok = f.dtype == LB_FLOAT32 ? finite_bits(peak_of(room.peaks[2 + k], piece, x, start, n))
                                            : finite16(room.narrow[k] + start, f.dtype, n);
      good[b] &= ok;
      fine &= ok;
    }
    return fine;
  }
  const int each = sub_block(f, run.cut);
  float *absmax = room.base[k], *scale = room.scale[k];
  int count = 0;
  for (int i = 0; i < s.n; i += each, ++count) {
    absmax[count] = float_of(peak_of(room.peaks[2 + k], piece, x, i, s.n - i < each ? s.n - i : each));
  }
  for (int rest = count; rest % 16; ++rest) absmax[rest] = 1.0f;  // not what lies there: subnormals divide slowly
  scales(f, absmax, count, scale, room.inverse[k]);
  for (int number = 0; number < count; ++number) {
    const int i = number * each;
    if (f.kind == LB_KIND_LOG) {
      room.base[k][number] = log_base(f, x + i, s.n - i < each ? s.n - i : each, scale[number], room.work);
    }
    const bool ok = finite_bits(magnitude_bits(scale[number]));
    good[i >> run.cut.shift] &= ok;
    fine &= ok;
  }
  return fine;
}

static void store_moment(const Run &run, const Span &s, int k, const bool *good, bool all, Room &room) {
  const lb_operand &o = run.job->moments[k];
  const lb_format &f = *o.format;
  const float *x = room.at[2 + k];
  const int width = run.cut.width;
  if (f.kind == LB_KIND_FLOAT) {
    const int size = f.dtype == LB_FLOAT32 ? 4 : 2;
    const char *from = size == 4 ? (const char *)x : (const char *)room.narrow[k];
    char *to = (char *)o.codes + s.at * size;
    if (all) {
      memcpy(to, from, (size_t)s.n * size);
      return;
    }
    for (int b = 0; b < s.blocks; ++b) {
      const int64_t start = (int64_t)b * width * size;
      if (good[b]) memcpy(to + start, from + start, (size_t)values_of(s, run.cut, b) * size);
    }
    return;
  }
  const uint16_t *draws = o.stochastic ? room.draws.fill(run.key[1 + k], s.number, s.n) : nullptr;
  uint8_t *target = (uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  const bool direct = f.bits == 8 && all;
  uint8_t *codes = direct ? target : room.codes;
  const int each = sub_block(f, run.cut);
  int64_t scale = s.row * o.scales + s.col / f.block;
  for (int i = 0, number = 0; i < s.n; i += each, ++number, ++scale) {
    const int n = s.n - i < each ? s.n - i : each;
    const bool bounded = run.job->program->guarded && all;
    const Block b = {room.inverse[k][number], room.base[k][number], o.live != 0, bounded};
    room.feed.some();
    encode(f, x + i, n, b, draws ? draws + i : nullptr, codes + i);
    if (!good[i >> run.cut.shift]) continue;
    o.scale[scale] = room.scale[k][number];
    if (f.kind == LB_KIND_LOG) ((float *)o.extra)[scale] = b.extra;
  }
  if (direct) return;
  if (all) {
    pack(codes, f.bits, s.n, target);
    return;
  }
  for (int b = 0; b < s.blocks; ++b) {
    const int start = b * width;
    if (good[b]) pack(codes + start, f.bits, values_of(s, run.cut, b), target + (int64_t)start * f.bits / 8);
  }
}

// The parameter as it will be stored, and whether it stays finite where it was.
static bool prepare_parameter(const Run &run, const Span &s, int piece, bool *good, Room &room) {
  const lb_job &job = *run.job;
  const float *p = room.at[0];
  const int dtype = job.param_dtype;
  bool fine;
  if (dtype == LB_FLOAT32) {
    fine = finite_bits(peak_of(room.peaks[0], run.written & 1 ? piece : 0, p, 0, s.n));
  } else {
    uint16_t *to = room.parameter;
    if (job.master == LB_SPLIT16 && dtype == LB_BFLOAT16) {  // ties go up, so that what is left fits int16
      LB_IVDEP for (int i = 0; i < s.n; ++i) to[i] = (uint16_t)((bits_of(p[i]) + 0x8000u) >> 16);
    } else {
      const uint16_t *draws = job.stochastic ? room.draws.fill(run.key[0], s.number, s.n) : nullptr;
      narrow(p, dtype, s.n, draws, to);
    }
    fine = finite16(to, dtype, s.n);
  }
  if (fine || !job.program->guarded) return true;
  bool kept = true;
  for (int i = 0; i < s.n; ++i) {  // a value that is broken already must not freeze its neighbours
    float now, was;
    if (dtype == LB_FLOAT32) {
      now = p[i];
      was = ((const float *)job.param)[s.at + i];
    } else {
      const uint16_t raw = ((const uint16_t *)job.param)[s.at + i];
      now = dtype == LB_BFLOAT16 ? widen_bf16(room.parameter[i]) : widen_fp16(room.parameter[i]);
      was = dtype == LB_BFLOAT16 ? widen_bf16(raw) : widen_fp16(raw);
    }
    if (!finite_bits(magnitude_bits(now)) && finite_bits(magnitude_bits(was))) {
      good[i >> run.cut.shift] = false;
      kept = false;
    }
  }
  return kept;
}

static void store_companion(const Run &run, int64_t at, int from, int n, Room &room) {
  const lb_job &job = *run.job;
  const float *p = room.at[0] + from;
  const uint16_t *stored = room.parameter + from;
  const int dtype = job.param_dtype;
  const Half half = half_of(dtype);
  if (job.master == LB_MASTER32) {
    memcpy((float *)job.companion + at, p, 4 * n);
    return;
  }
  if (job.master == LB_SPLIT16 && dtype == LB_BFLOAT16) {
    int16_t *to = (int16_t *)job.companion + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (int16_t)(bits_of(p[i]) - ((uint32_t)stored[i] << 16));
    return;
  }
  float *wide = room.companion;
  widen(stored, dtype, 0, n, wide);
  if (job.master == LB_KAHAN) {
    LB_IVDEP for (int i = 0; i < n; ++i) wide[i] = p[i] - wide[i];
    narrow(wide, dtype, n, nullptr, (uint16_t *)job.companion + at);
  } else if (job.master == LB_SPLIT8) {
    int8_t *to = (int8_t *)job.companion + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (int8_t)(int32_t)store_share(p[i], wide[i], 127.0f, half);
  } else {
    int16_t *to = (int16_t *)job.companion + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (int16_t)(int32_t)store_share(p[i], wide[i], 8192.0f, half);
  }
}

// memcpy for what has just been computed: the library's turns to `rep movsb` for a few thousand bytes, which waits.
static void copy(void *to, const void *from, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    char line[64];
    __builtin_memcpy(line, (const char *)from + i, 64);
    __builtin_memcpy((char *)to + i, line, 64);
  }
  for (; i < bytes; ++i) ((char *)to)[i] = ((const char *)from)[i];
}

static void store_parameter(const Run &run, const Span &s, const bool *good, bool all, Room &room) {
  const lb_job &job = *run.job;
  const int size = job.param_dtype == LB_FLOAT32 ? 4 : 2;
  const char *from = size == 4 ? (const char *)room.at[0] : (const char *)room.parameter;
  char *to = (char *)job.param + s.at * size;
  for (int b = 0; b < s.blocks; ++b) {
    const int start = b * run.cut.width, n = all ? s.n : values_of(s, run.cut, b);
    if (good[b]) {
      if (from != to) copy(to + (int64_t)start * size, from + (int64_t)start * size, (int64_t)n * size);
      if (size == 2 && job.master != LB_NONE) store_companion(run, s.at + start, start, n, room);
    }
    if (all) break;
  }
}

// Pieces in which stages run so that the peaks they report are those of every scale; 0 if they cannot be.
static int piece_of(const Run &run) {
  if (run.cut.width < LB_BLOCK) return 0;
  int piece = LB_BLOCK;
  for (int k = 0; k < run.job->program->moments; ++k) {
    const lb_format &f = *run.job->moments[k].format;
    if (f.kind == LB_KIND_FLOAT) continue;
    const int each = sub_block(f, run.cut);
    if (each < PIECE) return 0;
    piece = each < piece ? each : piece;
  }
  return piece;
}

// Which writes of each update are stored as roots: of square formats, by the last that writes and none reads after it.
static void root_masks(Run &run, uint32_t *roots) {
  const lb_program &program = *run.job->program;
  run.rooted = 0;
  int later = 0;
  for (int k = program.count - 1; k >= 0; --k) {
    const lb_stage &stage = program.stages[k];
    roots[k] = 0;
    if (stage.kind != LB_UPDATE) continue;
    for (int i = 0; i < stage.writes; ++i) {
      const int slot = stage.write[i];
      const bool square = slot >= 2 && slot < 2 + program.moments && run.job->moments[slot - 2].format->square;
      if (square && stage.rootable >> i & 1 && !(later >> slot & 1)) {
        roots[k] |= 1u << i;
        run.rooted |= 1 << slot;
      }
    }
    for (int i = 0; i < stage.writes; ++i) later |= 1 << stage.write[i];
    for (int i = 0; i < stage.reads; ++i) later |= 1 << stage.read[i];
  }
}

static void check_gradient(const Run &run, const Span &s, int piece, bool *good, bool *all, const Room &room) {
  for (int b = 0; b < s.blocks; ++b) {
    const int n = values_of(s, run.cut, b);
    good[b] = !run.job->program->guarded || finite_bits(peak_of(room.gradient, piece, room.at[1], b * run.cut.width, n));
    *all &= good[b];
  }
}

static int64_t update_span(const Run &run, const Span &s, const Span &ahead, int piece, const uint32_t *roots,
                           Room &room) {
  const lb_program &program = *run.job->program;
  look_ahead(run, ahead, run.wanted, room.feed);
  load(run, s, run.wanted, room);
  bool good[SPAN];
  bool all = true;
  const bool gauged = piece && run.gauge >= 0;  // then the stages find out on their way whether gradients are finite
  if (!gauged) check_gradient(run, s, 0, good, &all, room);
  for (int k = 0; k < program.count; ++k) {
    if (program.stages[k].kind != LB_UPDATE) continue;
    run_stage(run, program.stages[k], s, piece ? piece : LB_BLOCK, roots[k], k == run.gauge, room);
  }
  if (gauged) check_gradient(run, s, piece, good, &all, room);
  all &= prepare_parameter(run, s, piece, good, room);
  for (int k = 0; k < program.moments; ++k) all &= prepare_moment(run, s, k, piece, good, room);
  if (!program.guarded) {
    all = true;
    for (int b = 0; b < s.blocks; ++b) good[b] = true;
  }
  store_parameter(run, s, good, all, room);
  for (int k = 0; k < program.moments; ++k) store_moment(run, s, k, good, all, room);
  int64_t lost = 0;
  for (int b = 0; b < s.blocks; ++b) lost += !good[b];
  return lost;
}

// ---- the whole step

struct Step {
  int64_t arrived, phase;  // of a barrier of our own
  Run *runs;
  int count, threads;
  bool updating, done, failed;
  int64_t *first;   // of each run, its first unit of this sweep; then the end
  int64_t units, next_unit, next_run;
  int64_t longest;  // doubles a thread needs for reductions
};

#ifndef _OPENMP
static void meet(Step &step) {
  const int64_t phase = __atomic_load_n(&step.phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&step.arrived, 1, __ATOMIC_ACQ_REL) == step.threads) {
    __atomic_store_n(&step.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&step.phase, phase + 1, __ATOMIC_RELEASE);
  } else {
    while (__atomic_load_n(&step.phase, __ATOMIC_ACQUIRE) == phase) sched_yield();
  }
}
#endif

static int64_t units_of(const Run &run, bool updating) {
  const lb_program &program = *run.job->program;
  if (updating) return run.skip ? 0 : (run.cut.spans + CHUNK - 1) / CHUNK;
  if (run.waiting || run.next >= program.count) return 0;
  if (program.stages[run.next].over == LB_COLUMN) {
    return (run.job->rows + TILE - 1) / TILE * run.cut.per_row;
  }
  return (run.cut.spans + CHUNK - 1) / CHUNK;
}

static void fold(Run &run, const lb_stage &stage) {
  const lb_program &program = *run.job->program;
  lb_frame f = {};
  f.s = run.scalars;
  f.si = stage.s;
  f.c = run.job->constants;
  f.ci = stage.c;
  f.x = run.x;
  f.n = 16;
  const int first = 2 + program.moments;
  for (int k = 0; k < stage.reads; ++k) f.in[k] = run.vectors[stage.read[k] - first];
  for (int k = 0; k < stage.writes; ++k) f.out[k] = run.vectors[stage.write[k] - first];
  if (stage.writes) f.n = (run.lengths[stage.write[0] - first] + 15) / 16 * 16;
  stage.kernel(&f);
}

// Fold up to the next measurement.
static void advance(Run &run) {
  const lb_program &program = *run.job->program;
  for (; run.next < program.count; ++run.next) {
    const lb_stage &stage = program.stages[run.next];
    if (stage.kind == LB_FOLD) fold(run, stage);
    if (stage.kind == LB_MEASURE) break;
  }
  run.wanted = 0;
  for (int k = 0; k <= run.next && k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind == LB_FOLD || (stage.kind == LB_MEASURE && k != run.next)) continue;
    for (int i = 0; i < stage.reads; ++i) run.wanted |= 1 << stage.read[i];
  }
}

static bool all_finite(const float *x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!finite_bits(magnitude_bits(x[i]))) return false;
  }
  return true;
}

// A measurement over all tensors: those that are left alone do not count.
static void total(Step &step) {
  bool max = false;
  int64_t n = 0;
  double *each = (double *)malloc(sizeof(double) * (step.count + 1));
  if (!each) {
    step.failed = true;
    return;
  }
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    if (!run.waiting) continue;
    max = run.job->program->stages[run.next].reduce == LB_MAX;
    if (run.job->program->guarded && !finite_bits(magnitude_bits((float)run.total))) run.skip = true;
    each[n++] = run.skip ? 0.0 : run.total;
  }
  double value = 0.0;
  if (max) {
    for (int64_t k = 0; k < n; ++k) value = each[k] > value || each[k] != each[k] ? each[k] : value;
  } else {
    value = halve(each, n);
  }
  free(each);
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    if (!run.waiting) continue;
    run.x[0] = (float)value;
    run.waiting = false;
    ++run.next;
    advance(run);
  }
}

// What the next sweep does. One thread.
static void plan(Step &step, bool start) {
  if (step.updating) {
    step.done = true;
    return;
  }
  bool unfinished = false, ready = false;
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    const lb_program &program = *run.job->program;
    if (!start && !run.waiting && run.next < program.count) {  // has just been measured
      if (program.stages[run.next].over == LB_ALL) run.waiting = true;
      else ++run.next;
    }
    if (!run.waiting) advance(run);
    if (run.next < program.count) (run.waiting ? unfinished : ready) = true;
  }
  if (!ready && unfinished) total(step);
  ready |= unfinished;
  bool left = false;
  for (int k = 0; k < step.count; ++k) left |= step.runs[k].next < step.runs[k].job->program->count;
  step.updating = !left;
  if (step.updating) {
    for (int k = 0; k < step.count; ++k) {
      Run &run = step.runs[k];
      const lb_program &program = *run.job->program;
      bool measures = false;
      for (int i = 0; i < program.count; ++i) measures |= program.stages[i].kind == LB_MEASURE;
      if (program.guarded && measures) {
        run.skip |= !all_finite(run.scalars, program.scalars);
        for (int i = 0; i < program.vectors + program.temporaries; ++i) {
          run.skip |= !all_finite(run.vectors[i], run.lengths[i]);
        }
      }
      run.wanted |= 3 | ((1 << program.moments) - 1) << 2;
    }
  }
  step.units = 0;
  for (int k = 0; k < step.count; ++k) {
    step.first[k] = step.units;
    step.units += units_of(step.runs[k], step.updating);
  }
  step.first[step.count] = step.units;
  step.next_unit = step.next_run = 0;
}

static void sweep(Step &step, Room &room) {
  int at = 0;  // units come in rising order, so the run is found by going on
  int prepared = -1, piece = 0;
  uint32_t roots[LB_STAGES];
  for (;;) {
    const int64_t unit = __atomic_fetch_add(&step.next_unit, 1, __ATOMIC_RELAXED);
    if (unit >= step.units) return;
    while (unit >= step.first[at + 1]) ++at;
    Run &run = step.runs[at];
    const int64_t local = unit - step.first[at];
    if (!step.updating && run.job->program->stages[run.next].over == LB_COLUMN) {
      measure_columns(run, local, room);
      continue;
    }
    const int64_t last = (local + 1) * CHUNK < run.cut.spans ? (local + 1) * CHUNK : run.cut.spans;
    if (step.updating && prepared != at) {
      Run copy = run;
      root_masks(copy, roots);
      piece = piece_of(run);
      prepared = at;
    }
    int64_t lost = 0;
    for (int64_t k = local * CHUNK; k < last; ++k) {
      const Span s = span(*run.job, run.cut, k);
      const Span ahead = span(*run.job, run.cut, k + 1 < run.cut.spans ? k + 1 : k);
      if (step.updating) lost += update_span(run, s, ahead, piece, roots, room);
      else measure_span(run, s, &ahead, room);
    }
    if (lost) __atomic_fetch_add(&run.lost, lost, __ATOMIC_RELAXED);
  }
}

static void reduce(Step &step, double *work) {
  for (;;) {
    const int64_t k = __atomic_fetch_add(&step.next_run, 1, __ATOMIC_RELAXED);
    if (k >= step.count) return;
    Run &run = step.runs[k];
    if (step.first[k + 1] > step.first[k]) reduce_run(run, work);
  }
}

static void finish(Run &run) {
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  if (run.skip) run.lost = job.rows * run.cut.per_row;
  job.skipped[0] += run.lost;
  job.skipped[1] += run.skip;
  if (run.skip) return;
  for (int k = 0; k < program.kept; ++k) *job.scalars[k] = run.scalars[k];
  for (int k = 0; k < program.vectors; ++k) memcpy(job.vectors[k], run.vectors[k], 4 * run.lengths[k]);
}

static int64_t elements_over(const lb_job &job, int over) {
  return over == LB_ROW      ? job.rows
         : over == LB_COLUMN ? job.cols
         : over == LB_GROUP  ? (job.rows + job.group_rows - 1) / job.group_rows
                             : 1;
}

// Room for measurements, zeroed. False if there is no memory.
static bool prepare(Run &run, const lb_job &job, int64_t *longest) {
  const lb_program &program = *job.program;
  run.job = &job;
  run.cut = cut(job);
  int64_t elements = 1, sums = 0, blocks = 0;
  for (int k = 0; k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind == LB_UPDATE) {
      for (int i = 0; i < stage.writes; ++i) run.written |= 1 << stage.write[i];
    }
    if (stage.kind != LB_MEASURE) continue;
    const int64_t n = elements_over(job, stage.over), tiles = (job.rows + TILE - 1) / TILE;
    const int64_t needed = stage.over == LB_COLUMN ? tiles * job.cols : job.rows;
    const int64_t work = stage.over == LB_COLUMN ? tiles : run.cut.per_row;
    elements = n > elements ? n : elements;
    sums = needed > sums ? needed : sums;
    *longest = work > *longest ? work : *longest;
    if (stage.over != LB_COLUMN) blocks = job.rows * run.cut.per_row;
  }
  const int vectors = program.vectors + program.temporaries;
  int64_t floats = (elements + 31) / 16 * 16 + blocks;
  for (int k = 0; k < vectors; ++k) {
    run.lengths[k] = elements_over(job, program.over[k]);
    floats += (run.lengths[k] + 15) / 16 * 16;
  }
  char *memory = (char *)calloc(1, sizeof(double) * sums + sizeof(float) * floats);
  if (!memory) return false;
  run.sums = (double *)memory;
  run.x = (float *)(run.sums + sums);
  float *free = run.x + (elements + 31) / 16 * 16;
  for (int k = 0; k < vectors; ++k) {
    run.vectors[k] = free;
    free += (run.lengths[k] + 15) / 16 * 16;
    if (k < program.vectors) memcpy(run.vectors[k], job.vectors[k], 4 * run.lengths[k]);
  }
  run.partial = free;
  for (int k = 0; k < program.scalars; ++k) {
    run.scalars[k] = k < program.kept ? *job.scalars[k] : program.initial[k];
  }
  for (int k = 0; k <= program.moments; ++k) stream_key(job.seed, job.step, job.tensor, k, run.key[k]);
  uint32_t roots[LB_STAGES];
  root_masks(run, roots);
  run.gauge = gauge(program, program.count);
  return true;
}

static void work(Step &step, int thread, Room *room, double *space) {
  for (bool start = true;; start = false) {
    if (thread == 0) plan(step, start);
    LB_BARRIER();
    if (step.done || step.failed) return;
    sweep(step, *room);
    LB_BARRIER();
    if (!step.updating) reduce(step, space);
    LB_BARRIER();
  }
}

}  // namespace LB_SPACE
