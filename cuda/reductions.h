// From the numbers of sweeps to those of rows, groups, columns and tensors, and folds over what has elements.
#pragma once
#include "sweeps.h"

namespace lb {

// Folds on one element of the vectors over what was measured.
template <int M>
LB_FN void fold_element(const Job &job, const Run &run, uint8_t *workspace, int64_t at, double number) {
  using Fold = Folds<M + 1>;
  float x[VECTORS + 1] = {}, s[SCALARS + 1] = {};
  LB_UNROLL for (int k = 0; k < VECTORS; ++k) {
    if (Fold::READS >> k & 1u) x[k] = ((const float *)(workspace + job.work_vectors[k]))[at];
  }
  LB_UNROLL for (int k = 0; k < SCALARS; ++k) s[k] = run.scalars[k];
  Fold::on_element(x, job.constants, s, (float)number);
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
                                        Room<THREADS> &room) {
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
      if (strip_number < strips_of(job)) done(strip_number, strip<LARGEST, 8>(rows, strip_number, STRIPS, room.waiting, read));
    });
    return;
  }
  const int lanes = blocks < 32 ? (int)power_of_two(blocks) : 32;
  const int64_t lines = IN_ALL<M> ? strips_of(job) : rows;
  by_teams(lines, lanes, share, [&](int64_t line) {
    const auto row_number = [&](int64_t row) {
      const auto read = [&](int64_t i) { return row < rows ? (double)partial[row * blocks + i] : 0.0; };
      return halve_team<LARGEST>(strip<LARGEST, 4>(blocks, lane() % lanes, lanes, room.inner, read), blocks, lanes);
    };
    double number;
    if constexpr (IN_ALL<M>) {  // lanes stay together: what is beyond the last row is 0 rather than left out
      const int64_t whole = power_of_two(rows > STRIPS ? rows : STRIPS);
      number = strip<LARGEST, 1>(whole, line < lines ? line : 0, STRIPS, room.waiting, row_number);
    } else {
      number = row_number(line);
    }
    if (line < lines && lane() % lanes == 0) done(line, number);
  });
}

template <int M> LB_FN void reduce_groups(const Job &job, const Run &run, uint8_t *workspace, int32_t share,
                                          Room<THREADS> &room) {
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
    const double sum = halve_team<MAX<M>>(strip<MAX<M>, 4>(n, lane() % lanes, lanes, room.inner, read), n, lanes);
    if (group < groups && lane() % lanes == 0) done(group, sum);
  });
}

template <int M> LB_FN void reduce_columns(const Job &job, const Run &run, uint8_t *workspace, int32_t share,
                                           Room<THREADS> &room) {
  const double *sums = (const double *)(workspace + job.sums);
  by_teams(job.cols, 1, share, [&](int64_t column) {
    if (column >= job.cols) return;
    const auto read = [&](int64_t tile) { return sums[tile * job.cols + column]; };
    const double sum = strip<MAX<M>, 8>((job.rows + TILE - 1) / TILE, 0, 1, room.waiting, read);
    fold_element<M>(job, run, workspace, column, mean<M>(sum, job.rows, 1));
  });
}

// What was measured over a tensor, for thread 0.
template <int M>
LB_FN double tensor_number(const Job &job, const Run &run, const uint8_t *workspace, Room<THREADS> &room) {
  if constexpr (MAX<M>) {
    return (double)float_of(run.most);
  } else {
    const double *sums = (const double *)(workspace + job.sums);
    const double sum = halve_line<false>(strips_of(job), room, [&](int64_t i) { return sums[i]; });
    return mean<M>(sum, job.rows, job.cols);
  }
}

}  // namespace lb
