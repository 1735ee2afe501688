// The scale of a block of a stored weight, one at a time, as the CPU driver and the CUDA kernels both take it: from what
// is stored to what is multiplied with, and the smallest scale with which no value clips (lowbit/scales.py: multiplier,
// inverse, covering). And integers that are drawn around what they stand for (lowbit/stored.py).
#pragma once
#include "arithmetic.h"

namespace lb {

enum { E8M0_NAN = 255, E4M3_NAN = 0x7F };

struct Scaling {
  int32_t stored;  // enum lb_scaled
  int32_t last;    // e8m0: the largest code
  float least;             // e4m3
  float top, min_scale, max_scale;  // the format's
  bool outer;  // whether there is a scale of the tensor
  float whole;
};

LB_FN float no_number() { return float_of(0x7FC00000u); }

LB_FN float power_of_two(int32_t field) {  // 2**(field - 127), from 2**-127 on; 0 below
  return float_of(field > 0 ? (uint32_t)field << 23 : field == 0 ? 1u << 22 : 0u);
}

LB_FN float widen_e4m3(uint32_t code) {
  const int32_t field = (int32_t)(code >> 3 & 15u), mantissa = (int32_t)(code & 7u);
  const float magnitude = field ? (float)(8 + mantissa) * power_of_two(field + 117) : (float)mantissa * 0x1p-9f;
  const float value = (code & 0x7Fu) == E4M3_NAN ? no_number() : magnitude;
  return code & 0x80u ? -value : value;
}

// The smallest e4m3 number that is not below x, for x from 0 to 448.
LB_FN uint32_t e4m3_above(float x) {
  const uint32_t normal = ((bits_of(x) + 0xFFFFFu) >> 20) - (120u << 3);
  const float small = -floor((x < 0x1p-6f ? x : 0.0f) * -0x1p9f);
  return x < 0x1p-6f ? (uint32_t)(int32_t)small : normal;
}

constexpr float LARGEST = 3.4028234663852886e38f;

// What encodes with an e4m3 scale next to an outer one: 0 for a tensor of zeros and for NaN, finite for a scale of 0.
LB_FN float two_level_inverse(float held, float outer) {
  const float both = inverse(outer) / held, found = outer > 0.0f && both == both ? both : 0.0f;
  return found > LARGEST ? LARGEST : found;
}

LB_FN float multiplier_of(const Scaling &s, uint32_t raw) {
  if (s.stored == LB_SCALE_FP32) return float_of(raw);
  if (s.stored == LB_SCALE_E8M0) return raw == E8M0_NAN ? no_number() : power_of_two((int32_t)raw);
  float held = s.stored == LB_SCALE_BF16 ? widen_bf16((uint16_t)raw) : widen_e4m3(raw);
  if (s.outer) held = held * s.whole;
  return held > s.max_scale ? s.max_scale : held;
}

LB_FN float inverse_of(const Scaling &s, uint32_t raw, float multiplier) {
  if (s.stored == LB_SCALE_E8M0) return power_of_two(254 - (int32_t)raw);
  if (s.outer) return two_level_inverse(widen_e4m3(raw), s.whole);
  const float found = inverse(multiplier);
  return found > LARGEST ? LARGEST : found;
}

// The scale to store for a block with this largest magnitude.
LB_FN uint32_t covering_scale(const Scaling &s, float absmax) {
  const bool finite = finite_bits(magnitude_bits(absmax));
  if (s.stored == LB_SCALE_E8M0) {
    const int32_t bits = (int32_t)bits_of(absmax / s.top), field = bits >> 23;
    const int32_t code = field + ((bits & 0x7FFFFF) > (field ? 0 : 1 << 22) ? 1 : 0);
    return (uint32_t)(!finite ? E8M0_NAN : code < s.last ? code : s.last);
  }
  if (s.stored == LB_SCALE_E4M3) {
    const float block = absmax / s.top, wanted = s.outer && s.whole > 0.0f ? block / s.whole : block;
    const float least = wanted < s.least ? s.least : wanted;
    return finite ? e4m3_above(least < 448.0f ? least : 448.0f) : (uint32_t)E4M3_NAN;
  }
  const uint32_t bits = bits_of(derive_scale(absmax, s.top, s.min_scale, s.max_scale));
  return s.stored == LB_SCALE_FP32 ? bits : finite ? (bits + 0xFFFFu) >> 16 : 0x7FC0u;
}

// Whether values up to this magnitude would clip: `reach` is the largest that does not, in units of the scale.
LB_FN bool clips(float absmax, float reach, float multiplier) { return !(absmax <= reach * multiplier); }

// x in steps of 1/STEPS of a code, a whole number: the nearest, and from there up or down by what that is short of x, so
// that what a code stands for exactly stays. NaN counts as 0.
template <int STEPS> LB_FN float whole_steps(float x, float scale, float inverse, float limit, bool drawn, uint32_t draw) {
  constexpr float MANY = STEPS, ONE = 1.0f / STEPS;
  const float u = x * inverse * MANY;
  float q = rint(u == u ? u : 0.0f);
  const float moved = drawn ? floor((x - q * ONE * scale) * inverse * MANY + uniform(draw)) : 0.0f;
  q = q + (moved == moved ? moved : 0.0f);
  q = q < limit ? q : limit;
  return q > -limit ? q : -limit;
}

template <int STEPS> LB_FN float limit_of(int32_t codes) {  // the largest, in such steps
  return (float)codes * (float)STEPS + (STEPS > 1 ? 127.0f : 0.0f);
}

LB_FN int32_t code_of_steps(int32_t k) { return (k + 128) >> 8; }  // of 256; what is left is -128 to 127

LB_FN float value_of_steps(int32_t k, float scale) { return (float)k * 0x1p-8f * scale; }

}  // namespace lb
