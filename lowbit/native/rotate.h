// Random Hadamard rotations of the values of a row, and back: lowbit/rotation.py, bit for bit.
#pragma once
#include <string.h>

#include "arithmetic.h"
#include "lanes.h"

namespace LB_SPACE {

// Whether columns change their signs, 16 from a multiple of 16 on: bit c % 32 of hash c / 32.
struct Signs {
  bool flips;
  uint32_t first, second;
  explicit Signs(const lb_matrix &m) : flips(m.flips), first(m.signs[0]), second(m.signs[1]) {}
  uint32_t sixteen(int64_t col) const {
    const int64_t word = col / 32;
    const uint32_t bits = lb::hash((uint32_t)word, first, (uint32_t)(word >> 32) * 0x9E3779B1u + second);
    return flips ? bits >> (col % 32) & 0xFFFFu : 0u;
  }
};

#ifdef LB_AVX2

// One step of the rotation inside a register: of the values `APART` from each other, the sum and the difference.
template <int APART> LB_FN Lanes butterfly(Lanes x) {
  constexpr uint32_t SECOND = APART == 1 ? 0xAAAAu : APART == 2 ? 0xCCCCu : APART == 4 ? 0xF0F0u : 0xFF00u;
  return swap_lanes<APART>(x) + flip(x, SECOND);
}

template <int SIZE, bool BACK> static void rotate_run(const float *x, float *to, int64_t col, const Signs &signs, float by) {
  constexpr int EACH = Lanes::COUNT, COUNT = SIZE / EACH;
  Lanes v[COUNT];
  for (int k = 0; k < COUNT; ++k) {
    v[k] = Lanes::load(x + k * EACH);
    if (!BACK) v[k] = flip(v[k], signs.sixteen(col + k * EACH / 16 * 16) >> (k * EACH % 16));
    v[k] = butterfly<4>(butterfly<2>(butterfly<1>(v[k])));
    if (EACH == 16) v[k] = butterfly<8>(v[k]);
  }
  for (int apart = 1; apart < COUNT; apart *= 2) {
    for (int k = 0; k < COUNT; ++k) {
      if (k & apart) continue;
      const Lanes a = v[k], b = v[k + apart];
      v[k] = a + b;
      v[k + apart] = a - b;
    }
  }
  for (int k = 0; k < COUNT; ++k) {
    v[k] = v[k] * by;
    if (BACK) v[k] = flip(v[k], signs.sixteen(col + k * EACH / 16 * 16) >> (k * EACH % 16));
    v[k].store(to + k * EACH);
  }
}

#else

static void flip_signs(float *x, int size, int64_t col, const Signs &signs) {
  for (int i = 0; i < size; i += 16) {
    const uint32_t bits = signs.sixteen(col + i);
    for (int k = 0; k < 16; ++k) x[i + k] = lb::float_of(lb::bits_of(x[i + k]) ^ (bits >> k & 1u) << 31);
  }
}

template <int SIZE, bool BACK> static void rotate_run(const float *x, float *to, int64_t col, const Signs &signs, float by) {
  if (x != to) memcpy(to, x, sizeof(float) * SIZE);
  if (!BACK) flip_signs(to, SIZE, col, signs);
  for (int apart = 1; apart < SIZE; apart *= 2) {
    for (int first = 0; first < SIZE; first += 2 * apart) {
      LB_IVDEP for (int i = first; i < first + apart; ++i) {
        const float a = to[i], b = to[i + apart];
        to[i] = a + b;
        to[i + apart] = a - b;
      }
    }
  }
  LB_IVDEP for (int i = 0; i < SIZE; ++i) to[i] = to[i] * by;
  if (BACK) flip_signs(to, SIZE, col, signs);
}

#endif

template <int SIZE> static void rotate_runs(const float *x, float *to, int64_t n, int64_t col, bool back, const Signs &signs) {
  constexpr float BY = SIZE == 16 ? 0.25f : SIZE == 32 ? 0x1.6a09e6p-3f : SIZE == 64 ? 0.125f : 0x1.6a09e6p-4f;
  for (int64_t i = 0; i < n; i += SIZE) {
    (back ? rotate_run<SIZE, true> : rotate_run<SIZE, false>)(x + i, to + i, col + i, signs, BY);
  }
}

// Rotates n values of a row, whole runs from column `col` on, or takes that back. `to` may be x.
static void rotate(const lb_matrix &m, const float *x, float *to, int64_t n, int64_t col) {
  const Signs signs(m);
  const bool back = m.rotation < 0;
  const int size = back ? -m.rotation : m.rotation;
  (size == 16   ? rotate_runs<16>
   : size == 32 ? rotate_runs<32>
   : size == 64 ? rotate_runs<64>
                : rotate_runs<128>)(x, to, n, col, back, signs);
}

}  // namespace LB_SPACE
