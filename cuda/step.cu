// The updating sweep of an optimizer step: every tensor of a bucket in one launch.
//
// A warp takes a step block: 32 lanes decode 8 values each of the parameter, the gradient and every moment, run the
// printed updates on them, agree by shuffles on the block's scales and on whether all of it is finite, encode and store.
// Nothing is fp32 outside registers, nothing waits for the host, and a block that is not finite is left as it was.
//
// Memory, bytes of a parameter: what is stored of p (read and written), g (read), and each moment (read and written).
//   AdamW, bf16 p and g, 8-bit moments: 2 + 2 + 2 + 2 * 2 * (1 + 4/256) = 10.06; with 4 bits 2 * 2 * (1/2 + 4/128) = 8.13.
// Instructions of a parameter: `lowbit doctor --arch sm_90a` counts them; an H100 can issue 99 and 80 meanwhile.
#include "weights.h"

namespace lb {

// All moments from K on: prepare, find out whether the block can be stored, store.
template <int K> struct Stored {
  Scaled<K> scaled;
  CodeWords<K> codes;
  Stored<K + 1> rest;

  // True if something of it is not finite.
  LB_FN bool encode(const Place &place, const Key *keys, const Tables<K> &tables, float (&x)[LOADED][V], Stored &to) {
    keep_inside(place, x[2 + K]);
    keep_inside(place, to.scaled.source);
    bool bad = scale_moment<K>(to.scaled);
    to.codes = encode_moment<K>(keys[1 + K], place, tables, x[2 + K], to.scaled);
    if constexpr (FLOATS<K>) bad = !all_finite<FormatOf<K>::DTYPE>(to.codes);
    return bad | Stored<K + 1>::encode(place, keys, tables.rest, x, to.rest);
  }

  // What codes are taken from, of value k: its root for a format of roots.
  template <class F> LB_FN void take_sources(int k, const float (&x)[LOADED][V], Doubt &doubt, Stored &to) {
    to.scaled.source[k] = x[2 + K][k];
    if (FormatOf<K>::SQUARE) to.scaled.source[k] = Number<F>::value(sqrt(Number<F>::made(x[2 + K][k], doubt)));
    Stored<K + 1>::template take_sources<F>(k, x, doubt, to.rest);
  }

  LB_FN void store(const Job &job, const Place &place, const Stored &from) {
    store_moment<K>(job, place, from.codes, from.scaled);
    Stored<K + 1>::store(job, place, from.rest);
  }
};
template <> struct Stored<MOMENTS> {
  LB_FN bool encode(const Place &, const Key *, const Tables<MOMENTS> &, float (&)[LOADED][V], Stored &) { return false; }
  template <class F> LB_FN void take_sources(int, const float (&)[LOADED][V], Doubt &, Stored &) {}
  LB_FN void store(const Job &, const Place &, const Stored &) {}
};

// Whether the next operands are on their way while others are worked on: what was faster on an H100 (docs/gpu-speed.md).
template <int K> LB_FN constexpr bool searches() {
  if constexpr (K < MOMENTS) return FormatOf<K>::KIND == LB_KIND_CODEBOOK || searches<K + 1>();
  else return false;
}
constexpr bool EARLY = !searches<0>();

// A lane's values of everything as it is stored; they stay in registers until the new ones are known to be right.
using As = Kept<STORED>;
struct Operands {
  GradientWords gradient;
  As::Old parameter;
  Fetched<0, ~0u> moments;
};
// For how many blocks of threads at once a multiprocessor's registers are to suffice: as many as was fastest on an H100,
// and one less where they would spill.
constexpr int TOGETHER = !LINEAR || PARAM == LB_FLOAT32 || sizeof(Operands) > 112 ? 5 : 6;

LB_FN void fetch_operands(const Job &job, const Dynamic &now, const Place &here, Operands &to) {
  if (here.count == 0) return;
  to.gradient = fetch_gradient(now, here);
  to.parameter = As::fetch(job, here);
  Fetched<0, ~0u>::fetch(job, here, to.moments);
}

// All updates, after the last measurement, on numbers of type F. Whether plain floats might have given anything else.
template <class F> LB_FN bool run_updates(const Operands &from, const Place &here, const Tables<0> &tables,
                                          const float *scalars, float (&x)[LOADED][V], Stored<0> &stored) {
  using Update = Sweep<MEASURES, F>;
  const auto own = Update::scalars(scalars);
  widen_gradient(from.gradient, x[1]);
  As::decode(from.parameter, here, tables, x[0]);
  Fetched<0, ~0u>::decode(from.moments, here, tables, x);
  Doubt doubt, of_sources;
  LB_UNROLL for (int k = 0; k < V; ++k) {
    F values[SLOTS];
    LB_UNROLL for (int slot = 0; slot < LOADED; ++slot) values[slot] = Number<F>::made(x[slot][k], doubt);
    Update::run(values, own);
    LB_UNROLL for (int slot = 0; slot < 2 + MOMENTS; ++slot) x[slot][k] = Number<F>::value(values[slot]);
    Stored<0>::template take_sources<F>(k, x, of_sources, stored);
  }
  return Doubt::any(doubt) || Doubt::any(of_sources);
}

}  // namespace lb

extern "C" __global__ void __launch_bounds__(lb::UPDATERS, lb::TOGETHER)
    update(const Job *jobs, const Dynamic *dynamic, const Run *runs, const int32_t *owner, uint8_t *workspace) {
  using namespace lb;
  __shared__ Tables<0> tables;
  prepare_tables<0>(tables);
  __syncthreads();
  const int32_t index = owner[blockIdx.x];
  const Job job = jobs[index];  // a copy: what is stored might change the original, as far as the compiler knows
  const Dynamic now = dynamic[index];
  const Run &run = runs[index];
  if (MEASURES > 0 && GUARDED && run.skip) return;
  float scalars[SCALARS + 1];  // a copy, as above
  LB_UNROLL for (int k = 0; k < SCALARS; ++k) scalars[k] = run.scalars[k];
  Key keys[1 + MOMENTS];
  if (DRAWS) stream_keys(job, now, keys);
  const int64_t first = ((int64_t)blockIdx.x - job.first_chunk) * CHUNK + (int64_t)warp() * (32 * V * TURNS) + lane() * V;
  uint32_t lost = 0u;
  Place here = place(job, first);
  Operands old = {};
  fetch_operands(job, now, here, old);
  LB_ONE_AT_A_TIME for (int unit = 1; any<32>(here.count > 0); ++unit) {
    const Place ahead = unit < TURNS ? place(job, first + (int64_t)unit * (32 * V)) : Place{};
    Operands next = {};
    if (EARLY) fetch_operands(job, now, ahead, next);
    float x[LOADED][V];
    load_vectors<0, Sweep<MEASURES>::READS>(job, workspace, here, x);
    Stored<0> stored;
    const bool doubtful = run_updates<Quick>(old, here, tables, scalars, x, stored);
    if (any<32>(doubtful && here.count > 0)) run_updates<float>(old, here, tables, scalars, x, stored);
    bool finite;
    const As::New parameter = As::encode(job, keys[0], here, tables, old.parameter, x[0], finite);
    bool bad = !finite_gradient(old.gradient);
    bad |= !finite && As::spoils(here, tables, old.parameter, parameter, x[0]);
    bad |= Stored<0>::encode(here, keys, tables, x, stored);
    __syncwarp();  // all lanes have loaded the scales, which one of them stores: a vote alone orders no memory
    if (GUARDED && any<LANES>(bad)) {
      lost += lane() % LANES == 0 && here.count > 0;
    } else {
      As::store(job, here, x[0], parameter);
      Stored<0>::store(job, here, stored);
    }
    if (!EARLY) fetch_operands(job, now, ahead, next);
    here = ahead;
    old = next;
  }
  if (lost) atomicAdd((unsigned long long *)job.skipped, (unsigned long long)lost);
}
