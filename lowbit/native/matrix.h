// Whole matrices to codes and back, and to the values their codes stand for (what a quantized layer needs). A line is
// the part of a row that a thread works on at once: whole blocks of fp32 values, rotated where that is asked.
#pragma once
#include <stdlib.h>

#include "many.h"
#include "strip.h"

namespace LB_SPACE {

struct Line {  // n values of a row, from a column on; and where the values that their codes stand for go, or null
  int64_t row, col, n;
  const float *x;
  float *to;  // may be x, if that is a copy
};

// ---- to codes

// The roots, which a square format encodes.
static const float *roots(const lb_format &f, const float *x, int n, float *room) {
  if (!f.square) return x;
  LB_IVDEP for (int k = 0; k < n; ++k) room[k] = lb::sqrt(x[k]);
  return room;
}

static uint32_t peak_of(const float *x, int64_t n) {  // of any number of values
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i += SPAN) {
    const uint32_t found = peak(x + i, part_of(n - i));
    most = found > most ? found : most;
  }
  return most;
}

// The mean of the squares, in units of the binade of the largest magnitude. `work` is for a number for each 256 values.
static double mean_square(const float *x, int64_t n, float absmax, double *work) {
  alignas(64) float each[LB_BLOCK];
  const float by = absmax > 0.0f ? 1.0f / lb::binade(absmax) : 1.0f;
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += LB_BLOCK) {
    const int part = (int)(n - i < LB_BLOCK ? n - i : LB_BLOCK);
    LB_IVDEP for (int k = 0; k < part; ++k) each[k] = x[i + k] * by * (x[i + k] * by);
    work[count++] = (double)sum_few(each, part);
  }
  return halve(work, count) / (double)n;
}

// The scale and what else a block of n values needs. It may be longer than a span.
static bool measure_block(const lb_operand &o, const float *x, int64_t n, float *room, Block *b, float *scale) {
  const lb_format &f = *o.format;
  uint32_t most = 0;
  void *work = nullptr;
  float low = 0.0f, high = 0.0f;
  if ((f.kind == LB_KIND_LOG || f.rms) && !(work = malloc((size_t)n * 4 + 8))) return false;
  for (int64_t i = 0; i < n; i += SPAN) {
    const int part = part_of(n - i);
    const float *values = roots(f, x + i, part, room);
    if (f.kind == LB_KIND_AFFINE) {
      range(values, part, &low, &high);
    } else {
      const uint32_t found = peak(values, part);
      most = found > most ? found : most;
    }
  }
  const float absmax = float_of(most);
  const float statistic = f.rms ? rms_of(absmax, (float)mean_square(x, n, absmax, (double *)work)) : absmax;
  *scale = f.kind == LB_KIND_AFFINE ? affine_scale(f, low, high, &b->extra)
                                    : derive_scale(wanted_of(f.gain, statistic), f.top, f.min_scale, f.max_scale);
  b->inverse = inverse(*scale);
  b->live = o.live;
  b->bounded = *scale == *scale && f.gain == 1.0f && !f.rms;
  if (f.kind == LB_KIND_LOG) b->extra = log_base(f, x, n, *scale, (uint32_t *)work);
  free(work);
  return true;
}

// Codes of a part of a row, as they are stored; `codes` are one to a byte.
static void store_codes(const lb_operand &o, int64_t row, int64_t col, const uint8_t *codes, int n) {
  const int bits = o.format->bits;
  uint8_t *to = (uint8_t *)o.codes + row * o.row_bytes;
  if (col * bits % 8 == 0) pack(codes, bits, n, to + col * bits / 8);
  else put_bits(codes, bits, n, to, col);
}

// Whether many blocks can be encoded at once: in units of their own scales they are like one block of scale 1.
static bool short_blocks(const lb_operand &o) {
  const lb_format &f = *o.format;
  const bool plain = (f.kind == LB_KIND_INTEGER || f.kind == LB_KIND_CODEBOOK) && f.is_signed && !f.square && !o.live;
  return plain && f.block <= 64 && (f.block & (f.block - 1)) == 0;
}

static const uint16_t *draws_for(const lb_matrix &m, int64_t row, int64_t col, int n, Desk &desk) {
  return m.stochastic ? desk.draws.fill(m.key, row * m.stride + col, n) : nullptr;
}

// Which of n values in units of their scales are not beyond the edge, a bit each.
static void store_mask(const lb_matrix &m, int64_t row, int64_t col, const float *x, int n, float inverse) {
  uint8_t *to = m.mask + row * ((m.cols + 7) / 8);
  int i = 0;
#ifdef LB_AVX2
  for (; col % 8 == 0 && i + 16 <= n; i += 16) {
    const uint16_t bits = inside(x + i, inverse, m.edge);
    memcpy(to + (col + i) / 8, &bits, 2);
  }
#endif
  for (; i < n; ++i) {
    const uint8_t bit = lb::abs(in_units(x[i], inverse)) <= m.edge;
    put_bits(&bit, 1, 1, to, col + i);
  }
}

// Whole blocks of byte scales go together, and those that share an outer scale or a correction.
static int together(const lb_matrix &m) {
  const lb_format &f = *m.packed.format;
  const int each = m.run ? m.run : f.outer ? f.outer : f.block;
  return f.stored && !m.inverse ? SPAN / each * each : SPAN;
}

static void encode_many(const lb_matrix &m, const Line &line, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const bool stored = f.stored && !m.inverse;  // whole blocks then, of a multiple of 8 values
  const int most = together(m);
  uint8_t bytes[SPAN / 8];
  for (int64_t from = 0; from < line.n; from += most) {
    const int n = (int)(line.n - from < most ? line.n - from : most), count = (n - 1) / f.block + 1;
    const int64_t col = line.col + from, number = line.row * o.scales + col / f.block;
    const float *x = line.x + from;
    const Scales s = m.inverse ? given(m, line.row, col)
                     : stored  ? derive_bytes(m, x, col, n, bytes, desk)
                               : derive_short(f, x, n, desk);
    const uint16_t *draws = draws_for(m, line.row, col, n, desk);
    if (!o.codes && !m.run) {
      round_units(f, x, col, n, s, draws, line.to + from, desk);
      continue;
    }
    encode_units(f, x, col, n, s, draws, desk);
    if (m.mask) store_mask(m, line.row, col, desk.values, n, 1.0f);
    if (m.run) correct(m, line.row, col, n, bytes, desk);
    if (o.codes) store_codes(o, line.row, col, desk.codes, n);
    if (o.codes && m.outers) store_outer(m, line.row, col, count, desk);
    if (o.codes && stored) memcpy(m.bytes + number, bytes, count);
    else if (o.codes && !m.inverse) memcpy(o.scale + number, s.scale, sizeof(float) * count);
    if (line.to) decode_units(f, col, n, s, line.to + from, desk);
  }
}

static bool encode_block(const lb_matrix &m, const Line &block, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  Block b = {};
  float scale = 0.0f;
  if (!measure_block(o, block.x, block.n, desk.values, &b, &scale)) return false;
  const uint8_t zero = (uint8_t)(int32_t)b.extra;
  const void *extra = f.kind == LB_KIND_AFFINE ? (const void *)&zero : (const void *)&b.extra;
  for (int64_t i = 0; i < block.n; i += SPAN) {
    const int part = part_of(block.n - i);
    const int64_t col = block.col + i;
    const float *x = roots(f, block.x + i, part, desk.values);
    const uint16_t *draws = draws_for(m, block.row, col, part, desk);
    const bool direct = o.codes && f.bits == 8;
    uint8_t *codes = direct ? (uint8_t *)o.codes + block.row * o.row_bytes + col : desk.codes;
    encode(f, x, part, b, draws, codes);
    if (m.mask) store_mask(m, block.row, col, x, part, b.inverse);
    if (o.codes && !direct) store_codes(o, block.row, col, codes, part);
    if (block.to) decode(f, codes, part, scale, extra, block.to + i);
  }
  if (o.codes) {
    const int64_t number = block.row * o.scales + block.col / f.block;
    o.scale[number] = scale;
    if (f.kind == LB_KIND_AFFINE) ((uint8_t *)o.extra)[number] = zero;
    if (f.kind == LB_KIND_LOG) ((float *)o.extra)[number] = b.extra;
  }
  return true;
}

// Float formats have no blocks.
static void encode_floats(const lb_matrix &m, const Line &line, Desk &desk) {
  const lb_operand &o = m.packed;
  const int dtype = o.format->dtype;
  for (int64_t i = 0; i < line.n; i += SPAN) {
    const int part = part_of(line.n - i);
    const int64_t col = line.col + i, at = line.row * m.cols + col;
    const float *x = line.x + i;
    if (dtype == LB_FLOAT32) {
      if (o.codes) memcpy((float *)o.codes + at, x, 4 * part);
      if (line.to && line.to != line.x) memcpy(line.to + i, x, 4 * part);
      continue;
    }
    uint16_t *codes = o.codes ? (uint16_t *)o.codes + at : (uint16_t *)desk.out;
    narrow(x, dtype, part, draws_for(m, line.row, col, part, desk), codes);
    if (o.live) {
      for (int k = 0; k < part; ++k) codes[k] = x[k] > 0.0f && (codes[k] & 0x7FFF) == 0 ? 1 : codes[k];
    }
    if (line.to) widen(codes, dtype, 0, part, line.to + i);
  }
}

static bool encode_line(const lb_matrix &m, const Line &line, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  if (f.kind == LB_KIND_FLOAT) {
    encode_floats(m, line, desk);
    return true;
  }
  if (m.inverse || f.stored || short_blocks(o)) {
    encode_many(m, line, desk);
    return true;
  }
  if (o.codes && (int64_t)f.block * f.bits % 8) {  // blocks share bytes
    uint8_t *codes = (uint8_t *)o.codes + line.row * o.row_bytes;
    memset(codes + line.col * f.bits / 8, 0, (line.n * f.bits + 7) / 8);
  }
  for (int64_t i = 0; i < line.n; i += f.block) {
    const int64_t n = line.n - i < f.block ? line.n - i : f.block;
    const Line block = {line.row, line.col + i, n, line.x + i, line.to ? line.to + i : nullptr};
    if (!encode_block(m, block, desk)) return false;
  }
  return true;
}

// A piece's values, those of each row `width` apart, in fp32 and with the zeros that follow them.
static void copy_piece(const lb_matrix &m, const Piece &p, float *to, int64_t width) {
  const int64_t last = p.last < m.filled ? p.last : m.filled, n = last > p.first ? last - p.first : 0;
  if (m.columns) gather(m, p.row, p.lanes, p.first, n, to, width);
  for (int64_t i = 0; !m.columns && i < n; i += SPAN) {
    widen(m.values, m.dtype, p.row * m.step + p.first + i, part_of(n - i), to + i);
  }
  for (int l = 0; l < p.lanes; ++l) memset(to + l * width + n, 0, sizeof(float) * (p.last - p.first - n));
}

// Values whose bit is not set are multiplied by 0.
static void apply_mask(const lb_matrix &m, int64_t row, int64_t col, float *x, int64_t n) {
  const uint8_t *bits = m.mask + row * ((m.cols + 7) / 8);
  int64_t i = 0;
#ifdef LB_AVX2
  for (; i + 16 <= n; i += 16) {  // a piece begins at a byte
    uint16_t both;
    memcpy(&both, bits + (col + i) / 8, 2);
    for (int k = 0; k < 16; k += Lanes::COUNT) (Lanes::load(x + i + k) * chosen(both >> k, 1.0f, 0.0f)).store(x + i + k);
  }
#endif
  for (; i < n; ++i) x[i] = x[i] * (float)(bits[(col + i) / 8] >> (col + i) % 8 & 1);
}

// The rows of a piece as lines that `work` is to do. `room` is for values that do not lie in memory as they must.
template <class Work> static bool each_line(const lb_matrix &m, const Piece &p, float *room, Work work) {
  const int64_t n = p.last - p.first, width = n + ASIDE;
  const bool masked = m.mask && m.rotation < 0;
  const bool moved = m.columns || m.dtype != LB_FLOAT32 || (m.rotation && (m.filled < m.cols || masked));
  if (moved) copy_piece(m, p, room, width);
  for (int l = 0; l < p.lanes; ++l) {
    const int64_t row = p.row + l, at = row * m.cols + p.first;
    float *copy = room + l * width, *to = m.out_dtype == LB_FLOAT32 ? (float *)m.out + at : copy;
    const float *x = moved ? copy : (const float *)m.values + row * m.step + p.first;
    if (masked) apply_mask(m, row, p.first, copy, n);
    if (m.rotation) rotate(m, x, copy, n, p.first);
    if (m.rotation) x = copy;
    if (!work(Line{row, p.first, n, x, m.out ? to : nullptr})) return false;
    if (m.out && to == copy) put(copy, m.out_dtype, n, place(m.out, m.out_dtype, at));
  }
  return true;
}

static bool encode_piece(const lb_matrix &m, const Piece &p, float *room, Desk &desk) {
  return each_line(m, p, room, [&](const Line &line) { return encode_line(m, line, desk); });
}

// ---- and back, to rows

// Codes of n values from a column on, as they are stored, to values: of one block, or many in units of their scales.
static void decode_part(const lb_matrix &m, int64_t row, int64_t col, int n, float *to, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const uint8_t *codes = (const uint8_t *)o.codes + row * o.row_bytes;
  const int64_t number = row / m.tile * o.scales + col / f.block;
  const int count = (int)((col + n - 1) / f.block - col / f.block) + 1;
  if (m.outers) load_outer(m, row, col, count, desk);
  const float *scale = m.bytes ? look_up(m, m.bytes + number, count, desk).scale : o.scale + number;
  const float by = count == 1 ? *scale : 1.0f;
  const void *extra = !o.extra                     ? nullptr
                      : f.kind == LB_KIND_AFFINE ? (const void *)((const uint8_t *)o.extra + number)
                                                 : (const void *)((const float *)o.extra + number);
  if (col * f.bits % 8 == 0) {
    decode_packed(f, codes + col * f.bits / 8, n, by, extra, to, desk.codes);
  } else {
    get_bits(codes, f.bits, col, n, desk.codes);
    decode(f, desk.codes, n, by, extra, to);
  }
  if (count > 1) multiply(f, to, col, n, scale, to);
}

static void decode_piece(const lb_matrix &m, const Piece &p, Desk &desk) {
  const lb_operand &o = m.packed;
  const lb_format &f = *o.format;
  const bool whole = f.kind == LB_KIND_FLOAT;
  const bool many = (f.kind == LB_KIND_INTEGER || f.kind == LB_KIND_CODEBOOK) && !f.square;
  for (int64_t col = p.first; col < p.last;) {
    const int64_t end = whole || many ? p.last : col - col % f.block + f.block;
    const int n = part_of((end < p.last ? end : p.last) - col);
    const int64_t at = p.row * m.cols + col;
    float *to = m.out_dtype == LB_FLOAT32 ? (float *)m.out + at : desk.out;
    if (whole) widen(o.codes, f.dtype, p.row * m.cols + col, n, to);
    else decode_part(m, p.row, col, n, to, desk);
    if (m.out_dtype != LB_FLOAT32) put(to, m.out_dtype, n, place(m.out, m.out_dtype, at));
    col += n;
  }
}

}  // namespace LB_SPACE
