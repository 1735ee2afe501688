// Several values at once, as rules.h's functors take them in place of a float: a register, with the same arithmetic.
//
// Only for AVX2 and AVX-512; each operation is the IEEE operation of words.h on every lane.
#pragma once
#include "abi.h"
#include "words.h"

#define LB_IN inline __attribute__((always_inline))

#ifdef LB_AVX2
#ifdef LB_AVX512
#include "lanes512.h"
#else
#include "lanes256.h"
#endif

namespace LB_SPACE {

// A number in units of the scale rounded to a small float, as encode.h does it one by one: encode_minifloat.
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
