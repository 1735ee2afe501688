// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
//
// For a file that defines LB_KERNEL(symbol): how the declaration of an exported function of that name begins.
#pragma once
#include "abi.h"
#include "rules.h"

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

LB_KERNEL(adapm_square)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[2] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float g = frame->in[0][at];
      peaks[1] = lb::peak_of(peaks[1], g);
      const float measured_ = adapm_square::apply(g);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(adapm_average_square)(const lb_frame *frame) {
  const adapm_average_square::C c = {frame->c[frame->ci[0]]};
  LB_IVDEP
  for (int64_t at = 0; at < frame->n; ++at) {
    float v = frame->in[0][at];
    const float x = frame->x[at];
    adapm_average_square::apply(v, x, c);
    frame->out[0][at] = v;
  }
}

template <uint32_t ROOTS>
static void adapm_second_run(const lb_frame *frame) {
  const adapm_second::C c = {frame->c[frame->ci[0]]};
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
      adapm_second::apply(v, g, c);
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

LB_KERNEL(adapm_share)(const lb_frame *frame) {
  adapm_share::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_share::C c = {frame->c[frame->ci[0]]};
  adapm_share::apply(s, c);
  frame->s[frame->si[0]] = s.accumulated;
}

LB_KERNEL(adapm_descend_low)(const lb_frame *frame) {
  const adapm_descend_low::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_descend_low::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]], frame->c[frame->ci[4]], frame->c[frame->ci[5]]};
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
      adapm_descend_low::apply(p, v, a, w, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(adapm_descend_full)(const lb_frame *frame) {
  const adapm_descend_full::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const adapm_descend_full::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      adapm_descend_full::apply(p, g, m, v, s, c);
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

LB_KERNEL(adapm_descend_bare)(const lb_frame *frame) {
  const adapm_descend_bare::S s = {frame->s[frame->si[0]]};
  const adapm_descend_bare::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      adapm_descend_bare::apply(p, g, v, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
    *found++ = (uint32_t)peaks[1];
  }
}

LB_KERNEL(apollo_descend)(const lb_frame *frame) {
  const apollo_descend::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const apollo_descend::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float e = frame->in[1][at];
      apollo_descend::apply(p, e, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(fira_energy)(const lb_frame *frame) {
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      const float e = frame->in[0][at];
      const float measured_ = fira_energy::apply(e);
      frame->out[0][at] = measured_;
      peaks[0] = lb::peak_of(peaks[0], measured_);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

LB_KERNEL(fira_limit)(const lb_frame *frame) {
  fira_limit::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const fira_limit::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
  const float x = frame->x[0];
  fira_limit::apply(x, s, c);
  frame->s[frame->si[1]] = s.limiter;
  frame->s[frame->si[0]] = s.limited_norm;
}

LB_KERNEL(fira_descend)(const lb_frame *frame) {
  const fira_descend::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]]};
  const fira_descend::C c = {frame->c[frame->ci[0]]};
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
      fira_descend::apply(p, u, e, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

template <uint32_t ROOTS>
static void galore_adam_run(const lb_frame *frame) {
  const galore_adam::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]]};
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
      galore_adam::apply(r, m, v, n, c);
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
  galore_stride::S s = {frame->s[frame->si[0]], frame->s[frame->si[1]], frame->s[frame->si[2]]};
  const galore_stride::C c = {frame->c[frame->ci[0]]};
  galore_stride::apply(s, c);
  frame->s[frame->si[0]] = s.step_size;
}

LB_KERNEL(galore_descend)(const lb_frame *frame) {
  const galore_descend::S s = {frame->s[frame->si[0]]};
  const galore_descend::C c = {frame->c[frame->ci[0]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float u = frame->in[1][at];
      galore_descend::apply(p, u, s, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
  }
}

template <uint32_t ROOTS>
static void galore_adam_full_run(const lb_frame *frame) {
  const galore_adam_full::S s = {frame->s[frame->si[0]]};
  const galore_adam_full::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]], frame->c[frame->ci[2]], frame->c[frame->ci[3]]};
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
      galore_adam_full::apply(p, g, m, v, s, c);
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
      matrices_carry::apply(g, carried);
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
  const muon_average::C c = {frame->c[frame->ci[0]]};
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
      muon_average::apply(g, m, u, c);
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
  const muon_nesterov::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
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
      muon_nesterov::apply(g, m, u, c);
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
  const muon_descend::C c = {frame->c[frame->ci[0]], frame->c[frame->ci[1]]};
  const int64_t end = frame->n & ~INT64_C(15);
  uint32_t *found = frame->peaks;
  for (int64_t start = 0; start < end; start += frame->piece) {
    const int64_t stop = start + frame->piece < end ? start + frame->piece : end;
    int32_t peaks[1] = {};
    LB_IVDEP
    for (int64_t at = start; at < stop; ++at) {
      float p = frame->in[0][at];
      const float u = frame->in[1][at];
      muon_descend::apply(p, u, c);
      frame->out[0][at] = p;
      peaks[0] = lb::peak_of(peaks[0], p);
    }
    *found++ = (uint32_t)peaks[0];
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
