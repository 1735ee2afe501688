// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
//
// For a file that defines LB_KERNEL(symbol): how the declaration of an exported function of that name begins.
#pragma once
#include "abi.h"
#include "rules.h"

LB_KERNEL(adafactor_weigh)(const lb_frame *frame) {
  adafactor_weigh<float>::S s = {frame->s[frame->si[0]]};
  const adafactor_weigh<float>::C c = {frame->c[frame->ci[0]]};
  adafactor_weigh<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_sq_weight;
}

LB_KERNEL(adafactor_rows_square)(const lb_frame *frame) {
  const adafactor_rows_square<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adafactor_rows_square<float>::apply(g, c);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_average_rows)(const lb_frame *frame) {
  const adafactor_average_rows<float>::S s = {frame->s[frame->si[0]]};
  const adafactor_average_rows<float>::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float r = frame->in[0][at];
    const float x = frame->x[at];
    float a;
    adafactor_average_rows<float>::apply(r, a, x, s, c);
    frame->out[0][at] = r;
    frame->out[1][at] = a;
  }
}

LB_KERNEL(adafactor_centre)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float r = frame->in[0][at];
      const float measured_ = adafactor_centre<float>::apply(r);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(adafactor_keep_centre)(const lb_frame *frame) {
  adafactor_keep_centre<float>::S s = {frame->s[frame->si[0]]};
  const float x = frame->x[0];
  adafactor_keep_centre<float>::apply(x, s);
  frame->s[frame->si[0]] = s.centre;
}

LB_KERNEL(adafactor_columns_square)(const lb_frame *frame) {
  const adafactor_columns_square<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adafactor_columns_square<float>::apply(g, c);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_average_columns)(const lb_frame *frame) {
  const adafactor_average_columns<float>::S s = {frame->s[frame->si[0]]};
  const adafactor_average_columns<float>::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float k = frame->in[0][at];
    const float x = frame->x[at];
    float b;
    adafactor_average_columns<float>::apply(k, b, x, s, c);
    frame->out[0][at] = k;
    frame->out[1][at] = b;
  }
}

LB_KERNEL(adafactor_factored)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      const float a = frame->in[1][at];
      const float b = frame->in[2][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      adafactor_factored<float>::apply(g, a, b);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

template <uint32_t ROOTS>
static void adafactor_full_run(const lb_frame *frame) {
  const adafactor_full<float>::S s = {frame->s[frame->si[0]]};
  const adafactor_full<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      float v = frame->in[1][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adafactor_full<float>::apply(g, v, s, c);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
      if (ROOTS & 2) v = lb::sqrt(v);
      frame->out[1][at] = v;
      peaks[1] = lb::peak_of(peaks[1], v);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
LB_KERNEL(adafactor_full)(const lb_frame *frame) {
  switch (frame->roots) {
    case 2: return adafactor_full_run<2>(frame);
    default: return adafactor_full_run<0>(frame);
  }
}

LB_KERNEL(adafactor_size)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float p = frame->in[0][at];
      const float measured_ = adafactor_size<float>::apply(p);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(adafactor_scale)(const lb_frame *frame) {
  adafactor_scale<float>::S s = {frame->s[frame->si[0]]};
  const adafactor_scale<float>::C c = {frame->c[frame->ci[0]]};
  const float x = frame->x[0];
  adafactor_scale<float>::apply(x, s, c);
  frame->s[frame->si[0]] = s.scale;
}

LB_KERNEL(adafactor_energy)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adafactor_energy<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_clip)(const lb_frame *frame) {
  adafactor_clip<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]]};
  const adafactor_clip<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const float x = frame->x[0];
  adafactor_clip<float>::apply(x, s, c);
  frame->s[frame->si[0]] = s.shrink;
  frame->s[frame->si[2]] = s.rate;
}

LB_KERNEL(adafactor_descend)(const lb_frame *frame) {
  const adafactor_descend<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      adafactor_descend<float>::apply(p, g, s);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct adafactor_descend_lanes {
  using Stage = adafactor_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pg";
  static constexpr bool UNSIGNED[] = {false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  explicit adafactor_descend_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adafactor_descend_lanes &stage) {
    Stage::apply(x[0], x[1], stage.s);
  }
};
LB_FUSED(adafactor_descend)
#endif

LB_KERNEL(adafactor_descend_average)(const lb_frame *frame) {
  const adafactor_descend_average<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adafactor_descend_average<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adafactor_descend_average<float>::apply(p, g, m, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct adafactor_descend_average_lanes {
  using Stage = adafactor_descend_average<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgm";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::S s;
  typename Stage::C c;
  explicit adafactor_descend_average_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adafactor_descend_average_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.s, stage.c);
  }
};
LB_FUSED(adafactor_descend_average)
#endif

LB_KERNEL(adam_mini_mean_square)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adam_mini_mean_square<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adam_mini_mean_square_of_columns)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adam_mini_mean_square_of_columns<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adam_mini_average_square)(const lb_frame *frame) {
  const adam_mini_average_square<float>::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float v = frame->in[0][at];
    const float x = frame->x[at];
    adam_mini_average_square<float>::apply(v, x, c);
    frame->out[0][at] = v;
  }
}

LB_KERNEL(adam_mini_mini)(const lb_frame *frame) {
  const adam_mini_mini<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_mini<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      const float v = frame->in[3][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adam_mini_mini<float>::apply(p, g, m, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct adam_mini_mini_lanes {
  using Stage = adam_mini_mini<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmv";
  static constexpr bool UNSIGNED[] = {false, false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::S s;
  typename Stage::C c;
  explicit adam_mini_mini_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adam_mini_mini_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adam_mini_mini)
#endif

LB_KERNEL(adam_mini_mini_undecayed)(const lb_frame *frame) {
  const adam_mini_mini_undecayed<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_mini_undecayed<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      const float v = frame->in[3][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adam_mini_mini_undecayed<float>::apply(p, g, m, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct adam_mini_mini_undecayed_lanes {
  using Stage = adam_mini_mini_undecayed<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmv";
  static constexpr bool UNSIGNED[] = {false, false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::S s;
  typename Stage::C c;
  explicit adam_mini_mini_undecayed_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adam_mini_mini_undecayed_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adam_mini_mini_undecayed)
#endif

template <uint32_t ROOTS>
static void adam_mini_adam_run(const lb_frame *frame) {
  const adam_mini_adam<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_adam<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      adam_mini_adam<float>::apply(p, g, m, v, s, c);
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
LB_KERNEL(adam_mini_adam)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return adam_mini_adam_run<4>(frame);
    default: return adam_mini_adam_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct adam_mini_adam_lanes {
  using Stage = adam_mini_adam<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::S s;
  typename Stage::C c;
  explicit adam_mini_adam_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adam_mini_adam_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adam_mini_adam)
#endif

LB_KERNEL(adams_weigh)(const lb_frame *frame) {
  adams_weigh<float>::S s = {frame->s[frame->si[0]]};
  const adams_weigh<float>::C c = {frame->c[frame->ci[0]]};
  adams_weigh<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
}

LB_KERNEL(adams_unweighted)(const lb_frame *frame) {
  adams_unweighted<float>::S s = {frame->s[frame->si[0]]};
  const adams_unweighted<float>::C c = {frame->c[frame->ci[0]]};
  adams_unweighted<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
}

LB_KERNEL(adams_adams)(const lb_frame *frame) {
  const adams_adams<float>::S s = {frame->s[frame->si[0]]};
  const adams_adams<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adams_adams<float>::apply(p, g, m, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct adams_adams_lanes {
  using Stage = adams_adams<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgm";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::S s;
  typename Stage::C c;
  explicit adams_adams_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adams_adams_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.s, stage.c);
  }
};
LB_FUSED(adams_adams)
#endif

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
  static constexpr bool UNSIGNED[] = {false, false, false, true};
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
  static constexpr bool UNSIGNED[] = {false, false, false, true, true};
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

template <uint32_t ROOTS>
static void adapm_second_run(const lb_frame *frame) {
  const adapm_second<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float v = frame->in[0][at];
      const float g = frame->in[1][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      adapm_second<float>::apply(v, g, c);
      if (ROOTS & 1) v = lb::sqrt(v);
      frame->out[0][at] = v;
      peaks[0] = lb::peak_of(peaks[0], v);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
LB_KERNEL(adapm_second)(const lb_frame *frame) {
  switch (frame->roots) {
    case 1: return adapm_second_run<1>(frame);
    default: return adapm_second_run<0>(frame);
  }
}

LB_KERNEL(adapm_weigh_second)(const lb_frame *frame) {
  adapm_weigh_second<float>::S s = {frame->s[frame->si[0]]};
  const adapm_weigh_second<float>::C c = {frame->c[frame->ci[0]]};
  adapm_weigh_second<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_sq_weight;
}

LB_KERNEL(adapm_debias_second)(const lb_frame *frame) {
  adapm_debias_second<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  adapm_debias_second<float>::apply(s);
  frame->s[frame->si[0]] = s.root;
}

LB_KERNEL(adapm_share)(const lb_frame *frame) {
  adapm_share<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_share<float>::C c = {frame->c[frame->ci[0]]};
  adapm_share<float>::apply(s, c);
  frame->s[frame->si[0]] = s.accumulated;
}

LB_KERNEL(adapm_descend_low)(const lb_frame *frame) {
  const adapm_descend_low<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_descend_low<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float v = frame->in[1][at];
      const float a = frame->in[2][at];
      const float w = frame->in[3][at];
      adapm_descend_low<float>::apply(p, v, a, w, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}
#ifdef LB_FUSED
struct adapm_descend_low_lanes {
  using Stage = adapm_descend_low<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = -1;
  static constexpr char ROLES[] = "pvvv";
  static constexpr bool UNSIGNED[] = {false, false, false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  typename Stage::C c;
  explicit adapm_descend_low_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adapm_descend_low_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adapm_descend_low)
#endif

LB_KERNEL(adapm_descend_full)(const lb_frame *frame) {
  const adapm_descend_full<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_descend_full<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      const float v = frame->in[3][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      adapm_descend_full<float>::apply(p, g, m, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct adapm_descend_full_lanes {
  using Stage = adapm_descend_full<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmv";
  static constexpr bool UNSIGNED[] = {false, false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::S s;
  typename Stage::C c;
  explicit adapm_descend_full_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adapm_descend_full_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(adapm_descend_full)
#endif

LB_KERNEL(adapm_descend_bare)(const lb_frame *frame) {
  const adapm_descend_bare<float>::S s = {frame->s[frame->si[0]]};
  const adapm_descend_bare<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      const float v = frame->in[2][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      adapm_descend_bare<float>::apply(p, g, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct adapm_descend_bare_lanes {
  using Stage = adapm_descend_bare<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgv";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  typename Stage::C c;
  explicit adapm_descend_bare_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const adapm_descend_bare_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.s, stage.c);
  }
};
LB_FUSED(adapm_descend_bare)
#endif

LB_KERNEL(apollo_descend)(const lb_frame *frame) {
  const apollo_descend<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const apollo_descend<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float e = frame->in[1][at];
      apollo_descend<float>::apply(p, e, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}
#ifdef LB_FUSED
struct apollo_descend_lanes {
  using Stage = apollo_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = -1;
  static constexpr char ROLES[] = "pv";
  static constexpr bool UNSIGNED[] = {false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  typename Stage::C c;
  explicit apollo_descend_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const apollo_descend_lanes &stage) {
    Stage::apply(x[0], x[1], stage.s, stage.c);
  }
};
LB_FUSED(apollo_descend)
#endif

LB_KERNEL(fira_energy)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float e = frame->in[0][at];
      const float measured_ = fira_energy<float>::apply(e);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(fira_limit)(const lb_frame *frame) {
  fira_limit<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const fira_limit<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  fira_limit<float>::apply(x, s, c);
  frame->s[frame->si[1]] = s.limiter;
  frame->s[frame->si[0]] = s.limited_norm;
}

LB_KERNEL(fira_descend)(const lb_frame *frame) {
  const fira_descend<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const fira_descend<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float u = frame->in[1][at];
      const float e = frame->in[2][at];
      fira_descend<float>::apply(p, u, e, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}
#ifdef LB_FUSED
struct fira_descend_lanes {
  using Stage = fira_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = -1;
  static constexpr char ROLES[] = "pvv";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  typename Stage::C c;
  explicit fira_descend_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const fira_descend_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.s, stage.c);
  }
};
LB_FUSED(fira_descend)
#endif

template <uint32_t ROOTS>
static void galore_adam_run(const lb_frame *frame) {
  const galore_adam<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float r = frame->in[0][at];
      float m = frame->in[1][at];
      float v = frame->in[2][at];
      float n;
      galore_adam<float>::apply(r, m, v, n, c);
      if (ROOTS & 1) n = lb::sqrt(n);
      frame->out[0][at] = n;
      peaks[0] = lb::peak_of(peaks[0], n);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
      if (ROOTS & 4) v = lb::sqrt(v);
      frame->out[2][at] = v;
      peaks[2] = lb::peak_of(peaks[2], v);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
LB_KERNEL(galore_adam)(const lb_frame *frame) {
  switch (frame->roots) {
    case 1: return galore_adam_run<1>(frame);
    case 4: return galore_adam_run<4>(frame);
    case 5: return galore_adam_run<5>(frame);
    default: return galore_adam_run<0>(frame);
  }
}

LB_KERNEL(galore_stride)(const lb_frame *frame) {
  galore_stride<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]]};
  const galore_stride<float>::C c = {frame->c[frame->ci[0]]};
  galore_stride<float>::apply(s, c);
  frame->s[frame->si[0]] = s.step_size;
}

LB_KERNEL(galore_descend)(const lb_frame *frame) {
  const galore_descend<float>::S s = {frame->s[frame->si[0]]};
  const galore_descend<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float u = frame->in[1][at];
      galore_descend<float>::apply(p, u, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}
#ifdef LB_FUSED
struct galore_descend_lanes {
  using Stage = galore_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = -1;
  static constexpr char ROLES[] = "pv";
  static constexpr bool UNSIGNED[] = {false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::S s;
  typename Stage::C c;
  explicit galore_descend_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]]}, c{frame->c[frame->ci[0]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const galore_descend_lanes &stage) {
    Stage::apply(x[0], x[1], stage.s, stage.c);
  }
};
LB_FUSED(galore_descend)
#endif

template <uint32_t ROOTS>
static void galore_adam_full_run(const lb_frame *frame) {
  const galore_adam_full<float>::S s = {frame->s[frame->si[0]]};
  const galore_adam_full<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      galore_adam_full<float>::apply(p, g, m, v, s, c);
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
LB_KERNEL(galore_adam_full)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return galore_adam_full_run<4>(frame);
    default: return galore_adam_full_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct galore_adam_full_lanes {
  using Stage = galore_adam_full<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::S s;
  typename Stage::C c;
  explicit galore_adam_full_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const galore_adam_full_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(galore_adam_full)
#endif

LB_KERNEL(lion_lion)(const lb_frame *frame) {
  const lion_lion<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float m = frame->in[2][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      lion_lion<float>::apply(p, g, m, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = m;
      peaks[1] = lb::peak_of(peaks[1], m);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct lion_lion_lanes {
  using Stage = lion_lion<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgm";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::C c;
  explicit lion_lion_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const lion_lion_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.c);
  }
};
LB_FUSED(lion_lion)
#endif

template <uint32_t ROOTS>
static void matrices_carry_run(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      float carried;
      peaks[1] = lb::peak_of(peaks[1], g);
      matrices_carry<float>::apply(g, carried);
      if (ROOTS & 1) carried = lb::sqrt(carried);
      frame->out[0][at] = carried;
      peaks[0] = lb::peak_of(peaks[0], carried);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
LB_KERNEL(matrices_carry)(const lb_frame *frame) {
  switch (frame->roots) {
    case 1: return matrices_carry_run<1>(frame);
    default: return matrices_carry_run<0>(frame);
  }
}

template <uint32_t ROOTS>
static void muon_average_run(const lb_frame *frame) {
  const muon_average<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      float m = frame->in[1][at];
      float u;
      peaks[2] = lb::peak_of(peaks[2], g);
      muon_average<float>::apply(g, m, u, c);
      frame->out[0][at] = m;
      peaks[0] = lb::peak_of(peaks[0], m);
      if (ROOTS & 2) u = lb::sqrt(u);
      frame->out[1][at] = u;
      peaks[1] = lb::peak_of(peaks[1], u);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
LB_KERNEL(muon_average)(const lb_frame *frame) {
  switch (frame->roots) {
    case 2: return muon_average_run<2>(frame);
    default: return muon_average_run<0>(frame);
  }
}

template <uint32_t ROOTS>
static void muon_nesterov_run(const lb_frame *frame) {
  const muon_nesterov<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      float m = frame->in[1][at];
      float u;
      peaks[2] = lb::peak_of(peaks[2], g);
      muon_nesterov<float>::apply(g, m, u, c);
      frame->out[0][at] = m;
      peaks[0] = lb::peak_of(peaks[0], m);
      if (ROOTS & 2) u = lb::sqrt(u);
      frame->out[1][at] = u;
      peaks[1] = lb::peak_of(peaks[1], u);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
LB_KERNEL(muon_nesterov)(const lb_frame *frame) {
  switch (frame->roots) {
    case 2: return muon_nesterov_run<2>(frame);
    default: return muon_nesterov_run<0>(frame);
  }
}

LB_KERNEL(muon_descend)(const lb_frame *frame) {
  const muon_descend<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float u = frame->in[1][at];
      muon_descend<float>::apply(p, u, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}
#ifdef LB_FUSED
struct muon_descend_lanes {
  using Stage = muon_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = -1;
  static constexpr char ROLES[] = "pv";
  static constexpr bool UNSIGNED[] = {false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::C c;
  explicit muon_descend_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const muon_descend_lanes &stage) {
    Stage::apply(x[0], x[1], stage.c);
  }
};
LB_FUSED(muon_descend)
#endif

LB_KERNEL(scale_mean_of_rows)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = scale_mean_of_rows<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_sum_of_rows)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = scale_sum_of_rows<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_mean_of_columns)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = scale_mean_of_columns<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_sum_of_columns)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = scale_sum_of_columns<float>::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_norm)(const lb_frame *frame) {
  const scale_norm<float>::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    const float x = frame->x[at];
    float n;
    scale_norm<float>::apply(n, x, c);
    frame->out[0][at] = n;
  }
}

LB_KERNEL(scale_follow)(const lb_frame *frame) {
  const scale_follow<float>::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float m = frame->in[0][at];
      float g = frame->in[1][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      scale_follow<float>::apply(m, g, c);
      frame->out[0][at] = m;
      peaks[0] = lb::peak_of(peaks[0], m);
      frame->out[1][at] = g;
      peaks[1] = lb::peak_of(peaks[1], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}

LB_KERNEL(scale_descend)(const lb_frame *frame) {
  const scale_descend<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      const float n = frame->in[2][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      scale_descend<float>::apply(p, g, n, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct scale_descend_lanes {
  using Stage = scale_descend<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgv";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::C c;
  explicit scale_descend_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const scale_descend_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.c);
  }
};
LB_FUSED(scale_descend)
#endif

LB_KERNEL(scale_scalar_size)(const lb_frame *frame) {
  scale_scalar_size<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const scale_scalar_size<float>::C c = {frame->c[frame->ci[0]]};
  scale_scalar_size<float>::apply(s, c);
  frame->s[frame->si[0]] = s.scalar_size;
}

template <uint32_t ROOTS>
static void scale_scalar_adam_run(const lb_frame *frame) {
  const scale_scalar_adam<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const scale_scalar_adam<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      scale_scalar_adam<float>::apply(p, g, m, v, s, c);
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
LB_KERNEL(scale_scalar_adam)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return scale_scalar_adam_run<4>(frame);
    default: return scale_scalar_adam_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct scale_scalar_adam_lanes {
  using Stage = scale_scalar_adam<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::S s;
  typename Stage::C c;
  explicit scale_scalar_adam_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const scale_scalar_adam_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(scale_scalar_adam)
#endif

LB_KERNEL(sgd_plain)(const lb_frame *frame) {
  const sgd_plain<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      sgd_plain<float>::apply(p, g, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}
#ifdef LB_FUSED
struct sgd_plain_lanes {
  using Stage = sgd_plain<LB_SPACE::Lanes>;
  static constexpr int READS = 2, WRITES = 1, MOMENTS = 0;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pg";
  static constexpr bool UNSIGNED[] = {false, false};
  static constexpr int PLACES[] = {0};
  typename Stage::C c;
  explicit sgd_plain_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const sgd_plain_lanes &stage) {
    Stage::apply(x[0], x[1], stage.c);
  }
};
LB_FUSED(sgd_plain)
#endif

LB_KERNEL(sgd_momentum)(const lb_frame *frame) {
  const sgd_momentum<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float b = frame->in[2][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      sgd_momentum<float>::apply(p, g, b, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = b;
      peaks[1] = lb::peak_of(peaks[1], b);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct sgd_momentum_lanes {
  using Stage = sgd_momentum<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgm";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::C c;
  explicit sgd_momentum_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const sgd_momentum_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.c);
  }
};
LB_FUSED(sgd_momentum)
#endif

LB_KERNEL(sgd_nesterov)(const lb_frame *frame) {
  const sgd_nesterov<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[3] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float g = frame->in[1][at];
      float b = frame->in[2][at];
      peaks[2] = lb::peak_of(peaks[2], g);
      sgd_nesterov<float>::apply(p, g, b, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
      frame->out[1][at] = b;
      peaks[1] = lb::peak_of(peaks[1], b);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
    *found++ = (uint32_t)peaks[2];
  }
}
#ifdef LB_FUSED
struct sgd_nesterov_lanes {
  using Stage = sgd_nesterov<LB_SPACE::Lanes>;
  static constexpr int READS = 3, WRITES = 2, MOMENTS = 1;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgm";
  static constexpr bool UNSIGNED[] = {false, false, false};
  static constexpr int PLACES[] = {0, 2};
  typename Stage::C c;
  explicit sgd_nesterov_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const sgd_nesterov_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], stage.c);
  }
};
LB_FUSED(sgd_nesterov)
#endif

template <uint32_t ROOTS>
static void spam_released_run(const lb_frame *frame) {
  const spam_released<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]]};
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
      spam_released<float>::apply(p, g, m, v, c);
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
LB_KERNEL(spam_released)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return spam_released_run<4>(frame);
    default: return spam_released_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct spam_released_lanes {
  using Stage = spam_released<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::C c;
  explicit spam_released_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const spam_released_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.c);
  }
};
LB_FUSED(spam_released)
#endif

template <uint32_t ROOTS>
static void spam_released_sparse_run(const lb_frame *frame) {
  const spam_released_sparse<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      spam_released_sparse<float>::apply(p, g, m, v, c);
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
LB_KERNEL(spam_released_sparse)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return spam_released_sparse_run<4>(frame);
    default: return spam_released_sparse_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct spam_released_sparse_lanes {
  using Stage = spam_released_sparse<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::C c;
  explicit spam_released_sparse_lanes([[maybe_unused]] const lb_frame *frame) : c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const spam_released_sparse_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.c);
  }
};
LB_FUSED(spam_released_sparse)
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

LB_KERNEL(stabilizers_clip_and_freeze)(const lb_frame *frame) {
  const stabilizers_clip_and_freeze<float>::C c = {frame->c[frame->ci[0]]};
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
      stabilizers_clip_and_freeze<float>::apply(g, v, c);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

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

LB_KERNEL(stable_spam_closed_form)(const lb_frame *frame) {
  stable_spam_closed_form<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stable_spam_closed_form<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stable_spam_closed_form<float>::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
  frame->s[frame->si[1]] = s.exp_avg_sq_weight;
}

template <uint32_t ROOTS>
static void stabilizers_normalize_adamw_adamw_run(const lb_frame *frame) {
  const stabilizers_normalize_adamw_adamw<float>::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]]};
  const stabilizers_normalize_adamw_adamw<float>::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      stabilizers_normalize_adamw_adamw<float>::apply(p, g, m, v, s, c);
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
LB_KERNEL(stabilizers_normalize_adamw_adamw)(const lb_frame *frame) {
  switch (frame->roots) {
    case 4: return stabilizers_normalize_adamw_adamw_run<4>(frame);
    default: return stabilizers_normalize_adamw_adamw_run<0>(frame);
  }
}
#ifdef LB_FUSED
struct stabilizers_normalize_adamw_adamw_lanes {
  using Stage = stabilizers_normalize_adamw_adamw<LB_SPACE::Lanes>;
  static constexpr int READS = 4, WRITES = 3, MOMENTS = 2;
  static constexpr int GRADIENT = 1;
  static constexpr char ROLES[] = "pgmm";
  static constexpr bool UNSIGNED[] = {false, false, false, true};
  static constexpr int PLACES[] = {0, 2, 3};
  typename Stage::S s;
  typename Stage::C c;
  explicit stabilizers_normalize_adamw_adamw_lanes([[maybe_unused]] const lb_frame *frame) : s{frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]]}, c{frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]} {}
  LB_FN void run(LB_SPACE::Lanes *x, [[maybe_unused]] const stabilizers_normalize_adamw_adamw_lanes &stage) {
    Stage::apply(x[0], x[1], x[2], x[3], stage.s, stage.c);
  }
};
LB_FUSED(stabilizers_normalize_adamw_adamw)
#endif
