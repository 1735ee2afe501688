// Printed from lowbit/optim by `python -m lowbit.native.printer`; do not edit.
#pragma once
#include "words.h"

#ifdef __GNUC__  // a rule need not use all it has
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#endif

struct adamw_weigh {  // fold, lowbit.optim.adamw
  struct S { float exp_avg_weight, exp_avg_sq_weight; };
  struct C { float rate1, rate2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = lb::lerp(s.exp_avg_weight, 1.0f, c.rate1);
    s.exp_avg_sq_weight = lb::lerp(s.exp_avg_sq_weight, 1.0f, c.rate2);
  }
};

struct adamw_debias {  // fold, lowbit.optim.adamw
  struct S { float step_size, exp_avg_weight, root, exp_avg_sq_weight; };
  struct C { float lr; };
  LB_FN void apply(S &s, const C &c) {
    s.step_size = c.lr / s.exp_avg_weight;
    s.root = lb::reciprocal(lb::sqrt(s.exp_avg_sq_weight));
  }
};

template <class C>
LB_FN void adamw_average(float m, float v, float g, const C &c, float &out0_, float &out1_) {
  out0_ = lb::lerp(m, g, c.rate1);
  out1_ = lb::lerp(v, g * g, c.rate2);
}

template <class S, class C>
LB_FN float adamw_descend(float p, float m, float v, const C &c, const S &s) {
  return c.keep * p - s.step_size * (m / (lb::sqrt(v) * s.root + c.eps));
}

struct adamw_adamw {  // update, lowbit.optim.adamw
  struct S { float step_size, root; };
  struct C { float rate1, rate2, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    p = adamw_descend(p, m, v, c, s);
  }
};

struct adamw_amsgrad {  // update, lowbit.optim.adamw
  struct S { float step_size, root; };
  struct C { float rate1, rate2, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, float &h, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    h = lb::maximum(h, v);
    p = adamw_descend(p, m, h, c, s);
  }
};

struct adapm_square {  // measure, lowbit.optim.adapm
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct adapm_average_square {  // fold, lowbit.optim.adapm
  struct C { float rate2; };
  LB_FN void apply(float &v, float x, const C &c) {
    v = lb::lerp(v, x, c.rate2);
  }
};

struct adapm_second {  // update, lowbit.optim.adapm
  struct C { float rate2; };
  LB_FN void apply(float &v, float g, const C &c) {
    v = lb::lerp(v, g * g, c.rate2);
  }
};

struct adapm_share {  // fold, lowbit.optim.adapm
  struct S { float accumulated, exp_avg_weight; };
  struct C { float residual_scale; };
  LB_FN void apply(S &s, const C &c) {
    s.accumulated = lb::reciprocal(s.exp_avg_weight) - c.residual_scale;
  }
};

struct adapm_descend_low {  // update, lowbit.optim.adapm
  struct S { float accumulated, root; };
  struct C { float residual_scale, eps, update_clip, keep, lr, zero; };
  LB_FN void apply(float &p, float v, float a, float w, const S &s, const C &c) {
    const float m = c.residual_scale * w + s.accumulated * a;
    const float u = lb::clip(m / (lb::sqrt(v) * s.root + c.eps), -c.update_clip, c.update_clip);
    p = c.keep * p - c.lr * lb::where(v > 0.0f, u, c.zero);
  }
};

struct adapm_descend_full {  // update, lowbit.optim.adapm
  struct S { float step_size, root; };
  struct C { float rate1, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend(p, m, v, c, s);
  }
};

struct adapm_descend_bare {  // update, lowbit.optim.adapm
  struct S { float root; };
  struct C { float keep, lr, eps; };
  LB_FN void apply(float &p, float g, float v, const S &s, const C &c) {
    p = c.keep * p - c.lr * (g / (lb::sqrt(v) * s.root + c.eps));
  }
};

struct apollo_descend {  // update, lowbit.optim.apollo
  struct S { float step_size, limiter; };
  struct C { float behind, decay; };
  LB_FN void apply(float &p, float e, const S &s, const C &c) {
    p = p - s.step_size * (c.behind * (e / s.limiter));
    p = p - c.decay * p;
  }
};

struct fira_energy {  // measure, lowbit.optim.fira
  LB_FN float apply(float e) {
    return e * e;
  }
};

struct fira_limit {  // fold, lowbit.optim.fira
  struct S { float limited_norm, limiter; };
  struct C { float norm_eps, growth, one; };
  LB_FN void apply(float x, S &s, const C &c) {
    const float norm = lb::sqrt(x);
    const float growth = lb::maximum(norm / (s.limited_norm + c.norm_eps), c.growth) / c.growth;
    s.limiter = lb::where(s.limited_norm > 0.0f, growth, c.one);
    s.limited_norm = norm / s.limiter;
  }
};

struct fira_descend {  // update, lowbit.optim.fira
  struct S { float step_size, limiter; };
  struct C { float decay; };
  LB_FN void apply(float &p, float u, float e, const S &s, const C &c) {
    p = p - s.step_size * (u + e / s.limiter);
    p = p - c.decay * p;
  }
};

struct galore_adam {  // update, lowbit.optim.galore
  struct C { float rate1, rate2, eps; };
  LB_FN void apply(float r, float &m, float &v, float &n, const C &c) {
    adamw_average(m, v, r, c, m, v);
    n = m / (lb::sqrt(v) + c.eps);
  }
};

struct galore_stride {  // fold, lowbit.optim.galore
  struct S { float step_size, exp_avg_sq_weight, exp_avg_weight; };
  struct C { float lr; };
  LB_FN void apply(S &s, const C &c) {
    s.step_size = c.lr * lb::sqrt(s.exp_avg_sq_weight) / s.exp_avg_weight;
  }
};

struct galore_descend {  // update, lowbit.optim.galore
  struct S { float step_size; };
  struct C { float decay; };
  LB_FN void apply(float &p, float u, const S &s, const C &c) {
    p = p - s.step_size * u;
    p = p - c.decay * p;
  }
};

struct galore_adam_full {  // update, lowbit.optim.galore
  struct S { float step_size; };
  struct C { float rate1, rate2, eps, decay; };
  LB_FN void apply(float &p, float g, float &m, float &v, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    p = p - s.step_size * (m / (lb::sqrt(v) + c.eps));
    p = p - c.decay * p;
  }
};

struct matrices_carry {  // update, lowbit.optim.matrices
  LB_FN void apply(float g, float &carried) {
    carried = g;
  }
};

struct muon_average {  // update, lowbit.optim.muon
  struct C { float rate; };
  LB_FN void apply(float g, float &m, float &u, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const float kept1_ = m;
    u = kept1_;
  }
};

struct muon_nesterov {  // update, lowbit.optim.muon
  struct C { float rate, momentum; };
  LB_FN void apply(float g, float &m, float &u, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const float kept1_ = lb::lerp(g, m, c.momentum);
    u = kept1_;
  }
};

struct muon_descend {  // update, lowbit.optim.muon
  struct C { float keep, lr; };
  LB_FN void apply(float &p, float u, const C &c) {
    p = c.keep * p - c.lr * u;
  }
};

struct stabilizers_peak {  // measure, lowbit.optim.stabilizers
  LB_FN float apply(float g) {
    return lb::abs(g);
  }
};

struct stabilizers_weigh_peak {  // fold, lowbit.optim.stabilizers
  struct S { float m_max_weight; };
  struct C { float peak_rate; };
  LB_FN void apply(S &s, const C &c) {
    s.m_max_weight = lb::lerp(s.m_max_weight, 1.0f, c.peak_rate);
  }
};

struct stabilizers_peak_weight {  // fold, lowbit.optim.stabilizers
  struct S { float m_max_weight; };
  struct C { float peak_weight; };
  LB_FN void apply(S &s, const C &c) {
    s.m_max_weight = c.peak_weight;
  }
};

struct stabilizers_limit {  // fold, lowbit.optim.stabilizers
  struct S { float m_max_t, clip_limit, m_max_weight, clip_share, unit; };
  struct C { float peak_rate, one, largest; };
  LB_FN void apply(float x, S &s, const C &c) {
    s.m_max_t = lb::lerp(s.m_max_t, x, c.peak_rate);
    s.clip_limit = s.m_max_t / s.m_max_weight;
    s.clip_share = s.clip_limit / lb::where(x > 0.0f, x, c.one);
    const float top = lb::minimum(x, s.clip_limit);
    s.unit = lb::reciprocal(lb::binade(lb::where(top <= c.largest, top, c.one)));
  }
};

struct stabilizers_clip_spikes {  // update, lowbit.optim.stabilizers
  struct S { float clip_limit, clip_share; };
  LB_FN void apply(float &g, const S &s) {
    g = lb::where(lb::abs(g) > s.clip_limit, g * s.clip_share, g);
  }
};

struct stabilizers_energy {  // measure, lowbit.optim.stabilizers
  struct S { float unit; };
  LB_FN float apply(float g, const S &s) {
    g = g * s.unit;
    return g * g;
  }
};

struct stabilizers_weigh_norm {  // fold, lowbit.optim.stabilizers
  struct S { float m_norm_weight, v_norm_weight; };
  struct C { float norm_rate, energy_rate; };
  LB_FN void apply(S &s, const C &c) {
    s.m_norm_weight = lb::lerp(s.m_norm_weight, 1.0f, c.norm_rate);
    s.v_norm_weight = lb::lerp(s.v_norm_weight, 1.0f, c.energy_rate);
  }
};

struct stabilizers_norm_weight {  // fold, lowbit.optim.stabilizers
  struct S { float m_norm_weight, v_norm_weight; };
  struct C { float norm_weight, energy_weight; };
  LB_FN void apply(S &s, const C &c) {
    s.m_norm_weight = c.norm_weight;
    s.v_norm_weight = c.energy_weight;
  }
};

struct stabilizers_gain {  // fold, lowbit.optim.stabilizers
  struct S { float unit, m_norm_t, v_norm_t, m_norm_weight, v_norm_weight, norm_gain; };
  struct C { float norm_rate, energy_rate, norm_eps, one; };
  LB_FN void apply(float x, S &s, const C &c) {
    const float norm = lb::sqrt(x) / s.unit;
    s.m_norm_t = lb::lerp(s.m_norm_t, norm, c.norm_rate);
    s.v_norm_t = lb::lerp(s.v_norm_t, norm * norm, c.energy_rate);
    const float wanted = s.m_norm_t / s.m_norm_weight / (lb::sqrt(s.v_norm_t / s.v_norm_weight) + c.norm_eps);
    s.norm_gain = lb::where(x > 0.0f, wanted / lb::sqrt(lb::where(x > 0.0f, x, c.one)), lb::reciprocal(s.unit));
  }
};

struct stabilizers_normalize {  // update, lowbit.optim.stabilizers
  struct S { float unit, norm_gain; };
  LB_FN void apply(float &g, const S &s) {
    g = g * s.unit * s.norm_gain;
  }
};

struct stabilizers_clip_to_moment {  // update, lowbit.optim.stabilizers
  struct C { float spike_threshold; };
  LB_FN void apply(float &g, float v, const C &c) {
    const float limit = c.spike_threshold * v;
    g = lb::where((v > 0.0f) & (g * g > limit), lb::sign(g) * lb::sqrt(limit), g);
  }
};

struct stabilizers_energy_of_all {  // measure, lowbit.optim.stabilizers
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct stabilizers_share {  // fold, lowbit.optim.stabilizers
  struct S { float global_share; };
  struct C { float one, max_norm, norm_floor; };
  LB_FN void apply(float x, S &s, const C &c) {
    s.global_share = lb::minimum(c.one, c.max_norm / (lb::sqrt(x) + c.norm_floor));
  }
};

struct stabilizers_scale_all {  // update, lowbit.optim.stabilizers
  struct S { float global_share; };
  LB_FN void apply(float &g, const S &s) {
    g = g * s.global_share;
  }
};

struct stable_spam_closed_form {  // fold, lowbit.optim.stable_spam
  struct S { float exp_avg_weight, exp_avg_sq_weight; };
  struct C { float weight1, weight2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = c.weight1;
    s.exp_avg_sq_weight = c.weight2;
  }
};

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
