// A measuring sweep: blocks, then from blocks to what a measurement is over.
#pragma once
#include <stdlib.h>

#include "load.h"
#include "trees.h"

namespace LB_SPACE {

// What a later span will read.
static void look_ahead(const Run &run, const Span &s, int wanted, Feed &feed) {
  const lb_job &job = *run.job;
  const int of_parameter = job.param_dtype == LB_FLOAT32 ? 4 : 2, of_gradient = job.grad_dtype == LB_FLOAT32 ? 4 : 2;
  feed.count = 0;
  if (wanted & 1 && job.weight.format) {
    const int bits = job.weight.format->bits;
    feed.add((const char *)job.weight.codes + s.row * job.weight.row_bytes + s.col * bits / 8, s.n * bits / 8);
    if (job.rest) feed.add(job.rest + s.at, s.n);
  } else if (wanted & 1) {
    feed.add((const char *)job.param + s.at * of_parameter, s.n * of_parameter);
  }
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

// ---- a norm without a sweep of its own
//
// Between a first measurement and a sum of squares there may be updates that change only what is above a limit. Then the
// first sweep adds up the squares as well, in units of 1, and notes enough of each block to know later whether it has to
// be read again: because something in it is above the limit, or because a square in the final unit, a power of two, may
// lose bits. Where none does, scaling all squares scales their sum, to the bit.

// The measurement that the sweep of a first one, `first`, can find out; -1 for none.
static int foreseen(const lb_program &program, int *first) {
  *first = -1;
  for (int k = 0; k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind == LB_FOLD) continue;
    if (stage.kind == LB_MEASURE && *first >= 0 && stage.unit >= 0 && stage.over == LB_TENSOR) {
      return stage.reads == 1 && stage.read[0] == 1 ? k : -1;
    }
    if (stage.kind == LB_MEASURE ? stage.over == LB_COLUMN : stage.above < 0) return -1;
    if (stage.kind == LB_MEASURE && *first < 0) *first = k;
  }
  return -1;
}

// Whether updates before the next measurement leave all values alone whose magnitude is not above `most`.
static bool left_alone(const Run &run, float most) {
  bool alone = true;
  for (int k = 0; k < run.next; ++k) {
    const lb_stage &stage = run.job->program->stages[k];
    if (stage.kind == LB_UPDATE) alone &= most <= run.scalars[stage.above];
  }
  return alone;
}

constexpr float LEAST_ROOT = 0x1p-63f;  // of a square that is a normal number

// The sum over a block of what was measured. `values` has room for its width.
static float sum_block(const Cut &c, float *values, int n) {
  if (n < c.width) memset(values + n, 0, 4 * (c.width - n));
  return halve(values, c.width);
}

#ifdef LB_AVX2
LB_FN Lanes widened(const float *x) { return Lanes::load(x); }
LB_FN Lanes widened(const uint16_t *x) { return Lanes::widen(x); }

template <class G> LB_FN Survey survey_block(const G *g) {
  Peak most;
  Least least;
  Lanes squares[LB_BLOCK / Lanes::COUNT];
  for (int k = 0; k < LB_BLOCK / Lanes::COUNT; ++k) {
    const Lanes x = widened(g + k * Lanes::COUNT);
    most.see(x);
    least.see(x);
    squares[k] = x * x;
  }
  const float sum = halve_lanes<LB_BLOCK / Lanes::COUNT>(squares);
  return {sum, float_of(most.of_all()), float_of(least.of_all())};
}

// Blocks `first` to `end` of the first sweep.
template <class G> static void survey_blocks(Run &run, const G *gradient, int64_t first, int64_t end) {
  bool finite = true;
  for (int64_t block = first; block < end; ++block) {
    const char *ahead = (const char *)(gradient + block * LB_BLOCK) + 4096;  // a processor's own stops at a page's end
    for (int line = 0; line < LB_BLOCK * (int)sizeof(G); line += 64) __builtin_prefetch(ahead + line, 0, 2);
    const Survey seen = survey_block(gradient + block * LB_BLOCK);
    run.surveys[block] = seen;
    run.partial[block] = seen.most;
    finite &= seen.most < __builtin_inff();
  }
  if (run.job->program->guarded && !finite) __atomic_store_n(&run.skip, true, __ATOMIC_RELAXED);
}
#endif

static Survey survey(const Cut &c, const float *g, int n) {
#ifdef LB_AVX2
  if (n == LB_BLOCK) return survey_block(g);
#endif
  alignas(64) float squares[LB_BLOCK];
  uint32_t most = 0, least = 0x7F800000u;
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = magnitude_bits(g[i]);
    most = magnitude > most ? magnitude : most;
    least = magnitude && magnitude < least ? magnitude : least;
    squares[i] = g[i] * g[i];
  }
  return {sum_block(c, squares, n), float_of(most), float_of(least)};
}

// Whether what it notes is all that the first sweep has to do.
static bool only_surveys(const Run &run) {
  const lb_program &program = *run.job->program;
  for (int k = 0; k < run.next; ++k) {
    if (program.stages[k].kind == LB_UPDATE) return false;
  }
  return program.stages[run.next].plain && program.stages[run.next].reduce == LB_MAX;
}

// Blocks `first` to `end` of the first sweep, if they are whole and lie one after the other.
static bool survey_whole(Run &run, int64_t first, int64_t end) {
#ifdef LB_AVX2
  const lb_job &job = *run.job;
  if (run.foreseen < 0 || run.next != run.first || job.cols % LB_BLOCK || !only_surveys(run)) return false;
  if (job.grad_dtype == LB_FLOAT32) survey_blocks(run, (const float *)job.grad, first, end);
  else if (job.grad_dtype == LB_BFLOAT16) survey_blocks(run, (const uint16_t *)job.grad, first, end);
  return job.grad_dtype != LB_FLOAT16;
#else
  return false;
#endif
}

// A span of the first sweep; true if that is all there is to do.
static bool survey_span(Run &run, const Span &s, const Room &room) {
  bool finite = true;
  for (int b = 0; b < s.blocks; ++b) {
    const Survey seen = survey(run.cut, room.at[1] + b * run.cut.width, values_of(s, run.cut, b));
    run.surveys[s.block + b] = seen;
    run.partial[s.block + b] = seen.most;
    finite &= seen.most < __builtin_inff();
  }
  if (!only_surveys(run)) return false;
  if (run.job->program->guarded && !finite) __atomic_store_n(&run.skip, true, __ATOMIC_RELAXED);
  return true;
}

// The foreseen measurement of a span, if it need not be read again.
static bool settle(Run &run, const Span &s) {
  const float unit = run.scalars[run.job->program->stages[run.next].unit];
  for (int b = 0; b < s.blocks; ++b) {
    const Survey &seen = run.surveys[s.block + b];
    const bool exact = seen.squares < __builtin_inff() && seen.least >= LEAST_ROOT && seen.least * unit >= LEAST_ROOT;
    if (!exact || !left_alone(run, seen.most)) return false;
    run.partial[s.block + b] = seen.squares * unit * unit;
  }
  return true;
}

static void measure_span(Run &run, const Span &s, const Span *ahead, Room &room) {
  const lb_program &program = *run.job->program;
  const lb_stage &stage = program.stages[run.next];
  const int reader = gauge(program, run.next), width = run.cut.width;
  room.feed.count = 0;
  if (ahead) look_ahead(run, *ahead, 1 << 1, room.feed);
  load(run, s, run.wanted, room);
  if (run.foreseen >= 0 && run.next == run.first && survey_span(run, s, room)) return;
  bool finite = reader >= 0 || !program.guarded || finite_bits(peak(room.at[1], s.n));
  for (int k = 0; k <= run.next; ++k) {
    if (program.stages[k].kind != LB_UPDATE && k != run.next) continue;
    run_stage(run, program.stages[k], s, LB_BLOCK, 0, k == reader, run.scalars, room);
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
      run.partial[s.block + b] = sum_block(run.cut, values, n);
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

}  // namespace LB_SPACE
