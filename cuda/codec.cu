// Whole matrices to codes and back, and to the values that their codes stand for (what a quantized layer needs), in
// every format: bit for bit what lowbit/rows.py does.
//
// A lane has V = 8 neighbouring values of a row, and the lanes that share a scale are neighbours: one pass over memory,
// in which codes, values and a mask may all be written. Bytes per value: 4, 2 or 2 of what is read, bits / 8 of codes,
// (1 to 8) / block of scales, 4, 2 or 2 of values, 1/8 of a mask. Instructions per value on sm_90a, bf16 in and out, where
// rows are one line, as `lowbit doctor` counts: to make codes 18 (int8), 19 (int4), 23 (nf4), 27 (e4m3), 30 to 41 (MX and
// NVFP4), 14 to 23 more at random, 110 with a second candidate or powers; to decode 7 to 11, powers 37. An H100 has 25 in
// the time of 2.5 bytes.
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
