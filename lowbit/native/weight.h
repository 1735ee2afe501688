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

// Values of one block as integers in steps of 1/256 of a code, or of a code: the nearest, and from there up or down by
// what the nearest is short of the value, so that what a code stands for exactly stays. Codes come as signed bytes.
template <int STEPS> struct Steps {
  static constexpr float MANY = STEPS, ONE = 1.0f / STEPS;
  float scale, inverse, limit;
  Steps(const lb_format &f, float scale, float inverse)
      : scale(scale), inverse(inverse), limit((float)f.limit * MANY + (STEPS > 1 ? 127.0f : 0.0f)) {}
  template <class F> LB_IN F nearest(F x) const {
    const F u = x * F(inverse) * F(MANY);
    return lb::rint(lb::where(u == u, u, F(0.0f)));
  }
  template <class F> LB_IN F drawn(F x, F q, F bits) const {
    const F r = (x - q * F(ONE) * F(scale)) * F(inverse) * F(MANY), chance = (bits + F(0.5f)) * F(0x1p-16f);
    return q + lb::where(r >= F(1.0f) - chance, F(1.0f), F(0.0f)) - lb::where(r < -chance, F(1.0f), F(0.0f));
  }
  template <class F> LB_IN F held(F q) const { return lb::clip(q, F(-limit), F(limit)); }

  // From value `first` on, one after the other.
  void each(const float *x, int first, int n, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    LB_IVDEP for (int i = first; i < n; ++i) {
      float q = nearest(x[i]);
      if (draws) q = drawn(x[i], q, (float)(int32_t)draws[i]);
      const int32_t k = (int32_t)held(q), code = STEPS > 1 ? (k + 128) >> 8 : k;
      codes[i] = (uint8_t)code;
      if (STEPS > 1) rest[i] = (int8_t)(k - 256 * code);
    }
  }
#ifdef LB_AVX2
  // 32 at a time; returns how many were done.
  int many(const float *x, int n, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      Lanes q[32 / Lanes::COUNT], code[32 / Lanes::COUNT];
      for (int k = 0; k < 32 / Lanes::COUNT; ++k) {
        const int at = i + k * Lanes::COUNT;
        const Lanes value = Lanes::load(x + at);
        q[k] = nearest(value);
        if (draws) q[k] = drawn(value, q[k], Lanes::whole(draws + at));
        q[k] = held(q[k]);
        if (STEPS == 1) continue;
        code[k] = lb::rint((q[k] + 0.5f) * 0x1p-8f);  // 256 * code - 128 to 256 * code + 127
        q[k] = q[k] - code[k] * 256.0f;
      }
      store_bytes(codes + i, STEPS > 1 ? code : q, true);
      if (STEPS > 1) store_bytes((uint8_t *)rest + i, q, true);
    }
    return i;
  }
#endif
  void encode(const float *x, int n, const uint16_t *draws, uint8_t *codes, int8_t *rest) const {
    int first = 0;
#ifdef LB_AVX2
    first = many(x, n, draws, codes, rest);
#endif
    each(x, first, n, draws, codes, rest);
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
      Steps<256>(f, scale, inverse).encode(p + i, n, drawn, codes + i, rest + i);
    } else if (f.kind == LB_KIND_INTEGER) {
      Steps<1>(f, scale, inverse).encode(p + i, n, drawn, codes + i, nullptr);
    } else {
      const Block b = {inverse, 0.0f, false, run.job->program->guarded && all};
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
