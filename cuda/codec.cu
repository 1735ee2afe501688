// Whole matrices to codes and back, and to the values that their codes stand for (what a quantized layer needs), in
// every format: bit for bit what lowbit/rows.py does.
//
// A lane has V = 8 neighbouring values of a row, and the lanes that share a scale are neighbours: one pass over memory,
// in which codes, values and a mask may all be written. Bytes per value: 4, 2 or 2 of what is read, bits / 8 of codes,
// (1 to 8) / block of scales, 4, 2 or 2 of values, 1/8 of a mask. Instructions per value, nearest: 5 to 10 to encode, 3 to
// 5 to decode, 10 more for each of two candidates (an H100 has about 30 in the time that 3 bytes take).
// Two passes take: blocks in rows that do not fit a warp or are no power of two (`scales`, then `encode`), and scales
// below one of the tensor (`largest`, then `encode`). Where a block has several rows, or its scale is found or stored in
// yet other ways, the host makes scales of what statistic.cu has measured (lowbit/scales.py), and they are GIVEN.
//
// derive.h and places.h say what spec.h has; and STOCHASTIC, LIVE: how values are rounded.
#include "derive.h"

using namespace lb;

constexpr bool LONE = SCALED && Fmt::BLOCK % V != 0;  // the values of a lane may differ in scale
static_assert(ROTATION == 0 || AT_ONCE, "what is rotated on the way is encoded in one pass");

LB_FN Block known(const Matrix &m, int64_t row, int64_t col) {
  return GIVEN ? given(m, row, col) : kept(m, row, col);
}

template <bool BOUNDED>
LB_FN Codes<Fmt, V> encode_lane(const float (&x)[V], const Block &b, const uint32_t (&draws)[V], const Tables &shared) {
  float source[V];
  LB_UNROLL for (int i = 0; i < V; ++i) source[i] = source_of(x[i]);
  return Codec<Fmt>::encode<V, STOCHASTIC, LIVE, BOUNDED>(x, source, b.inverse, b.base, draws, shared);
}

LB_FN bool inside(const Matrix &m, float x, const Block &b) { return lb::abs(in_units(x, b.inverse)) <= m.edge; }

// Codes beyond the end of a row are 0; and so are bits.
LB_FN void store_lane(const Matrix &m, const Place &p, Codes<Fmt, V> &codes, uint32_t bits) {
  if (m.codes) {
    if constexpr (SCALED && Fmt::BITS < 8) keep_codes<Fmt, V>(codes, p.count);
    char *to = (char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8;
    store<V * Fmt::BITS / 8>(to, codes, (p.count * Fmt::BITS + 7) / 8);
  }
  if (!BACK && m.mask && p.count) m.mask[p.row * ((m.cols + 7) / 8) + p.col / 8] = (uint8_t)(bits & ((1u << p.count) - 1u));
}

// Values that may differ in scale, one at a time.
LB_FN void encode_each(const Matrix &m, const Place &p, const float (&x)[V], const uint32_t (&draws)[V], const Tables &shared) {
  Codes<Fmt, V> codes = {};
  uint32_t bits = 0u;
  LB_UNROLL for (int i = 0; i < V; ++i) {
    if (i >= p.count) break;
    const Block b = known(m, p.row, p.col + i);
    const float source[1] = {source_of(x[i])}, value[1] = {x[i]};
    const uint32_t drawn[1] = {draws[i]};
    const auto code = Codec<Fmt>::encode<1, STOCHASTIC, LIVE, false>(value, source, b.inverse, b.base, drawn, shared);
    put_code<Fmt, V>(codes, i, code.word[0]);
    bits |= inside(m, x[i], b) ? 1u << i : 0u;
    if (!m.out) continue;
    float out[1];
    Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
    write(m.out, p.row * m.cols + p.col + i, 1, out);
  }
  store_lane(m, p, codes, bits);
}

// Four blocks of threads on a multiprocessor: left to themselves, compilers give udyn8 too few registers.
extern "C" __global__ void __launch_bounds__(THREADS, 4) encode(const Matrix m) {
  __shared__ Tables shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  const Place p = Place::of(m);
  float x[V], outer = 0.0f;
  read_lane(m, p, x);
  uint32_t draws[V] = {};
  if (STOCHASTIC) draw(m, p, draws);
  if constexpr (LONE) return encode_each(m, p, x, draws, shared);
  Block b = {1.0f, 1.0f, 0.0f, 0u};
  bool bounded = false;  // see formats.h
  if constexpr (SCALED && AT_ONCE && PLAIN) {
    b = plain_block(x);
    bounded = !any<32>(!finite_bits(magnitude_bits(b.scale)));
  } else if constexpr (SCALED && AT_ONCE) {
    b = derived_block(m, p, x, shared, outer);
  } else if (p.count) {
    b = known(m, p.row, p.col);
  }
  Codes<Fmt, V> codes = PLAIN && bounded ? encode_lane<true>(x, b, draws, shared) : encode_lane<false>(x, b, draws, shared);
  uint32_t bits = 0u;
  if (!BACK && m.mask) {
    LB_UNROLL for (int i = 0; i < V; ++i) bits |= inside(m, x[i], b) ? 1u << i : 0u;
  }
  if constexpr (RUN > 0) b = corrected(m, p, x, codes, b, outer, shared);
  if (m.out) {
    float out[V];
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, out);
    write(m.out, p.row * m.cols + p.col, p.count, out);
  }
  if (SCALED && AT_ONCE && m.codes && p.count) {
    if (lane() % LANES == 0) keep(m, number_of(m, p.row, p.col), b);
    if (Way::OUTER && lane() % OUTER_LANES == 0) m.outer[outer_number(m, p.row, p.col)] = outer;
    if (WHOLE && p.row == 0 && p.col == 0) m.outer[0] = outer;
  }
  store_lane(m, p, codes, bits);
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(const Matrix m) {
  __shared__ Tables shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  const Place p = Place::of(m);
  if (!p.count) return;
  const char *from = (const char *)m.codes + p.row * m.row_bytes + p.col * Fmt::BITS / 8;
  const auto codes = load<V * Fmt::BITS / 8>(from, (p.count * Fmt::BITS + 7) / 8);
  float x[V] = {};
  if constexpr (LONE) {
    LB_UNROLL for (int i = 0; i < V; ++i) {
      if (i >= p.count) break;
      const Block b = kept(m, p.row, p.col + i);
      const Codes<Fmt, 1> code = {{code_at<Fmt, V>(codes, i)}};
      float out[1];
      Codec<Fmt>::decode<1>(code, b.scale, b.base, shared, out);
      x[i] = out[0];
    }
  } else {
    const Block b = kept(m, p.row, p.col);
    Codec<Fmt>::decode<V>(codes, b.scale, b.base, shared, x);
  }
  write(m.out, p.row * m.cols + p.col, p.count, x);
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

// What an outer scale of the tensor is made of. Blocks that are not finite count not.
extern "C" __global__ void __launch_bounds__(THREADS) largest_of_all(const Matrix m) {
  __shared__ uint32_t room[32];
  if constexpr (WHOLE && AT_ONCE) {
    const Place p = Place::of(m);
    float x[V];
    read_lane(m, p, x);
    const uint32_t most = over_block(bits_of(finite_or_0(wanted_of(m, p, x))), false, room);
    if (threadIdx.x == 0) atomicMax(m.most, most);
  }
}

// One block of values for each block of threads. A base takes 31 more looks at the values, one for each bit.
extern "C" __global__ void __launch_bounds__(THREADS) scales(const Matrix m) {
  __shared__ uint32_t room[32];
  const int64_t width = Fmt::BLOCK ? Fmt::BLOCK : m.width, row = blockIdx.x / m.scales, start = blockIdx.x % m.scales * width;
  const int64_t left = m.cols - start, count = left < width ? left : width, at = row * m.cols + start;
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
                                         : base_of(alive ? float_of(found) : 0.0f, b.scale, 1 << Fmt::BITS % 32);
  }
  if (threadIdx.x == 0) keep(m, blockIdx.x, b);
}
