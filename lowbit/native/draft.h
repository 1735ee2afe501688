// The updating sweep where nothing is unusual: blocks of up to 256 values as drafts, stored while the next one is made
// (fused.h). A block is stored only when all of its draft is known to be finite.
//
// Whatever is not plain is left to update.h, which finds the block untouched: a value that is not finite or might not
// fit where it is stored, formats and masters that no fused loop knows. A stored weight is decoded before the loop, which
// sees fp32, and encoded from its draft after it.
//
// Here is what of a tensor stays the same in a step; course.h goes through its blocks.
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
  bool ends;         // the course: the short blocks
  bool padded;       // which are copied
  bool singly;       // something has to be made ready for each block
  bool widen;        // the gradient, which the loop is to see in fp32
  int weight;        // the write of a stored weight; -1: p is floats
  int64_t waits;     // the number of the block that does; -1: none
  alignas(64) float values[2][LB_FUSED_WRITES][LB_BLOCK];
  alignas(64) float decoded[LB_BLOCK], nowhere[LB_BLOCK];
  alignas(64) float copies[LB_ARRAYS][LB_BLOCK], copies_to[LB_FUSED_WRITES][LB_BLOCK];
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
  drafts.waits = -1;
  for (void *&to : drafts.call.waits) to = drafts.nowhere;
}

static void prepare_drafts(const Run &run, const uint32_t *roots, Drafts &drafts) {
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  drafts.run = &run;
  drafts.waits = -1;
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
  for (int slot = 0; slot < drafts.slots; ++slot) {
    drafts.places[slot] = place_of(job, slot);
  }
  drafts.singly = job.weight.format || drafts.widen || (gradient && job.grad_dtype != LB_FLOAT32);
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    drafts.singly |= slot >= drafts.slots;
  }
  drafts.weight = -1;
  for (float &x : call.top) x = 1.0f;
  memset(drafts.values, 0, last.writes * sizeof drafts.values[0][0]);
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    for (int turn = 0; turn < 2; ++turn) call.draft[turn][w] = drafts.values[turn][w];
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

}  // namespace LB_SPACE
