// A parameter that is codes and scales, with no float master, as it is written: lowbit/stored.py, a span at a time.
#pragma once
#include "load.h"

namespace LB_SPACE {

// Whether each block stays finite where it was.
static bool check_weight(const Run &run, const Span &s, int piece, bool *good, Room &room) {
  const float *p = room.at[0];
  room.finite = finite_bits(peak_of(room.peaks[0], piece, p, 0, s.n));
  if (room.finite || !run.job->program->guarded) return true;
  bool kept = true;
  load_weight(run, s, room.value, room);
  for (int i = 0; i < s.n; ++i) {  // a value that is broken already must not freeze its neighbours
    if (!finite_bits(magnitude_bits(p[i])) && finite_bits(magnitude_bits(room.value[i]))) {
      good[i >> run.cut.shift] = kept = false;
    }
  }
  return kept;
}

// Whether a value of a block would clip. `finite`: all of them are.
static bool any_clips(const float *x, int n, float limit, [[maybe_unused]] bool finite) {
#ifdef LB_AVX2
  if (finite && n % 16 == 0) {
    Lanes largest = 0.0f;
    for (int i = 0; i < n; i += Lanes::COUNT) largest = lb::maximum(largest, lb::abs(Lanes::load(x + i)));
    return any(!(largest <= limit));
  }
#endif
  const int32_t most = (int32_t)bits_of(limit);
  int32_t over = !(limit >= 0.0f);
  LB_IVDEP for (int i = 0; i < n; ++i) over |= (int32_t)magnitude_bits(x[i]) > most ? 1 : 0;
  return over;
}

// Values of one block as integers in steps of 1/256 of a code, or of a code (scaling.h, whole_steps). Codes come as
// signed bytes.
template <int STEPS> struct Steps {
  static constexpr float MANY = STEPS, ONE = 1.0f / STEPS;
  float limit;
  explicit Steps(const lb_format &f) : limit(limit_of<STEPS>(f.limit)) {}

  LB_IN void encode(const float *x, int n, float scale, float inverse, bool finite, const uint16_t *draws,
                    uint8_t *codes, int8_t *rest) const {
    int first = 0;
#ifdef LB_AVX2
    for (; finite && first + 32 <= n; first += 32) {
      if (draws) many<true>(x + first, scale, inverse, draws + first, codes + first, rest + first);
      else many<false>(x + first, scale, inverse, draws, codes + first, rest + first);
    }
#endif
    LB_IVDEP for (int i = first; i < n; ++i) {
      const int32_t k = (int32_t)whole_steps<STEPS>(x[i], scale, inverse, limit, draws, draws ? draws[i] : 0);
      const int32_t code = STEPS > 1 ? code_of_steps(k) : k;
      codes[i] = (uint8_t)code;
      if (STEPS > 1) rest[i] = (int8_t)(k - 256 * code);
    }
  }
#ifdef LB_AVX2
  template <bool DRAWN>
  LB_IN void many(const float *x, float scale, float inverse, const uint16_t *draws, uint8_t *codes,
                  int8_t *rest) const {  // 32 finite numbers
    constexpr int GROUPS = 32 / Lanes::COUNT;
    Lanes q[GROUPS], code[GROUPS];
    for (int k = 0; k < GROUPS; ++k) {
      const Lanes value = Lanes::load(x + k * Lanes::COUNT);
      q[k] = nearest_whole(value * inverse * MANY);
      if (DRAWN) {
        const Lanes short_of = (value - q[k] * ONE * scale) * inverse * MANY;
        q[k] = q[k] + whole_below(short_of + (Lanes::whole(draws + k * Lanes::COUNT) + 0.5f) * 0x1p-16f);
      }
      q[k] = held(q[k], -limit, limit);
      if (STEPS == 1) continue;
      code[k] = nearest_whole((q[k] + 0.5f) * 0x1p-8f);  // of 256 * code - 128 to 256 * code + 127
      q[k] = q[k] - code[k] * 256.0f;
    }
    store_bytes(codes, STEPS > 1 ? code : q, true);
    if (STEPS > 1) store_bytes((uint8_t *)rest, q, true);
  }
#endif
};

// The same for a codebook, whose stochastic rounding leaves what a code stands for where it is: 16 random bits see less
// than the few ulp by which a value in units of its scale may be off.
struct Book {
  const lb_format &f;
#ifdef LB_AVX2
  Drawn drawn;
  explicit Book(const lb_format &f) : f(f), drawn(f) {}
#else
  explicit Book(const lb_format &f) : f(f) {}
#endif
  LB_IN void encode(const float *x, int n, float, float inverse, bool finite, const uint16_t *draws, uint8_t *codes,
                    int8_t *) const {
    int first = 0;
#ifdef LB_AVX2
    if (draws && f.bits == 4 && f.same && !f.grid_bits) first = draw_codes(drawn, f.sign_magnitude, x, n, inverse, draws, codes);
#endif
    const Block b = {inverse, 0.0f, false, finite};
    if (first < n) LB_SPACE::encode(f, x + first, n - first, b, draws ? draws + first : nullptr, codes + first);
  }
};

// Blocks of a span, with the scales that they have, or are going to have.
template <class Encoder>
static void encode_blocks(const Run &run, const Encoder &encoder, const Span &s, const bool *good,
                          const uint16_t *draws, uint8_t *codes, int8_t *rest, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const lb_format &f = *o.format;
  const float *p = room.at[0], reach = f.top + (job.rest ? 127.0f / 256.0f : 0.0f);
  const int each = sub_block(f, run.cut);
  int64_t number = s.row * o.scales + (s.col >> block_shift(f));
  const Scaling scaling = scaling_of(job);
  for (int i = 0; i < s.n; i += each, ++number) {
    const int n = s.n - i < each ? s.n - i : each;
    uint32_t raw = stored_scale(job, number);
    float scale = multiplier_of(scaling, raw);
    if (any_clips(p + i, n, reach * scale, room.finite)) {
      raw = covering_scale(scaling, float_of(peak(p + i, n)));
      scale = multiplier_of(scaling, raw);
      if (good[i >> run.cut.shift]) store_scale(job, number, raw);
    }
    const float inverse = inverse_of(scaling, raw, scale);
    // A block that has a value that is not finite has a scale of NaN.
    const bool finite = room.finite && scale == scale;
    encoder.encode(p + i, n, scale, inverse, finite, draws ? draws + i : nullptr, codes + i, rest + i);
    room.feed.some();
  }
}

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
  const uint16_t *draws = job.stochastic ? room.draws.fill(run.key[0], s.number, s.n) : nullptr;
  uint8_t *target = (uint8_t *)o.codes + s.row * o.row_bytes + s.col * f.bits / 8;
  int8_t *target_rest = job.rest ? job.rest + s.at : room.rest;
  const bool direct = f.bits == 8 && all;
  uint8_t *codes = direct ? target : room.codes;
  int8_t *rest = all ? target_rest : room.rest;
  const int width = run.cut.width;
  if (f.kind != LB_KIND_INTEGER) encode_blocks(run, Book(f), s, good, draws, codes, rest, room);
  else if (job.rest) encode_blocks(run, Steps<256>(f), s, good, draws, codes, rest, room);
  else encode_blocks(run, Steps<1>(f), s, good, draws, codes, rest, room);
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
