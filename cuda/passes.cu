// The pass before codec.cu's, for scales that no warp finds while it encodes: of blocks in rows that do not fit a warp or
// are no power of two (`scales`), and of what lies below one scale of the whole tensor (`largest_of_all`).
//
// Bytes per value: 4, 2 or 2 that are read, and what a block is stored with. Instructions per value: 13 to 23, a value at
// a time; 5 for the largest.
//
// derive.h and places.h say what spec.h has.
#include "derive.h"

using namespace lb;

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
LB_FN void largest_over(const Matrix &m, uint32_t (&room)[32]) {
  uint32_t most = 0u;
  by_turns(m, [&](Ordinal number, Ordinal) {
    const Place p = Place::of(m, number);
    float x[V];
    widen(m, p, Raw::of(m, p), x);
    const uint32_t wanted = bits_of(finite_or_0(wanted_of(m, p, x)));
    most = wanted > most ? wanted : most;
  });
  most = over_block(most, false, room);
  if (threadIdx.x == 0) atomicMax(m.most, most);
}

extern "C" __global__ void __launch_bounds__(THREADS) largest_of_all(const Matrix m) {
  __shared__ uint32_t room[32];
  if constexpr (WHOLE && AT_ONCE) largest_over(m, room);
}

// One block of values for each block of threads. A base takes 31 more looks at the values, one for each bit.
extern "C" __global__ void __launch_bounds__(THREADS) scales(const Matrix m) {
  __shared__ uint32_t room[32];
  const int64_t width = Fmt::BLOCK ? Fmt::BLOCK : m.width.by, row = blockIdx.x / m.scales, start = blockIdx.x % m.scales * width;
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
