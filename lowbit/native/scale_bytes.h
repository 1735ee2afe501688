// Scales that are stored in a byte: which byte, from the largest magnitude of a block, by the format's own rule. The rules
// are those of lowbit/scales.py, bit for bit; what a byte stands for comes from there.
#pragma once
#include "scaling.h"

namespace lb {

constexpr float LARGEST = 3.4028234663852886e38f;

LB_FN float times(float x, float factor) {
  const float product = x * factor;
  return factor == 1.0f ? x : product > LARGEST ? LARGEST : product;
}

// The root of the mean square of a block, which was summed in units of the binade of its largest magnitude.
LB_FN float rms_of(float absmax, double mean) {
  const float root = sqrt((float)mean) * (absmax > 0.0f ? binade(absmax) : 1.0f);
  const float held = root > LARGEST ? LARGEST : root;
  return finite_bits(magnitude_bits(absmax)) ? held : no_number();
}

// A power of two, by its biased exponent.
LB_FN int32_t byte_e8m0(const lb_format &f, float statistic) {
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

LB_FN int32_t byte_e4m3(const lb_format &f, float wanted, float outer, float candidate) {
  const float block = wanted / f.top, shared = outer > 0.0f ? block / outer : block;
  const float scaled = times(shared, candidate), least = scaled < f.smallest ? f.smallest : scaled;
  const int32_t code = nearest_e4m3(least > 448.0f ? 448.0f : least);
  return finite_bits(magnitude_bits(wanted)) ? code : E4M3_NAN;
}

// Of a block whose largest magnitude is absmax, with one of the format's candidates.
LB_FN int32_t byte_of(const lb_format &f, float absmax, float outer, float candidate) {
  const float statistic = finite_bits(magnitude_bits(absmax)) ? absmax : no_number();
  const float wanted = times(statistic, f.gain);
  return f.stored == LB_SCALE_E8M0 ? byte_e8m0(f, times(wanted, candidate)) : byte_e4m3(f, wanted, outer, candidate);
}

}  // namespace lb
