// Every format on the device, a lane's V values at a time. A format is a struct of constants that the host prints
// (lowbit/gpu/formats.py); what it means, bit for bit, is lowbit/codec.py.
//
// Codec<Fmt> has
//
//     Shared                      tables that the threads of a block keep in shared memory; may be empty
//     prepare(Shared &)           fills them: called by all threads, who meet afterwards before any of them goes on
//     decode<V>(codes, scale, base, shared, x)
//     encode<V, STOCHASTIC, LIVE, BOUNDED, POSITIVE>(x, source, inverse, base, draws, shared)  returns codes
//
// The codes of V values are Codes<Fmt, V>: the bytes that they take in memory (at least one), the bits above them 0.
// `base` is that of log formats, the zero point of affine ones, nothing to others. `source` is sqrt(x) for a SQUARE
// format, else x once more; `inverse` is inverse(scale); draws are 16 random bits for each value, unread without
// STOCHASTIC. LIVE: no value above 0 becomes 0 (an unsigned format is always so). BOUNDED: the scale was derived from
// these values and is finite, so that none is NaN, infinite or far beyond the top: what a step stores. POSITIVE: if the
// format is LIVE or unsigned, all values are 0 or above 2**-100, and `inverse` is above 2**-20.
//
// scale_of<Fmt>(absmax) and log_base<Fmt, V, LANES>(x, scale) say what a block of values is stored with.
//
// What is slow on a GPU is avoided: a conversion between integers and floats is an addition of a number whose ulp is 1,
// bytes are taken apart and put together by permutations, and a code of 16 is found by one look into a small table.
#pragma once
#include "quick.h"

namespace lb {

// ---- operations of the machine

#ifdef __CUDACC__
LB_FN uint32_t permute(uint32_t low, uint32_t high, uint32_t order) { return __byte_perm(low, high, order); }
LB_FN float add_down(float a, float b) { return __fadd_rd(a, b); }
LB_FN float larger(float a, float b) { return fmaxf(a, b); }
LB_FN float smaller(float a, float b) { return fminf(a, b); }
LB_FN float size(float a) { return fabsf(a); }  // free where it is an operand
LB_FN float saturated(float a) { return __saturatef(a); }
#else
LB_FN uint32_t permute(uint32_t low, uint32_t high, uint32_t order) {  // of eight bytes, four by number
  const uint64_t both = (uint64_t)high << 32 | low;
  uint32_t made = 0;
  for (int k = 0; k < 4; ++k) made |= (uint32_t)(both >> (order >> 4 * k & 7) * 8 & 255) << 8 * k;
  return made;
}
LB_FN float add_down(float a, float b) {  // a + b, rounded down, where b > 0 and |a| is small against it
  const float sum = a + b;
  return sum - b > a ? float_of(bits_of(sum) - 1u) : sum;
}
LB_FN float larger(float a, float b) { return maximum(a, b); }
LB_FN float smaller(float a, float b) { return minimum(a, b); }
LB_FN float size(float a) { return abs(a); }
LB_FN float saturated(float a) { return a > 1.0f ? 1.0f : a > 0.0f ? a : 0.0f; }
#endif

constexpr float INTEGER = 12582912.0f;           // 1.5 * 2**23: what is added to it is rounded to an integer
constexpr uint32_t INTEGER_BITS = 0x4B400000u;   // and stands in its low bits, in two's complement
constexpr uint32_t NATURAL_BITS = 0x4B000000u;   // 2**23 as bits: integers below it, or'ed in, are added

// ---- codes in words: a little-endian bit stream

template <class Fmt, int V> using Codes = Words<(V * Fmt::BITS + 7) / 8>;

// 1 in each of the first COUNT codes of a word.
template <int BITS, int COUNT>
constexpr uint32_t ONES = (uint32_t)(((1ull << BITS * COUNT) - 1u) / ((1u << BITS) - 1u));

// Whether codes lie across words: those of 6 bits.
template <class Fmt> constexpr bool ACROSS = Fmt::BITS < 32 && 32 % Fmt::BITS != 0;

template <class Fmt, int V> LB_FN uint32_t code_at(const Codes<Fmt, V> &codes, int i) {
  const int word = i * Fmt::BITS / 32, from = i * Fmt::BITS % 32;
  uint32_t bits = codes.word[word] >> from;
  if (ACROSS<Fmt> && from + Fmt::BITS > 32) bits |= codes.word[word + 1] << (32 - from);
  return bits & 0xFFFFFFFFu >> (32 - Fmt::BITS);
}

// Where there were zeros.
template <class Fmt, int V> LB_FN void put_code(Codes<Fmt, V> &codes, int i, uint32_t code) {
  const int word = i * Fmt::BITS / 32, from = i * Fmt::BITS % 32;
  codes.word[word] |= code << from;
  if (ACROSS<Fmt> && from + Fmt::BITS > 32) codes.word[word + 1] |= code >> (32 - from);
}

// The codes from the count-th on become 0.
template <class Fmt, int V> LB_FN void keep_codes(Codes<Fmt, V> &codes, int count) {
  LB_UNROLL for (int w = 0; w < Codes<Fmt, V>::COUNT; ++w) {
    const int left = count * Fmt::BITS - 32 * w;
    codes.word[w] &= left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
  }
}

// Codes that stand in the low bits of c. With bytes, what stands above them does not count; else it is the same in all
// of them, `above`, and is taken away at the end.
template <class Fmt, int V> LB_FN Codes<Fmt, V> pack(const uint32_t (&c)[V], uint32_t above = 0) {
  constexpr int EACH = 32 / Fmt::BITS, BITS = Fmt::BITS;
  Codes<Fmt, V> packed;
  if constexpr (ACROSS<Fmt>) {
    LB_UNROLL for (int w = 0; w < Codes<Fmt, V>::COUNT; ++w) packed.word[w] = 0u;
    LB_UNROLL for (int k = 0; k < V; ++k) put_code<Fmt, V>(packed, k, c[k] - above);
    return packed;
  } else {
    LB_UNROLL for (int w = 0; w * EACH < V; ++w) {
      const int first = w * EACH;
      if constexpr (BITS == 8 && V >= 4) {
        const uint32_t low = permute(c[first], c[first + 1], 0x40), high = permute(c[first + 2], c[first + 3], 0x40);
        packed.word[w] = permute(low, high, 0x5410);
      } else if constexpr (BITS == 8) {
        packed.word[w] = V == 2 ? permute(c[0], c[V - 1], 0x40) & 0xFFFFu : c[0] & 0xFFu;
      } else {
        constexpr int COUNT = V < EACH ? V : EACH;
        uint32_t word = c[first + COUNT - 1];
        LB_UNROLL for (int k = COUNT - 2; k >= 0; --k) word = (word << BITS) + c[first + k];
        packed.word[w] = word - ONES<BITS, COUNT> * above;
      }
    }
    return packed;
  }
}

// ---- scales

// derive_scale with the division by a constant as a product that is then put right: Markstein's theorem ("Computation
// of elementary functions on the IBM RISC System/6000 processor", 1990). It wants a remainder that does not underflow.
template <class Fmt> LB_FN float scale_of(float absmax) {
  constexpr float TOP = Fmt::TOP, SHARE = 1.0f / TOP;
  if (!(absmax >= 0x1p-90f)) return derive_scale(absmax, TOP, Fmt::MIN_SCALE, Fmt::MAX_SCALE);
  const float near = absmax * SHARE;
  float scale = fma(fma(near, -TOP, absmax), SHARE, near);
  scale = scale > Fmt::MAX_SCALE ? Fmt::MAX_SCALE : scale;
  scale = scale < Fmt::MIN_SCALE ? Fmt::MIN_SCALE : scale;
  return finite_bits(magnitude_bits(absmax)) ? scale : float_of(0x7FC00000u);
}

// The same without a choice, between bounds that leave nothing to hold; and its reciprocal.
template <class Fmt> LB_FN float quick_scale(float absmax, Doubt &doubt) {
  constexpr float TOP = Fmt::TOP, SHARE = 1.0f / TOP, LEAST = 2.0f * TOP * Fmt::MIN_SCALE, MOST = 0.5f * TOP * Fmt::MAX_SCALE;
  const bool between = absmax >= (LEAST > 0x1p-90f ? LEAST : 0x1p-90f) && absmax <= (MOST < 0x1p20f ? MOST : 0x1p20f);
  doubt.otherwise |= !between && absmax != 0.0f;
  const float near = absmax * SHARE;
  return TOP == 1.0f ? absmax : fma(fma(near, -TOP, absmax), SHARE, near);
}
LB_FN float quick_inverse(float scale) {  // of 0 any number: all values are 0, and others are not changed by what is added
  Doubt none;
  return divided(1.0f, scale + 0x1p-126f, &none).x;
}

// ---- rounding

LB_FN float share_of(uint32_t bits16) {  // 1 - uniform(bits16), exactly
  return (2.0f - 0x1p-17f) - float_of(0x3F800000u + (bits16 << 7));
}

template <bool BOUNDED> LB_FN float unit_of(float source, float inverse) {
  return BOUNDED ? source * inverse : in_units(source, inverse);
}

// ---- integers

template <class Fmt> struct Integers {
  struct Shared {};
  LB_FN void prepare(Shared &) {}

  static constexpr int EACH = 32 / Fmt::BITS;
  static constexpr float LEAST = Fmt::SIGNED ? -(float)Fmt::LIMIT : 0.0f;
  // A signed code plus HALF is not negative. Encoding adds it where codes are packed by addition.
  static constexpr uint32_t HALF = Fmt::SIGNED ? 1u << (Fmt::BITS - 1) : 0u, BIAS = Fmt::BITS < 8 ? HALF : 0u;

  // A word whose bytes are codes plus HALF, that of the i-th value among them; and which byte that is.
  template <int V> LB_FN uint32_t bytes_at(const Codes<Fmt, V> &codes, int i) {
    constexpr uint32_t MASK = (1u << Fmt::BITS) - 1u;
    const uint32_t word = codes.word[i / EACH] ^ ONES<Fmt::BITS, EACH> * HALF;
    return word >> i * Fmt::BITS % 8 & ONES<8, 4> * MASK;
  }
  LB_FN uint32_t byte_of(int i) { return (uint32_t)(i % EACH * Fmt::BITS / 8); }

  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float scale, float, const Shared &, float (&x)[V]) {
    decode_with<V>(NATURAL_BITS, codes, scale, x);
  }

  // `natural` is NATURAL_BITS.
  template <int V> LB_FN void decode_with(uint32_t natural, const Codes<Fmt, V> &codes, float scale, float (&x)[V]) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const uint32_t bytes = bytes_at<V>(codes, i);
      float value;
      if constexpr (!Fmt::SIGNED && Fmt::SQUARE) {  // 2**15 + code, and 2**15 * scale is finite
        value = fma(float_of(permute(bytes, 0x47000000u, 0x7404u | byte_of(i) << 4)), scale, -0x1p15f * scale);
      } else {
        value = (float_of(permute(bytes, natural, 0x7440u | byte_of(i))) - (0x1p23f + HALF)) * scale;
      }
      x[i] = Fmt::SQUARE ? value * value : value;
    }
  }

  // The code, plus BIAS, in the low bits of what is returned; the bits above are those of INTEGER.
  template <bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE>
  LB_FN uint32_t code(float x, float source, float inverse, uint32_t draw) {
    constexpr float LIMIT = (float)Fmt::LIMIT;
    constexpr bool RAISED = LIVE || !Fmt::SIGNED;
    float u = unit_of<BOUNDED>(source, inverse);
    // A value a little beyond the top is rounded to it, but may not be rounded up from there.
    if (STOCHASTIC || !BOUNDED) u = smaller(larger(u, LEAST), LIMIT);
    if constexpr (!STOCHASTIC) {
      if (RAISED) u = larger(u, POSITIVE ? saturated(source * 0x1p100f) : x > 0.0f ? 1.0f : LEAST);
      return bits_of(u + (INTEGER + BIAS));
    } else {
      const float sum = add_down(u, INTEGER + BIAS), low = sum - (INTEGER + BIAS);
      const float above = Fmt::SQUARE ? u * u - low * low : u - low, gap = Fmt::SQUARE ? 2.0f * low + 1.0f : 1.0f;
      const uint32_t made = bits_of(sum) + (above >= share_of(draw) * gap ? 1u : 0u);
      if (!RAISED) return made;
      const uint32_t one = INTEGER_BITS + BIAS + 1u;
      return x > 0.0f && made < one ? one : made;
    }
  }

  template <int V, bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE = false>
  LB_FN Codes<Fmt, V> encode(const float (&x)[V], const float (&source)[V], float inverse, float,
                             const uint32_t (&draws)[V], const Shared &) {
    uint32_t c[V];
    LB_UNROLL for (int i = 0; i < V; ++i) {
      c[i] = code<STOCHASTIC, LIVE, BOUNDED, POSITIVE>(x[i], source[i], inverse, STOCHASTIC ? draws[i] : 0u);
    }
    Codes<Fmt, V> packed = pack<Fmt, V>(c, INTEGER_BITS);
    if (BIAS) {
      LB_UNROLL for (int w = 0; w < Codes<Fmt, V>::COUNT; ++w) {
        packed.word[w] ^= ONES<Fmt::BITS, (V < EACH ? V : EACH)> * BIAS;
      }
    }
    return packed;
  }
};

// ---- codebooks

struct alignas(8) Bin {
  float threshold;  // of u
  uint32_t rung;    // of what is not beyond it
};

enum Search { CELLS, BINS, GRID };
template <class Fmt, Search BY> struct Ways;  // to a rung
template <class Fmt> struct Ways<Fmt, BINS> {
  Bin bins[Fmt::BINS];
  LB_FN void prepare(Ways &ways) {
    for (int k = (int)threadIdx.x; k < Fmt::BINS; k += (int)blockDim.x) {
      ways.bins[k] = {float_of(Fmt::bins(2 * k)), Fmt::bins(2 * k + 1)};
    }
  }
  // u is on the ladder's range, or next to it. The sum's low bits are the offset of an entry.
  LB_FN uint32_t rung(float u, const Ways &ways) {
    constexpr uint32_t MASK = (Fmt::BINS - 1) * (uint32_t)sizeof(Bin);
    const Bin bin = entry<MASK>(ways.bins, bits_of(fma(u, Fmt::TIMES, Fmt::PLUS)));
    return bin.rung + (bits_of(bin.threshold - u) >> 31);  // the sign of a difference is exact
  }
};
template <class Fmt> struct Ways<Fmt, GRID> {
  LB_FN void prepare(Ways &) {}
  static constexpr uint32_t SHIFT = 23 - Fmt::MANTISSA, LEAST = (uint32_t)(Fmt::NORMAL + 127) << 23;
  // The binade of u, that of the smallest normal number at least: steps are the same in all of it. What is added to u then
  // has their size for its ulp, and a sum has the number of steps in its low bits.
  LB_FN uint32_t binade_of(float u) {
    const uint32_t own = bits_of(u) & 0x7F800000u;
    return own > LEAST ? own : LEAST;
  }
  LB_FN uint32_t rung_of(float sum, uint32_t binade) {
    return (bits_of(sum) + (binade >> SHIFT) - (LEAST >> SHIFT)) & ((1u << (Fmt::BITS - 1)) - 1u);
  }
  LB_FN uint32_t rung(float u, const Ways &) {
    const uint32_t binade = binade_of(u);
    return rung_of(u + float_of(binade + (SHIFT << 23)), binade);
  }
  // From the rung at or below, up by chance.
  LB_FN uint32_t drawn(float u, uint32_t draw) {
    const uint32_t binade = binade_of(u);
    const float large = float_of(binade + (SHIFT << 23)), step = float_of(binade - (uint32_t)(Fmt::MANTISSA << 23));
    const float sum = add_down(u, large), above = u - (sum - large);
    const uint32_t rung = rung_of(sum, binade) + (above >= share_of(draw) * step ? 1u : 0u);
    return rung < Fmt::RUNGS - 1 ? rung : Fmt::RUNGS - 1;
  }
};
template <class Fmt> struct Ways<Fmt, CELLS> {
  static constexpr bool NEAR = Fmt::CELLS <= 512;
  uint32_t cells[NEAR ? Fmt::CELLS : 1];
  LB_FN void prepare(Ways &ways) {
    for (int k = (int)threadIdx.x; NEAR && k < Fmt::CELLS; k += (int)blockDim.x) ways.cells[k] = Fmt::cells(k);
  }
  LB_FN uint32_t rung(float u, const Ways &ways) {
    constexpr uint32_t BELOW = (1u << Fmt::CELL_SHIFT) - 1u;
    const int32_t magnitude = (int32_t)magnitude_bits(u);
    int32_t held = magnitude > Fmt::CELL_LOW ? magnitude : Fmt::CELL_LOW;
    held = held < Fmt::CELL_HIGH ? held : Fmt::CELL_HIGH;
    const bool negative = !Fmt::SIGN_MAGNITUDE && (int32_t)bits_of(u) < 0;
    const int32_t at = ((held - Fmt::CELL_LOW) >> Fmt::CELL_SHIFT) + (negative ? Fmt::CELL_HALF : 0);
    const uint32_t cell = NEAR ? ways.cells[NEAR ? at : 0] : Fmt::cells(at);
    const uint32_t over = ((uint32_t)held & BELOW) >= (cell & 0xFFFFFFu) ? 1u : 0u;
    return (cell >> 24) + (negative ? 0u - over : over);
  }
};

template <class Fmt> struct Codebook {
  using To = Ways<Fmt, (Fmt::BINS > 0 ? BINS : Fmt::MANTISSA > 0 ? GRID : CELLS)>;
  struct Shared {
    float values[1 << Fmt::BITS];
    To ways;
  };
  LB_FN void prepare(Shared &shared) {
    for (int k = (int)threadIdx.x; k < 1 << Fmt::BITS; k += (int)blockDim.x) {
      shared.values[k] = float_of(Fmt::values(k));
    }
    To::prepare(shared.ways);
  }

  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float scale, float, const Shared &shared, float (&x)[V]) {
    constexpr int EACH = 32 / Fmt::BITS;
    constexpr uint32_t MASK = ((1u << Fmt::BITS) - 1u) * 4u;
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const uint32_t word = ACROSS<Fmt> ? code_at<Fmt, V>(codes, i) : codes.word[i / EACH];
      const int at = ACROSS<Fmt> ? -2 : i % EACH * Fmt::BITS - 2;
      const float value = entry<MASK>(shared.values, at < 0 ? word << 2 : word >> (at < 0 ? 0 : at)) * scale;
      x[i] = Fmt::SQUARE ? value * value : value;
    }
  }

  LB_FN float ladder(uint32_t rung, const Shared &shared) {
    if constexpr (Fmt::SAME) return shared.values[rung];
    else return float_of(Fmt::ladder((int)rung));
  }

  static constexpr int EACH = 32 / Fmt::BITS;
  static constexpr float LEAST = Fmt::SIGN_MAGNITUDE ? -Fmt::TOP : Fmt::BOTTOM;
  static constexpr uint32_t SIGN = Fmt::SIGN_MAGNITUDE ? 1u << (Fmt::BITS - 1) : 0u;

  // The rung before it is raised.
  template <bool STOCHASTIC, bool BOUNDED, bool POSITIVE>
  LB_FN uint32_t rung_of(float u, uint32_t draw, const Shared &shared) {
    constexpr bool HELD = !BOUNDED || STOCHASTIC;
    if (HELD) u = smaller(u, Fmt::TOP);
    if (!Fmt::SIGN_MAGNITUDE && (HELD || (!Fmt::SIGNED && (!POSITIVE || Fmt::BOTTOM > 0.0f)))) u = larger(u, Fmt::BOTTOM);
    if constexpr (STOCHASTIC && Fmt::MANTISSA > 0) return Ways<Fmt, GRID>::drawn(u, draw);
    const uint32_t rung = To::rung(u, shared.ways);
    if (!STOCHASTIC) return rung;
    // From the nearest rung to the one at or below, and up again by chance.
    int32_t r = (int32_t)rung - (ladder(rung, shared) > u ? 1 : 0);
    r = r < 0 ? 0 : r > Fmt::RUNGS - 2 ? Fmt::RUNGS - 2 : r;
    const float low = ladder((uint32_t)r, shared), gap = ladder((uint32_t)r + 1u, shared) - low;
    return (uint32_t)r + (u - low >= share_of(draw) * gap ? 1u : 0u);
  }

  LB_FN uint32_t raised(uint32_t rung, float x) {
    const uint32_t least = x > 0.0f ? (uint32_t)Fmt::LEAST : 0u;
    return rung > least ? rung : least;
  }

  template <int V, bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE = false>
  LB_FN Codes<Fmt, V> encode(const float (&x)[V], const float (&source)[V], float inverse, float,
                             const uint32_t (&draws)[V], const Shared &shared) {
    constexpr bool RAISED = (LIVE || !Fmt::SIGNED) && Fmt::HAS_ZERO;
    // Bins of an unsigned format know by themselves what is above 0, as long as its product with `inverse` is.
    constexpr bool KNOWN = !STOCHASTIC && !Fmt::SIGNED && Fmt::BINS > 0;
    uint32_t c[V];
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const float u = unit_of<BOUNDED>(Fmt::SIGN_MAGNITUDE ? size(source[i]) : source[i], inverse);
      c[i] = rung_of<STOCHASTIC, BOUNDED, POSITIVE>(u, STOCHASTIC ? draws[i] : 0u, shared);
      if (RAISED && !KNOWN) c[i] = raised(c[i], x[i]);
      if constexpr (!Fmt::SAME) c[i] = Fmt::codes((int)c[i]);
      if constexpr (Fmt::SIGN_MAGNITUDE) {
        const float sign = BOUNDED ? source[i] : in_units(source[i], inverse);  // a NaN has none
        c[i] |= bits_of(sign) >> (32 - Fmt::BITS) & SIGN;
      }
    }
    Codes<Fmt, V> packed = pack<Fmt, V>(c);
    if (RAISED && KNOWN && !POSITIVE && __builtin_expect(inverse <= 0.5f, 0)) {
      LB_UNROLL for (int i = 0; i < V; ++i) {
        const uint32_t least = x[i] > 0.0f && code_at<Fmt, V>(packed, i) == 0u ? 1u : 0u;
        packed.word[i / EACH] |= least << i % EACH * Fmt::BITS;
      }
    }
    return packed;
  }
};

// ---- floats: codes are the numbers themselves

template <class Fmt> struct Floats {
  struct Shared {};
  LB_FN void prepare(Shared &) {}

  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float, float, const Shared &, float (&x)[V]) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if constexpr (Fmt::DTYPE == LB_FLOAT32) {
        x[i] = float_of(codes.word[i]);
      } else if constexpr (Fmt::DTYPE == LB_BFLOAT16) {
        x[i] = float_of(i % 2 ? codes.word[i / 2] & 0xFFFF0000u : codes.word[i / 2] << 16);
      } else {
        x[i] = value_fp16(codes.word[i / 2] >> i % 2 * 16 & 0xFFFFu);
      }
    }
  }

  template <int V, bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE = false>
  LB_FN Codes<Fmt, V> encode(const float (&x)[V], const float (&)[V], float, float, const uint32_t (&draws)[V],
                             const Shared &) {
    Codes<Fmt, V> packed;
    if constexpr (Fmt::DTYPE == LB_FLOAT32) {
      LB_UNROLL for (int i = 0; i < V; ++i) packed.word[i] = bits_of(x[i]);
      return packed;
    }
    constexpr bool BF16 = Fmt::DTYPE == LB_BFLOAT16;
    if constexpr (!STOCHASTIC && !LIVE && !BOUNDED) {
      LB_UNROLL for (int i = 0; i < V; i += 2) {
        const float high = V == 1 ? 0.0f : x[(i + 1) % V];
        packed.word[i / 2] = BF16 ? two_bf16(x[i], high) : two_fp16(x[i], high);
      }
      return packed;
    }
    uint32_t c[V];  // the number is the upper half where HIGH
    constexpr bool HIGH = BF16 && BOUNDED && !LIVE;
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if constexpr (HIGH) {
        const uint32_t raw = bits_of(x[i]);
        c[i] = raw + (STOCHASTIC ? draws[i] : 0x7FFFu + (raw >> 16 & 1u));
      } else if constexpr (BF16) {
        c[i] = STOCHASTIC ? narrow_bf16(x[i], draws[i]) : narrow_bf16(x[i]);
      } else {
        c[i] = STOCHASTIC ? narrow_fp16(x[i], draws[i]) : narrow_fp16(x[i]);
      }
      if (LIVE) c[i] = x[i] > 0.0f && (c[i] & 0x7FFFu) == 0u ? 1u : c[i];
    }
    LB_UNROLL for (int i = 0; i < V; i += 2) {
      if constexpr (V == 1) packed.word[0] = HIGH ? c[0] >> 16 : c[0];
      else packed.word[i / 2] = permute(c[i], c[i + 1], HIGH ? 0x7632 : 0x5410);
    }
    return packed;
  }
};

// ---- powers of a base (SOLO, https://arxiv.org/abs/2505.00347), and (code - zero) * scale

template <class Fmt> struct Powers {
  struct Shared {};
  LB_FN void prepare(Shared &) {}
  static constexpr int COUNT = 1 << Fmt::BITS;

  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float scale, float base, const Shared &, float (&x)[V]) {
    LB_UNROLL for (int i = 0; i < V; ++i) x[i] = 1.0f;
    float level = 1.0f;
    LB_UNROLL for (int k = 1; k < COUNT; ++k) {
      level = level * base;
      LB_UNROLL for (int i = 0; i < V; ++i) x[i] = code_at<Fmt, V>(codes, i) == (uint32_t)k ? level : x[i];
    }
    LB_UNROLL for (int i = 0; i < V; ++i) x[i] = x[i] * scale;
  }

  template <int V, bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE = false>
  LB_FN Codes<Fmt, V> encode(const float (&x)[V], const float (&)[V], float inverse, float base,
                             const uint32_t (&draws)[V], const Shared &) {
    uint32_t c[V];
    LB_UNROLL for (int i = 0; i < V; ++i) c[i] = 0u;
    float level = 1.0f;
    LB_UNROLL for (int k = 1; k < COUNT; ++k) {
      const float low = level * base, gap = level - low;
      LB_UNROLL for (int i = 0; i < V; ++i) {
        const float above = x[i] * inverse - low;
        const bool up = STOCHASTIC ? above >= share_of(draws[i]) * gap : above > gap * 0.5f;
        c[i] += up ? 0u : 1u;
      }
      level = low;
    }
    return pack<Fmt, V>(c);
  }
};

template <class Fmt> struct Affine {
  struct Shared {};
  LB_FN void prepare(Shared &) {}

  template <int V>
  LB_FN void decode(const Codes<Fmt, V> &codes, float scale, float zero, const Shared &, float (&x)[V]) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      x[i] = (float_of(NATURAL_BITS | code_at<Fmt, V>(codes, i)) - 0x1p23f - zero) * scale;
    }
  }

  template <int V, bool STOCHASTIC, bool LIVE, bool BOUNDED, bool POSITIVE = false>
  LB_FN Codes<Fmt, V> encode(const float (&x)[V], const float (&)[V], float inverse, float zero,
                             const uint32_t (&draws)[V], const Shared &) {
    constexpr float LIMIT = (float)Fmt::LIMIT;
    uint32_t c[V];
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const float u = unit_of<BOUNDED>(x[i], inverse), low = lb::floor(u);
      float code = (STOCHASTIC ? low + (u - low >= share_of(draws[i]) ? 1.0f : 0.0f) : lb::rint(u)) + zero;
      code = clip(code, 0.0f, LIMIT);
      code = LIVE && x[i] > 0.0f && code < zero + 1.0f ? zero + 1.0f : code;
      c[i] = bits_of(code + INTEGER) - INTEGER_BITS;
    }
    return pack<Fmt, V>(c);
  }
};

// ---- the codec of a format

template <class Fmt, int KIND> struct Kinds;
template <class Fmt> struct Kinds<Fmt, LB_KIND_FLOAT> : Floats<Fmt> {};
template <class Fmt> struct Kinds<Fmt, LB_KIND_INTEGER> : Integers<Fmt> {};
template <class Fmt> struct Kinds<Fmt, LB_KIND_CODEBOOK> : Codebook<Fmt> {};
template <class Fmt> struct Kinds<Fmt, LB_KIND_AFFINE> : Affine<Fmt> {};
template <class Fmt> struct Kinds<Fmt, LB_KIND_LOG> : Powers<Fmt> {};
template <class Fmt> struct Codec : Kinds<Fmt, Fmt::KIND> {};

// ---- the base of powers

template <int LANES> LB_FN uint32_t total(uint32_t x) {
  LB_UNROLL for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, apart);
  return x;
}

// The base with which the lowest level is the 0.1 quantile of what is above 0 among V * LANES values: the rank-th
// smallest, bit by bit from the highest. What lies beyond the end of a row is 0.
template <class Fmt, int V, int LANES> LB_FN float log_base(const float (&x)[V], float scale) {
  uint32_t alive = 0;
  bool odd = false;
  LB_UNROLL for (int i = 0; i < V; ++i) {
    alive += x[i] > 0.0f ? 1u : 0u;
    odd |= x[i] != x[i];
  }
  odd = any<LANES>(odd);
  alive = total<LANES>(alive);
  uint32_t rank = alive ? (alive - 1u) / 10u : 0u, found = 0;
  for (int bit = 30; bit >= 0; --bit) {  // `rank` counts among those that begin like `found`
    uint32_t below = 0;
    LB_UNROLL for (int i = 0; i < V; ++i) {
      below += x[i] > 0.0f && bits_of(x[i]) >> bit == found << 1 ? 1u : 0u;
    }
    below = total<LANES>(below);
    const bool one = rank >= below;
    rank -= one ? below : 0u;
    found = found << 1 | (one ? 1u : 0u);
  }
  if (scale == 0.0f) return 1.0f;
  if (odd || scale != scale) return float_of(0x7FC00000u);
  return base_of(alive ? float_of(found) : 0.0f, scale, 1 << Fmt::BITS);
}

}  // namespace lb
