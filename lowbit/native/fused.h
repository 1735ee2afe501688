// The loop of a step where it is fast: a block of up to 256 values decoded, updated and drafted while the one before is
// encoded and stored. The encoding fills the time in which square roots and divisions are waited for, and memory is read
// and written evenly, as the processor's look-ahead likes it.
//
// Pointers go from block to block and constants stay where they are: what is done once a block takes a tenth of the time.
//
// For each stage, kernels.h says what it is called with (`adamw_adamw_lanes`); this makes a loop for each way in which
// the operands may be stored: p and g as fp32 or bf16, moments as fp32, bytes, codes of 4 bits or, with AVX-512, of 8.
// Other ways go through fp32 in the first-level cache, where what is read is always LB_FLOATS.
#pragma once
#include "abi.h"
#include "lanes.h"

#ifdef LB_AVX2
namespace LB_SPACE {

constexpr int HALF = LB_BLOCK / 2;  // what may have a scale of its own

constexpr uint64_t kind_at(uint64_t kinds, int k) { return kinds >> (4 * k) & 15; }

// The kinds of a stage's operands: of its p, of its g, and of the moments it writes.
template <class Stage> constexpr uint64_t kinds_of(int p, int g, int moments) {
  uint64_t kinds = 0;
  for (int k = 0; k < Stage::READS; ++k) {
    const char role = Stage::ROLES[k];
    int kind = role == 'p' ? p : role == 'g' ? g : role == 'm' ? moments : LB_FLOATS;
    if (kind == LB_BYTES && Stage::UNSIGNED[k]) kind = LB_ROOT_BYTES;
    if (kind == LB_CODES && Stage::UNSIGNED[k]) kind = LB_RISING_CODES;
    kinds |= (uint64_t)kind << (4 * k);
  }
  return kinds;
}

template <class Stage, uint64_t KINDS> constexpr int kind_written(int w) {
  return Stage::PLACES[w] < Stage::READS ? kind_at(KINDS, Stage::PLACES[w]) : LB_FLOATS;
}

template <class Stage> constexpr uint32_t roots_of(uint64_t kinds) {  // of which writes roots are kept
  uint32_t roots = 0;
  for (int w = 0; w < Stage::WRITES; ++w) {
    const int k = Stage::PLACES[w];
    if (k < Stage::READS && kind_at(kinds, k) == LB_ROOT_BYTES) roots |= 1u << w;
  }
  return roots;
}

constexpr int bits_of(int kind) {
  return kind == LB_FLOATS ? 32 : kind == LB_BF16 ? 16 : kind == LB_NIBBLES ? 4 : 8;
}

// Operand K of a loop, and those after it.
template <class Stage, uint64_t KINDS, int K> struct Reader {
  static constexpr int KIND = kind_at(KINDS, K);
  static constexpr int BITS = bits_of(KIND);
  static constexpr bool SCALED = KIND != LB_FLOATS && KIND != LB_BF16;
  const void *from;
  const float *scales;
  int second;
  Lanes scale;
  Table table;
  const uint16_t *halves;
  mutable Lanes pair[2];
  Reader<Stage, KINDS, K + 1> rest;
  LB_IN Reader(const lb_fused *call)
      : from(call->frame.in[K]), scales(call->scale[K]), second(call->second[K]), rest(call) {
    if (KIND == LB_NIBBLES) table = Table((const float *)call->table[K]);
    halves = (const uint16_t *)call->table[K];
  }
  LB_IN void next(const lb_fused *call, bool row) {  // block
    from = (const char *)from + call->apart[row][K].bytes;
    if (SCALED) scales += call->apart[row][K].scales;
    rest.next(call, row);
  }
  LB_IN void begin_half(int half) {
    if (SCALED) scale = scales[half ? second : 0];
    rest.begin_half(half);
  }
  LB_IN void read(int i, Lanes *x) const {
    __builtin_prefetch((const char *)from + (i + LB_BLOCK) * BITS / 8, 0, 3);  // the next block, most of the time
    x[K] = lanes(i);
    rest.read(i, x);
  }
  LB_IN void begin([[maybe_unused]] int i) const {  // 32 values
    if constexpr (KIND == LB_CODES || KIND == LB_RISING_CODES) Table256::look_up(halves, (const uint8_t *)from + i, pair);
    rest.begin(i);
  }
  LB_IN Lanes lanes(int i) const {
    if (KIND == LB_FLOATS) return Lanes::load((const float *)from + i);
    if (KIND == LB_BF16) return Lanes::widen((const uint16_t *)from + i);
    if (KIND == LB_BYTES) return Lanes::signed_bytes((const uint8_t *)from + i) * scale;
    if (KIND == LB_NIBBLES) return table.look_up((const uint8_t *)from + i / 2) * scale;
    if (KIND == LB_CODES || KIND == LB_RISING_CODES) return pair[i / Lanes::COUNT % 2] * scale;
    const Lanes root = Lanes::bytes((const uint8_t *)from + i) * scale;
    return root * root;
  }
};
template <class Stage, uint64_t KINDS> struct Reader<Stage, KINDS, Stage::READS> {
  LB_IN Reader(const lb_fused *) {}
  LB_IN void next(const lb_fused *, bool) {}
  LB_IN void begin_half(int) {}
  LB_IN void begin(int) const {}
  LB_IN void read(int, Lanes *) const {}
};

// The rung of u, a value in units of its scale: how many thresholds are below it.
static int rung_of(const lb_format &f, float u) {
  int rung = 0;
  for (int half = 128; half; half /= 2) rung += f.thresholds[rung + half - 1] < u ? half : 0;
  return rung;
}

// Write W of a loop, and those after it: from the draft of the block before to where it belongs, 32 values at a time.
template <class Stage, uint64_t KINDS, int W> struct Writer {
  static constexpr int KIND = kind_written<Stage, KINDS>(W);
  static constexpr int GROUPS = 32 / Lanes::COUNT;
  static constexpr bool CODES = KIND == LB_CODES || KIND == LB_RISING_CODES;
  static constexpr bool SCALED = KIND != LB_FLOATS && KIND != LB_BF16;
  const float *draft;
  void *to, *next_to;
  float *scales;
  int second;
  Lanes inverse;
  Ladder ladder;
  Slopes slopes;
  int least;
  const uint16_t *draws;
  Writer<Stage, KINDS, W + 1> rest;
  LB_IN Writer(const lb_fused *call)
      : to(call->waits[W]), next_to(call->to[W]), scales(call->scale_to[W]), second(call->second_to[W]),
        least(call->least[W]), draws(call->draws), rest(call) {
    if (KIND == LB_NIBBLES) ladder = Ladder(*call->format[W]);
    if constexpr (CODES) slopes = Slopes(*call->format[W]);
  }
  LB_IN void begin_half(const lb_fused *call, const float *inverses, int half) {
    draft = call->draft[call->turn][W];
    if (SCALED) inverse = inverses[2 * W + half];
    rest.begin_half(call, inverses, half);
  }
  LB_IN void next(const lb_fused *call, bool row, const float *scale) {  // block: the one just drafted, of these scales
    to = next_to;
    next_to = (char *)next_to + call->apart_to[row][W].bytes;
    if (KIND == LB_BF16 && draws) draws += call->values;
    if (SCALED) {
      scales[0] = scale[2 * W];
      scales[second] = scale[2 * W + 1];
      scales += call->apart_to[row][W].scales;
    }
    rest.next(call, row, scale);
  }
  LB_IN void leave(lb_fused *call) const {
    call->waits[W] = to;
    rest.leave(call);
  }
  LB_IN void write(int i, Lanes *nearest) const {
    Lanes x[GROUPS];
    for (int k = 0; k < GROUPS; ++k) x[k] = Lanes::load(draft + i + k * Lanes::COUNT);
    if (KIND == LB_BYTES) {
      for (int k = 0; k < GROUPS; ++k) x[k] = x[k] * inverse;
      store_bytes((uint8_t *)to + i, x, true);
    } else if (KIND == LB_ROOT_BYTES) {  // what is above 0 keeps code 1
      store_roots((uint8_t *)to + i, x, inverse);
    } else if (KIND == LB_NIBBLES) {
      ladder.store((uint8_t *)to + i / 2, x, inverse, least);
    } else if constexpr (CODES) {
      slopes.template store<KIND == LB_CODES>((uint8_t *)to + i, x, inverse, least, nearest[W]);
    } else {
      for (int k = 0; k < GROUPS; ++k) {
        const int at = i + k * Lanes::COUNT;
        if (KIND == LB_FLOATS) x[k].store((float *)to + at);
        else if (draws) store_bf16((uint16_t *)to + at, x[k], draws + at);
        else store_bf16((uint16_t *)to + at, x[k]);
      }
    }
    rest.write(i, nearest);
  }
  // Arithmetic is not sure of a code: all that went through its lane are looked up.
  void look_again(const lb_fused *call, const float *inverses, int half, int end, const Lanes *nearest) const {
    if constexpr (CODES) {
      for (uint32_t left = slopes.doubtful(nearest[W]); left; left &= left - 1) {
        for (int i = half * HALF + __builtin_ctz(left); i < end; i += Lanes::COUNT) {
          const float x = draft[i];
          const int rung = rung_of(*call->format[W], x * inverses[2 * W + half]), live = x > 0.0f ? least : 0;
          ((uint8_t *)to)[i] = (uint8_t)(rung > live ? rung : live);
        }
      }
    }
    rest.look_again(call, inverses, half, end, nearest);
  }
};
template <class Stage, uint64_t KINDS> struct Writer<Stage, KINDS, Stage::WRITES> {
  LB_IN Writer(const lb_fused *) {}
  LB_IN void begin_half(const lb_fused *, const float *, int) {}
  LB_IN void next(const lb_fused *, bool, const float *) {}
  LB_IN void leave(lb_fused *) const {}
  LB_IN void write(int, Lanes *) const {}
  void look_again(const lb_fused *, const float *, int, int, const Lanes *) const {}
};

// The scales of a draft and their inverses, from the peaks of both halves of each write. False, and no scales, if it
// cannot be stored.
LB_FN bool derive_scales(const lb_fused *call, const Lanes *peaks, float *scales, float *inverses) {
  constexpr int PARTS = 2 * LB_FUSED_WRITES / Lanes::COUNT;
  bool fits = true;  // so much fits whatever is stored, however it is rounded
  for (int k = 0; k < PARTS; ++k) fits &= all_below(peaks[k], 0x7F7F0000u);
  if (!fits) return false;
  for (int k = 0; k < PARTS; ++k) {
    const int at = k * Lanes::COUNT;
    const Lanes either = most_bits(peaks[k], swap_lanes<1>(peaks[k])), most = chosen(call->whole >> at, either, peaks[k]);
    const Lanes held = most / Lanes::load(call->top + at);
    Lanes scale = lb::clip(held, Lanes::load(call->min_scale + at), Lanes::load(call->max_scale + at));
    scale = where(most == 0.0f, 0.0f, scale);
    scale.store(scales + at);
    where(scale > 0.0f, 1.0f / scale, 0.0f).store(inverses + at);
  }
  return true;
}

template <class Stage, uint64_t KINDS> static int64_t fused(lb_fused *call) {
  constexpr int WRITES = Stage::WRITES;
  const int ends[2] = {call->values < HALF ? (int)call->values : HALF, (int)call->values};
  const Stage stage(&call->frame);
  Reader<Stage, KINDS, 0> reader(call);
  Writer<Stage, KINDS, 0> writer(call);
  alignas(64) float scales[2 * LB_FUSED_WRITES], inverses[2 * LB_FUSED_WRITES];
  __builtin_memcpy(inverses, call->inverse, sizeof inverses);
  int64_t at = call->at;
  for (int64_t block = 0; block < call->blocks; ++block) {
    float *const *out = call->draft[!call->turn];
    Finite finite, gradient;
    Lanes found[2 * LB_FUSED_WRITES / Lanes::COUNT];
    for (Lanes &part : found) part = 0.0f;
    for (int half = 0; half < 2; ++half) {
      reader.begin_half(half);
      writer.begin_half(call, inverses, half);
      Peak peaks[WRITES];
      Lanes nearest[WRITES];
      for (int w = 0; w < WRITES; ++w) nearest[w] = 0.5f;
      for (int j = half * HALF; j < ends[half]; j += 32) {
        reader.begin(j);
#pragma GCC unroll 4
        for (int i = j; i < j + 32; i += Lanes::COUNT) {
          Lanes x[Stage::READS + WRITES];
          reader.read(i, x);
          if (Stage::GRADIENT >= 0) gradient.see(x[Stage::GRADIENT]);
          Stage::run(x, stage);
#pragma GCC unroll 12
          for (int w = 0; w < WRITES; ++w) {
            const int kind = kind_written<Stage, KINDS>(w);
            Lanes y = x[Stage::PLACES[w]];
            if (kind == LB_ROOT_BYTES) y = sqrt(y);
            y.store(out[w] + i);
            if (kind == LB_FLOATS) finite.see(y);
            else if (kind == LB_ROOT_BYTES) peaks[w].see_root(y);
            else peaks[w].see(y);
          }
        }
        writer.write(j, nearest);
      }
      writer.look_again(call, inverses, half, ends[half], nearest);
#pragma GCC unroll 12
      for (int w = 0; w < WRITES; ++w) {
        if (kind_written<Stage, KINDS>(w) == LB_FLOATS) continue;
        Lanes &part = found[2 * w / Lanes::COUNT];
        part = chosen(1u << (2 * w + half) % Lanes::COUNT, lb::float_of(peaks[w].of_all()), part);
      }
    }
    if (!finite.all() || !gradient.all() || !derive_scales(call, found, scales, inverses)) return block;
    call->turn = !call->turn;
    const bool row = ++at == call->in_row;
    if (row) at = 0;
    writer.next(call, row, scales);
    reader.next(call, row);
  }
  writer.leave(call);
  __builtin_memcpy(call->inverse, inverses, sizeof inverses);
  return call->blocks;
}

template <class Stage, uint64_t KINDS> LB_FN bool offer(uint64_t kinds, uint32_t roots, lb_fused_kernel &found) {
  if (kinds == KINDS && roots == roots_of<Stage>(KINDS)) found = fused<Stage, KINDS>;
  return kinds == KINDS;
}

template <class Stage, int P, int G> LB_FN bool offer_moments(uint64_t kinds, uint32_t roots, lb_fused_kernel &found) {
  bool known = offer<Stage, kinds_of<Stage>(P, G, LB_FLOATS)>(kinds, roots, found);
  if constexpr (Stage::MOMENTS > 0) {
    known |= offer<Stage, kinds_of<Stage>(P, G, LB_BYTES)>(kinds, roots, found);
    known |= offer<Stage, kinds_of<Stage>(P, G, LB_NIBBLES)>(kinds, roots, found);
    if constexpr (LOOKS_UP_BYTES) known |= offer<Stage, kinds_of<Stage>(P, G, LB_CODES)>(kinds, roots, found);
  }
  return known;
}

// The loop of a stage for operands of these kinds, 4 bits each; null if there is none.
template <class Stage> static lb_fused_kernel choose_fused(uint64_t kinds, uint32_t roots) {
  lb_fused_kernel found = nullptr;
  offer_moments<Stage, LB_FLOATS, LB_FLOATS>(kinds, roots, found) ||
      offer_moments<Stage, LB_BF16, LB_BF16>(kinds, roots, found) ||
      offer_moments<Stage, LB_BF16, LB_FLOATS>(kinds, roots, found);
  return found;
}

}  // namespace LB_SPACE
#endif
