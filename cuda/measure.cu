// All of an optimizer step but the updating sweep: what rules measure, what they fold from it, what persists.
//
//     begin             working copies of scalars and vectors; folds before the first measurement
//     measure           a sweep: each step block (256 values) to one number, or the largest magnitude of a tensor
//     measure_columns   a sweep: each tile of 512 rows of a column to one number
//     rows              step blocks' numbers to rows', or to at most STRIPS strips of a tensor's rows
//     elements          rows' numbers to groups', tiles' to columns'; folds over their elements
//     subtotal, total   a tensor's number; then that of all tensors together
//     scalars           a tensor's number; folds over the tensor; after the last measurement: what persists, if finite
//
// Which of them a measurement takes is said by lowbit/gpu/stages.py, and what a sum is, to the bit, by
// lowbit/backends/reference.py: so no schedule changes a bit, and the only atomics are maxima of integers.
//
// Memory, bytes of a parameter: a sweep reads the gradient (2 for bf16) and what else the measurement names; a sum
// leaves 4/256, read back once; columns leave 8/512. The sum of a step block takes a lane of 8 values 12 shuffles, 12
// additions and 14 selects, 5 instructions of a value; a largest magnitude takes 2. What follows a sweep is short and
// waits for memory a few times in each launch.
#include "reductions.h"

namespace lb {

// A thread's elements of the first `vectors` vectors.
template <class F> LB_FN void each_vector(const Job &job, uint8_t *workspace, int vectors, F f) {
  LB_UNROLL for (int k = 0; k < VECTORS; ++k) {
    float *working = (float *)(workspace + job.work_vectors[k]);
    const int64_t length = length_of(job, over(k));
    for (int64_t i = threadIdx.x; k < vectors && i < length; i += THREADS) f(k, i, working);
  }
}

LB_FN void persist(const Job &job, Run &run, uint8_t *workspace) {
  const int t = (int)threadIdx.x;
  bool bad = GUARDED && among<SCALARS>(t) && !finite_bits(magnitude_bits(run.scalars[t]));
  if (GUARDED) {
    each_vector(job, workspace, VECTORS, [&](int, int64_t i, const float *working) {
      bad |= !finite_bits(magnitude_bits(working[i]));
    });
  }
  if (bad) atomicMax(&run.skip, 1u);
  __syncthreads();
  if (run.skip) {  // all its blocks count as lost
    if (t == 0) job.skipped[0] += job.rows * blocks_of_row(job), job.skipped[1] += 1;
    return;
  }
  if (among<KEPT>(t)) *job.scalars[t] = run.scalars[t];
  each_vector(job, workspace, KEPT_VECTORS, [&](int k, int64_t i, const float *working) {
    job.vectors[k][i] = working[i];
  });
}

}  // namespace lb

#define LB_ARGUMENTS                                                                                         \
  [[maybe_unused]] const Job *jobs, [[maybe_unused]] const Dynamic *dynamic, [[maybe_unused]] Run *runs,     \
      [[maybe_unused]] const int32_t *owner, [[maybe_unused]] uint8_t *workspace,                            \
      [[maybe_unused]] int32_t measurement, [[maybe_unused]] int32_t share

extern "C" __global__ void __launch_bounds__(lb::THREADS) begin(LB_ARGUMENTS) {
  using namespace lb;
  const Job &job = jobs[blockIdx.x];
  Run &run = runs[blockIdx.x];
  const int t = (int)threadIdx.x;
  if (among<SCALARS>(t)) run.scalars[t] = among<KEPT>(t) ? *job.scalars[t] : initial(t);
  if (t == 0) run.total = 0.0, run.most = 0u, run.skip = 0u;
  each_vector(job, workspace, KEPT_VECTORS, [&](int k, int64_t i, float *working) { working[i] = job.vectors[k][i]; });
  __syncthreads();
  if (t == 0) Folds<0>::on_tensor(job.constants, run.scalars, 0.0f);
  __syncthreads();
  if (MEASURES == 0 && among<KEPT>(t)) *job.scalars[t] = run.scalars[t];
}

extern "C" __global__ void __launch_bounds__(lb::THREADS, lb::MEASURERS) measure(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Tables<0> tables;
  __shared__ uint32_t room[THREADS / 32];
  const int32_t at = owner[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER != LB_COLUMN) sweep<M>(jobs[at], dynamic[at], runs[at], workspace, tables, room);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS, 4) measure_columns(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Tables<0> tables;
  __shared__ float room[2][THREADS * V];
  const int32_t at = owner[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER == LB_COLUMN) {
      sweep_columns<M>(jobs[at], dynamic[at], runs[at], workspace, tables, room);
    }
  });
}

// Three blocks of threads on a multiprocessor: with four, nvcc 13.0 spills 24 bytes on sm_120.
extern "C" __global__ void __launch_bounds__(lb::THREADS, 3) rows(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Room<THREADS> room;
  const int32_t at = (int32_t)blockIdx.x / share;
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER != LB_COLUMN) reduce_rows<M>(jobs[at], runs[at], workspace, share, room);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS, 4) elements(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Room<THREADS> room;
  const int32_t at = (int32_t)blockIdx.x / share;
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER == LB_GROUP) reduce_groups<M>(jobs[at], runs[at], workspace, share, room);
    if constexpr (Sweep<M>::OVER == LB_COLUMN) reduce_columns<M>(jobs[at], runs[at], workspace, share, room);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) subtotal(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Room<THREADS> room;
  Run &run = runs[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER == LB_ALL) {
      const double number = tensor_number<M>(jobs[blockIdx.x], run, workspace, room);
      if (threadIdx.x != 0) return;
      run.total = number;
      run.most = 0u;
      if (GUARDED && !finite_bits(magnitude_bits((float)number))) run.skip = 1u;
    }
  });
}

// Of `count` tensors of any programs, in the order of `places`; one that is left alone counts as 0.
extern "C" __global__ void __launch_bounds__(lb::THREADS)
    total(Run *runs, const int32_t *places, int32_t count, int32_t max) {
  using namespace lb;
  __shared__ Room<THREADS> room;
  const auto read = [&](int64_t i) { return runs[places[i]].skip ? 0.0 : runs[places[i]].total; };
  const double number = max ? halve_line<true>(count, room, read) : halve_line<false>(count, room, read);
  for (int i = (int)threadIdx.x; i < count; i += THREADS) runs[places[i]].total = number;
}

extern "C" __global__ void __launch_bounds__(lb::THREADS, 4) scalars(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Room<THREADS> room;
  const Job &job = jobs[blockIdx.x];
  Run &run = runs[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    double number = 0.0;
    if constexpr (Sweep<M>::OVER == LB_TENSOR) number = tensor_number<M>(job, run, workspace, room);
    if constexpr (Sweep<M>::OVER == LB_ALL) number = run.total;
    __syncthreads();
    if (threadIdx.x == 0) {
      Folds<M + 1>::on_tensor(job.constants, run.scalars, (float)number);
      run.most = 0u;
    }
    __syncthreads();
    if constexpr (M + 1 == MEASURES) persist(job, run, workspace);
  });
}
