// A span from memory to fp32 in the first-level cache, and the printed stages on it.
#pragma once
#include "scales.h"

namespace LB_SPACE {

// A span of a tensor of floats: where it lies, or widened to `to`.
static const float *read_floats(const void *from, int dtype, const Span &s, float *to) {
  if (dtype == LB_FLOAT32 && s.n % 16 == 0) return (const float *)from + s.at;
  widen(from, dtype, s.at, s.n, to);
  return to;
}

// A span of an operand: where it lies, or decoded to `to`.
static const float *read_operand(const Run &run, const Span &s, const lb_operand &o, const float *scales, float *to,
                                 Room &room) {
  const lb_format &f = *o.format;
  if (f.kind == LB_KIND_FLOAT) return read_floats(o.codes, f.dtype, s, to);
  const uint8_t *codes = (const uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  const int each = sub_block(f, run.cut);
  const bool apart = f.bits == 8 || each % 16;  // one code per byte, since blocks may begin inside one
  if (f.bits != 8 && apart) {
    unpack(codes, f.bits, s.n, room.codes);
    codes = room.codes;
  }
  const int64_t first = s.row * o.scales + (s.col >> block_shift(f));
  for (int i = 0, k = 0; i < s.n; i += each, ++k) {
    const int n = s.n - i < each ? s.n - i : each;
    const float scale = scales ? scales[k] : o.scale[first + k];
    room.feed.some();
    const void *extra = o.extra ? (const float *)o.extra + first + k : nullptr;
    if (apart) decode(f, codes + i, n, scale, extra, to + i);
    else decode_packed(f, codes + i * f.bits / 8, n, scale, extra, to + i, room.codes);
  }
  return to;
}

// A span of a stored weight: code times scale, or (code + rest / 256) times scale.
static void load_weight(const Run &run, const Span &s, float *to, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const lb_format &f = *o.format;
  const uint8_t *codes = (const uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  const float *scales = multipliers(run, s, room);
#ifdef LB_AVX2
  if (!job.rest && f.bits == 4 && s.n % 16 == 0 && sub_block(f, run.cut) % 16 == 0) {
    const Table table(f.values);
    const int shift = __builtin_ctz((unsigned)sub_block(f, run.cut));
    for (int i = 0; i < s.n; i += Lanes::COUNT) (table.look_up(codes + i / 2) * scales[i >> shift]).store(to + i);
    return;
  }
#endif
  if (!job.rest) {
    read_operand(run, s, o, scales, to, room);
    return;
  }
  const int8_t *rest = job.rest + s.at;
  const int each = sub_block(f, run.cut), sign = 1 << (f.bits - 1);
  unpack(codes, f.bits, s.n, room.codes);
  const uint8_t *code = room.codes;
  for (int i = 0, k = 0; i < s.n; i += each, ++k) {
    const int end = s.n - i < each ? s.n : i + each;
    const float scale = scales[k];
    LB_IVDEP for (int j = i; j < end; ++j) {
      to[j] = value_of_steps(((code[j] ^ sign) - sign) * 256 + rest[j], scale);
    }
  }
}

static void load_parameter(const Run &run, const Span &s, Room &room) {
  const lb_job &job = *run.job;
  float *p = room.array[0];
  room.at[0] = p;
  if (job.weight.format) return load_weight(run, s, p, room);
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
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_share(p[i], (float)kept[i], STEPS8, half);
  } else if (job.master == LB_SPLIT16 && dtype == LB_FLOAT16) {
    const int16_t *kept = (const int16_t *)job.companion + s.at;
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_share(p[i], (float)kept[i], STEPS16, half);
  } else if (job.master == LB_SPLIT16) {
    const int16_t *kept = (const int16_t *)job.companion + s.at;
    const uint16_t *own = (const uint16_t *)job.param + s.at;
    LB_IVDEP for (int i = 0; i < n; ++i) p[i] = load_split16(own[i], kept[i]);
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
  room.at[1] = read_floats(run.job->grad, run.job->grad_dtype, s, room.array[1]);
  for (int k = 0; k < program.moments; ++k) {
    if (wanted >> (2 + k) & 1) room.at[2 + k] = read_operand(run, s, run.job->moments[k], nullptr, room.array[2 + k], room);
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
                      const float *scalars, Room &room) {
  const bool measure = stage.kind == LB_MEASURE;
  const int writes = measure ? 1 : stage.writes, each = writes + stage.reads_g;  // peaks of a piece
  lb_frame f;
  uint32_t peaks[PIECES * (LB_ARRAYS + 1)] = {};
  f.s = (float *)scalars;
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

// The largest magnitude of a part of a span: from the peaks of its pieces, or looked for.
static uint32_t peak_of(const uint32_t *peaks, int piece, const float *x, int start, int n) {
  if (!piece) return peak(x + start, n);
  uint32_t most = 0;
  for (int k = start / piece; k * piece < start + n; ++k) most = peaks[k] > most ? peaks[k] : most;
  return most;
}

}  // namespace LB_SPACE
