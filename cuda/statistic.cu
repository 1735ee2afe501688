// What scales are made from where no warp finds them by itself: a number for each piece of a row that lies in one block,
// a piece having 256 values at most. The host adds pieces and rows up and makes scales of the sums (lowbit/scales.py).
//
// A lane has V = 8 neighbouring values; as many lanes as a piece needs, a power of two, are its team. Bytes per value: 4,
// 2 or 2 that are read, and 8 / (values of a piece). Instructions per value: 26 at most, as `lowbit doctor` counts;
// what takes most is to write units, 4 bytes a value.
//
// derive.h and places.h say what spec.h has; and TEAM, the lanes of a piece.
#include "derive.h"

using namespace lb;

// A lane's values become the terms of the sum that is asked for.
LB_FN void terms(int what, const Block &b, const Tables &shared, float (&x)[V]) {
  const uint32_t draws[V] = {};
  float made[V];
  if (what == LB_LOSSES || what == LB_PRODUCTS) {
    const auto codes = Codec<Fmt>::encode<V, false, false, false>(x, x, b.inverse, b.base, draws, shared);
    Codec<Fmt>::decode<V>(codes, what == LB_LOSSES ? b.scale : 1.0f, b.base, shared, made);
  }
  LB_UNROLL for (int i = 0; i < V; ++i) {
    const float unit = x[i] * b.inverse, lost = made[i] - x[i];
    x[i] = what == LB_LOSSES       ? lost * lost
           : what == LB_PRODUCTS   ? unit * made[i]
           : what == LB_MAGNITUDES ? lb::abs(unit)
                                   : unit * unit;
  }
}

// `to`: [rows, scales, pieces]; of units, nothing.
LB_FN void measure_turn(const Matrix &m, Place p, int what, int pieces, double *to, const Tables &shared) {
  const uint32_t number = (uint32_t)(p.col / V) / TEAM, block = number / (uint32_t)pieces;  // in its row
  const int64_t own = (int64_t)block * m.width.by, first = number % (uint32_t)pieces * (int64_t)LB_BLOCK + lane() % TEAM * V;
  const int64_t end = own + m.width.by < m.cols ? own + m.width.by : m.cols;
  p.col = own + first;
  p.count = p.row < m.rows ? Place::held(end - p.col) : 0;
  float x[V];
  read<V>(m.values, p.row * m.cols + p.col, p.count, x);
  if (what == LB_PEAKS) {
    uint32_t most = 0u;
    LB_UNROLL for (int i = 0; i < V; ++i) most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
    most = largest<TEAM>(most);
    if (p.row < m.rows && lane() % TEAM == 0) to[p.row * (m.across.by / TEAM) + number] = (double)float_of(most);
    return;
  }
  const Block b = p.count ? given(m, p.row, p.col) : Block{0.0f, 0.0f, 0.0f, 0u};
  if (what == LB_UNITS) {
    LB_UNROLL for (int i = 0; i < V; ++i) x[i] = in_units(x[i], b.inverse);
    if (p.count) write(m.out, p.row * m.cols + p.col, p.count, x);
    return;
  }
  terms(what, b, shared, x);
  LB_UNROLL for (int i = 0; i < V; ++i) x[i] = i < p.count ? x[i] : 0.0f;
  const float sum = block_sum<TEAM, V>(x);
  if (p.row < m.rows && lane() % TEAM == 0) to[p.row * (m.across.by / TEAM) + number] = (double)sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) measure(const Matrix m, const int what, const int pieces, double *to) {
  __shared__ Tables shared;
  Codec<Fmt>::prepare(shared);
  __syncthreads();
  by_turns(m, [&](Ordinal number, Ordinal) { measure_turn(m, Place::of(m, number), what, pieces, to, shared); });
}
