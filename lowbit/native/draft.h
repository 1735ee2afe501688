// The updating sweep where nothing is unusual: blocks of 256 values as drafts, stored while the next one is made
// (fused.h). A block is stored only when all of its draft is known to be finite.
//
// Whatever is not plain is left to update.h, which finds the block untouched: a short one at the end of a row, a value
// that is not finite or might not fit where it is stored, formats and masters that no fused loop knows. A stored weight
// is decoded before the loop, which sees fp32, and encoded from its draft after it.
#pragma once
#include "update.h"

namespace LB_SPACE {

// Where the values of one slot are stored.
struct Place {
  char *start;
  float *scale;
  int64_t row_bytes, scales;
  int bits, shift;  // of a value; the logarithm of a scale's values
};

// A tensor's updates: plain ones, which write no more than the gradient, and a fused one, which writes all the rest.
struct Drafts {
  const Run *run;
  int before;  // plain ones
  const lb_stage *stages[LB_STAGES];
  lb_frame frames[LB_STAGES];
  int gauged;  // which of them reads the gradient as it came; `before` for the fused one
  const lb_stage *last;
  lb_fused call;
  lb_fused_kernel fused;  // null: the tensor cannot be drafted
  int slots;              // p, g and the moments
  Place places[LB_ARRAYS];
  bool straight;     // no gap between rows: the first block of one follows the last of the one before
  bool singly;       // something has to be made ready for each block
  bool widen;        // the gradient, which the loop is to see in fp32
  int weight;        // the write of a stored weight; -1: p is floats
  int64_t row, col;  // of the block that waits
  bool waiting;
  alignas(64) float values[2][LB_FUSED_WRITES][LB_BLOCK];
  alignas(64) float decoded[LB_BLOCK], nowhere[LB_BLOCK];
};

// How an operand is stored, as fused loops know it; -1 if they do not.
static int kind_of(const Run &run, int slot) {
  const lb_job &job = *run.job;
  if (slot == 0 && job.weight.format) return LB_FLOATS;
  if (slot < 2) {
    const int dtype = slot ? job.grad_dtype : job.param_dtype;
    return dtype == LB_FLOAT32 ? LB_FLOATS : dtype == LB_BFLOAT16 ? LB_BF16 : -1;
  }
  if (slot >= 2 + job.program->moments) return LB_FLOATS;
  const lb_operand &o = job.moments[slot - 2];
  const lb_format &f = *o.format;
  const bool halves = f.block == LB_BLOCK || f.block == LB_BLOCK / 2;
  if (o.stochastic) return -1;
  if (f.kind == LB_KIND_FLOAT) return f.dtype == LB_FLOAT32 ? LB_FLOATS : -1;
  if (f.kind == LB_KIND_CODEBOOK && f.bins && halves && !(f.is_signed && o.live)) return LB_NIBBLES;
  if (f.kind == LB_KIND_CODEBOOK && f.pieces && halves && !(f.is_signed && o.live)) {
    return f.is_signed ? LB_CODES : LB_RISING_CODES;
  }
  if (f.kind != LB_KIND_INTEGER || f.bits != 8 || !halves || f.square != !f.is_signed || f.is_signed == o.live) return -1;
  return f.square ? LB_ROOT_BYTES : LB_BYTES;
}

static Place place_of(const lb_job &job, int slot) {
  if (slot == 0 && job.weight.format) return {(char *)job.weight.codes, nullptr, 0, 0, 0, 0};  // of no use
  if (slot < 2) {
    const int bits = (slot ? job.grad_dtype : job.param_dtype) == LB_FLOAT32 ? 32 : 16;
    return {slot ? (char *)job.grad : (char *)job.param, nullptr, job.cols * bits / 8, 0, bits, 0};
  }
  const lb_operand &o = job.moments[slot - 2];
  const lb_format &f = *o.format;
  const bool whole = f.kind == LB_KIND_FLOAT;
  return {(char *)o.codes, whole ? nullptr : o.scale, whole ? job.cols * f.bits / 8 : o.row_bytes, o.scales, f.bits,
          f.block == LB_BLOCK ? 8 : 7};
}

static void nothing_waits(Drafts &drafts) {
  drafts.waiting = false;
  for (void *&to : drafts.call.waits) to = drafts.nowhere;
}

static void prepare_drafts(const Run &run, const uint32_t *roots, Drafts &drafts) {
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  drafts.run = &run;
  drafts.waiting = false;
  drafts.before = 0;
  drafts.gauged = -1;
  drafts.last = nullptr;
  drafts.fused = nullptr;
  if (run.cut.width != LB_BLOCK || run.gauge < 0 || job.master != LB_NONE) return;
  bool gradient = false;  // whether an update has written it
  for (int k = 0; k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind != LB_UPDATE) continue;
    if (drafts.last) {
      if (drafts.last->writes != 1 || drafts.last->write[0] != 1) return;
      for (int i = 0; i < drafts.last->reads; ++i) {
        if (drafts.last->read[i] != 1) return;
      }
      drafts.stages[drafts.before++] = drafts.last;
      gradient = true;
    }
    drafts.last = &stage;
    lb_frame &f = drafts.frames[drafts.before];
    f = {};
    f.s = (float *)run.scalars;
    f.si = stage.s;
    f.c = job.constants;
    f.ci = stage.c;
    f.n = f.piece = LB_BLOCK;
    f.roots = roots[k];
    if (k == run.gauge) drafts.gauged = drafts.before;
  }
  if (!drafts.last || !drafts.last->fused) return;
  const lb_stage &last = *drafts.last;
  int written = 0;
  for (int w = 0; w < last.writes; ++w) written |= 1 << last.write[w];
  if (written != (1 << (2 + program.moments)) - 1 - 2) return;  // p and every moment
  if (last.writes > LB_FUSED_WRITES) return;
  lb_fused &call = drafts.call;
  call = {};
  call.frame = drafts.frames[drafts.before];
  // There are loops for p in bf16 with g in fp32, not the reverse.
  drafts.widen = job.weight.format && job.grad_dtype != LB_FLOAT32;
  uint64_t kinds = 0;
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i], kind = slot == 1 && (gradient || drafts.widen) ? LB_FLOATS : kind_of(run, slot);
    if (kind < 0) return;
    kinds |= (uint64_t)kind << (4 * i);
    if (slot >= 2 && slot < 2 + program.moments) {
      const lb_format &f = *job.moments[slot - 2].format;
      call.table[i] = f.pieces ? (const void *)f.halves : f.values;
    }
  }
  drafts.slots = 2 + program.moments;
  drafts.straight = job.cols % LB_BLOCK == 0 && run.cut.stride == job.cols;
  for (int slot = 0; slot < drafts.slots; ++slot) {
    const Place &p = drafts.places[slot] = place_of(job, slot);
    drafts.straight &= p.row_bytes == job.cols * p.bits / 8 && (!p.scale || p.scales == job.cols >> p.shift);
  }
  drafts.singly = job.weight.format || drafts.widen || (gradient && job.grad_dtype != LB_FLOAT32);
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    drafts.singly |= slot >= drafts.slots;
    call.second[i] = slot < drafts.slots && drafts.places[slot].shift == 7;
  }
  drafts.weight = -1;
  for (float &x : call.top) x = 1.0f;
  memset(drafts.values, 0, last.writes * sizeof drafts.values[0][0]);
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    for (int turn = 0; turn < 2; ++turn) call.draft[turn][w] = drafts.values[turn][w];
    call.second_to[w] = drafts.places[slot].shift == 7;
    if (!call.second_to[w]) call.whole |= 3u << (2 * w);
    if (slot == 0 && job.weight.format) drafts.weight = w;
    if (slot < 2) continue;
    const lb_format &f = *job.moments[slot - 2].format;
    call.format[w] = &f;
    call.least[w] = !f.is_signed && f.has_zero ? f.least : 0;
    if (f.kind == LB_KIND_FLOAT) continue;
    for (int half = 0; half < 2; ++half) {
      call.top[2 * w + half] = f.top;
      call.min_scale[2 * w + half] = f.min_scale;
      call.max_scale[2 * w + half] = f.max_scale;
    }
  }
  nothing_waits(drafts);
  drafts.fused = last.fused(kinds, call.frame.roots);
}

// The gradient of a block after plain updates, in room or, where it is as it came, in the tensor (null).
static const float *read_gradient(Drafts &drafts, const Span &s, uint32_t *peak_of_gradient, Room &room) {
  const Run &run = *drafts.run;
  const lb_job &job = *run.job;
  const float *g = drafts.widen ? read_floats(job.grad, job.grad_dtype, s, room.array[1]) : nullptr;
  if (drafts.before) {  // loops ask for the next block of what they read, but this gradient they read from room
    const Place &p = drafts.places[1];
    const char *next = p.start + s.row * p.row_bytes + (s.col + LB_BLOCK) * p.bits / 8;
    for (int line = 0; line < LB_BLOCK * p.bits / 8; line += 64) __builtin_prefetch(next + line, 0, 3);
  }
  if (drafts.before && !g) g = read_floats(job.grad, job.grad_dtype, s, room.array[1]);
  bool raw = run.foreseen >= 0;  // g is what the first sweep has noted the peaks of
  for (int i = 0; i < drafts.before; ++i) {
    lb_frame &f = drafts.frames[i];
    uint32_t peaks[2];
    if (raw && drafts.stages[i]->above >= 0) {
      const float most = run.surveys[s.row * run.cut.per_row + s.col / LB_BLOCK].most;
      if (i == drafts.gauged) *peak_of_gradient = bits_of(most);
      if (most <= run.scalars[drafts.stages[i]->above]) continue;  // it would change nothing
    }
    raw = false;
    f.in[0] = g;
    f.out[0] = room.array[1];
    f.peaks = peaks;
    drafts.stages[i]->kernel(&f);
    g = room.array[1];
    if (i == drafts.gauged) *peak_of_gradient = peaks[1];
  }
  return g;
}

// How many of the next `most` blocks no plain update would change, as far as the first sweep has noted.
static int64_t unchanged(const Drafts &drafts, int64_t number, int64_t most) {
  const Run &run = *drafts.run;
  if (!drafts.before) return most;
  float limit = __FLT_MAX__;
  for (int i = 0; i < drafts.before; ++i) {
    if (run.foreseen < 0 || drafts.stages[i]->above < 0) return 0;
    limit = lb::minimum(limit, run.scalars[drafts.stages[i]->above]);
  }
  int64_t count = 0;
  while (count < most && run.surveys[number + count].most <= limit) ++count;
  return count;
}

// What the loop is told of a block and those after it.
static void begin_at(Drafts &drafts, int64_t row, int64_t col) {
  lb_fused &call = drafts.call;
  const lb_stage &last = *drafts.last;
  char *at[LB_ARRAYS];
  float *scale_at[LB_ARRAYS];
  for (int slot = 0; slot < drafts.slots; ++slot) {
    const Place &p = drafts.places[slot];
    at[slot] = p.start + row * p.row_bytes + col * p.bits / 8;
    scale_at[slot] = p.scale ? p.scale + row * p.scales + (col >> p.shift) : nullptr;
  }
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    if (slot >= drafts.slots) continue;
    call.frame.in[i] = slot == 0 && drafts.weight >= 0 ? drafts.decoded : (const float *)at[slot];
    call.scale[i] = scale_at[slot];
  }
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    call.to[w] = w == drafts.weight ? (char *)drafts.nowhere : at[slot];
    call.scale_to[w] = scale_at[slot];
  }
}

// The bits to round with of the blocks that are stored while `count` are drafted, and how many can be drafted so.
static int64_t draw(Drafts &drafts, int64_t row, int64_t col, int64_t count, Room &room) {
  const Run &run = *drafts.run;
  drafts.call.draws = nullptr;
  if (!run.job->stochastic || drafts.weight >= 0) return count;
  if (!drafts.waiting) return 1;
  const int64_t number = drafts.row * run.cut.stride + drafts.col;
  const int64_t most = number + LB_BLOCK == row * run.cut.stride + col ? SPAN / LB_BLOCK : 1;
  count = count < most ? count : most;
  drafts.call.draws = room.draws.fill(run.key[0], number, LB_BLOCK * (int)count);
  return count;
}

// The stored weight of the block that waits, from its draft.
static void store_waiting_weight(Drafts &drafts, Room &room) {
  if (drafts.weight < 0 || !drafts.waiting) return;
  const Run &run = *drafts.run;
  bool good = true;
  room.at[0] = drafts.call.draft[drafts.call.turn][drafts.weight];
  room.finite = true;
  store_weight(run, one_block(*run.job, run.cut, drafts.row, drafts.col, 0), &good, true, room);
}

// Stores the block that waits. The loop always makes a draft as well: here of what it has read before, for nothing.
static void store_last(Drafts &drafts, Room &room) {
  if (!drafts.waiting) return;
  lb_fused &call = drafts.call;
  for (int w = 0; w < drafts.last->writes; ++w) call.scale_to[w] = drafts.nowhere;
  draw(drafts, drafts.row, drafts.col, 1, room);
  store_waiting_weight(drafts, room);
  call.blocks = 1;
  drafts.fused(&call);
  nothing_waits(drafts);
}

// Makes drafts of blocks from one on, `most` at most; how many. The last then waits, unless the next cannot be drafted.
static int64_t draft_blocks(Drafts &drafts, int64_t row, int64_t col, int64_t most, Room &room) {
  const Run &run = *drafts.run;
  const lb_program &program = *run.job->program;
  const lb_stage &last = *drafts.last;
  lb_fused &call = drafts.call;
  int64_t count = drafts.singly ? 0 : unchanged(drafts, row * run.cut.per_row + col / LB_BLOCK, most);
  const Span s = one_block(*run.job, run.cut, row, col, 0);
  uint32_t peak_of_gradient = 0;
  const float *g = count ? nullptr : read_gradient(drafts, s, &peak_of_gradient, room);
  if (!finite_bits(peak_of_gradient)) return 0;
  begin_at(drafts, row, col);
  if (!count) {
    count = 1;
    if (drafts.weight >= 0) load_weight(run, s, drafts.decoded, room);
    for (int i = 0; i < last.reads; ++i) {
      const int slot = last.read[i];
      if (slot >= drafts.slots) {
        const int k = slot - drafts.slots;
        load_vector(run, s, slot, program.over[k], run.vectors[k], room);
        call.frame.in[i] = room.at[slot];
      } else if (slot == 1 && g) {
        call.frame.in[i] = g;
      }
    }
  }
  call.blocks = draw(drafts, row, col, count, room);
  store_waiting_weight(drafts, room);
  const int64_t made = drafts.fused(&call);
  drafts.waiting = made == call.blocks;
  if (!drafts.waiting) nothing_waits(drafts);
  drafts.row = row;
  drafts.col = col + (made - 1) * LB_BLOCK;
  for (; drafts.col >= run.job->cols; drafts.col -= run.job->cols) ++drafts.row;
  return made;
}

// Blocks `first` to `end` of a tensor; how many were left alone.
static int64_t update_blocks(Drafts &drafts, int64_t first, int64_t end, int piece, const uint32_t *roots, Room &room) {
  const Run &run = *drafts.run;
  const lb_job &job = *run.job;
  room.feed.count = 0;
  int64_t lost = 0;
  for (int64_t block = first; block < end;) {
    const int64_t row = block / run.cut.per_row, col = block % run.cut.per_row * LB_BLOCK;
    const int64_t whole = drafts.straight ? end - block : (job.cols - col) / LB_BLOCK;
    const int64_t most = whole < end - block ? whole : end - block;
    const int64_t made = most ? draft_blocks(drafts, row, col, most, room) : 0;
    block += made;
    if (made && drafts.waiting) continue;
    store_last(drafts, room);
    const Span s = one_block(job, run.cut, block / run.cut.per_row, block % run.cut.per_row * LB_BLOCK, block);
    lost += update_span(run, s, s, piece, roots, room);
    ++block;
  }
  store_last(drafts, room);
  return lost;
}

}  // namespace LB_SPACE
