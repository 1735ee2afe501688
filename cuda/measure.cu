// All of an optimizer step but the updating sweep: what rules measure, what they fold from it, what persists.
//
//     begin             working copies of scalars and vectors; folds before the first measurement
//     measure           a sweep: each step block (256 values) to one number, or the largest magnitude of a tensor
//     measure_columns   a sweep: each tile of 512 rows of a column to one number
//     rows              step blocks' numbers to rows', or to at most STRIPS strips of a tensor's rows
//     elements          rows' numbers to groups', tiles' to columns'; folds over their elements
//     subtotal, total   a tensor's number; then that of all tensors together
//     scalars           a tensor's number; folds over the tensor; after the last measurement: is all finite, what persists
//
// Which of them a measurement takes is said by lowbit/gpu/stages.py, and what a sum is, to the bit, by
// lowbit/backends/reference.py: so no schedule changes a bit, and the only atomics are maxima of integers.
//
// Memory, bytes of a parameter: a sweep reads the gradient (2 for bf16) and what else the measurement names; a sum leaves
// 4/256, read back once. Columns leave 8/512. A sum over a step block takes 12 shuffles of a warp, 1.5 instructions of a
// lane's value. Launches after a sweep wait for memory a few times each, some 3 microseconds, whatever the tensors.
#include "moments.h"
#include "sums.h"

namespace lb {

[[maybe_unused]] constexpr int TILE = 512;  // rows of a tile
constexpr int64_t STRIPS = 8192;            // of a tensor's rows
constexpr int NARROW = 1024;                // step blocks of a row that a warp adds up; a longer row takes a block of threads

LB_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LB_FN int64_t blocks_of_row(const Job &job) { return (job.cols + WIDTH - 1) / WIDTH; }
LB_FN int64_t strips_of(const Job &job) {
  return blocks_of_row(job) > NARROW ? job.rows : smaller(job.rows, STRIPS);
}
LB_FN int64_t length_of(const Job &job, int over) {  // of a vector
  return over == LB_ROW ? job.rows : over == LB_COLUMN ? job.cols : (job.rows + job.group_rows - 1) / job.group_rows;
}

// Whether a thread is one of the first COUNT, of which there may be none.
template <int COUNT> LB_FN bool among([[maybe_unused]] int t) {
  if constexpr (COUNT > 0) return t < COUNT;
  else return false;
}

template <int M> constexpr bool MAX = Sweep<M>::REDUCE == LB_MAX;
template <int M> constexpr bool IN_ALL = Sweep<M>::OVER == LB_TENSOR || Sweep<M>::OVER == LB_ALL;

template <int M> LB_FN double mean(double sum, int64_t rows, int64_t cols) {
  return Sweep<M>::REDUCE == LB_MEAN ? sum / ((double)rows * (double)cols) : sum;
}

// Calls f with the measurement of a number that is known when the kernel runs.
template <int M> struct Measurement {
  static constexpr int NUMBER = M;
};
template <int M = 0, class F> LB_FN void with(int32_t measure, F f) {
  if constexpr (M < MEASURES) {
    if (measure == M) f(Measurement<M>());
    else with<M + 1>(measure, f);
  }
}

// ---- sweeps

// What is measured at a place, 0 where there are no values. True if the gradient is not finite.
template <int M> LB_FN bool measured(const Job &job, const Dynamic &now, const uint8_t *workspace, const Tables<0> &tables,
                                     const typename Sweep<M>::Scalars &scalars, const Place &here, float (&value)[V]) {
  constexpr uint32_t READS = Sweep<M>::READS;
  float x[SLOTS][V];
  bool bad = false;
  if constexpr ((READS & 1u) != 0u) load_parameter(job, here, x[0]);
  if constexpr ((READS & 2u) != 0u) bad = load_gradient(now, here, x[1]);
  load_moments<0, READS>(job, here, tables, x);
  load_vectors<0, READS>(job, workspace, here, x);
  LB_UNROLL for (int k = 0; k < V; ++k) {
    float values[SLOTS] = {};
    LB_UNROLL for (int slot = 0; slot < SLOTS; ++slot) {
      if (READS >> slot & 1u) values[slot] = x[slot][k];
    }
    value[k] = Sweep<M>::run(values, scalars);
  }
  keep_inside(here, value);
  return bad;
}

template <int M> LB_FN void prepare(Tables<0> &tables) {
  if constexpr ((Sweep<M>::READS >> 2 & ((1u << MOMENTS) - 1u)) != 0u) {
    prepare_tables<0>(tables);
    __syncthreads();
  }
}

LB_FN void leave_if(bool bad, Run &run) {
  if (GUARDED && any<32>(bad) && lane() == 0) atomicMax(&run.skip, 1u);
}

LB_FN uint32_t peak(const float (&x)[V]) {
  uint32_t most = 0u;
  LB_UNROLL for (int k = 0; k < V; ++k) {
    const uint32_t bits = magnitude_bits(x[k]);
    most = bits > most ? bits : most;
  }
  return most;
}

template <int M> LB_FN void sweep(const Job &job, const Dynamic &now, Run &run, uint8_t *workspace, Tables<0> &tables) {
  prepare<M>(tables);
  const auto scalars = Sweep<M>::scalars(run.scalars);
  float *partial = (float *)(workspace + job.partial);
  const int64_t first = ((int64_t)blockIdx.x - job.first_chunk) * CHUNK + (int64_t)warp() * (32 * V * UNITS) + lane() * V;
  uint32_t most = 0u;
  bool bad = false;
  LB_ONE_AT_A_TIME for (int unit = 0; unit < UNITS; ++unit) {
    const Place here = place(job, first + (int64_t)unit * (32 * V));
    if (!any<32>(here.count > 0)) break;
    float value[V];
    bad |= measured<M>(job, now, workspace, tables, scalars, here, value);
    if constexpr (MAX<M> && IN_ALL<M>) {
      const uint32_t bits = peak(value);
      most = bits > most ? bits : most;
    } else {
      const float number = MAX<M> ? float_of(largest<LANES>(peak(value))) : block_sum<LANES>(value);
      if (lane() % LANES == 0 && here.count > 0) partial[here.block] = number;
    }
  }
  if constexpr (MAX<M> && IN_ALL<M>) {
    most = largest<32>(most);
    if (lane() == 0) atomicMax(&run.most, most);
  }
  leave_if(bad, run);
}

// A step block's columns in a tile of rows: threads bring some rows to shared memory together, then each adds up a
// column. Two rooms in turn, so that one barrier is enough.
template <int M>
LB_FN void sweep_columns(const Job &job, const Dynamic &now, Run &run, uint8_t *workspace, Tables<0> &tables,
                         float (&room)[2][THREADS * V]) {
  constexpr int ROWS = THREADS / LANES;  // brought together
  prepare<M>(tables);
  const auto scalars = Sweep<M>::scalars(run.scalars);
  const int64_t unit = (int64_t)blockIdx.x - job.first_tile, tile = unit / blocks_of_row(job);
  const int64_t left = unit % blocks_of_row(job) * WIDTH, top = tile * TILE, bottom = smaller(top + TILE, job.rows);
  const int t = (int)threadIdx.x, own = t / LANES;
  const bool adding = t < WIDTH && left + t < job.cols;
  double sum = 0.0;
  bool bad = false;
  int turn = 0;
  LB_ONE_AT_A_TIME for (int64_t row = top; row < bottom; row += ROWS, turn = 1 - turn) {
    const Place here = place(job, smaller(row + own, bottom - 1) * stride_of(job) + left + t % LANES * V);
    float value[V];
    bad |= measured<M>(job, now, workspace, tables, scalars, here, value);
    LB_UNROLL for (int k = 0; k < V; ++k) room[turn][t * V + k] = value[k];
    __syncthreads();
    const int count = (int)smaller(ROWS, bottom - row);
    for (int k = 0; adding && k < count; ++k) {
      const float each = room[turn][k * WIDTH + t];
      const double next = MAX<M> ? (double)abs(each) : (double)each;
      sum = row + k == top ? next : combined<MAX<M>>(sum, next);
    }
  }
  if (adding) ((double *)(workspace + job.sums))[tile * job.cols + left + t] = sum;
  leave_if(bad, run);
}

// ---- from there to rows, tensors, groups and columns

// Folds on one element of the vectors over what was measured.
template <int M> LB_FN void fold_element(const Job &job, const Run &run, uint8_t *workspace, int64_t at, double number) {
  using Fold = Folds<M + 1>;
  float x[VECTORS + 1] = {}, s[SCALARS + 1] = {};
  LB_UNROLL for (int k = 0; k < VECTORS; ++k) {
    if (Fold::READS >> k & 1u) x[k] = ((const float *)(workspace + job.work_vectors[k]))[at];
  }
  LB_UNROLL for (int k = 0; k < SCALARS; ++k) s[k] = run.scalars[k];
  Fold::on_element(x, s, (float)number);
  LB_UNROLL for (int k = 0; k < VECTORS; ++k) {
    if (Fold::WRITES >> k & 1u) ((float *)(workspace + job.work_vectors[k]))[at] = x[k];
  }
}

// A block's part of the lines of a job: each line to a team of lanes, in calls that a whole warp makes together.
template <class F> LB_FN void by_teams(int64_t lines, int lanes, int32_t share, F f) {
  const int64_t part = (int64_t)blockIdx.x % share, teams = THREADS / lanes;
  const int64_t own = (int64_t)warp() * (32 / lanes) + lane() / lanes;
  for (int64_t first = part * teams; first < lines; first += share * teams) f(first + own);
}

template <int M> LB_FN void reduce_rows(const Job &job, const Run &run, uint8_t *workspace, int32_t share,
                                        double (&room)[THREADS]) {
  constexpr bool LARGEST = MAX<M>;
  const int64_t blocks = blocks_of_row(job), rows = job.rows;
  const float *partial = (const float *)(workspace + job.partial);
  double *sums = (double *)(workspace + job.sums);
  const auto done = [&](int64_t line, double number) {
    if constexpr (Sweep<M>::OVER == LB_ROW) fold_element<M>(job, run, workspace, line, mean<M>(number, 1, job.cols));
    else sums[line] = number;
  };
  if (blocks > NARROW) {
    for (int64_t row = blockIdx.x % share; row < rows; row += share) {
      const float *line = partial + row * blocks;
      const double number = halve_line<LARGEST>(blocks, room, [&](int64_t i) { return (double)line[i]; });
      if (threadIdx.x == 0) done(row, number);
    }
    return;
  }
  if (IN_ALL<M> && blocks == 1) {
    by_teams(strips_of(job), 1, share, [&](int64_t strip_number) {
      const auto read = [&](int64_t i) { return (double)partial[i]; };
      if (strip_number < strips_of(job)) done(strip_number, strip<LARGEST, 8, 15>(rows, strip_number, STRIPS, read));
    });
    return;
  }
  const int lanes = blocks < 32 ? (int)power_of_two(blocks) : 32;
  const int64_t lines = IN_ALL<M> ? strips_of(job) : rows;
  by_teams(lines, lanes, share, [&](int64_t line) {
    const auto row_number = [&](int64_t row) {
      const auto read = [&](int64_t i) { return row < rows ? (double)partial[row * blocks + i] : 0.0; };
      return halve_team<LARGEST>(strip<LARGEST, 4, 3>(blocks, lane() % lanes, lanes, read), blocks, lanes);
    };
    double number;
    if constexpr (IN_ALL<M>) {  // lanes stay together: what is beyond the last row is 0 rather than left out
      const int64_t whole = power_of_two(rows > STRIPS ? rows : STRIPS);
      number = strip<LARGEST, 1, 12>(whole, line < lines ? line : 0, STRIPS, row_number);
    } else {
      number = row_number(line);
    }
    if (line < lines && lane() % lanes == 0) done(line, number);
  });
}

template <int M> LB_FN void reduce_groups(const Job &job, const Run &run, uint8_t *workspace, int32_t share,
                                          double (&room)[THREADS]) {
  const int64_t groups = length_of(job, LB_GROUP), length = job.group_rows;
  const double *sums = (const double *)(workspace + job.sums);
  const auto size = [&](int64_t group) { return smaller(length, job.rows - group * length); };
  const auto done = [&](int64_t group, double sum) {
    fold_element<M>(job, run, workspace, group, mean<M>(sum, size(group), job.cols));
  };
  if (length > NARROW) {
    for (int64_t group = blockIdx.x % share; group < groups; group += share) {
      const double *line = sums + group * length;
      const double sum = halve_line<MAX<M>>(size(group), room, [&](int64_t i) { return line[i]; });
      if (threadIdx.x == 0) done(group, sum);
    }
    return;
  }
  const int lanes = length < 32 ? (int)power_of_two(length) : 32;
  by_teams(groups, lanes, share, [&](int64_t group) {
    const double *line = sums + group * length;
    const int64_t n = group < groups ? size(group) : 1;
    const auto read = [&](int64_t i) { return group < groups ? line[i] : 0.0; };
    const double sum = halve_team<MAX<M>>(strip<MAX<M>, 4, 3>(n, lane() % lanes, lanes, read), n, lanes);
    if (group < groups && lane() % lanes == 0) done(group, sum);
  });
}

template <int M> LB_FN void reduce_columns(const Job &job, const Run &run, uint8_t *workspace, int32_t share) {
  const double *sums = (const double *)(workspace + job.sums);
  by_teams(job.cols, 1, share, [&](int64_t column) {
    if (column >= job.cols) return;
    const auto read = [&](int64_t tile) { return sums[tile * job.cols + column]; };
    const double sum = strip<MAX<M>, 8, 12>((job.rows + TILE - 1) / TILE, 0, 1, read);
    fold_element<M>(job, run, workspace, column, mean<M>(sum, job.rows, 1));
  });
}

// What was measured over a tensor, for thread 0.
template <int M> LB_FN double tensor_number(const Job &job, Run &run, const uint8_t *workspace, double (&room)[THREADS]) {
  if constexpr (MAX<M>) {
    return (double)float_of(run.most);
  } else {
    const double *sums = (const double *)(workspace + job.sums);
    const double sum = halve_line<false>(strips_of(job), room, [&](int64_t i) { return sums[i]; });
    return mean<M>(sum, job.rows, job.cols);
  }
}

// ---- what persists

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
  if (t == 0) Folds<0>::on_tensor(run.scalars, 0.0f);
  __syncthreads();
  if (MEASURES == 0 && among<KEPT>(t)) *job.scalars[t] = run.scalars[t];
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) measure(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ Tables<0> tables;
  const int32_t at = owner[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER != LB_COLUMN) sweep<M>(jobs[at], dynamic[at], runs[at], workspace, tables);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) measure_columns(LB_ARGUMENTS) {
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

extern "C" __global__ void __launch_bounds__(lb::THREADS) rows(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ double room[THREADS];
  const int32_t at = (int32_t)blockIdx.x / share;
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER != LB_COLUMN) reduce_rows<M>(jobs[at], runs[at], workspace, share, room);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) elements(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ double room[THREADS];
  const int32_t at = (int32_t)blockIdx.x / share;
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    if constexpr (Sweep<M>::OVER == LB_GROUP) reduce_groups<M>(jobs[at], runs[at], workspace, share, room);
    if constexpr (Sweep<M>::OVER == LB_COLUMN) reduce_columns<M>(jobs[at], runs[at], workspace, share);
  });
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) subtotal(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ double room[THREADS];
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
  __shared__ double room[THREADS];
  const auto read = [&](int64_t i) { return runs[places[i]].skip ? 0.0 : runs[places[i]].total; };
  const double number = max ? halve_line<true>(count, room, read) : halve_line<false>(count, room, read);
  for (int i = (int)threadIdx.x; i < count; i += THREADS) runs[places[i]].total = number;
}

extern "C" __global__ void __launch_bounds__(lb::THREADS) scalars(LB_ARGUMENTS) {
  using namespace lb;
  __shared__ double room[THREADS];
  const Job &job = jobs[blockIdx.x];
  Run &run = runs[blockIdx.x];
  with(measurement, [&](auto m) {
    constexpr int M = decltype(m)::NUMBER;
    double number = 0.0;
    if constexpr (Sweep<M>::OVER == LB_TENSOR) number = tensor_number<M>(job, run, workspace, room);
    if constexpr (Sweep<M>::OVER == LB_ALL) number = run.total;
    __syncthreads();
    if (threadIdx.x == 0) {
      Folds<M + 1>::on_tensor(run.scalars, (float)number);
      run.most = 0u;
    }
    __syncthreads();
    if constexpr (M + 1 == MEASURES) persist(job, run, workspace);
  });
}
