// Whole matrices to codes and back, and straight to the values their codes stand for (what a quantized layer needs).
// Rows are shared out to threads; a single row is cut where its blocks fill bytes.
#pragma once
#include "step.h"

namespace LB_SPACE {

constexpr int64_t WIDE = 8 * SPAN;  // values that a thread takes at once, about

struct Piece {  // whole blocks of one row
  int64_t row, first, last;
};

// How rows are shared out: whole rows, or if they are few, runs of blocks that begin at a byte.
struct Pieces {
  int64_t across, each, count;
  const lb_matrix *m;
  explicit Pieces(const lb_matrix &matrix) : m(&matrix) {
    const lb_format &f = *matrix.packed.format;
    const int64_t cols = matrix.cols, block = f.kind == LB_KIND_FLOAT ? SPAN : f.block;
    each = cols > 0 ? cols : 1;
    if (cols > 2 * WIDE && block % 8 == 0 && block < cols) each = (WIDE + block - 1) / block * block;
    across = (cols + each - 1) / each;
    count = matrix.rows * across;
  }
  Piece operator[](int64_t k) const {
    const int64_t first = k % across * each;
    return {k / across, first, first + each < m->cols ? first + each : m->cols};
  }
};

struct Desk {  // room for one thread
  alignas(64) float values[SPAN];
  alignas(64) float out[SPAN];
  alignas(64) float absmax[SPAN], scale[SPAN], inverse[SPAN];  // of short blocks
  alignas(64) int32_t peaks[SPAN];
  alignas(64) uint8_t codes[SPAN];
  Draws draws;
};

static void put_bits(const uint8_t *codes, int bits, int n, uint8_t *row, int64_t start) {  // into zeroed bytes
  for (int i = 0; i < n; ++i) {
    const int64_t at = (start + i) * bits;
    row[at / 8] = (uint8_t)(row[at / 8] | codes[i] << at % 8);
  }
}

static void get_bits(const uint8_t *row, int bits, int64_t start, int n, uint8_t *codes) {
  for (int i = 0; i < n; ++i) {
    const int64_t at = (start + i) * bits;
    codes[i] = row[at / 8] >> at % 8 & ((1 << bits) - 1);
  }
}

// The scale and what else a block needs. A block may be longer than a span: it is read once for this, once to encode.
static bool measure_block(const lb_matrix &m, int64_t row, int64_t col, int64_t n, Desk &desk, Block *b, float *scale) {
  const lb_format &f = *m.packed.format;
  uint32_t most = 0;
  float low = 0.0f, high = 0.0f;
  uint32_t *work = nullptr;
  float *all = nullptr;
  if (f.kind == LB_KIND_LOG) {
    work = (uint32_t *)malloc((size_t)n * 8 + 8);
    if (!work) return false;
    all = (float *)(work + n);
  }
  for (int64_t i = 0; i < n; i += SPAN) {
    const int part = (int)(n - i < SPAN ? n - i : SPAN);
    const float *x = desk.values;
    if (m.dtype == LB_FLOAT32) x = (const float *)m.values + row * m.cols + col + i;
    else widen(m.values, m.dtype, row * m.cols + col + i, part, desk.values);
    if (f.square) {
      LB_IVDEP for (int k = 0; k < part; ++k) desk.values[k] = lb::sqrt(x[k]);
      x = desk.values;
    }
    if (f.kind == LB_KIND_AFFINE) range(x, part, &low, &high);
    else {
      const uint32_t found = peak(x, part);
      most = found > most ? found : most;
    }
    if (all) memcpy(all + i, x, 4 * part);
  }
  *scale = f.kind == LB_KIND_AFFINE ? affine_scale(f, low, high, &b->extra) : derive_scale(float_of(most), f.top, f.min_scale, f.max_scale);
  b->inverse = inverse(*scale);
  b->live = m.packed.live;
  b->bounded = *scale == *scale;
  if (all) b->extra = log_base(f, all, n, *scale, work);
  free(work);
  return true;
}

// Whether many blocks can be encoded at once: in units of their own scales they are like one block of scale 1.
static bool short_blocks(const lb_operand &o, int64_t block) {
  const lb_format &f = *o.format;
  const bool plain = (f.kind == LB_KIND_INTEGER || f.kind == LB_KIND_CODEBOOK) && f.is_signed && !f.square && !o.live;
  return plain && block <= 64 && (block & (block - 1)) == 0 && block * f.bits % 8 == 0;
}

// As encode_piece, a span of short blocks at a time. The last block of a row may be shorter.
static void encode_short(const lb_matrix &m, const Piece &p, float *fake, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const int block = f.block;
  for (int64_t col = p.first; col < p.last; col += SPAN) {
    const int n = (int)(p.last - col < SPAN ? p.last - col : SPAN), count = (n + block - 1) / block;
    const int64_t at = p.row * m.cols + col;
    float *u = desk.values, *scale = desk.scale;
    int32_t *peaks = desk.peaks;
    widen(m.values, m.dtype, at, n, u);
    for (int i = n; i < count * block; ++i) u[i] = 0.0f;
    LB_IVDEP for (int i = 0; i < count * block; ++i) peaks[i] = (int32_t)magnitude_bits(u[i]);
    for (int left = count * block / 2; left >= count; left /= 2) {
      for (int i = 0; i < left; ++i) peaks[i] = peaks[2 * i] > peaks[2 * i + 1] ? peaks[2 * i] : peaks[2 * i + 1];
    }
    for (int b = 0; b < (count + 15) / 16 * 16; ++b) desk.absmax[b] = b < count ? float_of((uint32_t)peaks[b]) : 1.0f;
    scales(f, desk.absmax, count, scale, desk.inverse);
    for (int b = 0; b < count; ++b) {
      const float by = desk.inverse[b];
      LB_IVDEP for (int i = b * block; i < (b + 1) * block; ++i) u[i] = u[i] * by;
    }
    const uint16_t *draws = m.stochastic ? desk.draws.fill(m.key, p.row * m.stride + col, n) : nullptr;
    const Block one = {1.0f, 0.0f, false, false};
    encode(f, u, n, one, draws, desk.codes);
    if (!fake) {
      pack(desk.codes, f.bits, n, (uint8_t *)o.codes + p.row * o.row_bytes + col * f.bits / 8);
      memcpy(o.scale + p.row * o.scales + col / block, scale, sizeof(float) * count);
      continue;
    }
    decode(f, desk.codes, n, 1.0f, nullptr, desk.out);
    for (int b = 0; b < count; ++b) {
      const int end = n < (b + 1) * block ? n : (b + 1) * block;
      LB_IVDEP for (int i = b * block; i < end; ++i) fake[at + i] = desk.out[i] * scale[b];
    }
  }
}

// Encode a piece; with `fake`, write the values that the codes stand for there instead.
static bool encode_piece(const lb_matrix &m, const Piece &p, float *fake, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const bool whole = f.kind == LB_KIND_FLOAT;
  const int64_t block = whole ? SPAN : f.block;
  if (!whole && short_blocks(o, block)) {
    encode_short(m, p, fake, desk);
    return true;
  }
  uint8_t *codes_row = fake ? nullptr : (uint8_t *)o.codes + p.row * o.row_bytes;
  const bool bytewise = block * f.bits % 8 == 0;
  if (!bytewise && codes_row) memset(codes_row, 0, o.row_bytes);
  for (int64_t col = p.first; col < p.last; col += block) {
    const int64_t n = p.last - col < block ? p.last - col : block;
    Block b = {};
    float scale = 0.0f;
    if (!whole && !measure_block(m, p.row, col, n, desk, &b, &scale)) return false;
    const int64_t number = p.row * o.scales + col / block;
    const uint8_t zero = (uint8_t)(int32_t)b.extra;
    for (int64_t i = 0; i < n; i += SPAN) {
      const int part = (int)(n - i < SPAN ? n - i : SPAN);
      const int64_t at = p.row * m.cols + col + i;
      const float *x = desk.values;
      if (m.dtype == LB_FLOAT32) x = (const float *)m.values + at;
      else widen(m.values, m.dtype, at, part, desk.values);
      if (f.square) {
        LB_IVDEP for (int k = 0; k < part; ++k) desk.values[k] = lb::sqrt(x[k]);
        x = desk.values;
      }
      const uint16_t *draws = m.stochastic ? desk.draws.fill(m.key, p.row * m.stride + col + i, part) : nullptr;
      if (whole) {
        uint16_t *to = fake ? (uint16_t *)desk.out : (uint16_t *)o.codes + at;
        if (f.dtype == LB_FLOAT32) {
          memcpy(fake ? (void *)(fake + at) : (void *)((float *)o.codes + at), x, 4 * part);
          continue;
        }
        narrow(x, f.dtype, part, draws, to);
        if (o.live) {
          for (int k = 0; k < part; ++k) to[k] = x[k] > 0.0f && (to[k] & 0x7FFF) == 0 ? 1 : to[k];
        }
        if (fake) widen(to, f.dtype, 0, part, fake + at);
        continue;
      }
      const bool direct = !fake && f.bits == 8;
      uint8_t *codes = direct ? codes_row + col + i : desk.codes;
      encode(f, x, part, b, draws, codes);
      if (fake) {
        const void *extra = f.kind == LB_KIND_AFFINE ? (const void *)&zero : (const void *)&b.extra;
        decode(f, codes, part, scale, extra, fake + at);
      } else if (!direct) {
        if (bytewise) pack(codes, f.bits, part, codes_row + (col + i) * f.bits / 8);
        else put_bits(codes, f.bits, part, codes_row, col + i);
      }
    }
    if (fake || whole) continue;
    o.scale[number] = scale;
    if (f.kind == LB_KIND_AFFINE) ((uint8_t *)o.extra)[number] = zero;
    if (f.kind == LB_KIND_LOG) ((float *)o.extra)[number] = b.extra;
  }
  return true;
}

static void decode_piece(const lb_matrix &m, const Piece &p, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const bool whole = f.kind == LB_KIND_FLOAT;
  const int64_t block = whole ? SPAN : f.block;
  for (int64_t col = p.first; col < p.last; col += block) {
    const int64_t n = p.last - col < block ? p.last - col : block, number = p.row * o.scales + col / block;
    for (int64_t i = 0; i < n; i += SPAN) {
      const int part = (int)(n - i < SPAN ? n - i : SPAN);
      const int64_t at = p.row * m.cols + col + i;
      float *to = m.dtype == LB_FLOAT32 ? (float *)m.values + at : desk.out;
      if (whole) {
        widen(o.codes, f.dtype, at, part, to);
      } else {
        const uint8_t *row = (const uint8_t *)o.codes + p.row * o.row_bytes, *codes = desk.codes;
        if (f.bits == 8) codes = row + col + i;
        else if ((col + i) * f.bits % 8 == 0) unpack(row + (col + i) * f.bits / 8, f.bits, part, desk.codes);
        else get_bits(row, f.bits, col + i, part, desk.codes);
        const void *extra = !o.extra                     ? nullptr
                            : f.kind == LB_KIND_AFFINE ? (const void *)((const uint8_t *)o.extra + number)
                                                       : (const void *)((const float *)o.extra + number);
        decode(f, codes, part, o.scale[number], extra, to);
      }
      if (m.dtype != LB_FLOAT32) narrow(to, m.dtype, part, nullptr, (uint16_t *)m.values + at);
    }
  }
}

}  // namespace LB_SPACE
