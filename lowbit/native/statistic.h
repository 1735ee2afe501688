// What scales are made from: a number for each part of a row that lies in one block. Where the matrix has an `out`, the
// values themselves are written there, rotated: to be encoded in rows, once their scales are known.
#pragma once
#include "matrix.h"

namespace LB_SPACE {

struct Asked {  // which statistic, and where it goes
  int what;
  void *to;
};

// Terms of sums for n values, in units of the given scales, or losses.
static void terms(const lb_matrix &m, int what, const Line &line, int n, float *to, Desk &desk) {
  const lb_format &f = *m.packed.format;
  const Scales s = given(m, line.row, line.col);
  const float *x = line.x;
  if (what == LB_LOSSES) {
    round_units(f, x, line.col, n, s, nullptr, to, desk);
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = to[i] - x[i];
  } else if (what == LB_PRODUCTS) {
    encode_units(f, x, line.col, n, s, nullptr, desk);
    decode(f, desk.codes, n, 1.0f, nullptr, desk.out);
  } else {
    multiply(f, x, line.col, n, s.inverse, to);
  }
  if (what == LB_MAGNITUDES) {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = lb::abs(to[i]);
  } else if (what == LB_PRODUCTS) {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = desk.values[i] * desk.out[i];
  } else {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = to[i] * to[i];
  }
}

static Line part_of_line(const Line &line, int64_t from, int64_t n) {
  return {line.row, line.col + from, n, line.x + from, nullptr};
}

// Sums over the blocks of a line, as blocks.total has them: of short blocks, many at once.
static void sum_short(const lb_matrix &m, int what, const Line &line, double *to, Desk &desk) {
  alignas(64) float each[SPAN], sums[SPAN];
  const int block = m.packed.format->block, many = SPAN / block * block;
  for (int64_t i = 0; i < line.n; i += many) {
    const int n = (int)(line.n - i < many ? line.n - i : many), count = (n + block - 1) / block;
    terms(m, what, part_of_line(line, i, n), n, each, desk);
    sum_blocks(each, n, block, sums);
    for (int b = 0; b < count; ++b) *to++ = (double)sums[b];
  }
}

// Of long ones. `work` is for a number for each 256 values.
static void sum_long(const lb_matrix &m, int what, const Line &line, double *to, double *work, Desk &desk) {
  alignas(64) float each[LB_BLOCK];
  const int64_t block = m.packed.format->block;
  for (int64_t first = 0; first < line.n; first += block) {
    const int64_t last = first + block < line.n ? first + block : line.n;
    int64_t count = 0;
    for (int64_t i = first; i < last; i += LB_BLOCK) {
      const int n = (int)(last - i < LB_BLOCK ? last - i : LB_BLOCK);
      terms(m, what, part_of_line(line, i, n), n, each, desk);
      work[count++] = (double)sum_few(each, n);
    }
    *to++ = halve(work, count);
  }
}

static void find_peaks(const Line &line, int64_t block, float *to, Desk &desk) {
  if (block > SPAN) {
    for (int64_t i = 0; i < line.n; i += block) *to++ = float_of(peak_of(line.x + i, line.n - i < block ? line.n - i : block));
    return;
  }
  const int64_t many = SPAN / block * block;
  for (int64_t i = 0; i < line.n; i += many) {
    const int n = (int)(line.n - i < many ? line.n - i : many), count = (int)((n + block - 1) / block);
    peaks(line.x + i, n, (int)block, desk.absmax);
    memcpy(to, desk.absmax, sizeof(float) * count);
    to += count;
  }
}

static void find_units(const lb_matrix &m, const Line &line) {
  multiply(*m.packed.format, line.x, line.col, (int)line.n, given(m, line.row, line.col).inverse, line.to);
  LB_IVDEP for (int64_t i = 0; i < line.n; ++i) line.to[i] = in_units(line.to[i], 1.0f);
}

static void measure_line(const lb_matrix &m, const Asked &asked, const Line &line, double *work, Desk &desk) {
  const lb_operand &o = m.packed;
  const int64_t block = o.format->block, number = line.row * o.scales + line.col / block;
  if (asked.what == LB_UNITS) return find_units(m, line);
  if (line.to && line.to != line.x) memcpy(line.to, line.x, sizeof(float) * line.n);
  if (asked.what == LB_PEAKS) find_peaks(line, block, (float *)asked.to + number, desk);
  else if (block <= LB_BLOCK) sum_short(m, asked.what, line, (double *)asked.to + number, desk);
  else sum_long(m, asked.what, line, (double *)asked.to + number, work, desk);
}

static bool measure_piece(const lb_matrix &m, const Piece &p, const Asked &asked, float *room, double *work,
                          Desk &desk) {
  return each_line(m, p, room, [&](const Line &line) {
    measure_line(m, asked, line, work, desk);
    return true;
  });
}

}  // namespace LB_SPACE
