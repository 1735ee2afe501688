// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
//
// For a file that defines LB_KERNEL(symbol): how the declaration of an exported function of that name begins.
#pragma once
#include "abi.h"
#include "rules.h"

LB_KERNEL(adafactor_weigh)(const lb_frame *frame) {
  adafactor_weigh::S s = {frame->s[frame->si[0]]};
  const adafactor_weigh::C c = {frame->c[frame->ci[0]]};
  adafactor_weigh::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_sq_weight;
}

LB_KERNEL(adafactor_rows_square)(const lb_frame *frame) {
  const adafactor_rows_square::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adafactor_rows_square::apply(g, c);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_average_rows)(const lb_frame *frame) {
  const adafactor_average_rows::S s = {frame->s[frame->si[0]]};
  const adafactor_average_rows::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float r = frame->in[0][at];
    const float x = frame->x[at];
    float a;
    adafactor_average_rows::apply(r, a, x, s, c);
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
      const float measured_ = adafactor_centre::apply(r);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(adafactor_keep_centre)(const lb_frame *frame) {
  adafactor_keep_centre::S s = {frame->s[frame->si[0]]};
  const float x = frame->x[0];
  adafactor_keep_centre::apply(x, s);
  frame->s[frame->si[0]] = s.centre;
}

LB_KERNEL(adafactor_columns_square)(const lb_frame *frame) {
  const adafactor_columns_square::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adafactor_columns_square::apply(g, c);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_average_columns)(const lb_frame *frame) {
  const adafactor_average_columns::S s = {frame->s[frame->si[0]]};
  const adafactor_average_columns::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float k = frame->in[0][at];
    const float x = frame->x[at];
    float b;
    adafactor_average_columns::apply(k, b, x, s, c);
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
      adafactor_factored::apply(g, a, b);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

template <uint32_t ROOTS>
static void adafactor_full_run(const lb_frame *frame) {
  const adafactor_full::S s = {frame->s[frame->si[0]]};
  const adafactor_full::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
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
      adafactor_full::apply(g, v, s, c);
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
      const float measured_ = adafactor_size::apply(p);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(adafactor_scale)(const lb_frame *frame) {
  adafactor_scale::S s = {frame->s[frame->si[0]]};
  const adafactor_scale::C c = {frame->c[frame->ci[0]]};
  const float x = frame->x[0];
  adafactor_scale::apply(x, s, c);
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
      const float measured_ = adafactor_energy::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_clip)(const lb_frame *frame) {
  adafactor_clip::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]]};
  const adafactor_clip::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const float x = frame->x[0];
  adafactor_clip::apply(x, s, c);
  frame->s[frame->si[0]] = s.shrink;
  frame->s[frame->si[2]] = s.rate;
}

LB_KERNEL(adafactor_descend)(const lb_frame *frame) {
  const adafactor_descend::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
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
      adafactor_descend::apply(p, g, s);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adafactor_descend_average)(const lb_frame *frame) {
  const adafactor_descend_average::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adafactor_descend_average::C c = {frame->c[frame->ci[0]]};
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
      adafactor_descend_average::apply(p, g, m, s, c);
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
      const float measured_ = adam_mini_mean_square::apply(g);
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
      const float measured_ = adam_mini_mean_square_of_columns::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adam_mini_average_square)(const lb_frame *frame) {
  const adam_mini_average_square::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float v = frame->in[0][at];
    const float x = frame->x[at];
    adam_mini_average_square::apply(v, x, c);
    frame->out[0][at] = v;
  }
}

LB_KERNEL(adam_mini_mini)(const lb_frame *frame) {
  const adam_mini_mini::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_mini::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      adam_mini_mini::apply(p, g, m, v, s, c);
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

LB_KERNEL(adam_mini_mini_undecayed)(const lb_frame *frame) {
  const adam_mini_mini_undecayed::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_mini_undecayed::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
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
      adam_mini_mini_undecayed::apply(p, g, m, v, s, c);
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

template <uint32_t ROOTS>
static void adam_mini_adam_run(const lb_frame *frame) {
  const adam_mini_adam::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adam_mini_adam::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      adam_mini_adam::apply(p, g, m, v, s, c);
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

LB_KERNEL(adams_weigh)(const lb_frame *frame) {
  adams_weigh::S s = {frame->s[frame->si[0]]};
  const adams_weigh::C c = {frame->c[frame->ci[0]]};
  adams_weigh::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
}

LB_KERNEL(adams_unweighted)(const lb_frame *frame) {
  adams_unweighted::S s = {frame->s[frame->si[0]]};
  const adams_unweighted::C c = {frame->c[frame->ci[0]]};
  adams_unweighted::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
}

LB_KERNEL(adams_adams)(const lb_frame *frame) {
  const adams_adams::S s = {frame->s[frame->si[0]]};
  const adams_adams::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]};
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
      adams_adams::apply(p, g, m, s, c);
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

LB_KERNEL(adamw_weigh)(const lb_frame *frame) {
  adamw_weigh::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_weigh::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  adamw_weigh::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
  frame->s[frame->si[1]] = s.exp_avg_sq_weight;
}

LB_KERNEL(adamw_debias)(const lb_frame *frame) {
  adamw_debias::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]]};
  const adamw_debias::C c = {frame->c[frame->ci[0]]};
  adamw_debias::apply(s, c);
  frame->s[frame->si[0]] = s.step_size;
  frame->s[frame->si[2]] = s.root;
}

template <uint32_t ROOTS>
static void adamw_adamw_run(const lb_frame *frame) {
  const adamw_adamw::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_adamw::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      adamw_adamw::apply(p, g, m, v, s, c);
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

template <uint32_t ROOTS>
static void adamw_amsgrad_run(const lb_frame *frame) {
  const adamw_amsgrad::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adamw_amsgrad::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      adamw_amsgrad::apply(p, g, m, v, h, s, c);
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

LB_KERNEL(lion_lion)(const lb_frame *frame) {
  const lion_lion::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      lion_lion::apply(p, g, m, c);
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
      const float measured_ = scale_mean_of_rows::apply(g);
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
      const float measured_ = scale_sum_of_rows::apply(g);
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
      const float measured_ = scale_mean_of_columns::apply(g);
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
      const float measured_ = scale_sum_of_columns::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_norm)(const lb_frame *frame) {
  const scale_norm::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    const float x = frame->x[at];
    float n;
    scale_norm::apply(n, x, c);
    frame->out[0][at] = n;
  }
}

LB_KERNEL(scale_follow)(const lb_frame *frame) {
  const scale_follow::C c = {frame->c[frame->ci[0]]};
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
      scale_follow::apply(m, g, c);
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
  const scale_descend::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
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
      scale_descend::apply(p, g, n, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(scale_scalar_size)(const lb_frame *frame) {
  scale_scalar_size::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const scale_scalar_size::C c = {frame->c[frame->ci[0]]};
  scale_scalar_size::apply(s, c);
  frame->s[frame->si[0]] = s.scalar_size;
}

template <uint32_t ROOTS>
static void scale_scalar_adam_run(const lb_frame *frame) {
  const scale_scalar_adam::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const scale_scalar_adam::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      scale_scalar_adam::apply(p, g, m, v, s, c);
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

LB_KERNEL(sgd_plain)(const lb_frame *frame) {
  const sgd_plain::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
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
      sgd_plain::apply(p, g, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(sgd_momentum)(const lb_frame *frame) {
  const sgd_momentum::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      sgd_momentum::apply(p, g, b, c);
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

LB_KERNEL(sgd_nesterov)(const lb_frame *frame) {
  const sgd_nesterov::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      sgd_nesterov::apply(p, g, b, c);
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

template <uint32_t ROOTS>
static void spam_released_run(const lb_frame *frame) {
  const spam_released::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]]};
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
      spam_released::apply(p, g, m, v, c);
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

template <uint32_t ROOTS>
static void spam_released_sparse_run(const lb_frame *frame) {
  const spam_released_sparse::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      spam_released_sparse::apply(p, g, m, v, c);
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
      const float measured_ = stabilizers_peak::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_weigh_peak)(const lb_frame *frame) {
  stabilizers_weigh_peak::S s = {frame->s[frame->si[0]]};
  const stabilizers_weigh_peak::C c = {frame->c[frame->ci[0]]};
  stabilizers_weigh_peak::apply(s, c);
  frame->s[frame->si[0]] = s.m_max_weight;
}

LB_KERNEL(stabilizers_peak_weight)(const lb_frame *frame) {
  stabilizers_peak_weight::S s = {frame->s[frame->si[0]]};
  const stabilizers_peak_weight::C c = {frame->c[frame->ci[0]]};
  stabilizers_peak_weight::apply(s, c);
  frame->s[frame->si[0]] = s.m_max_weight;
}

LB_KERNEL(stabilizers_limit)(const lb_frame *frame) {
  stabilizers_limit::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]], frame->s[frame->si[4]]};
  const stabilizers_limit::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  stabilizers_limit::apply(x, s, c);
  frame->s[frame->si[0]] = s.m_max_t;
  frame->s[frame->si[1]] = s.clip_limit;
  frame->s[frame->si[3]] = s.clip_share;
  frame->s[frame->si[4]] = s.unit;
}

LB_KERNEL(stabilizers_clip_spikes)(const lb_frame *frame) {
  const stabilizers_clip_spikes::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_clip_spikes::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_energy)(const lb_frame *frame) {
  const stabilizers_energy::S s = {frame->s[frame->si[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = stabilizers_energy::apply(g, s);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_weigh_norm)(const lb_frame *frame) {
  stabilizers_weigh_norm::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stabilizers_weigh_norm::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stabilizers_weigh_norm::apply(s, c);
  frame->s[frame->si[0]] = s.m_norm_weight;
  frame->s[frame->si[1]] = s.v_norm_weight;
}

LB_KERNEL(stabilizers_norm_weight)(const lb_frame *frame) {
  stabilizers_norm_weight::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stabilizers_norm_weight::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stabilizers_norm_weight::apply(s, c);
  frame->s[frame->si[0]] = s.m_norm_weight;
  frame->s[frame->si[1]] = s.v_norm_weight;
}

LB_KERNEL(stabilizers_gain)(const lb_frame *frame) {
  stabilizers_gain::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]], frame->s[frame->si[3]], frame->s[frame->si[4]], frame->s[frame->si[5]]};
  const stabilizers_gain::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
  const float x = frame->x[0];
  stabilizers_gain::apply(x, s, c);
  frame->s[frame->si[1]] = s.m_norm_t;
  frame->s[frame->si[2]] = s.v_norm_t;
  frame->s[frame->si[5]] = s.norm_gain;
}

LB_KERNEL(stabilizers_normalize)(const lb_frame *frame) {
  const stabilizers_normalize::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_normalize::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_clip_to_moment)(const lb_frame *frame) {
  const stabilizers_clip_to_moment::C c = {frame->c[frame->ci[0]]};
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
      stabilizers_clip_to_moment::apply(g, v, c);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_clip_and_freeze)(const lb_frame *frame) {
  const stabilizers_clip_and_freeze::C c = {frame->c[frame->ci[0]]};
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
      stabilizers_clip_and_freeze::apply(g, v, c);
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
      const float measured_ = stabilizers_energy_of_all::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stabilizers_share)(const lb_frame *frame) {
  stabilizers_share::S s = {frame->s[frame->si[0]]};
  const stabilizers_share::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  stabilizers_share::apply(x, s, c);
  frame->s[frame->si[0]] = s.global_share;
}

LB_KERNEL(stabilizers_scale_all)(const lb_frame *frame) {
  const stabilizers_scale_all::S s = {frame->s[frame->si[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      stabilizers_scale_all::apply(g, s);
      frame->out[0][at] = g;
      peaks[0] = lb::peak_of(peaks[0], g);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(stable_spam_closed_form)(const lb_frame *frame) {
  stable_spam_closed_form::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const stable_spam_closed_form::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  stable_spam_closed_form::apply(s, c);
  frame->s[frame->si[0]] = s.exp_avg_weight;
  frame->s[frame->si[1]] = s.exp_avg_sq_weight;
}
