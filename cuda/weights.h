// A step's parameter as it is kept: floats with their low bits (operands.h), or codes and scales and no float master
// (lowbit/stored.py). Kept<STORED> is what the sweeps call; spec.h says which it is and how scales are stored.
//
// The codes of a stored weight are those of a moment number WEIGHT, so that blocks, lanes and parts are as moments.h
// has them. Other than a moment's, a scale is only renewed if a value of its block would clip.
#pragma once
#include "moments.h"
#include "scaling.h"

namespace lb {

// ---- scales in memory

LB_FN uint32_t stored_scale(const Job &job, int64_t index) {
  LB_GLOBAL(job.param_scale);
  if (SCALED == LB_SCALE_FP32) return ((const uint32_t *)job.param_scale)[index];
  if (SCALED == LB_SCALE_BF16) return ((const uint16_t *)job.param_scale)[index];
  return ((const uint8_t *)job.param_scale)[index];
}

LB_FN void store_scale(const Job &job, int64_t index, uint32_t raw) {
  LB_GLOBAL(job.param_scale);
  if (SCALED == LB_SCALE_FP32) ((uint32_t *)job.param_scale)[index] = raw;
  else if (SCALED == LB_SCALE_BF16) ((uint16_t *)job.param_scale)[index] = (uint16_t)raw;
  else ((uint8_t *)job.param_scale)[index] = (uint8_t)raw;
}

// ---- codes, and what is left of them, to values and back

template <int K> struct StoredWeight {
  using F = FormatOf<K>;
  static constexpr bool INTEGER_CODES = F::KIND == LB_KIND_INTEGER;
  static constexpr int EACH = PART<K>, ALL = PARTS<K>, CODE = BITS<K>;
  static constexpr uint32_t HALF = 1u << (CODE - 1);
  using Rest = Words<V>;

  struct Old {
    CodeWords<K> codes;
    Rest rest;
    uint32_t scale[ALL];
    float whole;  // the tensor's scale
  };
  struct New {
    CodeWords<K> codes;
    Rest rest;
    uint32_t scale[ALL];
    bool renewed[ALL];
  };

  LB_FN Scaling scaling(float whole) {
    return {SCALED, LAST_POWER, LEAST_SCALE, F::TOP, F::MIN_SCALE, F::MAX_SCALE, OUTER, whole};
  }

  LB_FN Old fetch(const Job &job, const Place &place) {
    Old to = {};
    to.codes = lb::fetch<CODE_BYTES<K>, CODE_EACH<K>>(job.param, code_index<K>(job, place), code_count<K>(place));
    if (REST) to.rest = lb::fetch<V, 1>(job.rest, place.at, place.count);
    to.whole = OUTER ? load_float(job.tensor_scale) : 1.0f;
    LB_UNROLL for (int part = 0; part < ALL; ++part) {
      if (place.count > part * EACH) to.scale[part] = stored_scale(job, scale_index<K>(job, place) + part);
    }
    return to;
  }

  LB_FN Codes<F, EACH> codes_of(const CodeWords<K> &codes, int part) {
    Codes<F, EACH> own;
    constexpr int bits = EACH * CODE;
    if constexpr (ALL == 1) own = codes;
    else own.word[0] = codes.word[part * bits / 32] >> part * bits % 32 & (uint32_t)((1ull << bits) - 1u);
    return own;
  }

  LB_FN int32_t rest_of(const Rest &rest, int k) { return (int8_t)(uint8_t)(rest.word[k / 4] >> k % 4 * 8); }

  LB_FN void decode(const Old &from, const Tables<0> &tables, float (&p)[V]) {
    const Scaling way = scaling(from.whole);
    LB_UNROLL for (int part = 0; part < ALL; ++part) {
      const Codes<F, EACH> own = codes_of(from.codes, part);
      const float scale = multiplier_of(way, from.scale[part]);
      float values[EACH];
      if constexpr (REST) {
        LB_UNROLL for (int k = 0; k < EACH; ++k) {
          const int32_t code = (int32_t)(code_at<F, EACH>(own, k) ^ HALF) - (int32_t)HALF;
          values[k] = value_of_steps(code * 256 + rest_of(from.rest, part * EACH + k), scale);
        }
      } else {
        Codec<F>::template decode<EACH>(own, scale, 1.0f, own_table<K>(tables), values);
      }
      LB_UNROLL for (int k = 0; k < EACH; ++k) p[part * EACH + k] = values[k];
    }
  }

  template <bool QUICK>
  LB_FN New encode(const Job &, const Key &key, const Place &place, const Tables<0> &tables, const Old &old,
                   float (&p)[V], bool &finite, Doubt &doubt) {
    constexpr int STEPS = REST ? 256 : 1;
    constexpr float REACH = F::TOP + (REST ? 127.0f / 256.0f : 0.0f);
    float sum = 0.0f;  // 0 * x is NaN for infinities and NaNs
    LB_UNROLL for (int k = 0; k < V; ++k) sum = fma(p[k], 0.0f, sum);
    finite = sum == 0.0f;
    if (QUICK) doubt.otherwise |= !finite;
    uint32_t draws[V] = {};
    if (STOCHASTIC) draw(key, place, draws);
    const Scaling way = scaling(old.whole);
    New to = {};
    LB_UNROLL for (int part = 0; part < ALL; ++part) {
      float values[EACH], most = 0.0f;
      uint32_t own_draws[EACH];
      take_part<K>(part, p, values);
      LB_UNROLL for (int k = 0; k < EACH; ++k) {
        most = larger_magnitude(most, values[k]);
        own_draws[k] = draws[part * EACH + k];
      }
      const float absmax = float_of(largest<SCALE_LANES<K>>(magnitude_bits(most)));
      to.renewed[part] = clips(absmax, REACH, multiplier_of(way, old.scale[part]));
      to.scale[part] = to.renewed[part] ? covering_scale(way, absmax) : old.scale[part];
      const float scale = multiplier_of(way, to.scale[part]), inverse = inverse_of(way, to.scale[part], scale);
      Codes<F, EACH> own;
      if constexpr (INTEGER_CODES) {
        uint32_t c[EACH];
        LB_UNROLL for (int k = 0; k < EACH; ++k) {
          const float limit = limit_of<STEPS>(F::LIMIT);
          const int32_t whole = (int32_t)whole_steps<STEPS>(values[k], scale, inverse, limit, STOCHASTIC, own_draws[k]);
          const int32_t code = REST ? code_of_steps(whole) : whole;
          c[k] = (uint32_t)code & (2u * HALF - 1u);
          const uint32_t left = (uint32_t)(whole - 256 * code) & 0xFFu;
          if (REST) to.rest.word[(part * EACH + k) / 4] |= left << (part * EACH + k) % 4 * 8;
        }
        own = pack<F, EACH>(c);
      } else {  // beyond the top there may be values: a scale of e4m3 ends
        own = Codec<F>::template encode<EACH, STOCHASTIC, false, false>(values, values, inverse, 0.0f, own_draws,
                                                                        own_table<K>(tables));
      }
      if constexpr (ALL == 1) to.codes = own;
      else to.codes.word[part * EACH * CODE / 32] |= own.word[0] << part * EACH * CODE % 32;
    }
    return to;
  }

  LB_FN bool spoils(const Place &place, const Tables<0> &tables, const Old &old, const New &, const float (&p)[V]) {
    float before[V];
    decode(old, tables, before);
    bool found = false;
    LB_UNROLL for (int k = 0; k < V; ++k) {
      const bool was = finite_bits(magnitude_bits(before[k]));
      found |= k < place.count && was && !finite_bits(magnitude_bits(p[k]));
    }
    return found;
  }

  LB_FN void store(const Job &job, const Place &place, New fresh) {
    if (!LINEAR) clear_beyond(fresh.codes, place.count * CODE);
    put<CODE_BYTES<K>, CODE_EACH<K>>(job.param, code_index<K>(job, place), fresh.codes, code_count<K>(place));
    if (REST) put<V, 1>(job.rest, place.at, fresh.rest, place.count);
    if (lane() % SCALE_LANES<K> != 0) return;
    LB_UNROLL for (int part = 0; part < ALL; ++part) {
      if (place.count <= part * EACH) return;
      if (fresh.renewed[part]) store_scale(job, scale_index<K>(job, place) + part, fresh.scale[part]);
    }
  }
};

// ---- either

template <bool CODES> struct Kept : StoredWeight<CODES ? WEIGHT : 0> {};
template <> struct Kept<false> {
  using Old = Parameter;
  using New = Parameter;
  LB_FN Old fetch(const Job &job, const Place &place) { return fetch_parameter(job, place); }
  LB_FN void decode(const Old &from, const Tables<0> &, float (&p)[V]) { widen_parameter(from, p); }
  template <bool QUICK>
  LB_FN New encode(const Job &, const Key &key, const Place &place, const Tables<0> &, const Old &, float (&p)[V],
                   bool &finite, Doubt &doubt) {
    return narrow_parameter<QUICK>(key, place, p, finite, doubt);
  }
  LB_FN bool spoils(const Place &place, const Tables<0> &, const Old &old, const New &fresh, const float (&)[V]) {
    return spoiled(place, old.raw, fresh.raw);
  }
  LB_FN void store(const Job &job, const Place &place, const New &fresh) { store_parameter(job, place, fresh); }
};

// Fetched and decoded at once, for sweeps that store nothing.
LB_FN void load_kept(const Job &job, const Place &place, const Tables<0> &tables, float (&p)[V]) {
  using As = Kept<STORED>;
  As::decode(As::fetch(job, place), tables, p);
}

}  // namespace lb
