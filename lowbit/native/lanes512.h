// A register of 16 numbers and what is done with it, AVX-512. lanes256.h has the same names for 8; lanes.h what follows from
// either.
#pragma once
#include <immintrin.h>
#include "abi.h"
#include "words.h"

namespace LB_SPACE {

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

}  // namespace LB_SPACE
