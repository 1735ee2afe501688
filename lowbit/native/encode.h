// A block's values to codes, in every format: scales, and the code of each value, to the nearest one or at random.
#pragma once
#include "blocks.h"

namespace LB_SPACE {

// ---- encoding: values of one block (roots for a square format) to codes, one per byte

struct Block {
  float inverse;   // of the scale
  float extra;     // zero point of affine formats, base of log ones
  bool live;       // a value above 0 must not become 0
  bool bounded;    // all values are finite, and none is beyond the top: what a step stores
};

static uint32_t select_bits(uint32_t *x, int n, int rank) {  // the rank-th smallest: quickselect
  int low = 0, high = n - 1;
  while (low < high) {
    const uint32_t pivot = x[(low + high) / 2];
    int i = low, j = high;
    while (i <= j) {
      while (x[i] < pivot) ++i;
      while (x[j] > pivot) --j;
      if (i <= j) {
        const uint32_t t = x[i];
        x[i++] = x[j];
        x[j--] = t;
      }
    }
    if (rank <= j) high = j;
    else if (rank >= i) low = i;
    else break;
  }
  return x[rank];
}

// SOLO's base: the lowest level is the 0.1 quantile of the values above 0. `work` has room for n numbers.
static float log_base(const lb_format &f, const float *x, int64_t n, float scale, uint32_t *work) {
  int alive = 0;
  bool odd = false;
  for (int64_t i = 0; i < n; ++i) {
    odd |= x[i] != x[i];
    if (x[i] > 0.0f) work[alive++] = bits_of(x[i]);
  }
  if (scale == 0.0f) return 1.0f;
  if (odd || scale != scale) return float_of(0x7FC00000u);
  const float low = alive ? float_of(select_bits(work, alive, (alive - 1) / 10)) : 0.0f;
  return base_of(low, scale, 1 << f.bits);
}

// Scales and their reciprocals from the largest magnitudes of n blocks. Runs over multiples of 16.
static void scales(const lb_format &f, const float *absmax, int n, float *scale, float *inverses) {
  const float top = f.top, least = f.min_scale, most = f.max_scale;  // copies: a store might change the format
  n = (n + 15) / 16 * 16;
  LB_IVDEP for (int i = 0; i < n; ++i) {
    scale[i] = derive_scale(absmax[i], top, least, most);
    inverses[i] = inverse(scale[i]);
  }
}

static float affine_scale(const lb_format &f, float low, float high, float *zero) {
  return lb::affine_scale(low, high, (float)f.limit, f.min_scale, f.max_scale, zero);
}

static void range(const float *x, int n, float *low, float *high) {  // a NaN stays
  for (int i = 0; i < n; ++i) {
    *low = x[i] < *low || x[i] != x[i] ? x[i] : *low;
    *high = x[i] > *high || x[i] != x[i] ? x[i] : *high;
  }
}

#ifdef LB_AVX2
// A search tree of 15 thresholds. The lookups take the low 3 bits of minus the rung, so the tables are turned round.
struct Tree {
  __m256 first, second, third, fourth;
  explicit Tree(const lb_format &f)
      : first(_mm256_set1_ps(f.tree[0])),
        second(_mm256_loadu_ps(f.tree + 8)),
        third(_mm256_loadu_ps(f.tree + 16)),
        fourth(_mm256_loadu_ps(f.tree + 24)) {}
  static __m256i down(__m256i rung, __m256 table, __m256 u) {  // a comparison is -1 where it holds
    const __m256 threshold = _mm256_permutevar8x32_ps(table, rung);
    return _mm256_add_epi32(_mm256_add_epi32(rung, rung), _mm256_castps_si256(_mm256_cmp_ps(threshold, u, _CMP_LT_OQ)));
  }
  __m256i minus_rung(__m256 u) const {
    const __m256i rung = _mm256_castps_si256(_mm256_cmp_ps(first, u, _CMP_LT_OQ));
    return down(down(down(rung, second, u), third, u), fourth, u);
  }
};

// Rungs of 32 values at a time; returns how many were done.
template <bool PLAIN>
static int search(const lb_format &f, const float *x, int n, float inverse, uint32_t keep, uint8_t *to) {
  const Tree tree(f);
  const __m256 by = _mm256_set1_ps(inverse), mask = _mm256_castsi256_ps(_mm256_set1_epi32((int)keep));
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i found[4];
    for (int k = 0; k < 4; ++k) {
      __m256 u = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), by);
      if (!PLAIN) {  // NaN, of a block that is not finite, counts as 0
        u = _mm256_and_ps(u, _mm256_cmp_ps(u, u, _CMP_ORD_Q));
        u = _mm256_and_ps(u, mask);
      }
      found[k] = tree.minus_rung(u);
    }
    __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(found[0], found[1]), _mm256_packs_epi32(found[2], found[3]));
    codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(to + i), _mm256_abs_epi8(codes));
  }
  for (; i + 8 <= n; i += 8) {  // short blocks
    __m256 u = _mm256_mul_ps(_mm256_loadu_ps(x + i), by);
    u = _mm256_and_ps(_mm256_and_ps(u, _mm256_cmp_ps(u, u, _CMP_ORD_Q)), mask);
    const __m256i rung = tree.minus_rung(u), words = _mm256_packs_epi32(rung, rung);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i order = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1);
    _mm_storel_epi64((__m128i *)(to + i), _mm_shuffle_epi8(_mm_abs_epi8(bytes), order));
  }
  return i;
}

// Codes of 4 bits drawn at random, one per byte, a register at a time; returns how many were done.
static int draw_codes(const Drawn &drawn, bool signs, const float *x, int n, float inverse, const uint16_t *draws,
                      uint8_t *to) {
  int i = 0;
  for (; i + Lanes::COUNT <= n; i += Lanes::COUNT) {
    Lanes u = Lanes::load(x + i) * inverse;
    u = where(u == u, u, 0.0f);  // NaN, of a block that is not finite
    const Lanes chance = (Lanes::whole(draws + i) + 0.5f) * 0x1p-16f;
    store_codes(to + i, signs ? Drawn::joined(drawn.code(lb::abs(u), chance), Drawn::sign(u)) : drawn.code(u, chance));
  }
  return i;
}
#endif

// The rung of each value in units of the scale: how many thresholds are below it.
static void rungs(const lb_format &f, const float *x, int n, float inverse, [[maybe_unused]] bool bounded,
                  uint8_t *to) {
  const uint32_t keep = f.sign_magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  if (f.rungs > 16) {
    // Copies, because a store to a byte may change anything in memory, as far as the compiler knows.
    const int shift = f.cell_shift, half = f.cell_half;
    const uint32_t below = (1u << shift) - 1, low = f.cell_low, high = f.cell_high, *cells = f.cells;
    LB_IVDEP for (int i = 0; i < n; ++i) {
      const uint32_t raw = bits_of(in_units(x[i], inverse)) & keep, magnitude = raw & 0x7FFFFFFFu;
      const uint32_t least = magnitude > low ? magnitude : low;
      const uint32_t held = least < high ? least : high;
      const int32_t negative = (int32_t)raw < 0;
      const uint32_t cell = cells[(negative ? half : 0) + (int32_t)((held - low) >> shift)];
      const int32_t over = (int32_t)(held & below) >= (int32_t)(cell & 0xFFFFFFu);
      to[i] = (uint8_t)((int32_t)(cell >> 24) + (negative ? -over : over));
    }
    return;
  }
  int i = 0;
#ifdef LB_AVX2
  if (bounded && !f.sign_magnitude) i = search<true>(f, x, n, inverse, keep, to);
  else i = search<false>(f, x, n, inverse, keep, to);
#endif
  LB_IVDEP for (; i < n; ++i) {
    const float u = float_of(bits_of(in_units(x[i], inverse)) & keep);
    int r = 0;
    for (int k = 0; k < 15; ++k) r += f.thresholds[k] < u ? 1 : 0;
    to[i] = (uint8_t)r;
  }
}

// Codes of a small float: the arithmetic that tables.minifloat has checked. The step of the grid is a part of the power
// of two at or below the magnitude; adding 1.5 * 2**23 steps leaves fp32 no bits below one step, so that the addition
// itself rounds, to nearest even.
template <bool DRAWN>
static void encode_minifloat(const lb_format &f, const float *x, int n, float inverse, const uint16_t *draws,
                             uint8_t *to) {
  const int width = 23 - f.grid_bits, sign = 32 - f.bits;
  const float top = f.top, least = f.grid_least, step = float_of((uint32_t)(127 - f.grid_bits) << 23);
  int i = 0;
#ifdef LB_AVX2
  const Minifloat floats(f);
  for (; i + Lanes::COUNT <= n; i += Lanes::COUNT) {
    store_codes(to + i, floats.with_sign(floats.round<DRAWN>(Lanes::load(x + i) * inverse, DRAWN ? draws + i : nullptr)).v);
  }
#endif
  LB_IVDEP for (; i < n; ++i) {
    const uint32_t raw = bits_of(in_units(x[i], inverse)), magnitude = raw & 0x7FFFFFFFu;
    const float a = float_of(magnitude) < top ? float_of(magnitude) : top;
    const float power = float_of(bits_of(a) & 0x7F800000u), binade = power > least ? power : least;
    const float gap = binade * step, shift = gap * 12582912.0f, sum = a + shift;
    int32_t code = (int32_t)(bits_of(sum) - bits_of(shift) + ((bits_of(binade) - bits_of(least)) >> width));
    if (DRAWN) {  // from the nearest to the one at or below, and up again by chance
      const float near = sum - shift, low = near > a ? near - gap : near;
      const int32_t up = a - low >= (1.0f - uniform(draws[i])) * gap ? 1 : 0;
      code += up - (near > a ? 1 : 0);
    }
    to[i] = (uint8_t)(code | (int32_t)((raw & 0x80000000u) >> sign));
  }
}

static void encode_codebook(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws,
                            uint8_t *to) {
  const float inverse = b.inverse;
  if (f.grid_bits) return (draws ? encode_minifloat<true> : encode_minifloat<false>)(f, x, n, inverse, draws, to);
#ifdef LB_AVX2
  if (draws && f.bits == 4 && f.same) {
    const int done = draw_codes(Drawn(f), f.sign_magnitude, x, n, inverse, draws, to);
    x += done, draws += done, to += done, n -= done;
  }
#endif
  rungs(f, x, n, inverse, b.bounded, to);
  if (draws) {  // from the nearest rung to the one at or below, and up again by chance
    const uint32_t keep = f.sign_magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
    const int last = f.rungs - 2;
    const float *ladder = f.ladder;
    LB_IVDEP for (int i = 0; i < n; ++i) {
      const float u = float_of(bits_of(in_units(x[i], inverse)) & keep);
      int r = to[i];
      r -= ladder[r] > u ? 1 : 0;
      r = r < 0 ? 0 : r;
      r = r > last ? last : r;
      const float low = ladder[r], gap = ladder[r + 1] - low;
      to[i] = (uint8_t)(r + (u - low >= (1.0f - uniform(draws[i])) * gap ? 1 : 0));
    }
  }
  if (!f.same) {
    int i = 0;
#ifdef LB_AVX2
    for (; f.rungs <= 16 && i + 32 <= n; i += 32) look_up_bytes(f.codes, to + i);
#endif
    for (; i < n; ++i) to[i] = f.codes[to[i]];
  }
  if (f.sign_magnitude) {
    const int shift = 32 - f.bits;
    LB_IVDEP for (int i = 0; i < n; ++i) {
      to[i] = (uint8_t)(to[i] | ((bits_of(in_units(x[i], inverse)) & 0x80000000u) >> shift));
    }
  }
}

template <bool BOUNDED, bool LIVE>
static void nearest_integer(const float *x, int n, float inverse, float least, float limit, int mask, uint8_t *to) {
  int i = 0;
#ifdef LB_AVX2
  for (; BOUNDED && mask == 255 && i + 32 <= n; i += 32) {
    Lanes u[32 / Lanes::COUNT];
    for (int k = 0; k < 32 / Lanes::COUNT; ++k) {
      const Lanes value = Lanes::load(x + i + k * Lanes::COUNT);
      u[k] = value * inverse;
      if (LIVE) u[k] = lb::maximum(u[k], where(value > 0.0f, 1.0f, least));
    }
    store_bytes(to + i, u, least < 0.0f);
  }
#endif
  LB_IVDEP for (; i < n; ++i) {
    float u = x[i] * inverse;
    if (!BOUNDED) {
      float held = u > least ? u : least;
      held = held < limit ? held : limit;
      u = u == u ? held : 0.0f;  // NaN, of a block that is not finite
    }
    if (LIVE) {  // code 1 is the smallest positive one
      const float one = x[i] > 0.0f ? 1.0f : least;
      u = u > one ? u : one;
    }
    to[i] = (uint8_t)((int32_t)bits_of(shifted(u)) & mask);
  }
}

static void encode_integer(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws,
                           uint8_t *to) {
  const float limit = (float)f.limit, least = f.is_signed ? -limit : 0.0f, inverse = b.inverse;
  const int32_t mask = (1 << f.bits) - 1;
  const bool live = b.live || !f.is_signed;
  if (!draws) {
    (b.bounded ? live ? nearest_integer<true, true> : nearest_integer<true, false>
     : live    ? nearest_integer<false, true>
               : nearest_integer<false, false>)(x, n, inverse, least, limit, mask, to);
    return;
  }
  // Unbiased in the value: between low**2 and (low + 1)**2 for a square format.
  const bool square = f.square;
  const float one = live ? 1.0f : least;
  int i = 0;
#ifdef LB_AVX2
  for (; !square && !live && i + Lanes::COUNT <= n; i += Lanes::COUNT) {
    const Lanes u = Lanes::load(x + i) * inverse, inside = lb::clip(where(u == u, u, 0.0f), least, limit);
    const Lanes low = whole_below(inside), chance = (Lanes::whole(draws + i) + 0.5f) * 0x1p-16f;
    store_codes(to + i, (rounded(low) + ones(1.0f - chance <= inside - low) & (uint32_t)mask).v);
  }
#endif
  LB_IVDEP for (; i < n; ++i) {
    const float u = in_units(x[i], inverse);
    float held = u > least ? u : least;
    held = held < limit ? held : limit;
    const float low = floor(held), share = 1.0f - uniform(draws[i]);
    const float above = square ? held * held - low * low : held - low, gap = square ? 2.0f * low + 1.0f : 1.0f;
    const float code = low + (above >= share * gap ? 1.0f : 0.0f);
    const float raised = x[i] > 0.0f && code < one ? one : code;
    to[i] = (uint8_t)((int32_t)raised & mask);
  }
}

static void encode_affine(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws,
                          uint8_t *to) {
  const float limit = (float)f.limit, zero = b.extra;
  for (int i = 0; i < n; ++i) {
    const float u = in_units(x[i], b.inverse), low = floor(u);
    const float rounded = draws ? low + (u - low >= 1.0f - uniform(draws[i]) ? 1.0f : 0.0f) : rint(u);
    float code = rounded + zero;
    code = code > 0.0f ? code : 0.0f;
    code = code < limit ? code : limit;
    code = b.live && x[i] > 0.0f && code < zero + 1.0f ? zero + 1.0f : code;
    to[i] = (uint8_t)(int32_t)code;
  }
}

static void encode_log(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws, uint8_t *to) {
  const int count = 1 << f.bits;
  float levels[16];
  log_levels(b.extra, count, levels);
  for (int i = 0; i < n; ++i) {
    const float u = x[i] * b.inverse, share = draws ? 1.0f - uniform(draws[i]) : 0.0f;
    int code = 0;
    for (int k = 0; k + 1 < count; ++k) {
      const float gap = levels[k] - levels[k + 1], above = u - levels[k + 1];
      const bool up = draws ? above >= share * gap : above > gap * 0.5f;
      code += up ? 0 : 1;
    }
    to[i] = (uint8_t)code;
  }
}

static void keep_alive(const lb_format &f, const float *x, int n, uint8_t *to) {
  if (!f.has_zero) return;
  const uint8_t least = (uint8_t)f.least;
  if (!f.is_signed) {
    LB_IVDEP for (int i = 0; i < n; ++i) {
      const uint8_t raised = to[i] > least ? to[i] : least;
      to[i] = x[i] > 0.0f ? raised : to[i];
    }
  } else {
    for (int i = 0; i < n; ++i) to[i] = x[i] > 0.0f && f.values[to[i]] <= 0.0f ? least : to[i];
  }
}

static void encode(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws, uint8_t *to) {
  if (f.kind == LB_KIND_INTEGER) {
    encode_integer(f, x, n, b, draws, to);
  } else if (f.kind == LB_KIND_LOG) {
    encode_log(f, x, n, b, draws, to);
  } else if (f.kind == LB_KIND_AFFINE) {
    encode_affine(f, x, n, b, draws, to);
  } else {
    encode_codebook(f, x, n, b, draws, to);
    if (b.live || !f.is_signed) keep_alive(f, x, n, to);
  }
}

// Codes as they are stored. `codes` has room for n.
static void encode_packed(const lb_format &f, const float *x, int n, const Block &b, const uint16_t *draws,
                          uint8_t *packed, uint8_t *codes) {
#ifdef LB_AVX2
  if (!draws && b.bounded && f.bins && !(f.is_signed && b.live) && n % 32 == 0) {
    const Ladder ladder(f);
    const int least = !f.is_signed && f.has_zero ? f.least : 0;
    for (int i = 0; i < n; i += 32) {
      Lanes values[32 / Lanes::COUNT];
      for (int k = 0; k < 32 / Lanes::COUNT; ++k) values[k] = Lanes::load(x + i + k * Lanes::COUNT);
      ladder.store(packed + i / 2, values, b.inverse, least);
    }
    return;
  }
#endif
  encode(f, x, n, b, draws, f.bits == 8 ? packed : codes);
  if (f.bits != 8) pack(codes, f.bits, n, packed);
}

}  // namespace LB_SPACE
