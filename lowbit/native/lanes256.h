// A register of 8 numbers and what is done with it, AVX2. lanes512.h has the same names for 16, and lookups of bytes; lanes.h
// what follows from either.
#pragma once
#include <immintrin.h>
#include "abi.h"
#include "words.h"

namespace LB_SPACE {

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

}  // namespace LB_SPACE
