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

template <class F>
struct adafactor_weigh {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> exp_avg_sq_weight; };
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_sq_weight = lb::lerp(s.exp_avg_sq_weight, 1.0f, c.rate2);
  }
};

template <class F>
struct adafactor_rows_square {  // measure, lowbit.optim.adafactor
  struct C { lb::constant<F> eps; };
  LB_FN F apply(F g, const C &c) {
    return g * g + c.eps;
  }
};

template <class F>
struct adafactor_average_rows {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> exp_avg_sq_weight; };
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(F &r, F &a, F x, const S &s, const C &c) {
    r = lb::lerp(r, x, c.rate2);
    const F kept1_ = lb::reciprocal(lb::sqrt(r / s.exp_avg_sq_weight));
    a = kept1_;
  }
};

template <class F>
struct adafactor_centre {  // measure, lowbit.optim.adafactor
  LB_FN F apply(F r) {
    return r;
  }
};

template <class F>
struct adafactor_keep_centre {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> centre; };
  LB_FN void apply(F x, S &s) {
    s.centre = x;
  }
};

template <class F>
struct adafactor_columns_square {  // measure, lowbit.optim.adafactor
  struct C { lb::constant<F> eps; };
  LB_FN F apply(F g, const C &c) {
    return g * g + c.eps;
  }
};

template <class F>
struct adafactor_average_columns {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> centre; };
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(F &k, F &b, F x, const S &s, const C &c) {
    k = lb::lerp(k, x, c.rate2);
    const F kept1_ = lb::sqrt(s.centre / k);
    b = kept1_;
  }
};

template <class F>
struct adafactor_factored {  // update, lowbit.optim.adafactor
  LB_FN void apply(F &g, F a, F b) {
    g = g * a * b;
  }
};

template <class F>
struct adafactor_full {  // update, lowbit.optim.adafactor
  struct S { lb::constant<F> exp_avg_sq_weight; };
  struct C { lb::constant<F> eps, rate2; };
  LB_FN void apply(F &g, F &v, const S &s, const C &c) {
    v = lb::lerp(v, g * g + c.eps, c.rate2);
    g = g / lb::sqrt(v / s.exp_avg_sq_weight);
  }
};

template <class F>
struct adafactor_size {  // measure, lowbit.optim.adafactor
  LB_FN F apply(F p) {
    return p * p;
  }
};

template <class F>
struct adafactor_scale {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> scale; };
  struct C { lb::constant<F> min_scale; };
  LB_FN void apply(F x, S &s, const C &c) {
    s.scale = lb::maximum(lb::sqrt(x), c.min_scale);
  }
};

template <class F>
struct adafactor_energy {  // measure, lowbit.optim.adafactor
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct adafactor_clip {  // fold, lowbit.optim.adafactor
  struct S { lb::constant<F> shrink, scale, rate; };
  struct C { lb::constant<F> decay, lr, one, d; };
  LB_FN void apply(F x, S &s, const C &c) {
    s.shrink = c.decay * s.scale;
    s.rate = c.lr * s.scale / lb::maximum(c.one, lb::sqrt(x) / c.d);
  }
};

template <class F>
struct adafactor_descend {  // update, lowbit.optim.adafactor
  struct S { lb::constant<F> shrink, rate; };
  LB_FN void apply(F &p, F g, const S &s) {
    p = p - s.shrink * p - s.rate * g;
  }
};

template <class F>
struct adafactor_descend_average {  // update, lowbit.optim.adafactor
  struct S { lb::constant<F> rate, shrink; };
  struct C { lb::constant<F> rate1; };
  LB_FN void apply(F &p, F g, F &m, const S &s, const C &c) {
    m = lb::lerp(m, s.rate * g, c.rate1);
    p = p - s.shrink * p - m;
  }
};

template <class F>
struct adam_mini_mean_square {  // measure, lowbit.optim.adam_mini
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct adam_mini_mean_square_of_columns {  // measure, lowbit.optim.adam_mini
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct adam_mini_average_square {  // fold, lowbit.optim.adam_mini
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(F &v, F x, const C &c) {
    v = lb::lerp(v, x, c.rate2);
  }
};

template <class F, class S, class C>
LB_FN F adamw_descend(F p, F m, F v, const C &c, const S &s) {
  return p - s.step_size * (m / (lb::sqrt(v) * s.root + c.eps));
}

template <class F>
struct adam_mini_mini {  // update, lowbit.optim.adam_mini
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend<F>(c.keep * p, m, v, c, s);
  }
};

template <class F>
struct adam_mini_mini_undecayed {  // update, lowbit.optim.adam_mini
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, eps; };
  LB_FN void apply(F &p, F g, F &m, F v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend<F>(p, m, v, c, s);
  }
};

template <class F, class C>
LB_FN void adamw_average(F m, F v, F g, const C &c, F &out0_, F &out1_) {
  out0_ = lb::lerp(m, g, c.rate1);
  out1_ = lb::lerp(v, g * g, c.rate2);
}

template <class F>
struct adam_mini_adam {  // update, lowbit.optim.adam_mini
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, rate2, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    p = adamw_descend<F>(p, m, v, c, s);
  }
};

template <class F>
struct adams_weigh {  // fold, lowbit.optim.adams
  struct S { lb::constant<F> exp_avg_weight; };
  struct C { lb::constant<F> rate1; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = lb::lerp(s.exp_avg_weight, 1.0f, c.rate1);
  }
};

template <class F>
struct adams_unweighted {  // fold, lowbit.optim.adams
  struct S { lb::constant<F> exp_avg_weight; };
  struct C { lb::constant<F> one; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = c.one;
  }
};

template <class F>
struct adams_adams {  // update, lowbit.optim.adams
  struct S { lb::constant<F> exp_avg_weight; };
  struct C { lb::constant<F> beta2, rate2, rate1, keep, lr, eps; };
  LB_FN void apply(F &p, F g, F &m, const S &s, const C &c) {
    const F before = m / s.exp_avg_weight;
    const F nu = c.beta2 * (before * before) + c.rate2 * (g * g);
    m = lb::lerp(m, g, c.rate1);
    p = c.keep * p - c.lr * (m / s.exp_avg_weight / (lb::sqrt(nu) + c.eps));
  }
};

template <class F>
struct adamw_weigh {  // fold, lowbit.optim.adamw
  struct S { lb::constant<F> exp_avg_weight, exp_avg_sq_weight; };
  struct C { lb::constant<F> rate1, rate2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = lb::lerp(s.exp_avg_weight, 1.0f, c.rate1);
    s.exp_avg_sq_weight = lb::lerp(s.exp_avg_sq_weight, 1.0f, c.rate2);
  }
};

template <class F>
struct adamw_debias {  // fold, lowbit.optim.adamw
  struct S { lb::constant<F> step_size, exp_avg_weight, root, exp_avg_sq_weight; };
  struct C { lb::constant<F> lr; };
  LB_FN void apply(S &s, const C &c) {
    s.step_size = c.lr / s.exp_avg_weight;
    s.root = lb::reciprocal(lb::sqrt(s.exp_avg_sq_weight));
  }
};

template <class F>
struct adamw_adamw {  // update, lowbit.optim.adamw
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, rate2, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    p = adamw_descend<F>(c.keep * p, m, v, c, s);
  }
};

template <class F>
struct adamw_amsgrad {  // update, lowbit.optim.adamw
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, rate2, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, F &h, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    h = lb::maximum(h, v);
    p = adamw_descend<F>(c.keep * p, m, h, c, s);
  }
};

template <class F>
struct adapm_second {  // update, lowbit.optim.adapm
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(F &v, F g, const C &c) {
    v = lb::lerp(v, g * g, c.rate2);
  }
};

template <class F>
struct adapm_weigh_second {  // fold, lowbit.optim.adapm
  struct S { lb::constant<F> exp_avg_sq_weight; };
  struct C { lb::constant<F> rate2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_sq_weight = lb::lerp(s.exp_avg_sq_weight, 1.0f, c.rate2);
  }
};

template <class F>
struct adapm_debias_second {  // fold, lowbit.optim.adapm
  struct S { lb::constant<F> root, exp_avg_sq_weight; };
  LB_FN void apply(S &s) {
    s.root = lb::reciprocal(lb::sqrt(s.exp_avg_sq_weight));
  }
};

template <class F>
struct adapm_share {  // fold, lowbit.optim.adapm
  struct S { lb::constant<F> accumulated, exp_avg_weight; };
  struct C { lb::constant<F> residual_scale; };
  LB_FN void apply(S &s, const C &c) {
    s.accumulated = lb::reciprocal(s.exp_avg_weight) - c.residual_scale;
  }
};

template <class F>
struct adapm_descend_low {  // update, lowbit.optim.adapm
  struct S { lb::constant<F> accumulated, root; };
  struct C { lb::constant<F> residual_scale, eps, update_clip, keep, lr, zero; };
  LB_FN void apply(F &p, F v, F a, F w, const S &s, const C &c) {
    const F m = c.residual_scale * w + s.accumulated * a;
    const F u = lb::clip(m / (lb::sqrt(v) * s.root + c.eps), -c.update_clip, c.update_clip);
    p = c.keep * p - c.lr * lb::where(v > 0.0f, u, c.zero);
  }
};

template <class F>
struct adapm_descend_full {  // update, lowbit.optim.adapm
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F v, const S &s, const C &c) {
    m = lb::lerp(m, g, c.rate1);
    p = adamw_descend<F>(c.keep * p, m, v, c, s);
  }
};

template <class F>
struct adapm_descend_bare {  // update, lowbit.optim.adapm
  struct S { lb::constant<F> root; };
  struct C { lb::constant<F> keep, lr, eps; };
  LB_FN void apply(F &p, F g, F v, const S &s, const C &c) {
    p = c.keep * p - c.lr * (g / (lb::sqrt(v) * s.root + c.eps));
  }
};

template <class F>
struct apollo_descend {  // update, lowbit.optim.apollo
  struct S { lb::constant<F> step_size, limiter; };
  struct C { lb::constant<F> behind, decay; };
  LB_FN void apply(F &p, F e, const S &s, const C &c) {
    p = p - s.step_size * (c.behind * (e / s.limiter));
    p = p - c.decay * p;
  }
};

template <class F>
struct fira_energy {  // measure, lowbit.optim.fira
  LB_FN F apply(F e) {
    return e * e;
  }
};

template <class F>
struct fira_limit {  // fold, lowbit.optim.fira
  struct S { lb::constant<F> limited_norm, limiter; };
  struct C { lb::constant<F> norm_eps, growth, one; };
  LB_FN void apply(F x, S &s, const C &c) {
    const F norm = lb::sqrt(x);
    const F growth = lb::maximum(norm / (s.limited_norm + c.norm_eps), c.growth) / c.growth;
    s.limiter = lb::where(s.limited_norm > 0.0f, growth, c.one);
    s.limited_norm = norm / s.limiter;
  }
};

template <class F>
struct fira_descend {  // update, lowbit.optim.fira
  struct S { lb::constant<F> step_size, limiter; };
  struct C { lb::constant<F> decay; };
  LB_FN void apply(F &p, F u, F e, const S &s, const C &c) {
    p = p - s.step_size * (u + e / s.limiter);
    p = p - c.decay * p;
  }
};

template <class F>
struct galore_adam {  // update, lowbit.optim.galore
  struct C { lb::constant<F> rate1, rate2, eps; };
  LB_FN void apply(F r, F &m, F &v, F &n, const C &c) {
    adamw_average<F>(m, v, r, c, m, v);
    n = m / (lb::sqrt(v) + c.eps);
  }
};

template <class F>
struct galore_stride {  // fold, lowbit.optim.galore
  struct S { lb::constant<F> step_size, exp_avg_sq_weight, exp_avg_weight; };
  struct C { lb::constant<F> lr; };
  LB_FN void apply(S &s, const C &c) {
    s.step_size = c.lr * lb::sqrt(s.exp_avg_sq_weight) / s.exp_avg_weight;
  }
};

template <class F>
struct galore_descend {  // update, lowbit.optim.galore
  struct S { lb::constant<F> step_size; };
  struct C { lb::constant<F> decay; };
  LB_FN void apply(F &p, F u, const S &s, const C &c) {
    p = p - s.step_size * u;
    p = p - c.decay * p;
  }
};

template <class F>
struct galore_adam_full {  // update, lowbit.optim.galore
  struct S { lb::constant<F> step_size; };
  struct C { lb::constant<F> rate1, rate2, eps, decay; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    p = p - s.step_size * (m / (lb::sqrt(v) + c.eps));
    p = p - c.decay * p;
  }
};

template <class F>
struct lion_lion {  // update, lowbit.optim.lion
  struct C { lb::constant<F> rate1, keep, lr, rate2; };
  LB_FN void apply(F &p, F g, F &m, const C &c) {
    const F u = lb::sign(lb::lerp(m, g, c.rate1));
    p = c.keep * p - c.lr * u;
    m = lb::lerp(m, g, c.rate2);
  }
};

template <class F>
struct matrices_carry {  // update, lowbit.optim.matrices
  LB_FN void apply(F g, F &carried) {
    carried = g;
  }
};

template <class F>
struct muon_average {  // update, lowbit.optim.muon
  struct C { lb::constant<F> rate; };
  LB_FN void apply(F g, F &m, F &u, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const F kept1_ = m;
    u = kept1_;
  }
};

template <class F>
struct muon_nesterov {  // update, lowbit.optim.muon
  struct C { lb::constant<F> rate, momentum; };
  LB_FN void apply(F g, F &m, F &u, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const F kept1_ = lb::lerp(g, m, c.momentum);
    u = kept1_;
  }
};

template <class F>
struct muon_descend {  // update, lowbit.optim.muon
  struct C { lb::constant<F> keep, lr; };
  LB_FN void apply(F &p, F u, const C &c) {
    p = c.keep * p - c.lr * u;
  }
};

template <class F>
struct scale_mean_of_rows {  // measure, lowbit.optim.scale
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct scale_sum_of_rows {  // measure, lowbit.optim.scale
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct scale_mean_of_columns {  // measure, lowbit.optim.scale
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct scale_sum_of_columns {  // measure, lowbit.optim.scale
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct scale_norm {  // fold, lowbit.optim.scale
  struct C { lb::constant<F> floor; };
  LB_FN void apply(F &n, F x, const C &c) {
    n = lb::maximum(lb::sqrt(x), c.floor);
  }
};

template <class F>
struct scale_follow {  // update, lowbit.optim.scale
  struct C { lb::constant<F> rate; };
  LB_FN void apply(F &m, F &g, const C &c) {
    m = lb::lerp(m, g, c.rate);
    const F kept1_ = m;
    g = kept1_;
  }
};

template <class F>
struct scale_descend {  // update, lowbit.optim.scale
  struct C { lb::constant<F> keep, lr; };
  LB_FN void apply(F &p, F g, F n, const C &c) {
    p = c.keep * p - c.lr * (g / n);
  }
};

template <class F>
struct scale_scalar_size {  // fold, lowbit.optim.scale
  struct S { lb::constant<F> scalar_size, exp_avg_weight; };
  struct C { lb::constant<F> scalar_lr; };
  LB_FN void apply(S &s, const C &c) {
    s.scalar_size = c.scalar_lr / s.exp_avg_weight;
  }
};

template <class F>
struct scale_scalar_adam {  // update, lowbit.optim.scale
  struct S { lb::constant<F> scalar_size, root; };
  struct C { lb::constant<F> rate1, rate2, scalar_keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    p = c.scalar_keep * p - s.scalar_size * (m / ((lb::sqrt(v) + c.eps) * s.root));
  }
};

template <class F, class C>
LB_FN F sgd_decayed(F g, F p, const C &c) {
  return g + c.weight_decay * p;
}

template <class F>
struct sgd_plain {  // update, lowbit.optim.sgd
  struct C { lb::constant<F> lr, weight_decay; };
  LB_FN void apply(F &p, F g, const C &c) {
    p = p - c.lr * sgd_decayed<F>(g, p, c);
  }
};

template <class F>
struct sgd_momentum {  // update, lowbit.optim.sgd
  struct C { lb::constant<F> momentum, share, weight_decay, lr; };
  LB_FN void apply(F &p, F g, F &b, const C &c) {
    b = c.momentum * b + c.share * sgd_decayed<F>(g, p, c);
    p = p - c.lr * b;
  }
};

template <class F>
struct sgd_nesterov {  // update, lowbit.optim.sgd
  struct C { lb::constant<F> weight_decay, momentum, share, lr; };
  LB_FN void apply(F &p, F g, F &b, const C &c) {
    const F d = sgd_decayed<F>(g, p, c);
    b = c.momentum * b + c.share * d;
    p = p - c.lr * (d + c.momentum * b);
  }
};

template <class F, class C>
LB_FN void spam_undecayed(F p, F g, F m, F v, const C &c, F &out0_, F &out1_, F &out2_) {
  adamw_average<F>(m, v, g, c, m, v);
  out0_ = p - c.step_size * (m / (lb::sqrt(v) + c.eps));
  out1_ = m;
  out2_ = v;
}

template <class F>
struct spam_released {  // update, lowbit.optim.spam
  struct C { lb::constant<F> rate1, rate2, step_size, eps, decay; };
  LB_FN void apply(F &p, F g, F &m, F &v, const C &c) {
    spam_undecayed<F>(p, g, m, v, c, p, m, v);
    p = p - c.decay * p;
  }
};

template <class F>
struct spam_released_sparse {  // update, lowbit.optim.spam
  struct C { lb::constant<F> rate1, rate2, step_size, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const C &c) {
    spam_undecayed<F>(p, g, m, v, c, p, m, v);
  }
};

template <class F>
struct stabilizers_peak {  // measure, lowbit.optim.stabilizers
  LB_FN F apply(F g) {
    return lb::abs(g);
  }
};

template <class F>
struct stabilizers_weigh_peak {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> m_max_weight; };
  struct C { lb::constant<F> peak_rate; };
  LB_FN void apply(S &s, const C &c) {
    s.m_max_weight = lb::lerp(s.m_max_weight, 1.0f, c.peak_rate);
  }
};

template <class F>
struct stabilizers_peak_weight {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> m_max_weight; };
  struct C { lb::constant<F> peak_weight; };
  LB_FN void apply(S &s, const C &c) {
    s.m_max_weight = c.peak_weight;
  }
};

template <class F>
struct stabilizers_limit {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> m_max_t, clip_limit, m_max_weight, clip_share, unit; };
  struct C { lb::constant<F> peak_rate, one, largest; };
  LB_FN void apply(F x, S &s, const C &c) {
    s.m_max_t = lb::lerp(s.m_max_t, x, c.peak_rate);
    s.clip_limit = s.m_max_t / s.m_max_weight;
    s.clip_share = s.clip_limit / lb::where(x > 0.0f, x, c.one);
    const F top = lb::minimum(x, s.clip_limit);
    s.unit = lb::reciprocal(lb::binade(lb::where(top <= c.largest, top, c.one)));
  }
};

template <class F>
struct stabilizers_clip_spikes {  // update, lowbit.optim.stabilizers
  struct S { lb::constant<F> clip_limit, clip_share; };
  LB_FN void apply(F &g, const S &s) {
    g = lb::where(lb::abs(g) > s.clip_limit, g * s.clip_share, g);
  }
};

template <class F>
struct stabilizers_energy {  // measure, lowbit.optim.stabilizers
  struct S { lb::constant<F> unit; };
  LB_FN F apply(F g, const S &s) {
    g = g * s.unit;
    return g * g;
  }
};

template <class F>
struct stabilizers_weigh_norm {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> m_norm_weight, v_norm_weight; };
  struct C { lb::constant<F> norm_rate, energy_rate; };
  LB_FN void apply(S &s, const C &c) {
    s.m_norm_weight = lb::lerp(s.m_norm_weight, 1.0f, c.norm_rate);
    s.v_norm_weight = lb::lerp(s.v_norm_weight, 1.0f, c.energy_rate);
  }
};

template <class F>
struct stabilizers_norm_weight {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> m_norm_weight, v_norm_weight; };
  struct C { lb::constant<F> norm_weight, energy_weight; };
  LB_FN void apply(S &s, const C &c) {
    s.m_norm_weight = c.norm_weight;
    s.v_norm_weight = c.energy_weight;
  }
};

template <class F>
struct stabilizers_gain {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> unit, m_norm_t, v_norm_t, m_norm_weight, v_norm_weight, norm_gain; };
  struct C { lb::constant<F> norm_rate, energy_rate, norm_eps, one; };
  LB_FN void apply(F x, S &s, const C &c) {
    const F norm = lb::sqrt(x) / s.unit;
    s.m_norm_t = lb::lerp(s.m_norm_t, norm, c.norm_rate);
    s.v_norm_t = lb::lerp(s.v_norm_t, norm * norm, c.energy_rate);
    const F wanted = s.m_norm_t / s.m_norm_weight / (lb::sqrt(s.v_norm_t / s.v_norm_weight) + c.norm_eps);
    s.norm_gain = lb::where(x > 0.0f, wanted / lb::sqrt(lb::where(x > 0.0f, x, c.one)), lb::reciprocal(s.unit));
  }
};

template <class F>
struct stabilizers_normalize {  // update, lowbit.optim.stabilizers
  struct S { lb::constant<F> unit, norm_gain; };
  LB_FN void apply(F &g, const S &s) {
    g = g * s.unit * s.norm_gain;
  }
};

template <class F, class C>
LB_FN F stabilizers_brought_down(F g, F v, const C &c) {
  const F limit = c.spike_threshold * v;
  return lb::where(g * g > limit, lb::sign(g) * lb::sqrt(limit), g);
}

template <class F>
struct stabilizers_clip_to_moment {  // update, lowbit.optim.stabilizers
  struct C { lb::constant<F> spike_threshold; };
  LB_FN void apply(F &g, F v, const C &c) {
    g = lb::where(v > 0.0f, stabilizers_brought_down<F>(g, v, c), g);
  }
};

template <class F>
struct stabilizers_clip_and_freeze {  // update, lowbit.optim.stabilizers
  struct C { lb::constant<F> spike_threshold; };
  LB_FN void apply(F &g, F v, const C &c) {
    g = stabilizers_brought_down<F>(g, v, c);
  }
};

template <class F>
struct stabilizers_energy_of_all {  // measure, lowbit.optim.stabilizers
  LB_FN F apply(F g) {
    return g * g;
  }
};

template <class F>
struct stabilizers_share {  // fold, lowbit.optim.stabilizers
  struct S { lb::constant<F> global_share; };
  struct C { lb::constant<F> one, max_norm, norm_floor; };
  LB_FN void apply(F x, S &s, const C &c) {
    s.global_share = lb::minimum(c.one, c.max_norm / (lb::sqrt(x) + c.norm_floor));
  }
};

template <class F>
struct stabilizers_scale_all {  // update, lowbit.optim.stabilizers
  struct S { lb::constant<F> global_share; };
  LB_FN void apply(F &g, const S &s) {
    g = g * s.global_share;
  }
};

template <class F>
struct stable_spam_closed_form {  // fold, lowbit.optim.stable_spam
  struct S { lb::constant<F> exp_avg_weight, exp_avg_sq_weight; };
  struct C { lb::constant<F> weight1, weight2; };
  LB_FN void apply(S &s, const C &c) {
    s.exp_avg_weight = c.weight1;
    s.exp_avg_sq_weight = c.weight2;
  }
};

template <class F>
struct stabilizers_normalize_adamw_adamw {  // update, lowbit.optim.adamw
  struct S { lb::constant<F> unit, norm_gain, step_size, root; };
  struct C { lb::constant<F> rate1, rate2, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    stabilizers_normalize<F>::apply(g, {s.unit, s.norm_gain});
    adamw_adamw<F>::apply(p, g, m, v, {s.step_size, s.root}, {c.rate1, c.rate2, c.keep, c.eps});
  }
};

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
