// Whole matrices to codes and back, and straight to the values that their codes stand for (what a quantized layer
// needs), in every format: bit for bit what lowbit/rows.py does.
//
// A lane has V = 8 neighbouring values of a row, and the lanes that share a scale are neighbours: one pass over memory.
// Bytes per value: 4, 2 or 2 of values, bits / 8 of codes, (4 or 8) / block of scales. Instructions per value, nearest:
// 5 to 10 to encode, 3 to 5 to decode (an H100 has about 30 in the time that 3 bytes take).
// Blocks that do not fit a warp, or are no power of two, take two passes: `scales`, then `encode` or `fake`. So do blocks
// of several rows, and scales that are found or stored in another way than absmax / top in fp32: torch makes those
// (lowbit/scales.py), and kernels are GIVEN what to multiply with.
//
// spec.h has the types Fmt (the codes), Values (the matrix) and Out (what `fake` writes), and the constants STOCHASTIC,
// LIVE, GIVEN, and ROTATION: how many values a random Hadamard rotation mixes before they are encoded
// (lowbit/rotation.py), 0 for none.
#include "formats.h"
#include "spec.h"

using namespace lb;

constexpr int V = 8, THREADS = 256;
constexpr bool SCALED = Fmt::KIND != LB_KIND_FLOAT;
constexpr bool LONE = SCALED && Fmt::BLOCK % V != 0;  // the values of a lane may differ in scale
// Whether a warp finds its scales itself; LANES share one.
constexpr bool AT_ONCE = !SCALED || (!GIVEN && Fmt::BLOCK >= V && Fmt::BLOCK <= 32 * V && (Fmt::BLOCK & (Fmt::BLOCK - 1)) == 0);
constexpr int LANES = SCALED && AT_ONCE ? Fmt::BLOCK / V : 1;
constexpr uint32_t MASK = 0xFFFFFFFFu >> (32 - Fmt::BITS);  // of a code
static_assert(ROTATION == 0 || AT_ONCE, "what is rotated on the way is encoded in one pass");

// lowbit/backends/cuda.py states the same layout.
struct Matrix {
  void *values;  // of the dtype of Values; row after row
  void *codes;
  float *scale;
  const float *inverse;  // GIVEN, with `scale`: what to multiply by, and back
  void *extra;           // zero points (uint8) or bases (float)
  int64_t rows, cols, stride;  // stride: of the numbering of elements, for random bits
  int64_t row_bytes, scales;   // of a row's codes; scales of a row
  int64_t across;              // lanes of a row
  int64_t tile, width;         // rows and columns of a block
  uint32_t key[2];             // of random bits
  uint32_t signs[2];           // of the hash that a rotation takes its signs from
};

// The place of a lane. Lanes beyond the last row come along, with nothing to do.
struct Place {
  int64_t row, col;
  int count;  // values, V at most
  LB_FN Place of(const Matrix &m) {
    const int64_t number = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    Place p;
    p.row = m.rows == 1 ? (number >= m.across ? 1 : 0)
            : (number | m.across) >> 32 ? number / m.across
                                        : (uint32_t)number / (uint32_t)m.across;
    p.col = (number - p.row * m.across) * V;
    const int64_t left = p.row < m.rows ? m.cols - p.col : 0;
    p.count = (int)(left < 0 ? 0 : left < V ? left : V);
    return p;
  }
};

// ---- values in memory; those beyond the end of a row are 0

template <int N> LB_FN void read(const void *values, int64_t at, int count, float (&x)[N]) {
  constexpr int SIZE = Values::BITS / 8;
  const Codes<Values, N> raw = load<N * SIZE>((const char *)values + at * SIZE, count * SIZE);
  Codec<Values>::template decode<N>(raw, 1.0f, 0.0f, {}, x);
}

template <class Type, int N> LB_FN void write(void *values, int64_t at, int count, const float (&x)[N]) {
  constexpr int SIZE = Type::BITS / 8;
  const uint32_t draws[N] = {};
  const auto raw = Codec<Type>::template encode<N, false, false, false>(x, x, 1.0f, 0.0f, draws, {});
  store<N * SIZE>((char *)values + at * SIZE, raw, count * SIZE);
}

// ---- what a block is stored with

struct Block {
  float scale, inverse, base;
};

LB_FN float source_of(float x) { return Fmt::SQUARE ? lb::sqrt(x) : x; }

// The largest magnitudes that count for a scale: of affine formats, of what is below 0 and of what is above.
struct Range {
  uint32_t below, above;
  LB_FN Range of(float source) {
    const uint32_t magnitude = magnitude_bits(source);
    if (Fmt::KIND != LB_KIND_AFFINE) return {0u, magnitude};
    const bool odd = source != source;
    return {source < 0.0f || odd ? magnitude : 0u, source > 0.0f || odd ? magnitude : 0u};
  }
  LB_FN Range both(Range a, Range b) {
    return {a.below > b.below ? a.below : b.below, a.above > b.above ? a.above : b.above};
  }
};

// All but the base of powers.
LB_FN Block block_of(Range range) {
  Block b;
  b.base = 0.0f;
  if (Fmt::KIND == LB_KIND_AFFINE) {
    const float low = range.below ? -float_of(range.below) : 0.0f;
    b.scale = affine_scale(low, float_of(range.above), (float)Fmt::LIMIT, Fmt::MIN_SCALE, Fmt::MAX_SCALE, &b.base);
  } else {
    b.scale = scale_of<Fmt>(float_of(range.above));
  }
  b.inverse = inverse(b.scale);
  return b;
}

LB_FN void keep(const Matrix &m, int64_t number, const Block &b) {
  m.scale[number] = b.scale;
  if (Fmt::KIND == LB_KIND_AFFINE) ((uint8_t *)m.extra)[number] = (uint8_t)(int32_t)b.base;
  if (Fmt::KIND == LB_KIND_LOG) ((float *)m.extra)[number] = b.base;
}

// The block of a value.
LB_FN int64_t number_of(const Matrix &m, int64_t row, int64_t col) {
  if constexpr (!GIVEN) return row * m.scales + col / Fmt::BLOCK;
  const int64_t across = m.cols >> 32 ? col / m.width : (int64_t)((uint32_t)col / (uint32_t)m.width);
  return (m.tile == 1 ? row : row / m.tile) * m.scales + across;
}

LB_FN Block kept(const Matrix &m, int64_t number) {
  Block b;
  b.scale = SCALED ? m.scale[number] : 1.0f;
  b.inverse = !GIVEN ? inverse(b.scale) : m.inverse ? m.inverse[number] : 0.0f;
  b.base = Fmt::KIND == LB_KIND_AFFINE ? (float)((const uint8_t *)m.extra)[number]
           : Fmt::KIND == LB_KIND_LOG  ? ((const float *)m.extra)[number]
                                       : 0.0f;
  return b;
}

// ---- the rotation: signs, then sums and differences at growing distances, then the norm

LB_FN void rotate(const Matrix &m, int64_t col, float (&x)[V]) {
  constexpr float ROOT = 0x1.6a09e6p-3f;  // 1 / sqrt(32)
  constexpr float NORM = ROTATION == 16 ? 0.25f : ROTATION == 32 ? ROOT : ROTATION == 64 ? 0.125f : ROOT / 2.0f;
  const uint32_t bits = hash((uint32_t)(col / 32), m.signs[0], m.signs[1]) >> (uint32_t)(col % 32);
  LB_UNROLL for (int i = 0; i < V; ++i) x[i] = float_of(bits_of(x[i]) ^ (bits >> i & 1u) << 31);
  LB_UNROLL for (int apart = 1; apart < V; apart *= 2) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i & apart) continue;
      const float a = x[i], b = x[i | apart];
      x[i] = a + b, x[i | apart] = a - b;
    }
  }
  LB_UNROLL for (int apart = 1; apart < ROTATION / V; apart *= 2) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      const float other = __shfl_xor_sync(WHOLE_WARP, x[i], apart);
      x[i] = lane() & apart ? other - x[i] : x[i] + other;
    }
  }
  LB_UNROLL for (int i = 0; i < V; ++i) x[i] = x[i] * NORM;
}

// ---- codes of a lane

LB_FN void draw(const Matrix &m, const Place &p, uint32_t (&draws)[V]) {
  const uint64_t pair = (uint64_t)(p.row * m.stride + p.col) / 2;  // rows are numbered from even numbers on, or alone
  const uint32_t second = (uint32_t)(pair >> 32) * 0x9E3779B1u + m.key[1];
  const uint32_t odd = (uint32_t)(p.row * m.stride & 1);  // rows of one value
  LB_UNROLL for (int i = 0; i < V; i += 2) {
    const uint32_t both = hash((uint32_t)pair + (uint32_t)i / 2, m.key[0], second);
    draws[i] = i == 0 && odd ? both >> 16 : both & 0xFFFFu;
    draws[i + 1] = both >> 16;
  }
}

template <bool BOUNDED>
LB_FN Codes<Fmt, V> encode_lane(const float (&x)[V], const Block &b, const uint32_t (&draws)[V],
                                const Codec<Fmt>::Shared &shared) {
  float source[V];
  LB_UNROLL for (int i = 0; i < V; ++i) source[i] = source_of(x[i]);
  return Codec<Fmt>::encode<V, STOCHASTIC, LIVE, BOUNDED>(x, source, b.inverse, b.base, draws, shared);
}

LB_FN void store_codes(const Matrix &m, const Place &p, const Codes<Fmt, V> &codes) {
  char *to = (char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8;
  store<V * Fmt::BITS / 8>(to, codes, (p.count * Fmt::BITS + 7) / 8);
}

// ---- kernels

template <bool FAKE> LB_FN void run(const Matrix &m, void *to, Codec<Fmt>::Shared &shared) {
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  const Place p = Place::of(m);
  float x[V];
  read<V>(m.values, p.row * m.cols + p.col, p.count, x);
  if (ROTATION) rotate(m, p.col, x);
  uint32_t draws[V] = {};
  if (STOCHASTIC) draw(m, p, draws);
  if constexpr (LONE) {
    Codes<Fmt, V> codes = {};
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i >= p.count) break;
      const Block b = kept(m, number_of(m, p.row, p.col + i));
      const float source[1] = {source_of(x[i])}, value[1] = {x[i]};
      const uint32_t bits[1] = {draws[i]};
      const auto code = Codec<Fmt>::encode<1, STOCHASTIC, LIVE, false>(value, source, b.inverse, b.base, bits, shared);
      codes.word[i * Fmt::BITS / 32] |= code.word[0] << i * Fmt::BITS % 32;
      if (!FAKE) continue;
      float out[1];
      Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
      write<Out>(to, p.row * m.cols + p.col + i, 1, out);
    }
    if (!FAKE) store_codes(m, p, codes);
    return;
  }
  Block b;
  Codes<Fmt, V> codes;
  const int64_t number = number_of(m, p.row, p.col);
  if constexpr (SCALED && AT_ONCE) {
    Range range = {0u, 0u};
    LB_UNROLL for (int i = 0; i < V; ++i) range = Range::both(range, Range::of(source_of(x[i])));
    range.above = largest<LANES>(range.above);
    if (Fmt::KIND == LB_KIND_AFFINE) range.below = largest<LANES>(range.below);
    b = block_of(range);
    if constexpr (Fmt::KIND == LB_KIND_LOG) b.base = log_base<Fmt, V, LANES>(x, b.scale);
    const bool plain = finite_bits(magnitude_bits(b.scale));
    codes = any<32>(!plain) ? encode_lane<false>(x, b, draws, shared) : encode_lane<true>(x, b, draws, shared);
    if (!FAKE && p.count && lane() % LANES == 0) keep(m, number, b);
  } else {
    b = p.count ? kept(m, number) : Block{1.0f, 1.0f, 0.0f};
    codes = encode_lane<false>(x, b, draws, shared);
  }
  if constexpr (FAKE) {
    float out[V];
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, out);
    write<Out>(to, p.row * m.cols + p.col, p.count, out);
  } else {
    if constexpr (SCALED && Fmt::BITS < 8) {  // codes beyond the end of a row are 0
      LB_UNROLL for (int i = 0; i < V; ++i) {
        if (i >= p.count) codes.word[i * Fmt::BITS / 32] &= ~(MASK << i * Fmt::BITS % 32);
      }
    }
    store_codes(m, p, codes);
  }
}

// Five blocks of threads on a multiprocessor: left to themselves, compilers give udyn8 too few registers.
extern "C" __global__ void __launch_bounds__(THREADS, 5) encode(const Matrix m) {
  __shared__ Codec<Fmt>::Shared shared;
  run<false>(m, nullptr, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS) fake(const Matrix m, void *to) {
  __shared__ Codec<Fmt>::Shared shared;
  run<true>(m, to, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(const Matrix m) {
  __shared__ Codec<Fmt>::Shared shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  const Place p = Place::of(m);
  if (!p.count) return;
  const auto codes = load<V * Fmt::BITS / 8>((const char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8,
                                              (p.count * Fmt::BITS + 7) / 8);
  float x[V] = {};
  if constexpr (LONE) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i >= p.count) break;
      const Block b = kept(m, number_of(m, p.row, p.col + i));
      const Codes<Fmt, 1> code = {{codes.word[i * Fmt::BITS / 32] >> i * Fmt::BITS % 32 & MASK}};
      float out[1];
      Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
      x[i] = out[0];
    }
  } else {
    const Block b = kept(m, number_of(m, p.row, p.col));
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, x);
  }
  write<Values>(m.values, p.row * m.cols + p.col, p.count, x);
}

// The largest, or the sum, over the threads of a block.
LB_FN uint32_t over_block(uint32_t x, bool sum, uint32_t (&room)[32]) {
  x = sum ? total<32>(x) : largest<32>(x);
  __syncthreads();
  if (lane() == 0) room[warp()] = x;
  __syncthreads();
  const uint32_t other = lane() < (int)(blockDim.x / 32u) ? room[lane()] : 0u;
  return sum ? total<32>(other) : largest<32>(other);
}

// One block of values for each block of threads. A base takes 31 more looks at the values, one for each bit.
extern "C" __global__ void __launch_bounds__(THREADS) scales(const Matrix m) {
  __shared__ uint32_t room[32];
  const int64_t row = blockIdx.x / m.scales, start = blockIdx.x % m.scales * Fmt::BLOCK;
  const int64_t left = m.cols - start, count = left < Fmt::BLOCK ? left : Fmt::BLOCK, at = row * m.cols + start;
  Range range = {0u, 0u};
  uint32_t alive = 0, odd = 0;
  float x[1];
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    read<1>(m.values, at + i, 1, x);
    range = Range::both(range, Range::of(source_of(x[0])));
    alive += x[0] > 0.0f ? 1u : 0u;
    odd |= x[0] != x[0] ? 1u : 0u;
  }
  range.above = over_block(range.above, false, room);
  if (Fmt::KIND == LB_KIND_AFFINE) range.below = over_block(range.below, false, room);
  Block b = block_of(range);
  if constexpr (Fmt::KIND == LB_KIND_LOG) {
    odd = over_block(odd, false, room);
    alive = over_block(alive, true, room);
    uint32_t rank = alive ? (alive - 1u) / 10u : 0u, found = 0;
    for (int bit = 30; bit >= 0; --bit) {
      uint32_t below = 0;
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        read<1>(m.values, at + i, 1, x);
        below += x[0] > 0.0f && bits_of(x[0]) >> bit == found << 1 ? 1u : 0u;
      }
      below = over_block(below, true, room);
      const bool one = rank >= below;
      rank -= one ? below : 0u;
      found = found << 1 | (one ? 1u : 0u);
    }
    b.base = b.scale == 0.0f          ? 1.0f
             : odd || b.scale != b.scale ? float_of(0x7FC00000u)
                                         : base_of(alive ? float_of(found) : 0.0f, b.scale, (int)MASK + 1);
  }
  if (threadIdx.x == 0) keep(m, blockIdx.x, b);
}
