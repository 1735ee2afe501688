// Scales that are stored in a byte: which byte, from the statistic of a block, by the format's own rule. The rules are
// those of lowbit/scales.py, bit for bit.
#pragma once
#include "scaling.h"

namespace lb {

LB_FN float times(float x, float factor) {
  const float product = x * factor;
  return factor == 1.0f ? x : product > LARGEST ? LARGEST : product;
}

// The root of the mean square of a block, which was summed in units of the binade of its largest magnitude.
LB_FN float rms_of(float absmax, float mean) {
  const float root = sqrt(mean) * (absmax > 0.0f ? binade(absmax) : 1.0f);
  const float held = root > LARGEST ? LARGEST : root;
  return finite_bits(magnitude_bits(absmax)) ? held : no_number();
}

// What a block's scale is to send to the top, from its statistic.
LB_FN float wanted_of(float gain, float statistic) {
  return times(finite_bits(magnitude_bits(statistic)) ? statistic : no_number(), gain);
}

// How a format's scales become powers of two: what lb_format has under the same names.
struct PowerRule {
  int32_t power, exponent, mantissa, last;
  float top;
};

// A power of two, by its biased exponent.
LB_FN int32_t byte_e8m0(const PowerRule &f, float statistic) {
  const bool up = f.power == LB_POWER_UP;
  uint32_t bits = bits_of(up ? statistic / f.top : statistic);
  bits += f.power == LB_POWER_EVEN ? 1u << (22 - f.mantissa) : 0u;
  const uint32_t field = bits >> 23, rest = bits & 0x7FFFFFu;
  const bool next = rest > (field == 0u ? 1u << 22 : 0u) && (up || f.power == LB_POWER_CEIL);
  const int32_t code = (int32_t)field - (up ? 0 : f.exponent) + (next ? 1 : 0);
  const int32_t held = code < 0 ? 0 : code > f.last ? f.last : code;
  return finite_bits(magnitude_bits(statistic)) ? held : E8M0_NAN;
}

// The nearest FP8 number to x in [0, 448].
LB_FN int32_t nearest_e4m3(float x) {
  const uint32_t bits = bits_of(x);
  const int32_t normal = (int32_t)((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120 << 3);
  return x < 0x1p-6f ? (int32_t)rint(x * 512.0f) : normal;
}

// The outer scale that makes the largest of these `peak`.
LB_FN float outer_of(float largest, float peak) {
  const float scale = largest / peak;
  return largest > 0.0f ? scale > 0x1p-126f ? scale : 0x1p-126f : 0.0f;
}

LB_FN int32_t byte_e4m3(float top, float smallest, float wanted, float outer, float candidate) {
  const float block = wanted / top, shared = outer > 0.0f ? block / outer : block;
  const float scaled = times(shared, candidate), least = scaled < smallest ? smallest : scaled;
  const int32_t code = nearest_e4m3(least > 448.0f ? 448.0f : least);
  return finite_bits(magnitude_bits(wanted)) ? code : E4M3_NAN;
}

// An FP8 number drawn around x, which is 0 to 448, or NaN, which counts as 0.
LB_FN int32_t drawn_e4m3(float x, float share) {
  const float held = x == x ? x : 0.0f;
  const int32_t code = held < 0x1p-6f ? (int32_t)floor(held * 512.0f) : (int32_t)(bits_of(held) >> 20) - (120 << 3);
  const float low = widen_e4m3((uint32_t)code), gap = widen_e4m3((uint32_t)(code < 126 ? code + 1 : 126)) - low;
  return code + (code < 126 && held - low >= share * gap ? 1 : 0);
}

// ---- MS-EDEN (lowbit/eden.py): what rounding has lost of a run, and a scale that makes up for it, drawn anew

// A block's part in a run's sum, from what it is in units of its scale.
LB_FN double weighed(float held, float sum) { return held > 0.0f ? (double)sum * ((double)held * (double)held) : 0.0; }

LB_FN float correction_of(double squares, double products) { return products > 0.0 ? (float)(squares / products) : 1.0f; }

LB_FN int32_t corrected_e4m3(int32_t code, float correction, float share) {
  const float held = widen_e4m3((uint32_t)code), wanted = held * correction;
  return held == held ? drawn_e4m3(wanted > 448.0f ? 448.0f : wanted, share) : code;
}

}  // namespace lb
