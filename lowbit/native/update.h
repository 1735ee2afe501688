// The updating sweep: new values are checked, encoded and stored, block by block, or not at all.
#pragma once
#include "measure.h"
#include "weight.h"

namespace LB_SPACE {

// A moment kept in 16 bits.
static void narrow_moment(const lb_operand &o, const float *x, int n, const uint16_t *draws, uint16_t *to) {
  narrow(x, o.format->dtype, n, draws, to);
  if (!o.live) return;
  LB_IVDEP for (int i = 0; i < n; ++i) to[i] = x[i] > 0.0f && (to[i] & 0x7FFF) == 0 ? 1 : to[i];
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
      const uint16_t *draws = o.stochastic ? room.draws.fill(run.key[1 + k], s.number, s.n) : nullptr;
      narrow_moment(o, x, s.n, draws, room.narrow[k]);
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
  int64_t scale = s.row * o.scales + (s.col >> block_shift(f));
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
  if (job.weight.format) return check_weight(run, s, run.written & 1 ? piece : 0, good, room);
  const float *p = room.at[0];
  const int dtype = job.param_dtype;
  bool fine;
  if (dtype == LB_FLOAT32) {
    fine = finite_bits(peak_of(room.peaks[0], run.written & 1 ? piece : 0, p, 0, s.n));
  } else {
    uint16_t *to = room.parameter;
    if (job.master == LB_SPLIT16 && dtype == LB_BFLOAT16) {
      LB_IVDEP for (int i = 0; i < s.n; ++i) to[i] = high_split16(p[i]);
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
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = low_split16(p[i], stored[i]);
    return;
  }
  float *wide = room.companion;
  widen(stored, dtype, 0, n, wide);
  if (job.master == LB_KAHAN) {
    LB_IVDEP for (int i = 0; i < n; ++i) wide[i] = p[i] - wide[i];
    narrow(wide, dtype, n, nullptr, (uint16_t *)job.companion + at);
  } else if (job.master == LB_SPLIT8) {
    int8_t *to = (int8_t *)job.companion + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (int8_t)(int32_t)store_share(p[i], wide[i], STEPS8, half);
  } else {
    int16_t *to = (int16_t *)job.companion + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (int16_t)(int32_t)store_share(p[i], wide[i], STEPS16, half);
  }
}

static void store_parameter(const Run &run, const Span &s, const bool *good, bool all, Room &room) {
  const lb_job &job = *run.job;
  if (job.weight.format) return store_weight(run, s, good, all, room);
  const int size = job.param_dtype == LB_FLOAT32 ? 4 : 2;
  const char *from = size == 4 ? (const char *)room.at[0] : (const char *)room.parameter;
  char *to = (char *)job.param + s.at * size;
  for (int b = 0; b < s.blocks; ++b) {
    const int start = b * run.cut.width, n = all ? s.n : values_of(s, run.cut, b);
    if (good[b]) {
      if (from != to) memcpy(to + (int64_t)start * size, from + (int64_t)start * size, (size_t)n * size);
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
// Returns a bit for each slot of which the root is left.
static int root_masks(const Run &run, uint32_t *roots) {
  const lb_program &program = *run.job->program;
  int rooted = 0, later = 0;
  for (int k = program.count - 1; k >= 0; --k) {
    const lb_stage &stage = program.stages[k];
    roots[k] = 0;
    if (stage.kind != LB_UPDATE) continue;
    for (int i = 0; i < stage.writes; ++i) {
      const int slot = stage.write[i];
      const bool square = slot >= 2 && slot < 2 + program.moments && run.job->moments[slot - 2].format->square;
      if (square && stage.rootable >> i & 1 && !(later >> slot & 1)) {
        roots[k] |= 1u << i;
        rooted |= 1 << slot;
      }
    }
    for (int i = 0; i < stage.writes; ++i) later |= 1 << stage.write[i];
    for (int i = 0; i < stage.reads; ++i) later |= 1 << stage.read[i];
  }
  return rooted;
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
    run_stage(run, program.stages[k], s, piece ? piece : LB_BLOCK, roots[k], k == run.gauge, run.scalars, room);
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

}  // namespace LB_SPACE
