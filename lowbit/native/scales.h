// The scales of a stored weight in memory: 32 bits, 16 or 8. What they mean is in scaling.h.
#pragma once
#include "scaling.h"
#include "span.h"

namespace LB_SPACE {

static Scaling scaling_of(const lb_job &job) {
  const lb_format &f = *job.weight.format;
  return {job.scaled, job.last, job.least_scale, f.top, f.min_scale, f.max_scale,
          job.tensor_scale != nullptr, job.tensor_scale ? *job.tensor_scale : 1.0f};
}

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

// What the blocks of a span are multiplied with, as they are stored.
static const float *multipliers(const Run &run, const Span &s, Room &room) {
  const lb_job &job = *run.job;
  const lb_operand &o = job.weight;
  const int64_t first = s.row * o.scales + (s.col >> block_shift(*o.format));
  if (job.scaled == LB_SCALE_FP32) return o.scale + first;
  const int each = sub_block(*o.format, run.cut), count = (s.n + each - 1) / each;
  const Scaling scaling = scaling_of(job);
  for (int k = 0; k < count; ++k) room.multipliers[k] = multiplier_of(scaling, stored_scale(job, first + k));
  return room.multipliers;
}

}  // namespace LB_SPACE
