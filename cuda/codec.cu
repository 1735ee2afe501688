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
// coding.h, derive.h and places.h say what spec.h has.
#include "coding.h"

using namespace lb;

// Four blocks of threads on a multiprocessor: left to themselves, compilers give udyn8 too few registers.
extern "C" __global__ void __launch_bounds__(THREADS, 4) encode(const Matrix m) {
  __shared__ Tables shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  Place next = Place::of(m, first_number(m));
  Raw ahead = Raw::of(m, next);
  by_turns(m, [&](Ordinal, Ordinal then) {
    const Place p = next;
    const Raw raw = ahead;
    next = Place::of(m, then);
    ahead = Raw::of(m, next);
    encode_turn(m, p, raw, shared);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(const Matrix m) {
  __shared__ Tables shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  by_turns(m, [&](Ordinal number, Ordinal) {
    const Place p = Place::of(m, number);
    if (p.count) decode_turn(m, p, shared);
  });
}
