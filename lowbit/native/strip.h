// What quantizes a row works on fp32 values that lie one after the other. Where a matrix has them so, it reads them
// there; here is how they get there from other dtypes, and from a matrix whose columns lie one after the other: a strip
// of rows at a time, some cache lines of every column, so that no transposed copy is made in memory.
#pragma once
#include "blocks.h"
#include "rotate.h"

namespace LB_SPACE {

constexpr int LANES = 64;    // rows of a strip
constexpr int WIDE = 8192;   // values of a row that a thread takes at once, about
constexpr int STRIP = 512;   // of each row of a strip
constexpr int ASIDE = 16;    // rows of a strip lie so much farther apart that they do not meet in the cache

static int64_t size_of(int dtype) { return dtype == LB_FLOAT32 ? 4 : 2; }
static char *place(void *values, int dtype, int64_t at) { return (char *)values + at * size_of(dtype); }

// fp32 values to any dtype, to nearest.
static void put(const float *x, int dtype, int64_t n, void *to) {
  if (dtype == LB_FLOAT32) memcpy(to, x, 4 * n);
  else narrow(x, dtype, (int)n, nullptr, (uint16_t *)to);
}

// 8 by 8 values, transposed. Steps are those from a row to the next.
static void transpose8(const float *from, int64_t step, float *to, int64_t to_step) {
#ifdef LB_AVX2
  __m256 r[8], s[8];
  for (int k = 0; k < 8; ++k) r[k] = _mm256_loadu_ps(from + k * step);
  for (int k = 0; k < 8; k += 2) {
    s[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
    s[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
  }
  for (int k = 0; k < 8; k += 4) {
    r[k] = _mm256_shuffle_ps(s[k], s[k + 2], 0x44);
    r[k + 1] = _mm256_shuffle_ps(s[k], s[k + 2], 0xEE);
    r[k + 2] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0x44);
    r[k + 3] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0xEE);
  }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_step, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_step, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  }
#else
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 8; ++i) to[i * to_step + k] = from[k * step + i];
  }
#endif
}

static void transpose16(const float *from, int64_t step, float *to, int64_t to_step) {
  for (int k = 0; k < 16; k += 8) {
    for (int i = 0; i < 16; i += 8) transpose8(from + k * step + i, step, to + i * to_step + k, to_step);
  }
}

// Columns first .. first + n of `lanes` rows from `row` on, of a matrix whose columns lie one after the other.
static void gather(const lb_matrix &m, int64_t row, int lanes, int64_t first, int64_t n, float *to, int64_t width) {
  alignas(64) float tile[16 * 16];
  for (int64_t c = 0; c < n; c += 16) {
    const int count = (int)(n - c < 16 ? n - c : 16);
    for (int l = 0; l < lanes; l += 16) {
      const int64_t at = (first + c) * m.step + row + l;
      const int part = lanes - l < 16 ? lanes - l : 16;
      float *corner = to + l * width + c;
      if (count == 16 && part == 16 && m.dtype == LB_FLOAT32) {
        transpose16((const float *)m.values + at, m.step, corner, width);
        continue;
      }
      for (int k = 0; k < count; ++k) widen(m.values, m.dtype, at + k * m.step, part, tile + 16 * k);
      if (count == 16 && part == 16) {
        transpose16(tile, 16, corner, width);
        continue;
      }
      for (int i = 0; i < part; ++i) {
        for (int k = 0; k < count; ++k) corner[i * width + k] = tile[16 * k + i];
      }
    }
  }
}

struct Piece {  // columns first .. last of some rows: one, or those of a strip
  int64_t row, first, last;
  int lanes;
};

// How a matrix is shared out: whole rows, or of long ones runs that begin at a byte of codes, of whole blocks if need be.
struct Pieces {
  int64_t rows, cols, across, each, count;
  int lanes;
  Pieces(const lb_matrix &m, bool blocks) : rows(m.rows), cols(m.cols), lanes(m.columns ? LANES : 1) {
    const lb_format &f = *m.packed.format;
    const int64_t wide = m.columns ? STRIP : WIDE;
    int64_t unit = f.kind == LB_KIND_FLOAT || !blocks ? 1 : f.outer ? f.outer : f.block;
    while (unit % (m.rotation ? LB_BLOCK / 2 : 8)) unit *= 2;
    each = cols > 0 ? cols : 1;
    if (cols > (m.columns ? wide : 2 * wide) && unit < cols) each = (wide + unit - 1) / unit * unit;
    across = (cols + each - 1) / each;
    count = (rows + lanes - 1) / lanes * across;
  }
  int64_t values() const { return (each + ASIDE) * lanes; }  // of a piece, with what is between its rows
  Piece operator[](int64_t k) const {
    const int64_t first = k % across * each, row = k / across * lanes;
    return {row, first, first + each < cols ? first + each : cols, (int)(rows - row < lanes ? rows - row : lanes)};
  }
};

}  // namespace LB_SPACE
