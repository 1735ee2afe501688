// Several values at once, as rules.h's functors take them in place of a float: a register, with the same arithmetic.
//
// Only for AVX2 and AVX-512; each operation is the IEEE operation of words.h on every lane.
#pragma once
#include "abi.h"
#include "words.h"

#define LB_IN inline __attribute__((always_inline))

#ifdef LB_AVX2
#include <immintrin.h>

namespace LB_SPACE {

#ifdef LB_AVX512

struct Mask {
  __mmask16 m;
};

struct Lanes {
  static constexpr int COUNT = 16;
  __m512 v;
  Lanes() = default;
  LB_IN Lanes(__m512 x) : v(x) {}
  LB_IN Lanes(float x) : v(_mm512_set1_ps(x)) {}
  LB_FN Lanes load(const float *from) { return _mm512_loadu_ps(from); }
  LB_IN void store(float *to) const { _mm512_storeu_ps(to, v); }
  LB_IN float first() const { return _mm512_cvtss_f32(v); }
  LB_FN Lanes widen(const uint16_t *from) {  // bf16
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  LB_FN Lanes whole(const uint16_t *from) {  // the numbers 0 to 65,535
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)));
  }
  LB_FN Lanes signed_bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
  }
  LB_FN Lanes bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
  }
};

LB_FN Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
LB_FN Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
LB_FN Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
LB_FN Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
LB_FN Mask operator<(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LB_FN Mask operator<=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
LB_FN Mask operator==(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
LB_FN Mask operator!=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
LB_FN Mask operator&(Mask a, Mask b) { return {(__mmask16)(a.m & b.m)}; }
LB_FN Mask operator|(Mask a, Mask b) { return {(__mmask16)(a.m | b.m)}; }
LB_FN Mask operator!(Mask a) { return {(__mmask16)~a.m}; }
LB_FN Lanes where(Mask condition, Lanes a, Lanes b) { return _mm512_mask_blend_ps(condition.m, b.v, a.v); }
LB_FN Lanes sqrt(Lanes a) { return _mm512_sqrt_ps(a.v); }
LB_FN bool any(Mask a) { return a.m != 0; }
LB_FN Lanes nearest_whole(Lanes a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LB_FN Lanes whole_below(Lanes a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
LB_FN Lanes held(Lanes a, Lanes low, Lanes high) { return _mm512_max_ps(_mm512_min_ps(a.v, high.v), low.v); }  // no NaN
LB_FN Lanes and_bits(Lanes a, uint32_t bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32((int)bits)));
}
LB_FN Lanes negative(Lanes a) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32((int)0x80000000u)));
}
LB_FN Lanes flip(Lanes a, uint32_t bits) {  // the signs of the lanes whose bit is set
  const __m512i x = _mm512_castps_si512(a.v);
  return _mm512_castsi512_ps(_mm512_mask_xor_epi32(x, (__mmask16)bits, x, _mm512_set1_epi32((int)0x80000000u)));
}
LB_FN Lanes chosen(uint32_t bits, Lanes a, Lanes b) { return where(Mask{(__mmask16)bits}, a, b); }
LB_FN uint32_t lanes_of(Mask a) { return a.m; }
template <int APART> LB_FN Lanes swap_lanes(Lanes a) {  // those that are 1, 2, 4 or 8 apart
  return APART == 1   ? _mm512_permute_ps(a.v, 0xB1)
         : APART == 2 ? _mm512_permute_ps(a.v, 0x4E)
         : APART == 4 ? _mm512_shuffle_f32x4(a.v, a.v, 0xB1)
                      : _mm512_shuffle_f32x4(a.v, a.v, 0x4E);
}

// One step of the trees of several blocks at once, on registers instead of lanes: the first halves of all runs of
// 2 * APART lanes, those of a and then those of b (of the four quarters of a register by turns, once they are shorter),
// and the second halves.
template <int APART> LB_FN Lanes first_halves(Lanes a, Lanes b) {
  return APART == 8   ? _mm512_shuffle_f32x4(a.v, b.v, 0x44)
         : APART == 4 ? _mm512_shuffle_f32x4(a.v, b.v, 0x88)
         : APART == 2 ? _mm512_shuffle_ps(a.v, b.v, 0x44)
                      : _mm512_shuffle_ps(a.v, b.v, 0x88);
}
template <int APART> LB_FN Lanes second_halves(Lanes a, Lanes b) {
  return APART == 8   ? _mm512_shuffle_f32x4(a.v, b.v, 0xEE)
         : APART == 4 ? _mm512_shuffle_f32x4(a.v, b.v, 0xDD)
         : APART == 2 ? _mm512_shuffle_ps(a.v, b.v, 0xEE)
                      : _mm512_shuffle_ps(a.v, b.v, 0xDD);
}
LB_FN Lanes in_order(Lanes found) {  // after all steps
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found.v);
}

struct Ints {  // the bits of numbers
  __m512i v;
};
LB_FN Ints ints(Lanes a) { return {_mm512_castps_si512(a.v)}; }
LB_FN Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
LB_FN Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LB_FN Ints operator>>(Ints a, int places) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(places))}; }
LB_FN Ints operator&(Ints a, uint32_t bits) { return {_mm512_and_si512(a.v, _mm512_set1_epi32((int)bits))}; }
LB_FN Ints ones(Mask a) { return {_mm512_maskz_set1_epi32(a.m, 1)}; }
LB_FN Ints rounded(Lanes a) { return {_mm512_cvtps_epi32(a.v)}; }
LB_FN Ints signs(Ints a) { return a & 0x80000000u; }
LB_FN Lanes with_sign(Lanes a, Lanes sign) {  // of a number that has none
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a.v), signs(ints(sign)).v));
}
LB_FN Lanes most_bits(Lanes a, Lanes b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}
LB_FN bool all_below(Lanes a, uint32_t bits) {  // as integers without a sign
  return _mm512_cmpge_epu32_mask(_mm512_castps_si512(a.v), _mm512_set1_epi32((int)bits)) == 0;
}
LB_FN Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a.v, b.v); }  // no NaN
LB_FN Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a.v, b.v); }

struct Finite {  // 0 as long as all is finite, else NaN
  __m512 sum;
  LB_IN Finite() : sum(_mm512_setzero_ps()) {}
  LB_IN void see(Lanes a) { sum = _mm512_fmadd_ps(a.v, _mm512_setzero_ps(), sum); }
  LB_IN bool all() const { return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0; }
};

struct Peak {  // the largest magnitude of each lane, as its bits
  __m512i most;
  LB_IN Peak() : most(_mm512_setzero_si512()) {}
  LB_IN void see_root(Lanes a) { most = _mm512_max_epu32(most, _mm512_castps_si512(a.v)); }  // -0 counts as infinite
  LB_IN void see(Lanes a) { most = _mm512_max_epi32(most, _mm512_castps_si512(and_bits(a, 0x7FFFFFFFu).v)); }
  LB_IN uint32_t of_all() const { return (uint32_t)_mm512_reduce_max_epu32(most); }
};

struct Least {  // the smallest magnitude of each lane but 0, as its bits less 1
  __m512i least;
  LB_IN Least() : least(_mm512_set1_epi32(0x7F7FFFFF)) {}
  LB_IN void see(Lanes a) {
    const __m512i magnitude = _mm512_castps_si512(and_bits(a, 0x7FFFFFFFu).v);
    least = _mm512_min_epu32(least, _mm512_sub_epi32(magnitude, _mm512_set1_epi32(1)));
  }
  LB_IN uint32_t of_all() const { return (uint32_t)_mm512_reduce_min_epu32(least) + 1; }
};

struct Table {  // 16 numbers, looked up by 4 bits
  __m512 values;
  Table() = default;
  LB_IN explicit Table(const float *from) : values(_mm512_loadu_ps(from)) {}
  LB_IN Lanes look_up(const uint8_t *packed) const {
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i eight = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)packed));
    const __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(half, eight), shift);  // the low 4 bits count
    return _mm512_permutexvar_ps(index, values);
  }
  LB_IN Lanes look_up_bytes(const uint8_t *codes) const {  // of one code each
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)), values);
  }
};

LB_FN void store_bf16(uint16_t *to, Lanes a, __m512i add) {  // finite
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(a.v), add);
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
LB_FN void store_bf16(uint16_t *to, Lanes a) {  // to nearest
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16), _mm512_set1_epi32(1));
  store_bf16(to, a, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}
LB_FN void store_bf16(uint16_t *to, Lanes a, const uint16_t *draws) {  // stochastically
  store_bf16(to, a, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)draws)));
}

// 32 numbers, rounded to integers that fit a byte.
LB_FN void store_bytes(uint8_t *to, const Lanes *u, bool) {
  for (int k = 0; k < 2; ++k) {
    _mm_storeu_si128((__m128i *)(to + 16 * k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(u[k].v)));
  }
}

// 32 roots, none below 0, as bytes in units of the scale: of those above 0, even if next to the scale they are nothing,
// at least 1.
LB_FN void store_roots(uint8_t *to, const Lanes *x, Lanes inverse) {
  for (int k = 0; k < 2; ++k) {
    const __m512i least = _mm512_min_epu32(_mm512_castps_si512(x[k].v), _mm512_set1_epi32(1));
    const __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32((x[k] * inverse).v), least);
    _mm_storeu_si128((__m128i *)(to + 16 * k), _mm512_cvtepi32_epi8(code));
  }
}

LB_FN void store_codes(uint8_t *to, __m512i codes) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(codes)); }

// The code of a number in units of the scale, drawn at random: the rung at or below it, or the next. By a search tree of
// 15 rungs, whose lookups take the low 3 bits of minus the rung.
struct Drawn {
  __m512 first, second, third, fourth, ladder, gaps;
  LB_FN __m512 twice(const float *eight) {
    return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(eight))));
  }
  LB_IN explicit Drawn(const lb_format &f)
      : first(_mm512_set1_ps(f.below[0])),
        second(twice(f.below + 8)),
        third(twice(f.below + 16)),
        fourth(twice(f.below + 24)),
        ladder(_mm512_loadu_ps(f.ladder)),
        gaps(_mm512_loadu_ps(f.gaps)) {}
  LB_FN __m512i passed(__m512i minus, __m512 rungs, Lanes u) {
    return _mm512_mask_sub_epi32(minus, _mm512_cmp_ps_mask(rungs, u.v, _CMP_LE_OQ), minus, _mm512_set1_epi32(1));
  }
  LB_FN __m512i down(__m512i minus, __m512 table, Lanes u) {
    return passed(_mm512_add_epi32(minus, minus), _mm512_permutexvar_ps(minus, table), u);
  }
  LB_IN __m512i code(Lanes u, Lanes chance) const {
    const __m512i top = passed(_mm512_setzero_si512(), first, u);
    const __m512i rung = _mm512_sub_epi32(_mm512_setzero_si512(), down(down(down(top, second, u), third, u), fourth, u));
    const Lanes above = u - Lanes(_mm512_permutexvar_ps(rung, ladder)), gap = _mm512_permutexvar_ps(rung, gaps);
    const Mask up = (1.0f - chance) * gap <= above;
    return _mm512_mask_add_epi32(rung, up.m, rung, _mm512_set1_epi32(1));
  }
  LB_FN __m512i sign(Lanes u) {  // as bit 3 of a code
    return _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(u.v), 28), _mm512_set1_epi32(8));
  }
  LB_FN __m512i joined(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
};

// A 4-bit codebook's code of a number in units of the scale: the bin it falls in, then the bin's threshold.
struct Ladder {
  __m512 low, high, times, plus;
  __m512i rung_low, rung_high, first;
  bool multiply;
  Ladder() = default;
  LB_IN explicit Ladder(const lb_format &f)
      : low(_mm512_loadu_ps(f.bin_threshold)),
        high(_mm512_loadu_ps(f.bin_threshold + 16)),
        times(_mm512_set1_ps(f.bin_times)),
        plus(_mm512_set1_ps(f.bin_plus)),
        rung_low(_mm512_loadu_si512(f.bin_rung)),
        rung_high(_mm512_loadu_si512(f.bin_rung + 16)),
        first(_mm512_set1_epi32(f.bin_low)),
        multiply(f.bin_low == 0) {}
  LB_IN __m512i code(Lanes u) const {
    const __m512i bin =
        multiply ? _mm512_cvttps_epi32(_mm512_fmadd_ps(u.v, times, plus))
                 : _mm512_max_epi32(_mm512_sub_epi32(_mm512_srai_epi32(_mm512_castps_si512(u.v), 21), first),
                                    _mm512_setzero_si512());
    const __m512i rung = _mm512_permutex2var_epi32(rung_low, bin, rung_high);
    const __mmask16 beyond = _mm512_cmp_ps_mask(_mm512_permutex2var_ps(low, bin, high), u.v, _CMP_LT_OQ);
    return _mm512_mask_add_epi32(rung, beyond, rung, _mm512_set1_epi32(1));
  }
  // 32 numbers as codes of 4 bits; of those above 0, even if next to the scale they are nothing, at least `least`.
  LB_IN void store(uint8_t *to, const Lanes *x, Lanes inverse, int least) const {
    __m128i codes[2];
    for (int k = 0; k < 2; ++k) {
      __m512i found = code(x[k] * inverse);
      if (least) found = _mm512_mask_max_epi32(found, (Lanes(0.0f) < x[k]).m, found, _mm512_set1_epi32(least));
      codes[k] = _mm512_cvtepi32_epi8(found);
    }
    const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(codes[0]), codes[1], 1);
    const __m256i pairs = _mm256_maddubs_epi16(all, _mm256_set1_epi16(0x1001));  // the first + 16 times the second
    _mm_storeu_si128((__m128i *)to, _mm256_cvtepi16_epi8(pairs));
  }
};

// 256 numbers, looked up by 32 bytes at a time: the low halves of all and the high halves, of which a register holds 32,
// among 64 each, and then by the high bits among the four that were found.
struct Table256 {
  LB_FN __m512i among(const uint16_t *halves, __m512i index, __mmask32 high, __mmask32 highest) {
    __m512i found[4];
    for (int k = 0; k < 4; ++k) {
      const uint16_t *from = halves + 64 * k;
      found[k] = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), index, _mm512_loadu_si512(from + 32));
    }
    return _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(found[0], high, found[1]), highest,
                                 _mm512_mask_mov_epi16(found[2], high, found[3]));
  }
  LB_FN void look_up(const uint16_t *halves, const uint8_t *codes, Lanes *x) {
    // So that halves that are put together four and four come out in order.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    const __m512i index = _mm512_permutexvar_epi64(order, words);  // the low 6 bits count
    const __mmask32 high = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 highest = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i low = among(halves, index, high, highest), above = among(halves + 256, index, high, highest);
    x[0] = Lanes(_mm512_castsi512_ps(_mm512_unpacklo_epi16(low, above)));
    x[1] = Lanes(_mm512_castsi512_ps(_mm512_unpackhi_epi16(low, above)));
  }
};

// Codes of 8 bits of numbers in units of the scale, by pieces.
struct Slopes {
  __m512 end_low, end_high, slope, offset, most, near;
  __m512i piece_low, piece_high, middle;
  Slopes() = default;
  LB_IN explicit Slopes(const lb_format &f)
      : end_low(_mm512_loadu_ps(f.piece_end)),
        end_high(_mm512_loadu_ps(f.piece_end + 16)),
        slope(_mm512_loadu_ps(f.piece_slope)),
        offset(_mm512_loadu_ps(f.piece_offset)),
        most(_mm512_loadu_ps(f.piece_most)),
        near(_mm512_set1_ps(f.piece_near)),
        piece_low(_mm512_loadu_si512(f.piece)),
        piece_high(_mm512_loadu_si512(f.piece + 16)),
        middle(_mm512_set1_epi32(f.middle)) {}
  // How many thresholds are below x, not below 0; and the shortest way so far from a sum to a whole number.
  LB_IN __m512i count(__m512 x, Lanes &nearest) const {
    const __m512 held = _mm512_max_ps(x, _mm512_set1_ps(0x1p-31f));
    const __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(held), 23);  // the low 5 bits count
    const __mmask16 after = _mm512_cmp_ps_mask(_mm512_permutex2var_ps(end_low, binade, end_high), x, _CMP_LT_OQ);
    __m512i piece = _mm512_permutex2var_epi32(piece_low, binade, piece_high);
    piece = _mm512_mask_add_epi32(piece, after, piece, _mm512_set1_epi32(1));
    const __m512 sum = _mm512_min_ps(
        _mm512_fmadd_ps(x, _mm512_permutexvar_ps(piece, slope), _mm512_permutexvar_ps(piece, offset)),
        _mm512_permutexvar_ps(piece, most));
    const __m512 apart = _mm512_reduce_ps(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    nearest = _mm512_range_ps(nearest.v, apart, 0b1010);  // the smaller magnitude
    return _mm512_cvttps_epi32(sum);
  }
  LB_IN __m512i signed_code(Lanes u, Lanes &nearest) const {
    const __m512i raw = _mm512_castps_si512(u.v), magnitude = _mm512_and_si512(raw, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 negative = _mm512_movepi32_mask(raw);
    // A tie goes down, which for what is negative is to the larger magnitude.
    const __m512i key = _mm512_mask_add_epi32(magnitude, negative, magnitude, _mm512_set1_epi32(1));
    const __m512i far = count(_mm512_castsi512_ps(key), nearest);
    const __m512i rung = _mm512_mask_sub_epi32(_mm512_add_epi32(middle, far), negative, middle, far);
    return _mm512_max_epi32(rung, _mm512_setzero_si512());
  }
  // 32 numbers as codes, as Ladder::store.
  template <bool SIGNED> LB_IN void store(uint8_t *to, const Lanes *x, Lanes inverse, int least, Lanes &nearest) const {
    for (int k = 0; k < 2; ++k) {
      const Lanes u = x[k] * inverse;
      __m512i found = SIGNED ? signed_code(u, nearest) : count(u.v, nearest);
      if (!SIGNED) found = _mm512_mask_max_epi32(found, (Lanes(0.0f) < x[k]).m, found, _mm512_set1_epi32(least));
      store_codes(to + 16 * k, found);
    }
  }
  LB_IN uint32_t doubtful(Lanes nearest) const { return _mm512_cmp_ps_mask(nearest.v, near, _CMP_LT_OQ); }
};

#else

struct Mask {
  __m256 m;
};

struct Lanes {
  static constexpr int COUNT = 8;
  __m256 v;
  Lanes() = default;
  LB_IN Lanes(__m256 x) : v(x) {}
  LB_IN Lanes(float x) : v(_mm256_set1_ps(x)) {}
  LB_FN Lanes load(const float *from) { return _mm256_loadu_ps(from); }
  LB_IN void store(float *to) const { _mm256_storeu_ps(to, v); }
  LB_IN float first() const { return _mm256_cvtss_f32(v); }
  LB_FN Lanes widen(const uint16_t *from) {  // bf16
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  LB_FN Lanes whole(const uint16_t *from) {  // the numbers 0 to 65,535
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)));
  }
  LB_FN Lanes signed_bytes(const uint8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
  }
  LB_FN Lanes bytes(const uint8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
  }
};

LB_FN Lanes operator+(Lanes a, Lanes b) { return _mm256_add_ps(a.v, b.v); }
LB_FN Lanes operator-(Lanes a, Lanes b) { return _mm256_sub_ps(a.v, b.v); }
LB_FN Lanes operator*(Lanes a, Lanes b) { return _mm256_mul_ps(a.v, b.v); }
LB_FN Lanes operator/(Lanes a, Lanes b) { return _mm256_div_ps(a.v, b.v); }
LB_FN Mask operator<(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
LB_FN Mask operator<=(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
LB_FN Mask operator==(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
LB_FN Mask operator!=(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
LB_FN Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
LB_FN Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
LB_FN Mask operator!(Mask a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
LB_FN Lanes where(Mask condition, Lanes a, Lanes b) { return _mm256_blendv_ps(b.v, a.v, condition.m); }
LB_FN Lanes sqrt(Lanes a) { return _mm256_sqrt_ps(a.v); }
LB_FN bool any(Mask a) { return _mm256_movemask_ps(a.m) != 0; }
LB_FN Lanes nearest_whole(Lanes a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LB_FN Lanes whole_below(Lanes a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
LB_FN Lanes held(Lanes a, Lanes low, Lanes high) { return _mm256_max_ps(_mm256_min_ps(a.v, high.v), low.v); }  // no NaN
LB_FN Lanes and_bits(Lanes a, uint32_t bits) {
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32((int)bits)));
}
LB_FN Lanes negative(Lanes a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
LB_FN Mask mask_of(uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each))};
}
LB_FN Lanes flip(Lanes a, uint32_t bits) {  // the signs of the lanes whose bit is set
  return _mm256_xor_ps(a.v, _mm256_and_ps(mask_of(bits).m, _mm256_set1_ps(-0.0f)));
}
LB_FN Lanes chosen(uint32_t bits, Lanes a, Lanes b) { return where(mask_of(bits), a, b); }
LB_FN uint32_t lanes_of(Mask a) { return (uint32_t)_mm256_movemask_ps(a.m); }
template <int APART> LB_FN Lanes swap_lanes(Lanes a) {  // those that are 1, 2 or 4 apart
  return APART == 1   ? _mm256_permute_ps(a.v, 0xB1)
         : APART == 2 ? _mm256_permute_ps(a.v, 0x4E)
                      : _mm256_permute2f128_ps(a.v, a.v, 0x01);
}

// One step of the trees of several blocks at once, on registers instead of lanes: the first halves of all runs of
// 2 * APART lanes, those of a and then those of b (of the two halves of a register by turns, once they are shorter),
// and the second halves.
template <int APART> LB_FN Lanes first_halves(Lanes a, Lanes b) {
  return APART == 4   ? _mm256_permute2f128_ps(a.v, b.v, 0x20)
         : APART == 2 ? _mm256_shuffle_ps(a.v, b.v, 0x44)
                      : _mm256_shuffle_ps(a.v, b.v, 0x88);
}
template <int APART> LB_FN Lanes second_halves(Lanes a, Lanes b) {
  return APART == 4   ? _mm256_permute2f128_ps(a.v, b.v, 0x31)
         : APART == 2 ? _mm256_shuffle_ps(a.v, b.v, 0xEE)
                      : _mm256_shuffle_ps(a.v, b.v, 0xDD);
}
LB_FN Lanes in_order(Lanes found) {  // after all steps
  return _mm256_permutevar8x32_ps(found.v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

struct Ints {  // the bits of numbers
  __m256i v;
};
LB_FN Ints ints(Lanes a) { return {_mm256_castps_si256(a.v)}; }
LB_FN Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
LB_FN Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
LB_FN Ints operator>>(Ints a, int places) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(places))}; }
LB_FN Ints operator&(Ints a, uint32_t bits) { return {_mm256_and_si256(a.v, _mm256_set1_epi32((int)bits))}; }
LB_FN Ints ones(Mask a) { return {_mm256_srli_epi32(_mm256_castps_si256(a.m), 31)}; }
LB_FN Ints rounded(Lanes a) { return {_mm256_cvtps_epi32(a.v)}; }
LB_FN Ints signs(Ints a) { return a & 0x80000000u; }
LB_FN Lanes with_sign(Lanes a, Lanes sign) {  // of a number that has none
  return _mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)));
}
LB_FN Lanes most_bits(Lanes a, Lanes b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}
LB_FN bool all_below(Lanes a, uint32_t bits) {  // as integers without a sign
  const __m256i least = _mm256_set1_epi32((int)bits), x = _mm256_castps_si256(a.v);
  return _mm256_testz_si256(_mm256_cmpeq_epi32(_mm256_max_epu32(x, least), x), _mm256_set1_epi32(-1));
}
LB_FN Lanes smaller(Lanes a, Lanes b) { return _mm256_min_ps(a.v, b.v); }  // no NaN
LB_FN Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a.v, b.v); }

struct Finite {  // 0 as long as all is finite, else NaN
  __m256 sum;
  LB_IN Finite() : sum(_mm256_setzero_ps()) {}
  LB_IN void see(Lanes a) { sum = _mm256_fmadd_ps(a.v, _mm256_setzero_ps(), sum); }
  LB_IN bool all() const { return _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) == 0; }
};

struct Peak {  // the largest magnitude of each lane, as its bits
  __m256i most;
  LB_IN Peak() : most(_mm256_setzero_si256()) {}
  LB_IN void see_root(Lanes a) { most = _mm256_max_epu32(most, _mm256_castps_si256(a.v)); }  // -0 counts as infinite
  LB_IN void see(Lanes a) { most = _mm256_max_epi32(most, _mm256_castps_si256(and_bits(a, 0x7FFFFFFFu).v)); }
  LB_IN uint32_t of_all() const {
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1)));
  }
};

struct Least {  // the smallest magnitude of each lane but 0, as its bits less 1
  __m256i least;
  LB_IN Least() : least(_mm256_set1_epi32(0x7F7FFFFF)) {}
  LB_IN void see(Lanes a) {
    const __m256i magnitude = _mm256_castps_si256(and_bits(a, 0x7FFFFFFFu).v);
    least = _mm256_min_epu32(least, _mm256_sub_epi32(magnitude, _mm256_set1_epi32(1)));
  }
  LB_IN uint32_t of_all() const {
    __m128i four = _mm_min_epu32(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1));
    four = _mm_min_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_min_epu32(four, _mm_shuffle_epi32(four, 0xB1))) + 1;
  }
};

struct Table {  // 16 numbers, looked up by 4 bits
  __m256 low, high;
  Table() = default;
  LB_IN explicit Table(const float *from) : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
  LB_IN Lanes of(__m256i index) const {  // lookups take the low 3 bits, the blend bit 3
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  LB_IN Lanes look_up(const uint8_t *packed) const {
    int32_t eight;
    __builtin_memcpy(&eight, packed, 4);
    return of(_mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)));
  }
  LB_IN Lanes look_up_bytes(const uint8_t *codes) const {  // of one code each
    return of(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
  }
};

LB_FN void store_bf16(uint16_t *to, Lanes a, __m256i add) {  // finite
  const __m256i bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(a.v), add), 16);
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x88);
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(pairs));
}
LB_FN void store_bf16(uint16_t *to, Lanes a) {  // to nearest
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(a.v), 16), _mm256_set1_epi32(1));
  store_bf16(to, a, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}
LB_FN void store_bf16(uint16_t *to, Lanes a, const uint16_t *draws) {  // stochastically
  store_bf16(to, a, _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)draws)));
}

LB_FN __m256i in_order(__m256i packed) {  // what two rounds of packing have mixed
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 32 numbers, rounded to integers that fit a byte, signed or not.
LB_FN void store_bytes(uint8_t *to, const Lanes *u, bool is_signed) {
  __m256i x[4];
  for (int k = 0; k < 4; ++k) x[k] = _mm256_cvtps_epi32(u[k].v);
  const __m256i low = _mm256_packs_epi32(x[0], x[1]), high = _mm256_packs_epi32(x[2], x[3]);
  const __m256i bytes = is_signed ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  _mm256_storeu_si256((__m256i *)to, in_order(bytes));
}

// 32 roots, as above.
LB_FN void store_roots(uint8_t *to, const Lanes *x, Lanes inverse) {
  __m256i code[4];
  for (int k = 0; k < 4; ++k) {
    const __m256i least = _mm256_min_epu32(_mm256_castps_si256(x[k].v), _mm256_set1_epi32(1));
    code[k] = _mm256_max_epi32(_mm256_cvtps_epi32((x[k] * inverse).v), least);
  }
  const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
  _mm256_storeu_si256((__m256i *)to, in_order(_mm256_packus_epi16(low, high)));
}

LB_FN void store_codes(uint8_t *to, __m256i codes) {
  const __m256i words = _mm256_packus_epi32(codes, codes);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i order = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1);
  _mm_storel_epi64((__m128i *)to, _mm_shuffle_epi8(bytes, order));
}

// The code of a number in units of the scale, drawn at random: the rung at or below it, or the next. By a search tree of
// 15 rungs, whose lookups take the low 3 bits of minus the rung.
struct Drawn {
  __m256 first, second, third, fourth, ladder[2], gaps[2];
  LB_IN explicit Drawn(const lb_format &f)
      : first(_mm256_set1_ps(f.below[0])),
        second(_mm256_loadu_ps(f.below + 8)),
        third(_mm256_loadu_ps(f.below + 16)),
        fourth(_mm256_loadu_ps(f.below + 24)),
        ladder{_mm256_loadu_ps(f.ladder), _mm256_loadu_ps(f.ladder + 8)},
        gaps{_mm256_loadu_ps(f.gaps), _mm256_loadu_ps(f.gaps + 8)} {}
  LB_FN __m256i passed(__m256i minus, __m256 rungs, Lanes u) {  // a comparison is -1 where it holds
    return _mm256_add_epi32(minus, _mm256_castps_si256(_mm256_cmp_ps(rungs, u.v, _CMP_LE_OQ)));
  }
  LB_FN __m256i down(__m256i minus, __m256 table, Lanes u) {
    return passed(_mm256_add_epi32(minus, minus), _mm256_permutevar8x32_ps(table, minus), u);
  }
  LB_FN Lanes look_up(const __m256 *table, __m256i index) {  // lookups take 3 bits, the blend bit 3
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table[0], index), _mm256_permutevar8x32_ps(table[1], index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  LB_IN __m256i code(Lanes u, Lanes chance) const {
    const __m256i top = passed(_mm256_setzero_si256(), first, u);
    const __m256i rung = _mm256_sub_epi32(_mm256_setzero_si256(), down(down(down(top, second, u), third, u), fourth, u));
    const Lanes above = u - look_up(ladder, rung);
    const Mask up = (1.0f - chance) * look_up(gaps, rung) <= above;
    return _mm256_sub_epi32(rung, _mm256_castps_si256(up.m));
  }
  LB_FN __m256i sign(Lanes u) {  // as bit 3 of a code
    return _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(u.v), 28), _mm256_set1_epi32(8));
  }
  LB_FN __m256i joined(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
};

// A 4-bit codebook's code of a number in units of the scale, by a search tree of 15 thresholds. The lookups take the
// low 3 bits of minus the rung, so the tables are turned round.
struct Ladder {
  __m256 first, second, third, fourth;
  Ladder() = default;
  LB_IN explicit Ladder(const lb_format &f)
      : first(_mm256_set1_ps(f.tree[0])),
        second(_mm256_loadu_ps(f.tree + 8)),
        third(_mm256_loadu_ps(f.tree + 16)),
        fourth(_mm256_loadu_ps(f.tree + 24)) {}
  LB_FN __m256i down(__m256i rung, __m256 table, __m256 u) {  // a comparison is -1 where it holds
    const __m256 threshold = _mm256_permutevar8x32_ps(table, rung);
    return _mm256_add_epi32(_mm256_add_epi32(rung, rung), _mm256_castps_si256(_mm256_cmp_ps(threshold, u, _CMP_LT_OQ)));
  }
  LB_IN __m256i minus_code(Lanes u) const {
    const __m256i rung = _mm256_castps_si256(_mm256_cmp_ps(first, u.v, _CMP_LT_OQ));
    return down(down(down(rung, second, u.v), third, u.v), fourth, u.v);
  }
  // 32 numbers as codes of 4 bits; of those above 0, even if next to the scale they are nothing, at least `least`.
  LB_IN void store(uint8_t *to, const Lanes *x, Lanes inverse, int least) const {
    __m256i codes[4];
    for (int k = 0; k < 4; ++k) {
      codes[k] = minus_code(x[k] * inverse);
      if (least) {
        const __m256i above = _mm256_castps_si256((Lanes(0.0f) < x[k]).m);
        codes[k] = _mm256_min_epi32(codes[k], _mm256_and_si256(above, _mm256_set1_epi32(-least)));
      }
    }
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(in_order(words)), _mm256_set1_epi16(0x1001));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x88);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(bytes));
  }
};

#endif

// A number in units of the scale rounded to a small float, as blocks.h does it one by one: encode_minifloat.
struct Minifloat {
  struct Rounded {
    Lanes value, sign;
    Ints code;  // without the sign
  };
  Lanes top, least, steps, step;
  int width, place;  // where the mantissa ends, and how far the sign has to go
  LB_IN explicit Minifloat(const lb_format &f)
      : top(f.top),
        least(f.grid_least),
        steps(12582912.0f / (float)(1 << f.grid_bits)),
        step(1.0f / (float)(1 << f.grid_bits)),
        width(23 - f.grid_bits),
        place(32 - f.bits) {}
  template <bool DRAWN> LB_IN Rounded round(Lanes raw, const uint16_t *draws) const {
    const Lanes u = where(raw == raw, raw, 0.0f), a = smaller(and_bits(u, 0x7FFFFFFFu), top);
    const Lanes binade = larger(and_bits(a, 0x7F800000u), least), shift = binade * steps, sum = a + shift;
    const Lanes near = sum - shift;
    const Ints code = ints(sum) - ints(shift) + (ints(binade) - ints(least) >> width);
    if (!DRAWN) return {near, u, code};
    const Lanes gap = binade * step, chance = (Lanes::whole(draws) + 0.5f) * 0x1p-16f;
    const Mask over = a < near;
    const Lanes low = where(over, near - gap, near);
    const Mask up = (1.0f - chance) * gap <= a - low;
    return {where(up, low + gap, low), u, code - ones(over) + ones(up)};
  }
  LB_IN Ints with_sign(const Rounded &r) const { return r.code + (signs(ints(r.sign)) >> place); }
};

// Of 32 numbers below 16, those that a table has for them.
LB_FN void look_up_bytes(const uint8_t *table, uint8_t *codes) {
  const __m256i each = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
  _mm256_storeu_si256((__m256i *)codes, _mm256_shuffle_epi8(each, _mm256_loadu_si256((const __m256i *)codes)));
}

// Which of 16 numbers, times a factor, are not beyond the edge on either side of 0; NaN is not.
LB_FN uint16_t inside(const float *x, Lanes factor, Lanes edge) {
  uint32_t bits = 0;
  for (int k = 0; k < 16; k += Lanes::COUNT) {
    const Lanes u = Lanes::load(x + k) * factor;
    bits |= lanes_of(!(edge < and_bits(u, 0x7FFFFFFFu))) << k;
  }
  return (uint16_t)bits;
}
// The sum of all lanes of N registers, N a power of two, by halving (trees.h). Overwrites x.
template <int N> LB_FN float halve_lanes(Lanes *x) {
  for (int i = 0; i < N / 2; ++i) x[i] = x[i] + x[i + N / 2];
  return halve_lanes<N / 2>(x);
}
template <> LB_IN float halve_lanes<1>(Lanes *x) {
  Lanes a = x[0];
#ifdef LB_AVX512
  a = a + swap_lanes<8>(a);
#endif
  a = a + swap_lanes<4>(a);
  a = a + swap_lanes<2>(a);
  a = a + swap_lanes<1>(a);
  return a.first();
}

#ifdef LB_AVX512
constexpr bool LOOKS_UP_BYTES = true;
#else
constexpr bool LOOKS_UP_BYTES = false;  // 8 lanes find one of 8 numbers only

struct Table256 {  // so that fused.h can name them
  static void look_up(const uint16_t *, const uint8_t *, Lanes *);
};
struct Slopes {
  Slopes() = default;
  explicit Slopes(const lb_format &);
  template <bool SIGNED> void store(uint8_t *, const Lanes *, Lanes, int, Lanes &) const;
  uint32_t doubtful(Lanes) const;
};
#endif

struct Uniform {  // the same number in every lane
  Lanes all;
  float one;
  LB_IN Uniform(float x) : all(x), one(x) {}
  LB_IN operator Lanes() const { return all; }
};

LB_FN Lanes operator-(Lanes a) { return negative(a); }
LB_FN Mask operator>(Lanes a, Lanes b) { return b < a; }
LB_FN Mask operator>=(Lanes a, Lanes b) { return b <= a; }

}  // namespace LB_SPACE

// The words, as words.h has them for one value.
namespace lb {
using LB_SPACE::Lanes;
using LB_SPACE::Mask;
using LB_SPACE::sqrt;
using LB_SPACE::Uniform;
using LB_SPACE::where;
template <> struct Same<Lanes> {
  using type = LB_SPACE::Uniform;
};
LB_FN Lanes lerp(Lanes a, Lanes b, Lanes weight) {
  const Mask small = weight < 0.5f;
  return where(small, a, b) + where(small, weight, -(1.0f - weight)) * (b - a);
}
LB_FN Lanes lerp(Lanes a, Lanes b, Uniform weight) {  // a branch that always goes one way, and no blends
  return weight.one < 0.5f ? a + weight * (b - a) : b + -(1.0f - weight) * (b - a);
}
LB_FN Lanes reciprocal(Lanes a) { return 1.0f / a; }
LB_FN Lanes binade(Lanes a) {
  const Lanes power = LB_SPACE::and_bits(a, 0x7F800000u);
  return where(power > 0x1p-126f, power, 0x1p-126f);
}
LB_FN Lanes abs(Lanes a) { return LB_SPACE::and_bits(a, 0x7FFFFFFFu); }
LB_FN Lanes sign(Lanes a) { return where(a > 0.0f, 1.0f, where(a < 0.0f, -1.0f, a)); }
LB_FN Lanes maximum(Lanes a, Lanes b) { return where(b > a, b, a); }
LB_FN Lanes minimum(Lanes a, Lanes b) { return where(b < a, b, a); }
LB_FN Lanes clip(Lanes a, Lanes low, Lanes high) { return minimum(maximum(a, low), high); }
}  // namespace lb
#endif
