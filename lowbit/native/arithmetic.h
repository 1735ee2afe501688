// The arithmetic of formats, one value at a time: what the CPU driver and the CUDA kernels both run, so that both give
// the bits of lowbit/codec.py, rounding.py and masters.py. No torch, no CUDA, no library: only integers, floats and
// IEEE operations. Every choice is a select, not a branch, so that a loop over values becomes vector code.
#pragma once
#include "abi.h"
#include "words.h"

namespace lb {

LB_FN bool finite_bits(uint32_t magnitude) { return magnitude < 0x7F800000u; }
LB_FN uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFu; }

// Round half to even for |x| < 2**22, by adding and taking away a number whose ulp is 1. The sum's low bits are the
// integer in two's complement.
LB_FN float shifted(float x) { return x + 12582912.0f; }
LB_FN float rint(float x) { return shifted(x) - 12582912.0f; }
LB_FN float floor(float x) {
  const float near = rint(x);
  return near > x ? near - 1.0f : near;
}

// ---- random bits (lowbit/rounding.py)

LB_FN uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The hash of two neighbouring elements; `second` is the second key, with the high bits of the pair's number folded in.
LB_FN uint32_t hash(uint32_t pair, uint32_t first, uint32_t second) {
  uint32_t x = pair + first;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) ^ second;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

LB_FN float uniform(uint32_t bits16) { return ((float)(int32_t)bits16 + 0.5f) * 0x1p-16f; }

// ---- 16-bit floats

LB_FN float widen_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

LB_FN float widen_fp16(uint16_t x) {
  const uint32_t magnitude = (uint32_t)(x & 0x7FFF) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);  // exact, subnormals too
  return float_of((magnitude >= 0x0F800000u ? 0x70000000u | magnitude : scaled) | (uint32_t)(x & 0x8000) << 16);
}

LB_FN uint16_t narrow_bf16(float x) {
  const uint32_t raw = bits_of(x);
  const uint32_t even = (raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16;
  return (uint16_t)((raw & 0x7FFFFFFFu) > 0x7F800000u ? (raw >> 16 | 0x40u) : even);
}

LB_FN uint16_t narrow_bf16(float x, uint32_t bits16) {
  const uint32_t raw = bits_of(x), magnitude = raw & 0x7FFFFFFFu;
  const uint32_t moved = (raw + (magnitude >= 0x7F800000u ? 0u : bits16)) >> 16;
  return (uint16_t)(magnitude > 0x7F800000u ? (raw >> 16 | 0x40u) : moved);
}

LB_FN uint16_t narrow_fp16(float x) {
  const uint32_t raw = bits_of(x), magnitude = raw & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // an ulp of 1/2 is a step of the grid
  uint32_t code = magnitude < 0x38800000u ? small : normal;
  code = magnitude >= 0x477FF000u ? 0x7C00u : code;
  code = magnitude > 0x7F800000u ? 0x7E00u : code;
  return (uint16_t)(code | (raw >> 16 & 0x8000u));
}

LB_FN uint16_t narrow_fp16(float x, uint32_t bits16) {
  const uint32_t raw = bits_of(x), magnitude = raw & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + (bits16 >> 3)) >> 13;
  const float grid = float_of(magnitude) * 0x1p24f, low = floor(grid < 0x1p20f ? grid : 0.0f);
  const uint32_t small = (uint32_t)(int32_t)low + (grid - low + (float)(int32_t)bits16 * 0x1p-16f >= 1.0f ? 1u : 0u);
  uint32_t code = magnitude < 0x38800000u ? small : normal;
  code = magnitude >= 0x47800000u || code > 0x7C00u ? 0x7C00u : code;
  code = magnitude > 0x7F800000u ? 0x7E00u : code;
  return (uint16_t)(code | (raw >> 16 & 0x8000u));
}

// ---- the low bits of a 16-bit parameter (lowbit/masters.py); `p` is the parameter, widened

struct Half {  // a 16-bit float format: the exponent field of its smallest normal, and half an ulp over the binade
  uint32_t least;
  float half_ulp;
};
constexpr Half BF16 = {1u << 23, 0x1p-8f}, FP16 = {113u << 23, 0x1p-11f};

LB_FN uint32_t power_of(float p, Half f) {  // of two, below p, as bits; frexp says 0 of what is not finite
  const uint32_t field = bits_of(p) & 0x7F800000u, power = field > f.least ? field : f.least;
  return power < 0x7F800000u ? power : 0x3F000000u;
}
LB_FN float half_ulp(float p, Half f) { return float_of(power_of(p, f)) * f.half_ulp; }

// x / half_ulp(p), exactly for what is left of a number that was rounded to p: by 2 / power, which is a float where 1 / power
// or 1 / half_ulp need not be.
LB_FN float half_ulps(float x, float p, Half f) { return x * float_of(0x7F800000u - power_of(p, f)) * (0.5f / f.half_ulp); }

LB_FN float load_kahan(float p, float error, Half f) {
  const bool own = float_of(magnitude_bits(error)) <= half_ulp(p, f);
  return p + (own ? error : 0.0f);
}

// Half an ulp is cut into COUNT steps. A number of steps times COARSE is exact, and with what is missing, times FINE, it
// is rounded as number / COUNT is, for each number there is.
struct Steps {
  float count, coarse, fine;
};
constexpr Steps STEPS8 = {127.0f, 0x1p-7f, 0x1.020408p-14f}, STEPS16 = {8192.0f, 0x1p-13f, 0.0f};

LB_FN float load_share(float p, float steps, Steps of, Half f) {
  return p + (steps * of.coarse + steps * of.fine) * half_ulp(p, f);
}

LB_FN float store_share(float value, float p, Steps of, Half f) {
  float share = half_ulps(value - p, p, f);
  share = share == share ? share : 0.0f;
  share = share > 1.0f ? 1.0f : share;
  return rint((share < -1.0f ? -1.0f : share) * of.count);
}

// The bits of which split16 stores the upper half, ties going up, and then what is left, so that it fits 16 bits; a NaN
// must not carry into the sign.
LB_FN uint32_t bits_to_split(float x) { return x == x ? bits_of(x) : 0x7FC00000u; }
LB_FN uint16_t high_split16(float x) { return (uint16_t)((bits_to_split(x) + 0x8000u) >> 16); }
LB_FN int16_t low_split16(float x, uint16_t high) { return (int16_t)(bits_to_split(x) - ((uint32_t)high << 16)); }

LB_FN float load_split16(uint16_t p, int16_t low) {  // below the bits of 0 are those of NaNs
  const int32_t kept = (p & 0x7FFF) == 0 && low < 0 ? 0 : low;
  return float_of(((uint32_t)p << 16) + (uint32_t)kept);
}

// ---- scales

// absmax / top, held where its reciprocal and the top are finite; 0 for a block of zeros, NaN if not finite.
LB_FN float derive_scale(float absmax, float top, float least, float most) {
  float scale = absmax / top;
  scale = scale < least ? least : scale;
  scale = scale > most ? most : scale;
  scale = finite_bits(magnitude_bits(absmax)) ? scale : float_of(0x7FC00000u);
  return absmax == 0.0f ? 0.0f : scale;
}

LB_FN float inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// The scale of an affine block from its range, low <= 0 <= high; and where 0 lies.
LB_FN float affine_scale(float low, float high, float limit, float least, float most, float *zero) {
  const float span = high - low;
  const bool finite = finite_bits(magnitude_bits(low)) && finite_bits(magnitude_bits(high));
  const bool overflow = finite && !finite_bits(magnitude_bits(span));
  const float scale = overflow ? high / limit - low / limit : derive_scale(span, limit, least, most);
  const float nearest = rint(-low * inverse(scale));
  *zero = !(nearest > 0.0f) ? 0.0f : nearest > limit ? limit : nearest;
  return scale;
}

enum { ROOT_STEPS = 6 };

// The n-th root of x in [2**-126, 1], by a fixed course of IEEE operations (lowbit/codec.py has the same).
LB_FN double fixed_root(double x, int n) {
  const int64_t one = 0x3FF0000000000000, apart = bits_of(x) - one;  // not above 0
  double y = double_of(one - (n - 1 - apart) / n);
  for (int step = 0; step < ROOT_STEPS; ++step) {
    double power = y;
    for (int k = 2; k < n; ++k) power = power * y;
    y = y - (y - x / power) / n;
  }
  return y;
}

// The base with which the lowest of `count` powers is `low` in units of the scale.
LB_FN float base_of(float low, float scale, int count) {
  double ratio = (double)low / (double)scale;
  ratio = ratio < 0x1p-126 ? 0x1p-126 : ratio > 1.0 ? 1.0 : ratio;
  return (float)fixed_root(ratio, count - 1);
}

// What codes of a block are taken from: x in units of the scale; NaN (a block that is not finite) counts as 0.
LB_FN float in_units(float x, float inverse) {
  const float unit = x * inverse;
  const float least = unit == unit ? unit : 0.0f;
  return least > 3.4028234663852886e38f ? 3.4028234663852886e38f : least < -3.4028234663852886e38f ? -3.4028234663852886e38f : least;
}

}  // namespace lb
