// The scale of a block of a stored weight, from what is stored to what is multiplied with, and the smallest with which
// none of its values clips: lowbit/scales.py, one block at a time. What is stored is held as 32 bits.
#pragma once
#include "span.h"

namespace LB_SPACE {

constexpr float NO_NUMBER = __builtin_nanf(""), HUGE_SCALE = 3.4028234663852886e38f;
enum { E8M0_NAN = 255, E4M3_NAN = 0x7F };

static uint32_t stored_scale(const lb_job &job, int64_t number) {
  const void *from = job.weight.scale;
  return job.scaled == LB_SCALE_FP32   ? ((const uint32_t *)from)[number]
         : job.scaled == LB_SCALE_BF16 ? ((const uint16_t *)from)[number]
                                       : ((const uint8_t *)from)[number];
}

static void store_scale(const lb_job &job, int64_t number, uint32_t raw) {
  void *to = job.weight.scale;
  if (job.scaled == LB_SCALE_FP32) ((uint32_t *)to)[number] = raw;
  else if (job.scaled == LB_SCALE_BF16) ((uint16_t *)to)[number] = (uint16_t)raw;
  else ((uint8_t *)to)[number] = (uint8_t)raw;
}

LB_FN float power_of_two(int32_t field) {  // 2**(field - 127), from 2**-127 on; 0 below
  return float_of(field > 0 ? (uint32_t)field << 23 : field == 0 ? 1u << 22 : 0u);
}

LB_FN float widen_e4m3(uint32_t code) {
  const int32_t field = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = field ? (float)(8 + mantissa) * power_of_two(field + 117) : (float)mantissa * 0x1p-9f;
  const float value = (code & 0x7F) == E4M3_NAN ? NO_NUMBER : magnitude;
  return code & 0x80 ? -value : value;
}

// The smallest e4m3 number that is not below x, for x from 0 to 448.
LB_FN uint32_t e4m3_above(float x) {
  const uint32_t normal = ((bits_of(x) + 0xFFFFFu) >> 20) - (120u << 3);
  return x < 0x1p-6f ? (uint32_t)(int32_t)-lb::floor(x * -0x1p9f) : normal;
}

static float multiplier_of(const lb_job &job, uint32_t raw) {
  if (job.scaled == LB_SCALE_FP32) return float_of(raw);
  if (job.scaled == LB_SCALE_E8M0) return raw == E8M0_NAN ? NO_NUMBER : power_of_two((int32_t)raw);
  float held = job.scaled == LB_SCALE_BF16 ? widen_bf16((uint16_t)raw) : widen_e4m3(raw);
  if (job.tensor_scale) held = held * *job.tensor_scale;
  const float most = job.weight.format->max_scale;
  return held > most ? most : held;
}

static float inverse_of(const lb_job &job, uint32_t raw, float multiplier) {
  if (job.scaled == LB_SCALE_E8M0) return power_of_two(254 - (int32_t)raw);
  float found = inverse(multiplier);
  if (job.tensor_scale) {
    const float whole = *job.tensor_scale, both = 1.0f / whole / widen_e4m3(raw);
    found = whole > 0.0f && both == both ? both : 0.0f;
  }
  return found > HUGE_SCALE ? HUGE_SCALE : found;
}

static uint32_t covering_scale(const lb_job &job, float absmax) {
  const lb_format &f = *job.weight.format;
  const bool finite = finite_bits(magnitude_bits(absmax));
  if (job.scaled == LB_SCALE_E8M0) {
    const int32_t bits = (int32_t)bits_of(absmax / f.top), field = bits >> 23;
    const int32_t code = field + ((bits & 0x7FFFFF) > (field ? 0 : 1 << 22) ? 1 : 0);
    return !finite ? E8M0_NAN : code < job.last ? code : job.last;
  }
  if (job.scaled == LB_SCALE_E4M3) {
    const float whole = job.tensor_scale ? *job.tensor_scale : 0.0f;
    const float wanted = whole > 0.0f ? absmax / f.top / whole : absmax / f.top;
    const float least = wanted < job.least_scale ? job.least_scale : wanted;
    return finite ? e4m3_above(least < 448.0f ? least : 448.0f) : E4M3_NAN;
  }
  const uint32_t bits = bits_of(derive_scale(absmax, f.top, f.min_scale, f.max_scale));
  return job.scaled == LB_SCALE_FP32 ? bits : finite ? (bits + 0xFFFFu) >> 16 : 0x7FC0u;
}

// What the blocks of a span are multiplied with, as they are stored.
static const float *multipliers(const Run &run, const Span &s, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const int64_t first = s.row * o.scales + (s.col >> block_shift(*o.format));
  if (job.scaled == LB_SCALE_FP32) return o.scale + first;
  const int count = (s.n + sub_block(*o.format, run.cut) - 1) / sub_block(*o.format, run.cut);
  for (int k = 0; k < count; ++k) room.multipliers[k] = multiplier_of(job, stored_scale(job, first + k));
  return room.multipliers;
}

}  // namespace LB_SPACE
