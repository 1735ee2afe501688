// The updating sweep where nothing is unusual: blocks of 256 values as drafts, stored while the next one is made
// (fused.h). A block is stored only when all of its draft is known to be finite.
//
// Whatever is not plain is left to update.h, which finds the block untouched: a short one at the end of a row, a value
// that is not finite or might not fit where it is stored, formats and masters that no fused loop knows. A stored weight
// is decoded before the loop, which sees fp32, and encoded from its draft after it.
#pragma once
#include "update.h"

namespace LB_SPACE {

struct Draft {
  alignas(64) float values[LB_ARRAYS][LB_BLOCK];  // by write of the last update
  alignas(64) float scale[16], inverse[16];       // two for each write, one after the other
  int64_t row, col;
  char *at[LB_ARRAYS];         // by slot: where the block is stored
  float *scale_at[LB_ARRAYS];  // its scales
  bool waiting;                // to be stored
};

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
  alignas(64) float top[16], least[16], most[16];  // of scales, two for each write
  bool whole[LB_ARRAYS];                           // by write: one scale for all 256
  bool widen;             // the gradient, which the loop is to see in fp32
  int weight;             // the write of a stored weight; -1: p is floats
  Draft drafts[2];
  alignas(64) float decoded[LB_BLOCK], zeros[LB_BLOCK], nowhere[LB_BLOCK];
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

static void prepare_drafts(const Run &run, const uint32_t *roots, Drafts &drafts) {
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  drafts.run = &run;
  drafts.drafts[0].waiting = drafts.drafts[1].waiting = false;
  drafts.before = 0;
  drafts.gauged = -1;
  drafts.last = nullptr;
  drafts.fused = nullptr;
  memset(drafts.zeros, 0, sizeof drafts.zeros);
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
  if (last.writes > 8) return;
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
  for (int slot = 0; slot < drafts.slots; ++slot) drafts.places[slot] = place_of(job, slot);
  drafts.weight = -1;
  for (int k = 0; k < 16; ++k) drafts.top[k] = drafts.least[k] = drafts.most[k] = 1.0f;
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    drafts.whole[w] = true;
    if (slot == 0 && job.weight.format) drafts.weight = w;
    if (slot < 2) continue;
    const lb_format &f = *job.moments[slot - 2].format;
    call.format[w] = &f;
    call.least[w] = !f.is_signed && f.has_zero ? f.least : 0;
    if (f.kind == LB_KIND_FLOAT) continue;
    drafts.whole[w] = f.block == LB_BLOCK;
    for (int half = 0; half < 2; ++half) {
      drafts.top[2 * w + half] = f.top;
      drafts.least[2 * w + half] = f.min_scale;
      drafts.most[2 * w + half] = f.max_scale;
    }
  }
  drafts.fused = last.fused(kinds, call.frame.roots);
}

static Span span_of(const Drafts &drafts, const Draft &d) {
  return one_block(*drafts.run->job, drafts.run->cut, d.row, d.col, 0);
}

// What the fused loop reads: operands as they are stored, but for the gradient, if plain updates come first.
static void read_block(Drafts &drafts, Draft &d, uint32_t *peak_of_gradient, Room &room) {
  const Run &run = *drafts.run;
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  const Span s = span_of(drafts, d);
  const float *g = drafts.widen ? read_floats(job.grad, job.grad_dtype, s, room.array[1]) : nullptr;
  if (drafts.before) {  // loops ask for the next block of what they read, but this gradient they read from room
    const Place &p = drafts.places[1];
    const char *next = p.start + d.row * p.row_bytes + (d.col + LB_BLOCK) * p.bits / 8;
    for (int line = 0; line < LB_BLOCK * p.bits / 8; line += 64) __builtin_prefetch(next + line, 0, 3);
  }
  if (drafts.before && !g) g = read_floats(job.grad, job.grad_dtype, s, room.array[1]);
  bool raw = run.foreseen >= 0;  // g is what the first sweep has noted the peaks of
  for (int i = 0; i < drafts.before; ++i) {
    lb_frame &f = drafts.frames[i];
    uint32_t peaks[2];
    if (raw && drafts.stages[i]->above >= 0) {
      const float most = run.surveys[d.row * run.cut.per_row + d.col / LB_BLOCK].most;
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
  for (int slot = 0; slot < drafts.slots; ++slot) {
    const Place &p = drafts.places[slot];
    d.at[slot] = p.start + d.row * p.row_bytes + d.col * p.bits / 8;
    d.scale_at[slot] = p.scale ? p.scale + d.row * p.scales + (d.col >> p.shift) : nullptr;
  }
  if (drafts.weight >= 0) {
    load_weight(run, s, drafts.decoded, room);
    d.at[0] = (char *)drafts.decoded;
  }
  lb_fused &call = drafts.call;
  const lb_stage &last = *drafts.last;
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    if (slot >= drafts.slots) {
      const int k = slot - drafts.slots;
      load_vector(run, s, slot, program.over[k], run.vectors[k], room);
      call.frame.in[i] = room.at[slot];
      continue;
    }
    call.frame.in[i] = slot == 1 && g ? g : (const float *)d.at[slot];
    if (!d.scale_at[slot]) continue;
    call.scale[0][i] = d.scale_at[slot][0];
    call.scale[1][i] = d.scale_at[slot][drafts.places[slot].shift < 8];
  }
}

// What it stores of the block before.
static void store_block(Drafts &drafts, const Draft &d, Room &room) {
  const Run &run = *drafts.run;
  lb_fused &call = drafts.call;
  const lb_stage &last = *drafts.last;
  call.draws = nullptr;
  if (run.job->stochastic && drafts.weight < 0) call.draws = room.draws.fill(run.key[0], d.row * run.cut.stride + d.col, LB_BLOCK);
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    call.draft[w] = d.values[w];
    call.to[w] = d.at[slot];
    call.inverse[0][w] = d.inverse[2 * w];
    call.inverse[1][w] = d.inverse[2 * w + 1];
    if (!d.scale_at[slot]) continue;
    d.scale_at[slot][0] = d.scale[2 * w];
    if (!drafts.whole[w]) d.scale_at[slot][1] = d.scale[2 * w + 1];
  }
  if (drafts.weight < 0) return;
  bool good = true;
  const Span s = span_of(drafts, d);
  call.to[drafts.weight] = drafts.nowhere;
  room.at[0] = d.values[drafts.weight];
  room.finite = true;
  store_weight(run, s, &good, true, room);
}

// Whether the draft can be stored; its scales, from the peaks of both halves.
static bool judge(const Drafts &drafts, const uint32_t *peaks, Draft &d) {
  const int writes = drafts.last->writes;
  const uint32_t *second = peaks + writes + 1;
  alignas(64) uint32_t absmax[16] = {};
  uint32_t worst = peaks[writes] > second[writes] ? peaks[writes] : second[writes];
  for (int w = 0; w < writes; ++w) {
    const uint32_t a = peaks[w], b = second[w], most = a > b ? a : b;
    worst = most > worst ? most : worst;
    absmax[2 * w] = drafts.whole[w] ? most : a;
    absmax[2 * w + 1] = drafts.whole[w] ? most : b;
  }
#ifdef LB_AVX2
  for (int k = 0; k < 16; k += Lanes::COUNT) {  // derive_scale and inverse, which the compiler would take one by one
    const Lanes most = Lanes::load((const float *)absmax + k), held = most / Lanes::load(drafts.top + k);
    Lanes scale = lb::clip(held, Lanes::load(drafts.least + k), Lanes::load(drafts.most + k));
    scale = where(most < __builtin_inff(), scale, __builtin_nanf(""));
    scale = where(most == 0.0f, 0.0f, scale);
    scale.store(d.scale + k);
    where(scale > 0.0f, 1.0f / scale, 0.0f).store(d.inverse + k);
  }
#endif
  return worst < 0x7F7F0000u;  // so much fits whatever is stored, however it is rounded
}

// Makes a draft of `now`, if there is such a block, and stores the one before, if it waits. The loop does both always;
// what it has no block for, once in a chunk, it does for nothing: it drafts the block before again, or stores away from
// the tensor.
static void draft_block(Drafts &drafts, Draft *now, Draft &before, Room &room) {
  lb_fused &call = drafts.call;
  const int writes = drafts.last->writes;
  uint32_t peaks[2 * (LB_ARRAYS + 1)], gradient = 0;
  call.frame.peaks = peaks;
  read_block(drafts, now ? *now : before, &gradient, room);
  for (int w = 0; w < writes; ++w) call.frame.out[w] = now ? now->values[w] : drafts.nowhere;
  if (before.waiting) {
    store_block(drafts, before, room);
  } else {
    for (int w = 0; w < writes; ++w) {
      call.draft[w] = drafts.zeros;
      call.to[w] = drafts.nowhere;
    }
    call.draws = nullptr;
  }
  drafts.fused(&call);
  before.waiting = false;
  if (now) now->waiting = judge(drafts, peaks, *now) && finite_bits(gradient);
}

// Blocks `first` to `end` of a tensor; how many were left alone.
static int64_t update_blocks(Drafts &drafts, int64_t first, int64_t end, int piece, const uint32_t *roots, Room &room) {
  const Run &run = *drafts.run;
  const lb_job &job = *run.job;
  room.feed.count = 0;
  int64_t lost = 0, row = first / run.cut.per_row, col = first % run.cut.per_row * LB_BLOCK;
  for (int64_t block = first; block < end; ++block) {
    Draft &d = drafts.drafts[block & 1], &before = drafts.drafts[~block & 1];
    d.row = row;
    d.col = col;
    if (job.cols - col >= LB_BLOCK) draft_block(drafts, &d, before, room);
    if (!d.waiting) {
      if (before.waiting) draft_block(drafts, nullptr, before, room);
      const Span s = one_block(job, run.cut, row, col, block);
      lost += update_span(run, s, s, piece, roots, room);
    }
    col += LB_BLOCK;
    if (col >= job.cols) {
      col = 0;
      ++row;
    }
  }
  Draft &rest = drafts.drafts[~end & 1];
  if (rest.waiting) draft_block(drafts, nullptr, rest, room);
  return lost;
}

}  // namespace LB_SPACE
