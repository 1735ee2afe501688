// Formats, a block at a time: up to 256 values between their stored form and fp32 in the first-level cache.
//
// Formats are data: a switch on the kind outside, a loop without branches inside, which the compiler turns into vector
// code for the instruction set that this text is compiled for. Written by hand is only what it cannot find: looking up
// one of 16 numbers in a register, and bytes to floats (AVX2; docs/decisions/006-native-cpu.md says what that buys).
#pragma once
#include <string.h>

#include "arithmetic.h"
#include "lanes.h"

namespace LB_SPACE {
using namespace lb;

// Values that are worked on together: a few arrays of them fit the first-level cache.
constexpr int SPAN = 4 * LB_BLOCK;

// ---- 16-bit floats to fp32 and back, and whole rows of values

static void widen(const void *from, int dtype, int64_t at, int n, float *to) {
  if (dtype == LB_FLOAT32) {
    memcpy(to, (const float *)from + at, 4 * n);
  } else if (dtype == LB_BFLOAT16) {
    const uint16_t *x = (const uint16_t *)from + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = widen_bf16(x[i]);
  } else {
    const uint16_t *x = (const uint16_t *)from + at;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = widen_fp16(x[i]);
  }
}

static void narrow(const float *x, int dtype, int n, const uint16_t *draws, uint16_t *to) {
  if (dtype == LB_BFLOAT16) {
    if (draws) {
      LB_IVDEP for (int i = 0; i < n; ++i) to[i] = narrow_bf16(x[i], draws[i]);
    } else {
      LB_IVDEP for (int i = 0; i < n; ++i) to[i] = narrow_bf16(x[i]);
    }
  } else if (draws) {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = narrow_fp16(x[i], draws[i]);
  } else {
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = narrow_fp16(x[i]);
  }
}

static uint32_t peak(const float *x, int n) {  // magnitudes as integers: NaN > infinity > finite
  int32_t most = 0;
  LB_IVDEP for (int i = 0; i < n; ++i) {
    const int32_t b = (int32_t)magnitude_bits(x[i]);
    most = b > most ? b : most;
  }
  return (uint32_t)most;
}

static bool finite16(const uint16_t *x, int dtype, int n) {
  const uint16_t infinite = dtype == LB_BFLOAT16 ? 0x7F80 : 0x7C00;
  int16_t most = 0;
  LB_IVDEP for (int i = 0; i < n; ++i) {
    const int16_t b = (int16_t)(x[i] & 0x7FFF);
    most = b > most ? b : most;
  }
  return (uint16_t)most < infinite;
}

// ---- random bits: 16 for each element, one hash for two

struct Draws {
  alignas(64) uint32_t pairs[SPAN / 2 + 16];
  const uint16_t *fill(const uint32_t key[2], int64_t start, int n, int after = 0) {  // that stay; even, as start then is
    const int64_t first = start / 2;
    const int count = (int)((start + n + 1) / 2 - first);
    const uint32_t low = (uint32_t)first;
    // A span never crosses a multiple of 2**33 elements, so its high bits are all the same.
    const uint32_t second = (uint32_t)(first >> 32) * 0x9E3779B1u + key[1];
    uint32_t *to = pairs + after / 2;
    for (int i = 0; i < count; ++i) to[i] = hash(low + (uint32_t)i, key[0], second);
    return (const uint16_t *)pairs + start % 2;
  }
};

static void stream_key(int64_t seed, int64_t step, int64_t tensor, int operand, uint32_t key[2]) {
  const uint32_t words[6] = {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)step, (uint32_t)(step >> 32),
                             (uint32_t)tensor, (uint32_t)operand};
  for (int k = 0; k < 2; ++k) {
    uint32_t mixed = k ? 0x5BF03635u : 0u;
    for (uint32_t word : words) mixed = mix(mixed * 0x9E3779B9u + word + 1u);
    key[k] = mixed;
  }
}

// ---- codes, one per byte, to a little-endian bit stream and back

// From any place on; the bytes are zero where nothing is yet.
static void put_bits(const uint8_t *codes, int bits, int n, uint8_t *row, int64_t start) {
  for (int i = 0; i < n; ++i) {
    const int64_t at = (start + i) * bits;
    const int shifted = codes[i] << at % 8;
    row[at / 8] = (uint8_t)(row[at / 8] | shifted);
    if (shifted > 255) row[at / 8 + 1] = (uint8_t)(row[at / 8 + 1] | shifted >> 8);
  }
}

static void get_bits(const uint8_t *row, int bits, int64_t start, int n, uint8_t *codes) {
  for (int i = 0; i < n; ++i) {
    const int64_t at = (start + i) * bits;
    const int next = at % 8 + bits > 8 ? row[at / 8 + 1] : 0;
    codes[i] = (next << 8 | row[at / 8]) >> at % 8 & ((1 << bits) - 1);
  }
}

// 8 codes are one number of BITS bytes; to a byte each, in three rounds of halving, and back.
template <int BITS> LB_FN uint64_t spread(uint64_t x) {
  constexpr uint64_t FOUR = (1ull << 4 * BITS) - 1, TWO = (1ull << 2 * BITS) - 1, ONE = (1ull << BITS) - 1;
  x = (x & FOUR) | (x & FOUR << 4 * BITS) << (32 - 4 * BITS);
  x = (x & TWO * 0x100000001ull) | (x & (TWO << 2 * BITS) * 0x100000001ull) << (16 - 2 * BITS);
  return (x & ONE * 0x1000100010001ull) | (x & (ONE << BITS) * 0x1000100010001ull) << (8 - BITS);
}

template <int BITS> LB_FN uint64_t gathered(uint64_t x) {
  constexpr uint64_t FOUR = (1ull << 4 * BITS) - 1, TWO = (1ull << 2 * BITS) - 1, ONE = (1ull << BITS) - 1;
  x = (x & ONE * 0x1000100010001ull) | (x >> (8 - BITS) & (ONE << BITS) * 0x1000100010001ull);
  x = (x & TWO * 0x100000001ull) | (x >> (16 - 2 * BITS) & (TWO << 2 * BITS) * 0x100000001ull);
  return (x & FOUR) | (x >> (32 - 4 * BITS) & FOUR << 4 * BITS);
}

template <int BITS> static void unpack_eights(const uint8_t *packed, int n, uint8_t *codes) {
  for (; n >= 8; n -= 8, codes += 8, packed += BITS) {
    uint64_t word = 0;
    memcpy(&word, packed, BITS);
    word = spread<BITS>(word);
    memcpy(codes, &word, 8);
  }
  get_bits(packed, BITS, 0, n, codes);
}

template <int BITS> static void pack_eights(const uint8_t *codes, int n, uint8_t *packed) {
  for (; n >= 8; n -= 8, codes += 8, packed += BITS) {
    uint64_t word;
    memcpy(&word, codes, 8);
    word = gathered<BITS>(word);
    memcpy(packed, &word, BITS);
  }
  memset(packed, 0, (n * BITS + 7) / 8);
  put_bits(codes, BITS, n, packed, 0);
}

static void unpack(const uint8_t *packed, int bits, int n, uint8_t *codes) {
  if (bits == 4) {
    LB_IVDEP for (int i = 0; i < n / 2; ++i) {
      codes[2 * i] = packed[i] & 15;
      codes[2 * i + 1] = packed[i] >> 4;
    }
    if (n % 2) codes[n - 1] = packed[n / 2] & 15;
  } else if (bits == 8) {
    memcpy(codes, packed, n);
  } else {
    (bits == 2 ? unpack_eights<2> : unpack_eights<6>)(packed, n, codes);
  }
}

static void pack(const uint8_t *codes, int bits, int n, uint8_t *packed) {
  if (bits == 4) {
    LB_IVDEP for (int i = 0; i < n / 2; ++i) {
      uint16_t pair;  // little-endian, as every machine that this is built for
      memcpy(&pair, codes + 2 * i, 2);
      packed[i] = (uint8_t)(pair | pair >> 4);
    }
    if (n % 2) packed[n / 2] = codes[n - 1];
  } else if (bits == 8) {
    memcpy(packed, codes, n);
  } else {
    (bits == 2 ? pack_eights<2> : pack_eights<6>)(codes, n, packed);
  }
}

// ---- decoding: codes of one block, one per byte, to values

static void decode_codebook(const lb_format &f, const uint8_t *codes, int n, float scale, float *to) {
  int i = 0;
#ifdef LB_AVX2
  if (f.bits <= 4) {
    const Table table(f.values);
    for (; i + Lanes::COUNT <= n; i += Lanes::COUNT) (table.look_up_bytes(codes + i) * scale).store(to + i);
  }
#endif
  LB_IVDEP for (; i < n; ++i) to[i] = f.values[codes[i]] * scale;
}

static void log_levels(float base, int count, float *levels) {  // by repeated multiplication
  levels[0] = 1.0f;
  for (int k = 1; k < count; ++k) levels[k] = levels[k - 1] * base;
}

// Bytes, signed or not, to numbers. Left to itself the compiler loads 64 bytes and takes them apart, at twice the cost.
template <class Byte, bool SQUARE> static void decode_bytes(const uint8_t *codes, int n, float scale, float *to) {
  int i = 0;
#ifdef LB_AVX2
  for (; i + Lanes::COUNT <= n; i += Lanes::COUNT) {
    const Lanes x = ((Byte)-1 < 0 ? Lanes::signed_bytes(codes + i) : Lanes::bytes(codes + i)) * scale;
    (SQUARE ? x * x : x).store(to + i);
  }
#endif
  for (; i < n; ++i) {
    const float x = (float)(Byte)codes[i] * scale;
    to[i] = SQUARE ? x * x : x;
  }
}

static void decode(const lb_format &f, const uint8_t *codes, int n, float scale, const void *extra, float *to) {
  if (f.kind == LB_KIND_INTEGER && !f.is_signed) {
    (f.square ? decode_bytes<uint8_t, true> : decode_bytes<uint8_t, false>)(codes, n, scale, to);
  } else if (f.kind == LB_KIND_INTEGER && f.bits == 8) {
    decode_bytes<int8_t, false>(codes, n, scale, to);
  } else if (f.kind == LB_KIND_INTEGER) {
    const int sign = 1 << (f.bits - 1);
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = (float)((codes[i] ^ sign) - sign) * scale;
  } else if (f.kind == LB_KIND_CODEBOOK) {
    decode_codebook(f, codes, n, scale, to);
  } else if (f.kind == LB_KIND_AFFINE) {
    const float zero = (float)*(const uint8_t *)extra;
    LB_IVDEP for (int i = 0; i < n; ++i) to[i] = ((float)codes[i] - zero) * scale;
  } else {
    float levels[16];
    log_levels(*(const float *)extra, 1 << f.bits, levels);
    for (int i = 0; i < n; ++i) to[i] = levels[codes[i]] * scale;
  }
}

// Values of one block from its codes as they are stored. `codes` has room for n.
static void decode_packed(const lb_format &f, const uint8_t *packed, int n, float scale, const void *extra, float *to,
                          uint8_t *codes) {
  if (f.bits == 8) return decode(f, packed, n, scale, extra, to);
#ifdef LB_AVX2
  if (f.bits == 4 && (f.kind == LB_KIND_CODEBOOK || (f.kind == LB_KIND_INTEGER && f.is_signed))) {
    const Table table(f.values);
    const int whole = n / 16 * 16;
    for (int i = 0; i < whole; i += Lanes::COUNT) (table.look_up(packed + i / 2) * scale).store(to + i);
    packed += whole / 2, to += whole, n -= whole;
  }
#endif
  unpack(packed, f.bits, n, codes);
  decode(f, codes, n, scale, extra, to);
}

}  // namespace LB_SPACE
