// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
//
// For a file that defines LB_KERNEL(symbol): how the declaration of an exported function of that name begins.
#pragma once
#include "abi.h"
#include "rules.h"

LB_KERNEL(adamw_weigh)(const lb_frame *frame) {
  adamw_weigh<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_weigh<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  adamw_weigh<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
  frame->s[frame->si[1]] = s.exp_avg_sq_weight;
}

LB_KERNEL(adamw_debias)(const lb_frame *frame) {
  adamw_debias<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]]};
  const adamw_debias<float>::C c = {frame->c[frame->ci[0]]};
  adamw_debias<float>::apply(s, c);
  frame->s[frame->si[0]] = s.step_size;
  frame->s[frame->si[2]] = s.root;
}

template <uint32_t ROOTS>
static void adamw_adamw_run(const lb_frame *frame) {
  const adamw_adamw<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_adamw<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[4] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      float v = frame->in[3][at];
      peaks[3] = lb::peak_of(peaks[3], g);
      adamw_adamw<float>::apply(p, g, m, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
      if (ROOTS & 4) v = lb::sqrt(v);
      frame->out[2][at] = v;
      peaks[2] = lb::peak_of(peaks[2], v);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
    *found++ = (uint32_t)peaks[3];
  }
}
LB_KERNEL(adamw_adamw)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return adamw_adamw_run<4>(frame);
    default: return adamw_adamw_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct adamw_adamw_lanes {
  using Stage = adamw_adamw<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::S s;
  typename Stage::C c;
  explicit adamw_adamw_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adamw_adamw_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adamw_adamw)
#endif

template <uint32_t ROOTS>
static void adamw_amsgrad_run(const lb_frame *frame) {
  const adamw_amsgrad<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_amsgrad<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[5] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      float v = frame->in[3][at];
      float h = frame->in[4][at];
      peaks[4] = lb::peak_of(peaks[4], g);
      adamw_amsgrad<float>::apply(p, g, m, v, h, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
      if (ROOTS & 4) v = lb::sqrt(v);
      frame->out[2][at] = v;
      peaks[2] = lb::peak_of(peaks[2], v);
      if (ROOTS & 8) h = lb::sqrt(h);
      frame->out[3][at] = h;
      peaks[3] = lb::peak_of(peaks[3], h);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
    *found++ = (uint32_t)peaks[3];
    *found++ = (uint32_t)peaks[4];
  }
}
LB_KERNEL(adamw_amsgrad)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return adamw_amsgrad_run<4>(frame);
    case 8: return adamw_amsgrad_run<8>(frame);
    case 12: return adamw_amsgrad_run<12>(frame);
    default: return adamw_amsgrad_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct adamw_amsgrad_lanes {
  using Stage = adamw_amsgrad<LB_SPACE::Lanes>;
  static constexpr int READS = 5, WRITES = 4, MOMENTS = 3;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmmm";
  static constexpr int PLACES[] = {0, 2, 3, 4};
  typename Stage::S s;
  typename Stage::C c;
  explicit adamw_amsgrad_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adamw_amsgrad_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], x[4], stage.s, stage.c);
  }
};
LB_FUSED(adamw_amsgrad)
#endif

LB_KERNEL(stabilizers_peak)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = stabilizers_peak<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_weigh_peak)(const lb_frame *frame) {
  stabilizers_weigh_peak<float>::S s = {frame->s[frame->si[0]]};
  const stabilizers_weigh_peak<float>::C c = {frame->c[frame->ci[0]]};
  stabilizers_weigh_peak<float>::apply(s, c);
  frame->s[frame->si[0]] = s.m_max_weight;
}

LB_KERNEL(stabilizers_peak_weight)(const lb_frame *frame) {
  stabilizers_peak_weight<float>::S s = {frame->s[frame->si[0]]};
  const stabilizers_peak_weight<float>::C c = {frame->c[frame->ci[0]]};
  stabilizers_peak_weight<float>::apply(s, c);
  frame->s[frame->si[0]] = s.m_max_weight;
}

LB_KERNEL(stabilizers_limit)(const lb_frame *frame) {
  stabilizers_limit<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]], frame->s[frame->si[4]]};
  const stabilizers_limit<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  stabilizers_limit<float>::apply(x, s, c);
  frame->s[frame->si[0]] = s.m_max_t;
  frame->s[frame->si[1]] = s.clip_limit;
  frame->s[frame->si[3]] = s.clip_share;
  frame->s[frame->si[4]] = s.unit;
}

LB_KERNEL(stabilizers_clip_spikes)(const lb_frame *frame) {
  const stabilizers_clip_spikes<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_clip_spikes<float>::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct stabilizers_clip_spikes_lanes {
  using Stage = stabilizers_clip_spikes<LB_SPACE::Lanes>;
  static constexpr int READS = 1, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 0;
  static constexpr char ROLES[] = "g";
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  explicit stabilizers_clip_spikes_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const stabilizers_clip_spikes_lanes &stage) {
    Stage::apply(x[0], stage.s);
  }
};
LB_FUSED(stabilizers_clip_spikes)
#endif

LB_KERNEL(stabilizers_energy)(const lb_frame *frame) {
  const stabilizers_energy<float>::S s = {frame->s[frame->si[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = stabilizers_energy<float>::apply(g, s);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_weigh_norm)(const lb_frame *frame) {
  stabilizers_weigh_norm<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stabilizers_weigh_norm<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stabilizers_weigh_norm<float>::apply(s, c);
  frame->s[frame->si[0]] = s.m_norm_weight;
  frame->s[frame->si[1]] = s.v_norm_weight;
}

LB_KERNEL(stabilizers_norm_weight)(const lb_frame *frame) {
  stabilizers_norm_weight<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stabilizers_norm_weight<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stabilizers_norm_weight<float>::apply(s, c);
  frame->s[frame->si[0]] = s.m_norm_weight;
  frame->s[frame->si[1]] = s.v_norm_weight;
}

LB_KERNEL(stabilizers_gain)(const lb_frame *frame) {
  stabilizers_gain<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]], frame->s[frame->si[4]], frame->s[frame->si[5]]};
  const stabilizers_gain<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const float x = frame->x[0];
  stabilizers_gain<float>::apply(x, s, c);
  frame->s[frame->si[1]] = s.m_norm_t;
  frame->s[frame->si[2]] = s.v_norm_t;
  frame->s[frame->si[5]] = s.norm_gain;
}

LB_KERNEL(stabilizers_normalize)(const lb_frame *frame) {
  const stabilizers_normalize<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_normalize<float>::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct stabilizers_normalize_lanes {
  using Stage = stabilizers_normalize<LB_SPACE::Lanes>;
  static constexpr int READS = 1, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 0;
  static constexpr char ROLES[] = "g";
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  explicit stabilizers_normalize_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const stabilizers_normalize_lanes &stage) {
    Stage::apply(x[0], stage.s);
  }
};
LB_FUSED(stabilizers_normalize)
#endif

LB_KERNEL(stabilizers_clip_to_moment)(const lb_frame *frame) {
  const stabilizers_clip_to_moment<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      const float v = frame->in[1][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_clip_to_moment<float>::apply(g, v, c);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct stabilizers_clip_to_moment_lanes {
  using Stage = stabilizers_clip_to_moment<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 0;
  static constexpr char ROLES[] = "gv";
  static constexpr int PLACES[] = {0};
  typename Stage::C c;
  explicit stabilizers_clip_to_moment_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const stabilizers_clip_to_moment_lanes &stage) {
    Stage::apply(x[0], x[1], stage.c);
  }
};
LB_FUSED(stabilizers_clip_to_moment)
#endif

LB_KERNEL(stabilizers_energy_of_all)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = stabilizers_energy_of_all<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_share)(const lb_frame *frame) {
  stabilizers_share<float>::S s = {frame->s[frame->si[0]]};
  const stabilizers_share<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  stabilizers_share<float>::apply(x, s, c);
  frame->s[frame->si[0]] = s.global_share;
}

LB_KERNEL(stabilizers_scale_all)(const lb_frame *frame) {
  const stabilizers_scale_all<float>::S s = {frame->s[frame->si[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_scale_all<float>::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct stabilizers_scale_all_lanes {
  using Stage = stabilizers_scale_all<LB_SPACE::Lanes>;
  static constexpr int READS = 1, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 0;
  static constexpr char ROLES[] = "g";
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  explicit stabilizers_scale_all_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const stabilizers_scale_all_lanes &stage) {
    Stage::apply(x[0], stage.s);
  }
};
LB_FUSED(stabilizers_scale_all)
#endif

LB_KERNEL(stable_spam_closed_form)(const lb_frame *frame) {
  stable_spam_closed_form<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stable_spam_closed_form<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stable_spam_closed_form<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
  frame->s[frame->si[1]] = s.exp_avg_sq_weight;
}
