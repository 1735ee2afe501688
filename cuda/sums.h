// Sums have one meaning (lowbit/backends/reference.py): a tree of halves, x[i] + x[i + n/2]. Here lanes share the work.
//
// The tree over a line of n numbers, a power of two, is the tree over T sums, where the t-th is the tree over
// x[t], x[t + T], x[t + 2T] ...: so T threads, T a power of two, each add up a strip and then halve among themselves,
// and neighbouring threads read neighbours. Which T is of no consequence to the bits. What is missing to a power of two
// counts as 0: it must be added, since -0 + 0 is 0.
#pragma once
#include "device.h"

namespace lb {

// How numbers become one: their sum, or of magnitudes the largest, NaN > infinity > finite.
template <bool MAX, class F> LB_FN F combined(F a, F b) {
  if (MAX) return b > a || b != b ? b : a;
  return a + b;
}

LB_FN int64_t power_of_two(int64_t n) {  // the smallest that is not below n
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// ---- fp32, inside a step block

// Lanes hold N values of a step block each: the tree over lanes APART .. 1 apart. Both of a pair need the same sums, so
// each takes over half of them: 4 + 2 + 1 shuffles for the first three of 8 values, not 8 + 8 + 8. The values' own
// upper half then lies in the other lane, FOLDED times over.
template <int APART, int N, int FOLDED, int LANES, int V> LB_FN float halve_lanes(float (&x)[V]) {
  if constexpr (APART > 0 && N > 1) {
    const bool upper = (lane() & APART) != 0;
    LB_UNROLL for (int k = 0; k < N / 2; ++k) {
      const float kept = upper ? x[k + N / 2] : x[k], given = upper ? x[k] : x[k + N / 2];
      x[k] = kept + __shfl_xor_sync(WHOLE_WARP, given, APART);
    }
    return halve_lanes<APART / 2, N / 2, FOLDED + 1, LANES>(x);
  } else if constexpr (APART > 0) {
    x[0] = x[0] + __shfl_xor_sync(WHOLE_WARP, x[0], APART);
    return halve_lanes<APART / 2, N, FOLDED, LANES>(x);
  } else {
    LB_UNROLL for (int level = 1; level <= FOLDED; ++level) {
      LB_UNROLL for (int k = 0; k < N; ++k) x[k] = x[k] + __shfl_xor_sync(WHOLE_WARP, x[k], LANES >> level);
    }
    LB_UNROLL for (int half = N / 2; half > 0; half /= 2) {
      LB_UNROLL for (int k = 0; k < half; ++k) x[k] = x[k] + x[k + half];
    }
    return x[0];
  }
}

// The sum of the V values of each of LANES lanes, for all of them; overwrites x.
template <int LANES, int V> LB_FN float block_sum(float (&x)[V]) { return halve_lanes<LANES / 2, V, 0, LANES>(x); }

// ---- float64, along a line

// Shared memory for the sums of a block of threads: in registers, the partial sums of a thread would be 30.
template <int THREADS> struct Room {
  double line[THREADS];
  double waiting[15][THREADS], inner[3][THREADS];  // partial sums of each thread's strip, and of strips within strips
};

// Numbers t, t + apart, t + 2 apart ... of a line of n by halving; read(i) is number i. Going through the numbers with the
// bits of their places reversed, the tree is a carry chain of the partial sums that wait. BATCH numbers are asked for before
// any has come; a strip has at most BATCH * 2**LEVELS.
template <bool MAX, int BATCH, int LEVELS, int THREADS, class Read>
LB_FN double strip(int64_t n, int64_t t, int64_t apart, double (&waiting)[LEVELS][THREADS], Read read) {
  const int64_t whole = power_of_two(n), length = whole > apart ? whole / apart : 1;
  const int batch = length < BATCH ? (int)length : BATCH;
  const int64_t batches = length / batch, step = batches * apart;
  double last = 0.0;
  int64_t place = 0;  // of the batch, its bits reversed
  LB_ONE_AT_A_TIME for (int64_t number = 0; number < batches; ++number) {
    double x[BATCH];
    LB_UNROLL for (int k = 0; k < BATCH; ++k) {
      const int64_t i = t + place * apart + k * step;
      x[k] = k < batch && i < n ? read(i) : 0.0;
    }
    LB_UNROLL for (int half = BATCH / 2; half > 0; half /= 2) {
      LB_UNROLL for (int k = 0; k < half; ++k) {
        if (half < batch) x[k] = combined<MAX>(x[k], x[k + half]);
      }
    }
    last = x[0];
    int level = 0;
    LB_ONE_AT_A_TIME for (; (number >> level & 1) != 0; ++level) {
      last = combined<MAX>(waiting[level][threadIdx.x], last);
    }
    if (number + 1 < batches) waiting[level][threadIdx.x] = last;
    int64_t bit = batches / 2;
    for (; (place & bit) != 0; bit /= 2) place ^= bit;
    place |= bit;
  }
  return last;
}

// What `lanes` neighbouring lanes, a power of two, have of a line of n, halved; the first of them gets the result.
template <bool MAX> LB_FN double halve_team(double x, int64_t n, int lanes) {
  LB_UNROLL for (int apart = 16; apart > 0; apart /= 2) {
    const double other = __shfl_xor_sync(WHOLE_WARP, x, apart);
    if (apart < lanes && apart < n) x = combined<MAX>(x, other);
  }
  return x;
}

// The whole block of THREADS threads on one line; thread 0 gets the result. `room` may be used again afterwards.
template <bool MAX, int THREADS, class Read> LB_FN double halve_line(int64_t n, Room<THREADS> &room, Read read) {
  const int t = (int)threadIdx.x;
  double (&line)[THREADS] = room.line;
  line[t] = strip<MAX, 8>(n, t, THREADS, room.waiting, read);
  __syncthreads();
  LB_UNROLL for (int apart = THREADS / 2; apart > 0; apart /= 2) {
    if (t < apart && apart < n) line[t] = combined<MAX>(line[t], line[t + apart]);
    __syncthreads();
  }
  const double sum = line[0];
  __syncthreads();
  return sum;
}

}  // namespace lb
