// A step's moments and vectors, each in its own format: decoded, given scales, encoded.
#pragma once
#include "formats.h"
#include "operands.h"

namespace lb {

// What spec.h says of moment K: Format, STOCHASTIC, and LIVE: a value above 0 must not become 0.
template <int K> using FormatOf = typename Moment<K>::Format;

template <int K> constexpr int BITS = FormatOf<K>::BITS;
template <int K> constexpr bool FLOATS = FormatOf<K>::KIND == LB_KIND_FLOAT;
template <int K> constexpr int CODE_BYTES = (V * BITS<K> + 7) / 8;
template <int K> constexpr int SCALE_BLOCK = FLOATS<K> || FormatOf<K>::BLOCK > WIDTH ? WIDTH : FormatOf<K>::BLOCK;
// Lanes share a scale; or, with blocks that are shorter than what a lane has, its values are in parts, each with a scale.
template <int K> constexpr int SCALE_LANES = SCALE_BLOCK<K> > V ? SCALE_BLOCK<K> / V : 1;
template <int K> constexpr int PARTS = SCALE_BLOCK<K> < V ? V / SCALE_BLOCK<K> : 1;
template <int K> constexpr int PART = V / PARTS<K>;
template <int K> using CodeWords = Words<CODE_BYTES<K>>;

template <int K> struct Tables {  // of all moments' formats from K on, in shared memory
  typename Codec<FormatOf<K>>::Shared own;
  Tables<K + 1> rest;
};
constexpr int WEIGHT = LB_MOMENTS;  // the number of what is no moment: the parameter, where it is codes (weights.h)
template <int K, bool> struct OwnTables {};
template <int K> struct OwnTables<K, true> {
  typename Codec<FormatOf<K>>::Shared own;
};
template <> struct Tables<MOMENTS> : OwnTables<WEIGHT, STORED> {};

template <int K> LB_FN void prepare_own([[maybe_unused]] Tables<MOMENTS> &tables) {
  if constexpr (STORED) {
    OwnTables<K, STORED> &its = tables;
    Codec<FormatOf<K>>::prepare(its.own);
  }
}

template <int K> LB_FN void prepare_tables([[maybe_unused]] Tables<K> &tables) {
  if constexpr (K < MOMENTS) {
    Codec<FormatOf<K>>::prepare(tables.own);
    prepare_tables<K + 1>(tables.rest);
  } else {
    prepare_own<WEIGHT>(tables);
  }
}

// Of what is no moment, with number K: behind those of all moments.
template <int K, int AT> LB_FN const auto &own_table(const Tables<AT> &tables) {
  if constexpr (AT < MOMENTS) {
    return own_table<K>(tables.rest);
  } else {
    const OwnTables<K, true> &its = tables;
    return its.own;
  }
}

// Where a lane's codes and their scale are.
template <int K> LB_FN int64_t code_index(const Job &job, const Place &place) {
  if (LINEAR || FLOATS<K>) return (int64_t)((uint64_t)place.at * (uint64_t)BITS<K> / 8u);
  return place.row * ((job.cols * BITS<K> + 7) / 8) + place.col * BITS<K> / 8;
}

template <int K> LB_FN int64_t scale_index(const Job &job, const Place &place) {
  constexpr int64_t block = FormatOf<K>::BLOCK;
  if (LINEAR) return (int64_t)((uint64_t)place.number / (uint64_t)block);  // here rows are whole blocks
  return place.row * ((job.cols + block - 1) / block) + place.col / block;
}

template <int K> constexpr int CODE_EACH = FLOATS<K> ? BITS<K> / 8 : 1;  // bytes that an access cannot split
template <int K> LB_FN int code_count(const Place &place) {              // accesses, of the values that exist
  return FLOATS<K> ? place.count : (place.count * BITS<K> + 7) / 8;
}

// What is stored of a tensor, from a number on. Only where rows do not matter, and for moments and 16-bit parameters.
template <int K> LB_FN void begin_moments([[maybe_unused]] int64_t first, [[maybe_unused]] Job &job) {
  if constexpr (K < MOMENTS) {
    constexpr int64_t block = FormatOf<K>::BLOCK;
    job.codes[K] = (uint8_t *)job.codes[K] + first * BITS<K> / 8;
    if (!FLOATS<K>) job.scale[K] += first / block;
    if (FormatOf<K>::KIND == LB_KIND_LOG) job.base[K] += first / block;
    begin_moments<K + 1>(first, job);
  }
}
LB_FN void begin_with(int64_t first, Job &job, Dynamic &now) {
  job.param = (uint8_t *)job.param + first * SIZE<PARAM>;
  if (MASTER != LB_NONE) job.companion = (uint8_t *)job.companion + first * COMPANION;
  now.grad = (const uint8_t *)now.grad + first * SIZE<GRAD>;
  begin_moments<0>(first, job);
}

// Of the parameter and the moments; a gradient's values beyond a row's end are fetched as 0.
template <int COUNT> LB_FN void clear(int k, float (&x)[COUNT][V]) {
  LB_UNROLL for (int slot = 0; slot < 2 + MOMENTS; ++slot) x[slot][k] = slot == 1 ? x[1][k] : 0.0f;
}

template <int K> LB_FN void take_part(int part, const float (&x)[V], float (&to)[PART<K>]) {
  LB_UNROLL for (int k = 0; k < PART<K>; ++k) to[k] = x[part * PART<K> + k];
}

// Moments as they are stored, from K on, those that are wanted: a bit of WANTED per slot.
template <int K, uint32_t WANTED> struct Fetched {
  static constexpr bool HERE = (WANTED >> (2 + K) & 1u) != 0u;
  CodeWords<K> codes;
  float scale[PARTS<K>], base[PARTS<K>];
  Fetched<K + 1, WANTED> rest;

  LB_FN void fetch(const Job &job, const Place &place, Fetched &to) {
    if constexpr (HERE) {
      to.codes = lb::fetch<CODE_BYTES<K>, CODE_EACH<K>>(job.codes[K], code_index<K>(job, place), code_count<K>(place));
      LB_UNROLL for (int part = 0; part < PARTS<K>; ++part) {
        to.scale[part] = to.base[part] = 1.0f;
        if (!FLOATS<K> && (LINEAR || place.count > part * PART<K>)) {
          const int64_t index = scale_index<K>(job, place) + part;
          to.scale[part] = load_float(job.scale[K] + index);
          if (FormatOf<K>::KIND == LB_KIND_LOG) to.base[part] = load_float(job.base[K] + index);
        }
      }
    }
    Fetched<K + 1, WANTED>::fetch(job, place, to.rest);
  }

  template <int COUNT>
  LB_FN void decode(const Fetched &from, const Tables<K> &tables, float (&x)[COUNT][V]) {
    if constexpr (HERE) {
      using F = FormatOf<K>;
      constexpr int bits = PART<K> * BITS<K>;
      LB_UNROLL for (int part = 0; part < PARTS<K>; ++part) {
        float values[PART<K>];
        Codes<F, PART<K>> own;
        if constexpr (PARTS<K> == 1) own = from.codes;
        else own.word[0] = from.codes.word[part * bits / 32] >> part * bits % 32 & (uint32_t)((1ull << bits) - 1u);
        Codec<F>::template decode<PART<K>>(own, from.scale[part], from.base[part], tables.own, values);
        LB_UNROLL for (int k = 0; k < PART<K>; ++k) x[2 + K][part * PART<K> + k] = values[k];
      }
    }
    Fetched<K + 1, WANTED>::decode(from.rest, tables.rest, x);
  }
};
template <uint32_t WANTED> struct Fetched<MOMENTS, WANTED> {
  LB_FN void fetch(const Job &, const Place &, Fetched &) {}
  template <int COUNT> LB_FN void decode(const Fetched &, const Tables<MOMENTS> &, float (&)[COUNT][V]) {}
};

// The gradient as it is stored; a view may begin anywhere.
LB_FN GradientWords fetch_gradient(const Dynamic &now, const Place &place) {
  const void *at = (const uint8_t *)now.grad + place.at * SIZE<GRAD>;
  LB_GLOBAL(at);
  // Where rows are whole blocks only the address is asked for: it is all that a turn needs to know.
  if (LINEAR && aligned<V * SIZE<GRAD>>(at)) return load_aligned<V * SIZE<GRAD>>(at);
  return load<V * SIZE<GRAD>, SIZE<GRAD>>(at, place.count);
}

LB_FN void widen_gradient(const GradientWords &from, float (&g)[V]) {
  LB_UNROLL for (int k = 0; k < V; ++k) g[k] = value<GRAD>(from.word, k);
}

LB_FN bool finite_gradient(const GradientWords &raw) {
  if (GRAD == LB_FLOAT16) return all_finite<GRAD>(raw);
  if (GRAD == LB_BFLOAT16) {
    uint32_t sums = 0u;
    LB_UNROLL for (int k = 0; k < GradientWords::COUNT; ++k) sums = nothing_plus(sums, raw.word[k]);
    return (sums & 0x7FFF7FFFu) == 0u;
  }
  float sum = 0.0f;  // 0 * x is NaN for infinities and NaNs
  LB_UNROLL for (int k = 0; k < V; ++k) sum = fma(value<GRAD>(raw.word, k), 0.0f, sum);
  return sum == 0.0f;
}

// Fetched and widened at once, for sweeps that store nothing. The gradient: true if it is not finite.
LB_FN bool load_gradient(const Dynamic &now, const Place &place, float (&g)[V]) {
  const GradientWords raw = fetch_gradient(now, place);
  widen_gradient(raw, g);
  return !finite_gradient(raw);
}

template <int K, uint32_t WANTED, int COUNT>
LB_FN void load_moments(const Job &job, const Place &place, const Tables<K> &tables, float (&x)[COUNT][V]) {
  Fetched<K, WANTED> raw;
  Fetched<K, WANTED>::fetch(job, place, raw);
  Fetched<K, WANTED>::decode(raw, tables, x);
}

// Vectors, broadcast over their values.
template <int K, uint32_t WANTED, int COUNT>
LB_FN void load_vectors([[maybe_unused]] const Job &job, [[maybe_unused]] const uint8_t *workspace,
                        [[maybe_unused]] const Place &place, [[maybe_unused]] float (&x)[COUNT][V]) {
  if constexpr (K < VECTORS) {
    constexpr int slot = 2 + MOMENTS + K;
    if constexpr ((WANTED >> slot & 1u) != 0u) {
      const float *values = (const float *)(workspace + job.work_vectors[K]);
      if constexpr (OVER[K] == LB_COLUMN) {
        LB_UNROLL for (int k = 0; k < V; ++k) x[slot][k] = k < place.count ? values[place.col + k] : 0.0f;
      } else {
        const float value = place.count > 0 ? values[OVER[K] == LB_GROUP ? place.row / job.group_rows : place.row] : 0.0f;
        LB_UNROLL for (int k = 0; k < V; ++k) x[slot][k] = value;
      }
    }
    load_vectors<K + 1, WANTED>(job, workspace, place, x);
  }
}

// ---- storing

// A value above 0 must not be encoded as 0.
template <int K> constexpr bool RAISED = !FLOATS<K> && (Moment<K>::LIVE || !FormatOf<K>::SIGNED);

// The bits of the largest magnitude; of numbers that are not below 0, bits are as numbers.
template <bool POSITIVE, int COUNT> LB_FN uint32_t most_of(const float (&x)[COUNT]) {
  uint32_t bits = 0u;
  float most = 0.0f;
  LB_UNROLL for (int k = 0; k < COUNT; ++k) {
    if (POSITIVE) bits = bits_of(x[k]) > bits ? bits_of(x[k]) : bits;
    else most = larger_magnitude(most, x[k]);
  }
  return POSITIVE ? bits : magnitude_bits(most);
}

template <int K> struct Scaled {  // what a lane knows of the blocks that its values of a moment are in
  float source[V];  // what codes are taken from: roots for a format of roots
  float scale[PARTS<K>], inverse[PARTS<K>], base[PARTS<K>];
};

// A moment's scales; true if it cannot be stored. Quick ones are in doubt unless that and much more is well.
template <bool QUICK, int K> LB_FN bool scale_moment(Doubt &doubt, Scaled<K> &to) {
  using F = FormatOf<K>;
  bool bad = false;
  LB_UNROLL for (int part = 0; part < PARTS<K>; ++part) {
    to.scale[part] = to.inverse[part] = to.base[part] = 0.0f;
    if constexpr (!FLOATS<K>) {  // floats can be stored or not as they are narrowed
      float values[PART<K>];
      take_part<K>(part, to.source, values);
      const float absmax = float_of(largest<SCALE_LANES<K>>(most_of<QUICK && !F::SIGNED>(values)));
      if constexpr (QUICK) {
        to.scale[part] = quick_scale<F>(absmax, doubt);
        to.inverse[part] = quick_inverse(to.scale[part]);
      } else {
        to.scale[part] = scale_of<F>(absmax);
        to.inverse[part] = inverse(to.scale[part]);
      }
      if constexpr (F::KIND == LB_KIND_LOG) to.base[part] = log_base<F, PART<K>, SCALE_LANES<K>>(values, to.scale[part]);
      bad |= !QUICK && !finite_bits(magnitude_bits(to.scale[part]));
    }
  }
  return bad;
}

template <bool QUICK, int K> LB_FN CodeWords<K> encode_moment(const Key &key, const Place &place, const Tables<K> &tables,
                                                  const float (&x)[V], const Scaled<K> &scaled) {
  using F = FormatOf<K>;
  constexpr int bits = PART<K> * BITS<K>;
  uint32_t draws[V] = {};
  if (Moment<K>::STOCHASTIC) draw(key, place, draws);
  CodeWords<K> codes = {};
  LB_UNROLL for (int part = 0; part < PARTS<K>; ++part) {
    float values[PART<K>], source[PART<K>];
    uint32_t own_draws[PART<K>];
    take_part<K>(part, F::SQUARE ? scaled.source : x, values);  // a root is above 0 where its square is
    take_part<K>(part, scaled.source, source);
    LB_UNROLL for (int k = 0; k < PART<K>; ++k) own_draws[k] = draws[part * PART<K> + k];
    const auto own = Codec<F>::template encode<PART<K>, Moment<K>::STOCHASTIC, Moment<K>::LIVE, QUICK || GUARDED, QUICK>(
        values, source, scaled.inverse[part], scaled.base[part], own_draws, tables.own);
    if constexpr (PARTS<K> == 1) codes = own;
    else codes.word[part * bits / 32] |= own.word[0] << part * bits % 32;
  }
  return codes;
}

// Codes of values that do not exist are 0.
template <int BYTES> LB_FN void clear_beyond(Words<BYTES> &words, int bits) {
  LB_UNROLL for (int k = 0; k < Words<BYTES>::COUNT; ++k) {
    const int left = bits - 32 * k;
    words.word[k] &= left >= 32 ? 0xFFFFFFFFu : left > 0 ? (1u << left) - 1u : 0u;
  }
}

template <int K>
LB_FN void store_moment(const Job &job, const Place &place, CodeWords<K> codes, const Scaled<K> &scaled) {
  if (!LINEAR && !FLOATS<K>) clear_beyond(codes, place.count * BITS<K>);
  put<CODE_BYTES<K>, CODE_EACH<K>>(job.codes[K], code_index<K>(job, place), codes, code_count<K>(place));
  if constexpr (!FLOATS<K>) {
    if (lane() % SCALE_LANES<K> != 0) return;
    LB_UNROLL for (int part = 0; part < PARTS<K>; ++part) {
      if (!LINEAR && place.count <= part * PART<K>) return;
      const int64_t index = scale_index<K>(job, place) + part;
      store_float(job.scale[K] + index, scaled.scale[part]);
      if (FormatOf<K>::KIND == LB_KIND_LOG) store_float(job.base[K] + index, scaled.base[part]);
    }
  }
}

}  // namespace lb
