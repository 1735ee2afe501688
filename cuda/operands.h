// A lane's values of every operand of a step: from memory to fp32 registers and back.
//
// A warp works on 32 * V neighbouring element numbers, its lanes on V of them each. An element's number is row * stride
// + column, where stride is a row's length in whole step blocks of WIDTH values (lowbit/layout.py).
#pragma once
#include "device.h"
#include "job.h"
#include "spec.h"

namespace lb {
using namespace spec;

constexpr int THREADS = 256, UNITS = 4;  // of a block of threads; of 32 * V numbers that a warp takes one after the other
constexpr int CHUNK = THREADS * V * UNITS;  // element numbers of a block of threads
constexpr int UPDATERS = 128, TURNS = CHUNK / (UPDATERS * V);  // the updating sweep has smaller ones with as many
constexpr int LOADED = 2 + MOMENTS + VECTORS;  // slots that lie in memory: p, g, the moments, vectors
constexpr int LANES = WIDTH / V;            // that share a step block
static_assert(WIDTH % V == 0 && LANES <= 32, "a step block belongs to one warp, and a lane to one step block");

// Where a lane's values are.
struct Place {
  int64_t row, col;  // of the first
  int64_t number;
  int64_t counted;   // the same for random bits, counted from where their key is (stream_keys)
  int64_t block;     // number of the step block
  int64_t at;        // offset of the first value
  int count;         // how many of the V values exist: those beyond a row's or the tensor's end do not
};

LB_FN int64_t stride_of(const Job &job) { return LINEAR ? job.cols : (job.cols + WIDTH - 1) / WIDTH * WIDTH; }

LB_FN int64_t quotient(int64_t a, int64_t b) {  // of natural numbers: 64 bits take five times as long as 32
  return ((uint64_t)a | (uint64_t)b) >> 32 == 0 ? (int64_t)((uint32_t)a / (uint32_t)b) : a / b;
}

// Whether a row and a column have to be found: a division. LINEAR without vectors, nobody asks for them.
constexpr bool DIVIDED = !LINEAR || VECTORS > 0;

LB_FN Place place_in(const Job &job, int64_t number, int64_t row, int64_t col) {
  Place to;
  to.row = row, to.col = col;
  to.number = to.counted = number;
  to.block = (int64_t)((uint64_t)number / WIDTH);
  to.at = LINEAR ? number : row * job.cols + col;
  const int64_t left = row < job.rows ? job.cols - col : 0;
  to.count = LINEAR ? (row < job.rows ? V : 0) : left < V ? (int)(left > 0 ? left : 0) : V;
  return to;
}

LB_FN Place place(const Job &job, int64_t number) {
  if (DIVIDED) {
    const int64_t length = stride_of(job), row = quotient(number, length);
    return place_in(job, number, row, number - row * length);
  }
  Place to = {};
  to.number = to.counted = to.at = number;
  to.block = (int64_t)((uint64_t)number / WIDTH);
  to.count = number < job.rows * job.cols ? V : 0;
  return to;
}

// What lies beyond a row's end is no value: `act` is given its numbers. A branch that hardly any lane takes. To choose for
// each value costs instructions and, between what is decoded and what is encoded, registers.
template <class Act> LB_FN void beyond([[maybe_unused]] const Place &place, [[maybe_unused]] Act act) {
  if constexpr (!LINEAR) {
    if (place.count == V) return;
    LB_BRANCH();
    LB_UNROLL for (int k = 0; k < V; ++k) {
      if (k >= place.count) act(k);
    }
  }
}

// ---- memory

// Whether a thread is one of the first COUNT, of which there may be none.
template <int COUNT> LB_FN bool among([[maybe_unused]] int t) {
  if constexpr (COUNT > 0) return t < COUNT;
  else return false;
}

// Brings what the host has told to shared memory; all threads of a block meet afterwards.
template <class T> LB_FN void bring(const T &from, T &to) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  for (uint32_t k = threadIdx.x; k < sizeof(T) / 4; k += blockDim.x) ((uint32_t *)&to)[k] = ((const uint32_t *)&from)[k];
}

template <int BYTES, int EACH> LB_FN Words<BYTES> fetch(const void *from, int64_t index, int count) {
  const uint8_t *at = (const uint8_t *)from + index;
  LB_GLOBAL(at);
  if (LINEAR) return load_aligned<BYTES>(at);
  return load<BYTES, EACH>(at, count);
}

template <int BYTES, int EACH> LB_FN void put(void *to, int64_t index, const Words<BYTES> &words, int count) {
  uint8_t *at = (uint8_t *)to + index;
  LB_GLOBAL(at);
  if (LINEAR) store_aligned<BYTES>(at, words);
  else store<BYTES, EACH>(at, words, count);
}

LB_FN float load_float(const float *from) {
  LB_GLOBAL(from);
  return *from;
}

LB_FN void store_float(float *to, float value) {
  LB_GLOBAL(to);
  *to = value;
}

template <int DTYPE> constexpr int SIZE = DTYPE == LB_FLOAT32 ? 4 : 2;  // bytes of a value

LB_FN uint16_t half_word(const uint32_t *words, int k) { return (uint16_t)(words[k / 2] >> (k % 2 * 16)); }

LB_FN void set_half_word(uint32_t *words, int k, uint16_t x) {
  words[k / 2] = k % 2 ? words[k / 2] | (uint32_t)x << 16 : (uint32_t)x;
}

template <int DTYPE> LB_FN float value(const uint32_t *words, int k) {
  if (DTYPE == LB_FLOAT32) return float_of(words[k]);
  if (DTYPE == LB_FLOAT16) return widen_fp16(half_word(words, k));
  return float_of(k % 2 ? words[k / 2] & 0xFFFF0000u : words[k / 2] << 16);
}

// ---- random bits

struct Key {
  uint32_t first, second;
};

// rounding.key of (seed, step, tensor, operand), for numbers of the chunk of `from` and counted from there: the high bits of
// their pairs are the same. Of a block's threads each finds a word, in shared memory; the caller has them meet then.
template <int COUNT> LB_FN void stream_keys(const Job &job, const Dynamic &now, int64_t from, Key (&keys)[COUNT]) {
  static_assert(2 * COUNT <= UPDATERS, "a thread for each word of each key");
  const uint32_t t = threadIdx.x;
  if (t >= 2 * COUNT) return;
  const uint32_t words[6] = {(uint32_t)now.seed, (uint32_t)(now.seed >> 32), (uint32_t)now.step,
                             (uint32_t)(now.step >> 32), (uint32_t)job.tensor, t / 2};
  uint32_t mixed = t % 2 ? 0x5BF03635u : 0u;
  LB_UNROLL for (int k = 0; k < 6; ++k) mixed = mix(mixed * 0x9E3779B9u + words[k] + 1u);
  ((uint32_t *)keys)[t] = mixed + (t % 2 ? (uint32_t)(from >> 33) * 0x9E3779B1u : (uint32_t)(from >> 1));
}

// 16 random bits for each of the V values from a place on.
LB_FN void draw(const Key &key, const Place &place, uint32_t (&draws)[V]) {
  const uint32_t pair = (uint32_t)((uint64_t)place.counted >> 1);
  LB_UNROLL for (int k = 0; k < (V + 1) / 2; ++k) {
    const uint32_t both = hash(pair + (uint32_t)k, key.first, key.second);
    draws[2 * k % V] = V == 1 && lane() % 2 ? both >> 16 : both & 0xFFFFu;
    if (V > 1) draws[(2 * k + 1) % V] = both >> 16;
  }
}

// ---- what is not finite

// Whether stored numbers are finite. A 16-bit exponent of ones, and only that, carries into the sign's place.
template <int DTYPE, int BYTES> LB_FN bool all_finite(const Words<BYTES> &words) {
  float sum = 0.0f;
  uint32_t carried = 0u;
  LB_UNROLL for (int k = 0; k < Words<BYTES>::COUNT; ++k) {
    if (DTYPE == LB_FLOAT32) sum = fma(float_of(words.word[k]), 0.0f, sum);  // 0 * x is NaN for infinities and NaNs
    else if (DTYPE == LB_BFLOAT16) carried |= (words.word[k] & 0x7F807F80u) + 0x00800080u;
    else carried |= (words.word[k] & 0x7C007C00u) + 0x04000400u;
  }
  return sum == 0.0f && (carried & 0x80008000u) == 0u;
}

// ---- the parameter, with its low bits (lowbit/masters.py)

constexpr int COMPANION = MASTER == LB_SPLIT8 ? 1 : MASTER == LB_MASTER32 ? 4 : 2;  // bytes of a value's low bits
constexpr Half HALF = PARAM == LB_BFLOAT16 ? BF16 : FP16;

using ParamWords = Words<V * SIZE<PARAM>>;
using CompanionWords = Words<V * COMPANION>;
using GradientWords = Words<V * SIZE<GRAD>>;

LB_FN float load_low(uint32_t raw, float p, const uint32_t *kept, int k) {
  if (MASTER == LB_MASTER32) {
    const float whole = float_of(kept[k]);
    const uint32_t rounded = PARAM == LB_BFLOAT16 ? narrow_bf16(whole) : narrow_fp16(whole);
    const bool same = rounded == raw || ((rounded | raw) & 0x7FFFu) == 0u;  // -0 equals 0, NaN nothing
    return same && p == p ? whole : p;
  }
  if (MASTER == LB_KAHAN) return load_kahan(p, value<PARAM>(kept, k), HALF);
  if (MASTER == LB_SPLIT8) return load_share(p, (float)(int8_t)(uint8_t)(kept[k / 4] >> (k % 4 * 8)), STEPS8, HALF);
  const int16_t low = (int16_t)half_word(kept, k);
  return PARAM == LB_BFLOAT16 ? load_split16((uint16_t)raw, low) : load_share(p, (float)low, STEPS16, HALF);
}

struct Parameter {  // as it is stored
  ParamWords raw;
  CompanionWords low;
};

LB_FN Parameter fetch_parameter(const Job &job, const Place &place) {
  Parameter to = {};
  to.raw = fetch<V * SIZE<PARAM>, SIZE<PARAM>>(job.param, place.at * SIZE<PARAM>, place.count);
  if (MASTER != LB_NONE) to.low = fetch<V * COMPANION, COMPANION>(job.companion, place.at * COMPANION, place.count);
  return to;
}

LB_FN void widen_parameter(const Parameter &from, float (&p)[V]) {
  LB_UNROLL for (int k = 0; k < V; ++k) {
    p[k] = value<PARAM>(from.raw.word, k);
    if (MASTER != LB_NONE) p[k] = load_low(half_word(from.raw.word, k), p[k], from.low.word, k);
  }
}

// The parameter as it will be stored, whatever it is.
LB_FN ParamWords narrow_any(const uint32_t (&draws)[V], const float (&p)[V]) {
  ParamWords words = {};
  LB_UNROLL for (int k = 0; k < V; ++k) {
    uint16_t narrowed;
    if (MASTER == LB_SPLIT16 && PARAM == LB_BFLOAT16) narrowed = high_split16(p[k]);
    else if (PARAM == LB_BFLOAT16) narrowed = STOCHASTIC ? narrow_bf16(p[k], draws[k]) : narrow_bf16(p[k]);
    else narrowed = STOCHASTIC ? narrow_fp16(p[k], draws[k]) : narrow_fp16(p[k]);
    set_half_word(words.word, k, narrowed);
  }
  return words;
}

// What is left of p beside what is stored of it.
LB_FN CompanionWords narrow_rest(const float (&p)[V], const ParamWords &stored) {
  CompanionWords low = {};
  LB_UNROLL for (int k = 0; k < V; ++k) {
    const float own = value<PARAM>(stored.word, k);
    if (MASTER == LB_MASTER32) {
      low.word[k % CompanionWords::COUNT] = bits_of(p[k]);
    } else if (MASTER == LB_SPLIT8) {
      const uint32_t share = (uint32_t)(int32_t)store_share(p[k], own, STEPS8, HALF) & 0xFFu;
      low.word[k / 4] |= share << (k % 4 * 8);
    } else {
      const uint16_t half = MASTER == LB_KAHAN ? (PARAM == LB_BFLOAT16 ? narrow_bf16(p[k] - own) : narrow_fp16(p[k] - own))
                            : PARAM == LB_BFLOAT16
                                ? (uint16_t)low_split16(p[k], half_word(stored.word, k))
                                : (uint16_t)(int16_t)(int32_t)store_share(p[k], own, STEPS16, HALF);
      set_half_word(low.word, k, half);
    }
  }
  return low;
}

// The parameter as it will be stored, and whether it is finite: where it is not, a quick course is in doubt. Its rest at
// once: until all else is encoded, that takes fewer registers than p.
template <bool QUICK>
LB_FN Parameter narrow_parameter(const Key &key, const Place &place, const float (&p)[V], bool &finite, Doubt &doubt) {
  Parameter to = {};
  uint32_t draws[V] = {};
  if (STOCHASTIC && PARAM != LB_FLOAT32) draw(key, place, draws);
  if constexpr (QUICK && PARAM == LB_BFLOAT16 && V % 2 == 0) {
    constexpr bool SPLIT = MASTER == LB_SPLIT16;  // of finite bits it keeps the lower half as it is
    LB_UNROLL for (int k = 0; k < V; k += 2) {
      const uint32_t a = bits_of(p[k]), b = bits_of(p[k + 1]);
      const uint32_t low = a + (SPLIT ? 0x8000u : STOCHASTIC ? draws[k] : 0x7FFFu + (a >> 16 & 1u));
      const uint32_t high = b + (SPLIT ? 0x8000u : STOCHASTIC ? draws[k + 1] : 0x7FFFu + (b >> 16 & 1u));
      to.raw.word[k / 2] = permute(low, high, 0x7632);
      if (SPLIT) to.low.word[k / 2] = permute(a, b, 0x5410);
    }
    LB_UNROLL for (int k = 0; k < V; ++k) Doubt::must_be_finite(doubt, p[k]);
    finite = true;
    if (MASTER != LB_NONE && !SPLIT) to.low = narrow_rest(p, to.raw);
    return to;
  } else if constexpr (PARAM == LB_FLOAT32) {
    LB_UNROLL for (int k = 0; k < V; ++k) to.raw.word[k] = bits_of(p[k]);
  } else {
    to.raw = narrow_any(draws, p);
  }
  finite = all_finite<PARAM>(to.raw);
  if (QUICK) doubt.otherwise |= !finite;
  if (MASTER != LB_NONE) to.low = narrow_rest(p, to.raw);
  return to;
}

LB_FN void store_parameter(const Job &job, const Place &place, const Parameter &fresh) {
  put<V * SIZE<PARAM>, SIZE<PARAM>>(job.param, place.at * SIZE<PARAM>, fresh.raw, place.count);
  if (MASTER != LB_NONE) put<V * COMPANION, COMPANION>(job.companion, place.at * COMPANION, fresh.low, place.count);
}

// Whether a finite parameter would be so no longer: one that is broken already must not freeze its neighbours.
LB_FN bool spoiled(const Place &place, const ParamWords &old, const ParamWords &fresh) {
  bool found = false;
  LB_UNROLL for (int k = 0; k < V; ++k) {
    const bool was = finite_bits(magnitude_bits(value<PARAM>(old.word, k)));
    found |= k < place.count && was && !finite_bits(magnitude_bits(value<PARAM>(fresh.word, k)));
  }
  return found;
}

}  // namespace lb
