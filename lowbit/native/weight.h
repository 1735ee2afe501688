// A parameter that is codes and scales, with no float master, as it is written: lowbit/stored.py, a span at a time.
#pragma once
#include "load.h"

namespace LB_SPACE {

// Whether each block stays finite where it was.
static bool check_weight(const Run &run, const Span &s, int piece, bool *good, Room &room) {
  const float *p = room.at[0];
  if (finite_bits(peak_of(room.peaks[0], piece, p, 0, s.n)) || !run.job->program->guarded) return true;
  bool kept = true;
  load_weight(run, s, room.value, room);
  for (int i = 0; i < s.n; ++i) {  // a value that is broken already must not freeze its neighbours
    if (!finite_bits(magnitude_bits(p[i])) && finite_bits(magnitude_bits(room.value[i]))) {
      good[i >> run.cut.shift] = kept = false;
    }
  }
  return kept;
}

// The scale of a block for new values: the one it has, unless one of them would clip.
static float renewed_scale(const lb_format &f, float reach, const float *x, int n, float scale) {
  const float limit = reach * scale;
  const int32_t most = (int32_t)bits_of(limit);
  int32_t over = !(limit >= 0.0f);
  LB_IVDEP for (int i = 0; i < n; ++i) over |= (int32_t)magnitude_bits(x[i]) > most ? 1 : 0;
  return over ? derive_scale(float_of(peak(x, n)), f.top, f.min_scale, f.max_scale) : scale;
}

// Values of one block as integers in steps of 1/256 of a code, or of a code: the nearest, and from there up or down by
// what the nearest is short of the value, so that what a code stands for exactly stays. Codes come as signed bytes.
template <int STEPS> struct Steps {
  static constexpr float MANY = STEPS, ONE = 1.0f / STEPS;
  float scale, inverse, limit;
  Steps(const lb_format &f, float scale, float inverse)
      : scale(scale), inverse(inverse), limit((float)f.limit * MANY + (STEPS > 1 ? 127.0f : 0.0f)) {}

  // From value `first` on, one after the other; NaN counts as 0.
  void each(const float *x, int first, int n, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    const float scale = this->scale, inverse = this->inverse, limit = this->limit;
    LB_IVDEP for (int i = first; i < n; ++i) {
      const float u = x[i] * inverse * MANY;
      float q = lb::rint(u == u ? u : 0.0f);
      if (draws) q = q + lb::floor((x[i] - q * ONE * scale) * inverse * MANY + uniform(draws[i]));
      q = q < limit ? q : limit;
      q = q > -limit ? q : -limit;
      const int32_t k = (int32_t)q, code = STEPS > 1 ? (k + 128) >> 8 : k;
      codes[i] = (uint8_t)code;
      if (STEPS > 1) rest[i] = (int8_t)(k - 256 * code);
    }
  }
#ifdef LB_AVX2
  // Numbers, 32 at a time; returns how many were done.
  int many(const float *x, int n, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    constexpr int GROUPS = 32 / Lanes::COUNT;
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      Lanes q[GROUPS], code[GROUPS];
      for (int k = 0; k < GROUPS; ++k) {
        const int at = i + k * Lanes::COUNT;
        const Lanes value = Lanes::load(x + at);
        q[k] = nearest_whole(value * inverse * MANY);
        if (draws) {
          const Lanes short_of = (value - q[k] * ONE * scale) * inverse * MANY;
          q[k] = q[k] + whole_below(short_of + (Lanes::whole(draws + at) + 0.5f) * 0x1p-16f);
        }
        q[k] = held(q[k], -limit, limit);
        if (STEPS == 1) continue;
        code[k] = nearest_whole((q[k] + 0.5f) * 0x1p-8f);  // of 256 * code - 128 to 256 * code + 127
        q[k] = q[k] - code[k] * 256.0f;
      }
      store_bytes(codes + i, STEPS > 1 ? code : q, true);
      if (STEPS > 1) store_bytes((uint8_t *)rest + i, q, true);
    }
    return i;
  }
#endif
  void encode(const float *x, int n, bool finite, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    int first = 0;
#ifdef LB_AVX2
    if (finite) first = draws ? many(x, n, draws, codes, rest) : many(x, n, nullptr, codes, rest);
#endif
    if (first < n) each(x, first, n, draws, codes, rest);
  }
};

// Codes, or signed bytes of which they are the low bits.
static void pack_codes(const lb_format &f, const uint8_t *codes, int n, uint8_t *packed) {
  if (f.bits != 4) return pack(codes, f.bits, n, packed);
  LB_IVDEP for (int i = 0; i < n / 2; ++i) {
    uint16_t pair;
    memcpy(&pair, codes + 2 * i, 2);
    packed[i] = (uint8_t)((pair & 15) | (pair >> 4 & 0xF0));
  }
  if (n % 2) packed[n / 2] = codes[n - 1] & 15;
}

static void store_weight(const Run &run, const Span &s, const bool *good, bool all, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const lb_format &f = *o.format;
  const float *p = room.at[0], reach = f.top + (job.rest ? 127.0f / 256.0f : 0.0f);
  const uint16_t *draws = job.stochastic ? room.draws.fill(run.key[0], s.number, s.n) : nullptr;
  uint8_t *target = (uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  int8_t *target_rest = job.rest ? job.rest + s.at : nullptr;
  const bool direct = f.bits == 8 && all, bounded = all && job.program->guarded;
  uint8_t *codes = direct ? target : room.codes;
  int8_t *rest = all ? target_rest : room.rest;
  const int each = sub_block(f, run.cut), width = run.cut.width;
  int64_t number = s.row * o.scales + (s.col >> block_shift(f));
  for (int i = 0; i < s.n; i += each, ++number) {
    const int n = s.n - i < each ? s.n - i : each;
    const float scale = renewed_scale(f, reach, p + i, n, o.scale[number]), inverse = lb::inverse(scale);
    const uint16_t *drawn = draws ? draws + i : nullptr;
    room.feed.some();
    if (f.kind == LB_KIND_INTEGER && job.rest) {
      Steps<256>(f, scale, inverse).encode(p + i, n, bounded, drawn, codes + i, rest + i);
    } else if (f.kind == LB_KIND_INTEGER) {
      Steps<1>(f, scale, inverse).encode(p + i, n, bounded, drawn, codes + i, nullptr);
    } else {
      const Block b = {inverse, 0.0f, false, bounded};
      encode(f, p + i, n, b, drawn, codes + i);
    }
    if (good[i >> run.cut.shift]) o.scale[number] = scale;
  }
  if (all) {
    if (!direct) pack_codes(f, codes, s.n, target);
    return;
  }
  for (int b = 0; b < s.blocks; ++b) {
    const int start = b * width, n = values_of(s, run.cut, b);
    if (!good[b]) continue;
    pack_codes(f, codes + start, n, target + (int64_t)start * f.bits / 8);
    if (job.rest) memcpy(target_rest + start, rest + start, n);
  }
}

}  // namespace LB_SPACE
