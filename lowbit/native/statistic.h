// What scales are made from: a number for each part of a row that lies in one block. Where the matrix has an `out`, the
// values themselves are written there, rotated: to be encoded in rows, once their scales are known.
#pragma once
#include "matrix.h"
#include "trees.h"

namespace LB_SPACE {

struct Asked {  // which statistic, and where it goes
  int what;
  void *to;
};

// Terms of a sum for n values of one block: squares or magnitudes in units of its scale, or squares of losses.
static void terms(const lb_matrix &m, int what, const float *x, int64_t col, int n, const Scales &s, float *to,
                  Desk &desk) {
  const lb_format &f = *m.packed.format;
  if (what == LB_LOSSES) {
    encode_units(f, x, col, n, s, nullptr, desk);
    decode_units(f, col, n, s, to, desk);
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = to[i] - x[i];
  } else {
    multiply(f, x, col, n, s.inverse, to);
  }
  if (what == LB_MAGNITUDES) {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = lb::abs(to[i]);
  } else {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = to[i] * to[i];
  }
}

// A sum over a part of a row in one block, as blocks.total has it. `work` is for a number for each 256 values.
static double sum_block(const lb_matrix &m, int what, const Line &block, double *work, Desk &desk) {
  alignas(64) float each[LB_BLOCK];
  const Scales s = given(m, block.row, block.col);
  int64_t count = 0;
  for (int64_t i = 0; i < block.n; i += LB_BLOCK) {
    const int n = (int)(block.n - i < LB_BLOCK ? block.n - i : LB_BLOCK);
    terms(m, what, block.x + i, block.col + i, n, s, each, desk);
    int width = 1;
    while (width < n) width *= 2;
    for (int k = n; k < width; ++k) each[k] = 0.0f;
    work[count++] = (double)halve(each, width);
  }
  return halve(work, count);
}

static void measure_line(const lb_matrix &m, const Asked &asked, const Line &line, double *work, Desk &desk) {
  const lb_operand &o = m.packed;
  const int64_t block = o.format->block;
  if (line.to && line.to != line.x) memcpy(line.to, line.x, sizeof(float) * line.n);
  for (int64_t i = 0; i < line.n; i += block) {
    const int64_t n = line.n - i < block ? line.n - i : block, number = line.row * o.scales + (line.col + i) / block;
    const Line part = {line.row, line.col + i, n, line.x + i, nullptr};
    if (asked.what != LB_PEAKS) {
      ((double *)asked.to)[number] = sum_block(m, asked.what, part, work, desk);
      continue;
    }
    uint32_t most = 0;
    for (int64_t k = 0; k < n; k += SPAN) {
      const uint32_t found = peak(part.x + k, part_of(n - k));
      most = found > most ? found : most;
    }
    ((float *)asked.to)[number] = float_of(most);
  }
}

static bool measure_piece(const lb_matrix &m, const Piece &p, const Asked &asked, float *room, double *work,
                          Desk &desk) {
  return each_line(m, p, room, [&](const Line &line) {
    measure_line(m, asked, line, work, desk);
    return true;
  });
}

}  // namespace LB_SPACE
