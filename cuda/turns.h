// A turn of the updating sweep (step.cu): which operands a lane fetches, what it makes of them and what is stored then; and
// where its turns are. All that the threads of a block share lies in shared memory.
#pragma once
#include "weights.h"

namespace lb {

// All moments from K on: take what codes are made of, encode, store.
template <int K> struct Stored {
  Scaled<K> scaled;
  CodeWords<K> codes;
  Stored<K + 1> rest;

  // Of value k: its root for a format of roots.
  template <class F> LB_FN void take_sources(int k, const float (&x)[LOADED][V], Doubt &doubt, Stored &to) {
    const float value = x[2 + K][k];
    if (QUICK<F> && RAISED<K>) Doubt::must_be_positive(doubt, value);
    to.scaled.source[k] = FormatOf<K>::SQUARE ? Number<F>::value(sqrt(Number<F>::made(value, doubt))) : value;
    Stored<K + 1>::template take_sources<F>(k, x, doubt, to.rest);
  }

  // True if something of it is not finite: where it is, quick numbers may be in doubt.
  template <class F>
  LB_FN bool encode(const Place &place, const Key *keys, const Tables<K> &tables, float (&x)[LOADED][V], Doubt &doubt,
                    Stored &to) {
    bool bad = scale_moment<QUICK<F>, K>(doubt, to.scaled);
    to.codes = encode_moment<QUICK<F>, K>(keys[1 + K], place, tables, x[2 + K], to.scaled);
    if constexpr (FLOATS<K>) bad = !all_finite<FormatOf<K>::DTYPE>(to.codes);
    return bad | Stored<K + 1>::template encode<F>(place, keys, tables.rest, x, doubt, to.rest);
  }

  LB_FN void clear_sources(int k, Stored &to) {
    to.scaled.source[k] = 0.0f;
    Stored<K + 1>::clear_sources(k, to.rest);
  }

  LB_FN void store(const Job &job, const Place &place, const Stored &from) {
    store_moment<K>(job, place, from.codes, from.scaled);
    Stored<K + 1>::store(job, place, from.rest);
  }
};
template <> struct Stored<MOMENTS> {
  template <class F> LB_FN void take_sources(int, const float (&)[LOADED][V], Doubt &, Stored &) {}
  template <class F>
  LB_FN bool encode(const Place &, const Key *, const Tables<MOMENTS> &, float (&)[LOADED][V], Doubt &, Stored &) {
    return false;
  }
  LB_FN void clear_sources(int, Stored &) {}
  LB_FN void store(const Job &, const Place &, const Stored &) {}
};

// A lane's values of everything as it is stored.
using As = Kept<STORED>;
struct Operands {
  GradientWords gradient;
  As::Old parameter;
  Fetched<0, ~0u> moments;
};
struct Fresh {
  As::New parameter;
  Stored<0> moments;
};

// A lane's places are APART numbers from each other, TURNS of them at most. Where nobody asks for rows or columns they are
// counted from the chunk's first number, in 32 bits.
constexpr bool ANEW = LINEAR && VECTORS == 0 && !STORED;
constexpr uint32_t APART = UPDATERS * V;

// Whether the next turn's operands are fetched while this one's are encoded, for which there must be registers.
constexpr bool PLAIN = PARAM == LB_BFLOAT16 && GRAD == LB_BFLOAT16 && MASTER == LB_NONE;
constexpr bool WIDE = sizeof(Fetched<0, ~0u>) > 64;  // two moments in fp32, or many scales
constexpr bool EARLY = ANEW && PLAIN && !WIDE && MOMENTS < 3;

// For how many blocks of threads at once a multiprocessor's registers are to suffice: for eight, of 64 registers a thread;
// in ragged rows with three moments for seven, where they would spill (docs/decisions/008-cuda.md).
constexpr int TOGETHER = LINEAR || MOMENTS < 3 ? 8 : 7;

LB_FN void fetch_operands(const Job &job, const Dynamic &now, const Place &here, Operands &to) {
  if (here.count == 0) {
    // Else registers would keep another turn's operands until the next are fetched, and `again` would judge by them. Lanes
    // of EARLY kernels that have no values leave the loop.
    static_assert(!EARLY || ANEW, "a lane may leave before the others");
    if (!EARLY) to = {};
    return;
  }
  to.gradient = fetch_gradient(now, here);
  to.parameter = As::fetch(job, here);
  Fetched<0, ~0u>::fetch(job, here, to.moments);
}

LB_FN void decode_operands(const Operands &from, const Tables<0> &tables, float (&x)[LOADED][V]) {
  widen_gradient(from.gradient, x[1]);
  As::decode(from.parameter, tables, x[0]);
  Fetched<0, ~0u>::decode(from.moments, tables, x);
}

LB_FN void store_fresh(const Job &job, const Place &place, const Fresh &from) {
  As::store(job, place, from.parameter);
  Stored<0>::store(job, place, from.moments);
}

// All updates, after the last measurement, on numbers of type F, and what is to be stored then; and between the two,
// when nothing is needed any more of what was fetched, something else. True if something of it is not finite; with quick
// numbers, if plain floats might give anything else.
template <class F, class Between>
LB_FN bool renew(const Job &job, const Operands &from, const Place &here, const Key *keys, const Tables<0> &tables,
                 const float *constants, const float *scalars, float (&x)[LOADED][V], Fresh &to, Between between) {
  using Update = Sweep<MEASURES, F>;
  const auto own = Update::scalars(scalars);
  const As::Old old = from.parameter;
  Doubt doubt;
  bool bad = !finite_gradient(from.gradient), finite;
  decode_operands(from, tables, x);
  beyond(here, [&](int k) { clear(k, x); });  // or a code of 0, of which nothing was asked, might be in doubt
  LB_UNROLL for (int k = 0; k < V; ++k) {
    F values[SLOTS];
    LB_UNROLL for (int slot = 0; slot < LOADED; ++slot) values[slot] = Number<F>::made(x[slot][k], doubt);
    Update::run(values, constants, own);
    LB_UNROLL for (int slot = 0; slot < 2 + MOMENTS; ++slot) x[slot][k] = Number<F>::value(values[slot]);
    Stored<0>::template take_sources<F>(k, x, doubt, to.moments);
  }
  bad |= QUICK<F> && Doubt::any(doubt);  // now, or its registers are taken until the end
  between();
  beyond(here, [&](int k) { clear(k, x), Stored<0>::clear_sources(k, to.moments); });  // a rule may make something of 0
  Doubt later;
  to.parameter = As::template encode<QUICK<F>>(job, keys[0], here, tables, old, x[0], finite, later);
  if (!QUICK<F>) bad |= !finite && As::spoils(here, tables, old, to.parameter, x[0]);
  bad |= Stored<0>::template encode<F>(here, keys, tables, x, later, to.moments);
  return QUICK<F> ? bad | Doubt::any(later) : bad;
}

// What all threads of a block share; in their registers all addresses would be too many.
struct alignas(16) Told {
  Job job;  // ANEW: what is stored begins with the chunk
  Dynamic now;
  int64_t chunk;  // its first number
  uint32_t end;   // of the chunk, counted from there
  uint32_t *marks;  // the chunk's word: in registers its address would be kept for a branch that hardly ever runs
  int64_t length, rows, cols;  // of a row; and how many rows and columns further the next turn is
  float scalars[SCALARS + 1];
  Key keys[1 + MOMENTS];  // of the chunk's random bits
};

LB_FN void tell(const Job &job, const Dynamic &now, const Run &run, int64_t chunk, Told &told) {
  bring(job, told.job);
  bring(now, told.now);
  if (among<SCALARS>((int)threadIdx.x)) told.scalars[threadIdx.x] = run.scalars[threadIdx.x];
  __syncthreads();
  if (DRAWS) stream_keys(told.job, told.now, told.job.first + (chunk - told.job.first_chunk) * CHUNK, told.keys);
  if (threadIdx.x == 0) {
    told.chunk = (chunk - told.job.first_chunk) * CHUNK;
    const int64_t left = told.job.rows * told.job.cols - told.chunk;
    told.end = left < CHUNK ? (uint32_t)left : (uint32_t)CHUNK;
    if (ANEW) begin_with(told.chunk, told.job, told.now);
    if (DIVIDED) {
      told.length = stride_of(told.job);
      told.rows = quotient(APART, told.length);
      told.cols = APART - told.rows * told.length;
    }
  }
  __syncthreads();
}

LB_FN Place place_on(const Told &told, uint32_t at) {
  Place to = {};
  if (ANEW) {
    int whole = V;
    LB_KEEP_NUMBER(whole);  // a compiler that knew it would make predicates, where branches are faster
    to.number = to.at = to.counted = at;
    to.count = at < told.end ? whole : 0;
  } else if (at < CHUNK) {
    to = place(told.job, told.chunk + at);
    to.counted = at;
  }
  return to;
}

// Row and column of a lane's turn. They would take registers until the turn is stored, so shared memory keeps them. A
// division finds the first; the others are found from that before.
struct alignas(16) Spot {
  int64_t row, col;
};
struct Spots {
  Spot own[DIVIDED ? UPDATERS : 1];
};

LB_FN Place place_of(const Told &told, uint32_t at, const Spot &spot) {
  Place to = place_in(told.job, told.chunk + at, spot.row, spot.col);
  to.counted = at;
  return to;
}

LB_FN Place first_place(const Told &told, uint32_t at, Spots &spots) {
  const Place to = place_on(told, at);
  if (DIVIDED) spots.own[threadIdx.x] = {to.row, to.col};
  return to;
}

LB_FN Place next_place(const Told &told, uint32_t at, Spots &spots) {
  if (!DIVIDED) return place_on(told, at);
  Spot &own = spots.own[threadIdx.x];
  own.row += told.rows, own.col += told.cols;
  if (own.col >= told.length) own.row += 1, own.col -= told.length;
  Place to = place_of(told, at, own);
  if (at >= CHUNK) to.count = 0;
  return to;
}

LB_FN Place noted(const Told &told, uint32_t at, const Spots &spots) {
  if (!DIVIDED) return place_on(told, at);
  LB_REREAD();  // else it would be kept in registers after all
  return place_of(told, at, spots.own[threadIdx.x]);
}

LB_FN bool goes_on(int count) { return ANEW ? count > 0 : any<32>(count > 0); }

// Whether quick numbers are of any use: not if they doubt the weights of an average, which are the same for all values.
LB_FN bool worth_trying(const float *constants, const float *scalars) {
  using Update = Sweep<MEASURES, Quick>;
  Doubt doubt;
  Quick values[SLOTS];
  LB_UNROLL for (int slot = 0; slot < SLOTS; ++slot) values[slot] = {1.0f, &doubt};
  Update::run(values, constants, Update::scalars(scalars));
  return !doubt.otherwise;
}

// `marks`: a word for each chunk, of which a warp has a byte, of that a bit for each turn that `update` leaves to `again`.
static_assert(TURNS <= 8 && UPDATERS == 4 * 32, "a chunk's marks are a word");

LB_FN void leave(uint32_t turns, const Told &told) {  // at once: to keep them until the end would take a register
  if (lane() == 0) atomicOr(told.marks, turns << 8 * warp());
}

}  // namespace lb
