// A parameter that is codes and scales, with no float master, as it is written: lowbit/stored.py, a span at a time.
#pragma once
#include "load.h"

namespace LB_SPACE {

constexpr int WEIGHT = LB_MOMENTS;  // its place among the scales in a room

// A block keeps its scale, unless a value would clip. Runs over multiples of 16.
static void renew_scales(const lb_format &f, float reach, const float *absmax, int n, float *scale, float *inverses) {
  const float top = f.top, least = f.min_scale, most = f.max_scale;
  n = (n + 15) / 16 * 16;
  LB_IVDEP for (int i = 0; i < n; ++i) {
    const float derived = derive_scale(absmax[i], top, least, most);
    scale[i] = absmax[i] <= reach * scale[i] ? scale[i] : derived;
    inverses[i] = inverse(scale[i]);
  }
}

// The scales that it is going to have; whether each block stays finite where it was.
static bool prepare_weight(const Run &run, const Span &s, int piece, bool *good, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const lb_format &f = *o.format;
  const float *p = room.at[0], reach = f.top + (job.rest ? 127.0f / 256.0f : 0.0f);
  const int each = sub_block(f, run.cut);
  float *absmax = room.base[WEIGHT], *scale = room.scale[WEIGHT];
  const int64_t first = s.row * o.scales + s.col / f.block;
  uint32_t worst = 0;
  int count = 0;
  for (int i = 0; i < s.n; i += each, ++count) {
    const int n = s.n - i < each ? s.n - i : each;
    const uint32_t most = each < piece ? peak(p + i, n) : peak_of(room.peaks[0], piece, p, i, n);
    worst = most > worst ? most : worst;
    absmax[count] = float_of(most);
    scale[count] = o.scale[first + count];
  }
  for (int rest = count; rest % 16; ++rest) absmax[rest] = scale[rest] = 1.0f;
  renew_scales(f, reach, absmax, count, scale, room.inverse[WEIGHT]);
  if (finite_bits(worst) || !job.program->guarded) return true;
  bool kept = true;
  load_weight(run, s, room.value, room);
  for (int i = 0; i < s.n; ++i) {  // a value that is broken already must not freeze its neighbours
    if (!finite_bits(magnitude_bits(p[i])) && finite_bits(magnitude_bits(room.value[i]))) {
      good[i >> run.cut.shift] = kept = false;
    }
  }
  return kept;
}

// One block as integers in steps of 1/256 of a code, or of a code: the nearest, and from there up or down by what the
// nearest is short of the value, so that what a code stands for exactly stays.
template <int STEPS>
static void encode_steps(const lb_format &f, const float *x, int n, float scale, float inverse, const uint16_t *draws,
                         uint8_t *codes, int8_t *rest) {
  constexpr float MANY = STEPS, ONE = 1.0f / STEPS;
  const float limit = (float)f.limit * MANY + (STEPS > 1 ? 127.0f : 0.0f);
  const int32_t mask = (1 << f.bits) - 1;
  LB_IVDEP for (int i = 0; i < n; ++i) {
    const float u = x[i] * inverse * MANY;
    float q = rint(u == u ? u : 0.0f);
    if (draws) {
      const float r = (x[i] - q * ONE * scale) * inverse * MANY, chance = uniform(draws[i]);
      q = q + (r >= 1.0f - chance ? 1.0f : 0.0f) - (r < -chance ? 1.0f : 0.0f);
    }
    q = q < limit ? q : limit;
    q = q > -limit ? q : -limit;
    const int32_t k = (int32_t)q, code = STEPS > 1 ? (k + 128) >> 8 : k;
    codes[i] = (uint8_t)(code & mask);
    if (STEPS > 1) rest[i] = (int8_t)(k - 256 * code);
  }
}

static void store_weight(const Run &run, const Span &s, const bool *good, bool all, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const lb_format &f = *o.format;
  const float *p = room.at[0];
  const uint16_t *draws = job.stochastic ? room.draws.fill(run.key[0], s.number, s.n) : nullptr;
  uint8_t *target = (uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  int8_t *target_rest = job.rest ? job.rest + s.at : nullptr;
  const bool direct = f.bits == 8 && all;
  uint8_t *codes = direct ? target : room.codes;
  int8_t *rest = all ? target_rest : room.rest;
  const int each = sub_block(f, run.cut), width = run.cut.width;
  int64_t number = s.row * o.scales + s.col / f.block;
  for (int i = 0, k = 0; i < s.n; i += each, ++k, ++number) {
    const int n = s.n - i < each ? s.n - i : each;
    const float scale = room.scale[WEIGHT][k], inverse = room.inverse[WEIGHT][k];
    const uint16_t *drawn = draws ? draws + i : nullptr;
    room.feed.some();
    if (f.kind == LB_KIND_INTEGER && job.rest) {
      encode_steps<256>(f, p + i, n, scale, inverse, drawn, codes + i, rest + i);
    } else if (f.kind == LB_KIND_INTEGER) {
      encode_steps<1>(f, p + i, n, scale, inverse, drawn, codes + i, nullptr);
    } else {
      const Block b = {inverse, 0.0f, false, run.job->program->guarded && all};
      encode(f, p + i, n, b, drawn, codes + i);
    }
    if (good[i >> run.cut.shift]) o.scale[number] = scale;
  }
  if (all) {
    if (!direct) pack(codes, f.bits, s.n, target);
    return;
  }
  for (int b = 0; b < s.blocks; ++b) {
    const int start = b * width, n = values_of(s, run.cut, b);
    if (!good[b]) continue;
    pack(codes + start, f.bits, n, target + (int64_t)start * f.bits / 8);
    if (job.rest) memcpy(target_rest + start, rest + start, n);
  }
}

}  // namespace LB_SPACE
