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

template <class F, class C>
LB_FN void adamw_average(F m, F v, F g, const C &c, F &out0_, F &out1_) {
  out0_ = lb::lerp(m, g, c.rate1);
  out1_ = lb::lerp(v, g * g, c.rate2);
}

template <class F, class S, class C>
LB_FN F adamw_descend(F p, F m, F v, const C &c, const S &s) {
  return c.keep * p - s.step_size * (m / (lb::sqrt(v) * s.root + c.eps));
}

template <class F>
struct adamw_adamw {  // update, lowbit.optim.adamw
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, rate2, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    p = adamw_descend<F>(p, m, v, c, s);
  }
};

template <class F>
struct adamw_amsgrad {  // update, lowbit.optim.adamw
  struct S { lb::constant<F> step_size, root; };
  struct C { lb::constant<F> rate1, rate2, keep, eps; };
  LB_FN void apply(F &p, F g, F &m, F &v, F &h, const S &s, const C &c) {
    adamw_average<F>(m, v, g, c, m, v);
    h = lb::maximum(h, v);
    p = adamw_descend<F>(p, m, h, c, s);
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

template <class F>
struct stabilizers_clip_to_moment {  // update, lowbit.optim.stabilizers
  struct C { lb::constant<F> spike_threshold; };
  LB_FN void apply(F &g, F v, const C &c) {
    const F limit = c.spike_threshold * v;
    g = lb::where((v > 0.0f) & (g * g > limit), lb::sign(g) * lb::sqrt(limit), g);
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

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
