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

struct adafactor_weigh {  // fold, lowbit.optim.adafactor
  struct S { float exp_avg_sq_weight; };
  struct C { float rate2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_sq_weight = lb::lerp(s.exp_avg_sq_weight, 1.0f, c.rate2);
  }
};

struct adafactor_rows_square {  // measure, lowbit.optim.adafactor
  struct C { float eps; };
  LB_FN float apply(float g, const C &c) {
    return g * g + c.eps;
  }
};

struct adafactor_average_rows {  // fold, lowbit.optim.adafactor
  struct S { float exp_avg_sq_weight; };
  struct C { float rate2; };
  LB_FN void apply(float &r, float &a, float x, const S &s, const C &c) {
    r = lb::lerp(r, x, c.rate2);
    const float kept1_ = lb::reciprocal(lb::sqrt(r / s.exp_avg_sq_weight));
    a = kept1_;
  }
};

struct adafactor_centre {  // measure, lowbit.optim.adafactor
  LB_FN float apply(float r) {
    return r;
  }
};

struct adafactor_keep_centre {  // fold, lowbit.optim.adafactor
  struct S { float centre; };
  LB_FN void apply(float x, S &s) {
    s.centre = x;
  }
};

struct adafactor_columns_square {  // measure, lowbit.optim.adafactor
  struct C { float eps; };
  LB_FN float apply(float g, const C &c) {
    return g * g + c.eps;
  }
};

struct adafactor_average_columns {  // fold, lowbit.optim.adafactor
  struct S { float centre; };
  struct C { float rate2; };
  LB_FN void apply(float &k, float &b, float x, const S &s, const C &c) {
    k = lb::lerp(k, x, c.rate2);
    const float kept1_ = lb::sqrt(s.centre / k);
    b = kept1_;
  }
};

struct adafactor_factored {  // update, lowbit.optim.adafactor
  LB_FN void apply(float &g, float a, float b) {
    g = g * a * b;
  }
};

struct adafactor_full {  // update, lowbit.optim.adafactor
  struct S { float exp_avg_sq_weight; };
  struct C { float eps, rate2; };
  LB_FN void apply(float &g, float &v, const S &s, const C &c) {
    v = lb::lerp(v, g * g + c.eps, c.rate2);
    g = g / lb::sqrt(v / s.exp_avg_sq_weight);
  }
};

struct adafactor_size {  // measure, lowbit.optim.adafactor
  LB_FN float apply(float p) {
    return p * p;
  }
};

struct adafactor_scale {  // fold, lowbit.optim.adafactor
  struct S { float scale; };
  struct C { float min_scale; };
  LB_FN void apply(float x, S &s, const C &c) {
    s.scale = lb::maximum(lb::sqrt(x), c.min_scale);
  }
};

struct adafactor_energy {  // measure, lowbit.optim.adafactor
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct adafactor_clip {  // fold, lowbit.optim.adafactor
  struct S { float shrink, scale, rate; };
  struct C { float decay, lr, one, d; };
  LB_FN void apply(float x, S &s, const C &c) {
    s.shrink = c.decay * s.scale;
    s.rate = c.lr * s.scale / lb::maximum(c.one, lb::sqrt(x) / c.d);
  }
};

struct adafactor_descend {  // update, lowbit.optim.adafactor
  struct S { float shrink, rate; };
  LB_FN void apply(float &p, float g, const S &s) {
    p = p - s.shrink * p - s.rate * g;
  }
};

struct adafactor_descend_average {  // update, lowbit.optim.adafactor
  struct S { float rate, shrink; };
  struct C { float rate1; };
  LB_FN void apply(float &p, float g, float &m, const S &s, const C &c) {
    m = lb::lerp(m, s.rate * g, c.rate1);
    p = p - s.shrink * p - m;
  }
};

struct adam_mini_mean_square {  // measure, lowbit.optim.adam_mini
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct adam_mini_mean_square_of_columns {  // measure, lowbit.optim.adam_mini
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct adam_mini_average_square {  // fold, lowbit.optim.adam_mini
  struct C { float rate2; };
  LB_FN void apply(float &v, float x, const C &c) {
    v = lb::lerp(v, x, c.rate2);
  }
};

template <class S, class C>
LB_FN float adamw_descend(float p, float m, float v, const C &c, const S &s) {
  return p - s.step_size * (m / (lb::sqrt(v) * s.root + c.eps));
}

struct adam_mini_mini {  // update, lowbit.optim.adam_mini
  struct S { float step_size, root; };
  struct C { float rate1, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend(c.keep * p, m, v, c, s);
  }
};

struct adam_mini_mini_undecayed {  // update, lowbit.optim.adam_mini
  struct S { float step_size, root; };
  struct C { float rate1, eps; };
  LB_FN void apply(float &p, float g, float &m, float v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend(p, m, v, c, s);
  }
};

template <class C>
LB_FN void adamw_average(float m, float v, float g, const C &c, float &out0_, float &out1_) {
  out0_ = lb::lerp(m, g, c.rate1);
  out1_ = lb::lerp(v, g * g, c.rate2);
}

struct adam_mini_adam {  // update, lowbit.optim.adam_mini
  struct S { float step_size, root; };
  struct C { float rate1, rate2, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    p = adamw_descend(p, m, v, c, s);
  }
};

struct adams_weigh {  // fold, lowbit.optim.adams
  struct S { float exp_avg_weight; };
  struct C { float rate1; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = lb::lerp(s.exp_avg_weight, 1.0f, c.rate1);
  }
};

struct adams_unweighted {  // fold, lowbit.optim.adams
  struct S { float exp_avg_weight; };
  struct C { float one; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = c.one;
  }
};

struct adams_adams {  // update, lowbit.optim.adams
  struct S { float exp_avg_weight; };
  struct C { float beta2, rate2, rate1, keep, lr, eps; };
  LB_FN void apply(float &p, float g, float &m, const S &s, const C &c) {
    const float before = m / s.exp_avg_weight;
    const float nu = c.beta2 * (before * before) + c.rate2 * (g * g);
    m = lb::lerp(m, g, c.rate1);
    p = c.keep * p - c.lr * (m / s.exp_avg_weight / (lb::sqrt(nu) + c.eps));
  }
};

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

struct adamw_adamw {  // update, lowbit.optim.adamw
  struct S { float step_size, root; };
  struct C { float rate1, rate2, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    p = adamw_descend(c.keep * p, m, v, c, s);
  }
};

struct adamw_amsgrad {  // update, lowbit.optim.adamw
  struct S { float step_size, root; };
  struct C { float rate1, rate2, keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, float &h, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    h = lb::maximum(h, v);
    p = adamw_descend(c.keep * p, m, h, c, s);
  }
};

struct lion_lion {  // update, lowbit.optim.lion
  struct C { float rate1, keep, lr, rate2; };
  LB_FN void apply(float &p, float g, float &m, const C &c) {
    const float u = lb::sign(lb::lerp(m, g, c.rate1));
    p = c.keep * p - c.lr * u;
    m = lb::lerp(m, g, c.rate2);
  }
};

struct scale_mean_of_rows {  // measure, lowbit.optim.scale
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct scale_sum_of_rows {  // measure, lowbit.optim.scale
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct scale_mean_of_columns {  // measure, lowbit.optim.scale
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct scale_sum_of_columns {  // measure, lowbit.optim.scale
  LB_FN float apply(float g) {
    return g * g;
  }
};

struct scale_norm {  // fold, lowbit.optim.scale
  struct C { float floor; };
  LB_FN void apply(float &n, float x, const C &c) {
    n = lb::maximum(lb::sqrt(x), c.floor);
  }
};

struct scale_follow {  // update, lowbit.optim.scale
  struct C { float rate; };
  LB_FN void apply(float &m, float &g, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const float kept1_ = m;
    g = kept1_;
  }
};

struct scale_descend {  // update, lowbit.optim.scale
  struct C { float keep, lr; };
  LB_FN void apply(float &p, float g, float n, const C &c) {
    p = c.keep * p - c.lr * (g / n);
  }
};

struct scale_scalar_size {  // fold, lowbit.optim.scale
  struct S { float scalar_size, exp_avg_weight; };
  struct C { float scalar_lr; };
  LB_FN void apply(S &s, const C &c) {
    s.scalar_size = c.scalar_lr / s.exp_avg_weight;
  }
};

struct scale_scalar_adam {  // update, lowbit.optim.scale
  struct S { float scalar_size, root; };
  struct C { float rate1, rate2, scalar_keep, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, const S &s, const C &c) {
    adamw_average(m, v, g, c, m, v);
    p = c.scalar_keep * p - s.scalar_size * (m / ((lb::sqrt(v) + c.eps) * s.root));
  }
};

template <class C>
LB_FN float sgd_decayed(float g, float p, const C &c) {
  return g + c.weight_decay * p;
}

struct sgd_plain {  // update, lowbit.optim.sgd
  struct C { float lr, weight_decay; };
  LB_FN void apply(float &p, float g, const C &c) {
    p = p - c.lr * sgd_decayed(g, p, c);
  }
};

struct sgd_momentum {  // update, lowbit.optim.sgd
  struct C { float momentum, share, weight_decay, lr; };
  LB_FN void apply(float &p, float g, float &b, const C &c) {
    b = c.momentum * b + c.share * sgd_decayed(g, p, c);
    p = p - c.lr * b;
  }
};

struct sgd_nesterov {  // update, lowbit.optim.sgd
  struct C { float weight_decay, momentum, share, lr; };
  LB_FN void apply(float &p, float g, float &b, const C &c) {
    const float d = sgd_decayed(g, p, c);
    b = c.momentum * b + c.share * d;
    p = p - c.lr * (d + c.momentum * b);
  }
};

template <class C>
LB_FN void spam_undecayed(float p, float g, float m, float v, const C &c, float &out0_, float &out1_, float &out2_) {
  adamw_average(m, v, g, c, m, v);
  out0_ = p - c.step_size * (m / (lb::sqrt(v) + c.eps));
  out1_ = m;
  out2_ = v;
}

struct spam_released {  // update, lowbit.optim.spam
  struct C { float rate1, rate2, step_size, eps, decay; };
  LB_FN void apply(float &p, float g, float &m, float &v, const C &c) {
    spam_undecayed(p, g, m, v, c, p, m, v);
    p = p - c.decay * p;
  }
};

struct spam_released_sparse {  // update, lowbit.optim.spam
  struct C { float rate1, rate2, step_size, eps; };
  LB_FN void apply(float &p, float g, float &m, float &v, const C &c) {
    spam_undecayed(p, g, m, v, c, p, m, v);
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

template <class C>
LB_FN float stabilizers_brought_down(float g, float v, const C &c) {
  const float limit = c.spike_threshold * v;
  return lb::where(g * g > limit, lb::sign(g) * lb::sqrt(limit), g);
}

struct stabilizers_clip_to_moment {  // update, lowbit.optim.stabilizers
  struct C { float spike_threshold; };
  LB_FN void apply(float &g, float v, const C &c) {
    g = lb::where(v > 0.0f, stabilizers_brought_down(g, v, c), g);
  }
};

struct stabilizers_clip_and_freeze {  // update, lowbit.optim.stabilizers
  struct C { float spike_threshold; };
  LB_FN void apply(float &g, float v, const C &c) {
    g = stabilizers_brought_down(g, v, c);
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
