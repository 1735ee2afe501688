// The sweeps that measure: from a tensor's operands to a number for each step block, or each column of a tile of rows.
#pragma once
#include "sums.h"
#include "weights.h"

namespace lb {

[[maybe_unused]] constexpr int TILE = 512;  // rows of a tile
constexpr int64_t STRIPS = 8192;            // of a tensor's rows
constexpr int NARROW = 1024;                // step blocks of a row; longer ones take a whole block of threads

LB_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LB_FN int64_t blocks_of_row(const Job &job) { return (job.cols + WIDTH - 1) / WIDTH; }
LB_FN int64_t strips_of(const Job &job) {
  return blocks_of_row(job) > NARROW ? job.rows : smaller(job.rows, STRIPS);
}
LB_FN int64_t length_of(const Job &job, int over) {  // of a vector
  return over == LB_ROW ? job.rows : over == LB_COLUMN ? job.cols : (job.rows + job.group_rows - 1) / job.group_rows;
}

template <int M> constexpr bool MAX = Sweep<M>::REDUCE == LB_MAX;
template <int M> constexpr bool IN_ALL = Sweep<M>::OVER == LB_TENSOR || Sweep<M>::OVER == LB_ALL;

// Blocks of threads that a multiprocessor's registers are to suffice for; 0: as a compiler likes. With several measurements,
// one of them of lines, it liked too few registers and spilled (sm_90a).
template <int M> constexpr bool OF_LINES = !IN_ALL<M> || OF_LINES<M + 1>;
template <> constexpr bool OF_LINES<MEASURES> = false;
constexpr int MEASURERS = MEASURES > 1 && OF_LINES<0> ? 6 : 0;

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

// What is measured at a place, 0 where there are no values. True if the gradient is not finite.
template <int M>
LB_FN bool measured(const Job &job, const Dynamic &now, const uint8_t *workspace, const Tables<0> &tables,
                    const typename Sweep<M>::Scalars &scalars, const Place &here, float (&value)[V]) {
  constexpr uint32_t READS = Sweep<M>::READS;
  float x[SLOTS][V];
  bool bad = false;
  if constexpr ((READS & 1u) != 0u) load_kept(job, here, tables, x[0]);
  if constexpr ((READS & 2u) != 0u) bad = load_gradient(now, here, x[1]);
  load_moments<0, READS>(job, here, tables, x);
  load_vectors<0, READS>(job, workspace, here, x);
  constexpr uint32_t CODES = READS & ((1u << (2 + MOMENTS)) - 1u) & (STORED ? ~2u : ~3u);
  if constexpr (CODES != 0u) beyond(here, [&](int k) { clear(k, x); });  // a code of 0 is some number
  LB_UNROLL for (int k = 0; k < V; ++k) {
    float values[SLOTS] = {};
    LB_UNROLL for (int slot = 0; slot < SLOTS; ++slot) {
      if (READS >> slot & 1u) values[slot] = x[slot][k];
    }
    value[k] = Sweep<M>::run(values, job.constants, scalars);
  }
  beyond(here, [&](int k) { value[k] = 0.0f; });
  return bad;
}

template <int M> LB_FN void prepare(Tables<0> &tables) {
  if constexpr ((Sweep<M>::READS >> 2 & ((1u << MOMENTS) - 1u)) != 0u || (STORED && (Sweep<M>::READS & 1u) != 0u)) {
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

// `room`: a number for each warp, so that a block of threads goes to the tensor's maximum once.
template <int M>
LB_FN void sweep(const Job &job, const Dynamic &now, Run &run, uint8_t *workspace, Tables<0> &tables,
                 [[maybe_unused]] uint32_t (&room)[THREADS / 32]) {
  prepare<M>(tables);
  const auto scalars = Sweep<M>::scalars(run.scalars);
  float *partial = (float *)(workspace + job.partial);
  const int64_t chunk = (int64_t)blockIdx.x - job.first_chunk;
  const int64_t first = chunk * CHUNK + (int64_t)warp() * (32 * V * UNITS) + lane() * V;
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
    if (lane() == 0) room[warp()] = most;
    __syncthreads();
    most = largest<32>(lane() < THREADS / 32 ? room[lane()] : 0u);
    if (threadIdx.x == 0) atomicMax(&run.most, most);
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

}  // namespace lb
