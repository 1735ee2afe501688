// What crosses from Python into the CPU library: plain structs, pointers and fixed-width integers (a C ABI: no C++
// type, no torch). `lowbit/native/abi.py` states the same layouts for ctypes and a test compares every offset.
#pragma once
#include <stdint.h>

enum { LB_ARRAYS = 12 };  // arrays of one program: p, g, the moments, and vectors over rows, columns or groups
enum { LB_SCALARS = 32 };  // scalars of one program, persistent ones first, then temporaries
enum { LB_CONSTANTS = 48 };
enum { LB_STAGES = 32 };  // of one program
enum { LB_MOMENTS = 6 };  // per-value moments of one program
enum { LB_BLOCK = 256 };  // values of the largest step block

enum lb_dtype { LB_FLOAT32, LB_BFLOAT16, LB_FLOAT16 };
enum lb_kind { LB_KIND_FLOAT, LB_KIND_INTEGER, LB_KIND_CODEBOOK, LB_KIND_AFFINE, LB_KIND_LOG };
enum lb_power { LB_POWER_UP, LB_POWER_FLOOR, LB_POWER_CEIL, LB_POWER_EVEN };  // how a scale becomes one, e8m0
enum lb_master { LB_NONE, LB_SPLIT8, LB_SPLIT16, LB_KAHAN, LB_MASTER32 };
enum lb_stage_kind { LB_MEASURE, LB_FOLD, LB_UPDATE };
enum lb_reduce { LB_MAX, LB_SUM, LB_MEAN };
enum lb_scaled { LB_SCALE_FP32, LB_SCALE_BF16, LB_SCALE_E8M0, LB_SCALE_E4M3 };
enum lb_over { LB_TENSOR, LB_ALL, LB_ROW, LB_COLUMN, LB_GROUP };

// The operands of one call of a printed stage. Arrays are by position: `in[k]` is the stage's k-th array argument (all
// arguments but s, c and x, in the order of the function's signature), `out[k]` its k-th write; an out may be the same
// memory as an in. A measure writes its values to out[0]. Scalars and constants are the program's; the stage's own k-th
// scalar is s[si[k]], its k-th constant c[ci[k]].
//
// An update or measure runs over n values, n a multiple of 16. A fold over the tensor ignores n and the arrays, reads
// x[0] and writes s in place. A fold over rows, columns or groups is like an update over n elements with x as one more
// array.
typedef struct lb_frame {
  const float *in[LB_ARRAYS];
  float *out[LB_ARRAYS];
  const float *x;
  float *s;
  const int32_t *si;
  const float *c;
  const int32_t *ci;
  int64_t n;
  int64_t piece;   // a multiple of 16: what has peaks of its own
  uint32_t roots;  // bit k: write the square root of the k-th write instead of it (what a root format stores)
  // What an update or measure finds on its way, piece after piece, as bits of magnitudes, so that NaN > infinity >
  // finite: the largest of each write (its root where roots says so), then, where it reads g, of g as it was read.
  uint32_t *peaks;
} lb_frame;

typedef void (*lb_kernel)(const lb_frame *);

// How an operand of a fused update is stored: fp32; bf16; signed bytes; bytes of roots; codes of 4 bits; of 8, in the
// order of their values, signed or not.
enum lb_source_kind { LB_FLOATS, LB_BF16, LB_BYTES, LB_ROOT_BYTES, LB_NIBBLES, LB_CODES, LB_RISING_CODES };
enum { LB_FUSED_WRITES = 8 };
typedef struct lb_apart {  // from a block of an operand to the next
  int64_t bytes, scales;
} lb_apart;
// An update on blocks of one length, some from each row. It decodes what it reads, makes a draft of a block, and stores
// the block before, which waits, in the same loop; the last one waits for the next call. A block that cannot be stored,
// because something in it is not finite or might not be once it is rounded, ends the call and does not wait.
typedef struct lb_fused {
  lb_frame frame;  // its `in`: operands of the first block, as they are stored
  int64_t blocks;  // to draft, at least one
  int64_t values;  // of a block: 32 to 256, a multiple of 32
  int64_t in_row, at;  // blocks of a row; of those, the number of the first
  // By read.
  const void *table[LB_ARRAYS];   // of operands with codes: values, or their halves
  const float *scale[LB_ARRAYS];  // of the first block
  int32_t second[LB_ARRAYS];      // from the scale of a block's first half to that of its second: 0 or 1
  lb_apart apart[2][LB_ARRAYS];   // in a row, and from the last of one to the first of the next
  // By write.
  void *to[LB_FUSED_WRITES];  // where the first block is going to be stored
  float *scale_to[LB_FUSED_WRITES];
  int32_t second_to[LB_FUSED_WRITES];
  lb_apart apart_to[2][LB_FUSED_WRITES];
  const struct lb_format *format[LB_FUSED_WRITES];
  int32_t least[LB_FUSED_WRITES];  // of codes: the smallest of what is above 0
  float *draft[2][LB_FUSED_WRITES];
  // By half of each write, one after the other.
  float top[2 * LB_FUSED_WRITES], min_scale[2 * LB_FUSED_WRITES], max_scale[2 * LB_FUSED_WRITES];
  uint32_t whole;             // bit by bit: both halves have one scale
  const uint16_t *draws;      // for p in bf16, from the block that waits on; null: to nearest
  // The block that waits, or a place for what nobody needs.
  int32_t turn;               // its draft
  void *waits[LB_FUSED_WRITES];
  float inverse[2 * LB_FUSED_WRITES];  // of its scales
} lb_fused;
// How many blocks have been drafted: fewer than asked for if the next one cannot be stored. Then nothing waits.
typedef int64_t (*lb_fused_kernel)(lb_fused *);
// The kernel for operands of these kinds, 4 bits each, in the order of the stage's arguments, and these roots, or null.
typedef lb_fused_kernel (*lb_choose_fused)(uint64_t kinds, uint32_t roots);

// How numbers are stored: lowbit/formats.py, with what encoding needs made ready.
typedef struct lb_format {
  int32_t kind, bits, is_signed, square, sign_magnitude, dtype;
  int32_t block;     // values that share a scale
  int32_t limit;     // integer and affine: the largest code in use
  int32_t rungs;     // codebook: entries of the ladder
  int32_t has_zero;  // whether a code means exactly 0
  int32_t least;     // the smallest positive code
  int32_t same;      // codebook: rung k has code k
  float top, min_scale, max_scale;
  float values[256];      // integer and codebook: what each code stands for
  float ladder[256];      // the values encoding chooses from, ascending
  float thresholds[256];  // the rung of u is the count of thresholds below u; unused ones are infinite
  uint8_t codes[256];     // the code of each rung
  // Up to 16 rungs: the thresholds as a search tree, level after level: 1, 2, 4 and 8 of them. The one to look
  // at when rung r of a level has been reached is number (-r mod 8) of its eight.
  float tree[32];
  // The same as 32 bins with at most one threshold each, where there is such a cut. A bin's number is the whole part of
  // u * bin_times + bin_plus (rounded once), or with bin_low the leading 11 bits of u, from bin_low on.
  int32_t bins;               // 0: there are none
  int32_t bin_low;            // 0: by multiplication
  float bin_times, bin_plus;
  float bin_threshold[32];    // infinite for none
  int32_t bin_rung[32];       // of what is not beyond the threshold
  // More: cells by the leading bits of the magnitude, each with at most one threshold. An entry is the rung of the
  // cell's small magnitudes, shifted by 24, and the low bits from which on the next rung begins.
  const uint32_t *cells;
  int32_t cell_shift, cell_half;  // low bits; where the cells of negative numbers begin
  uint32_t cell_low, cell_high;   // magnitudes are held between these
  // Up to 16 rungs: what `tree` is to `thresholds`, of the rungs that may be at or below u with one above; and from
  // each rung to the next.
  float below[32], gaps[16];
  // 8 bits: magnitudes cut into pieces, in each of which the thresholds lie evenly, but for what rounding them to fp32
  // does. The count of those below a magnitude is the whole part of magnitude * slope + offset (rounded once), held at
  // most `piece_most`, unless that is so near a whole number that it takes a comparison. The piece: `piece` of its
  // binade, from 2**-31 on, or the one after that if the magnitude is above `piece_end`.
  int32_t pieces, middle;  // 0: there are none; the rung of 0
  float piece_near;        // how near
  float piece_end[32];
  int32_t piece[32];
  float piece_slope[16], piece_offset[16], piece_most[16];
  uint16_t halves[2][256];  // of `values`: the low halves of all of them, then the high ones
  // Codebooks that are the numbers of a small float, in the order of their codes, ties to even: bits of its mantissa (0:
  // the codebook is none), and the smallest number with all of them.
  int32_t grid_bits;
  float grid_least;
  // Scales that the library derives itself (lowbit/scales.py has the rules): in fp32, or stored in a byte.
  int32_t stored, power;       // an lb_scaled; an lb_power
  int32_t exponent, mantissa;  // of the largest value: its exponent, and the bits below
  int32_t last;                // the largest byte
  int32_t tries;               // how many candidates there are
  int32_t rms;                 // from the root of the mean square, not from the largest magnitude
  int32_t outer;               // values of a row whose scales share an outer one; 0: all, or there is none
  float peak;                  // what the largest value of those becomes in units of the outer scale
  float gain, smallest, candidates[2];  // smallest: of e4m3 scales
} lb_format;

// One per-value moment of one tensor, as rows (lowbit/rows.py).
typedef struct lb_operand {
  const lb_format *format;
  void *codes;       // uint8, or the dtype of a float format
  float *scale;      // [rows, scales]
  void *extra;       // zero points (uint8) or bases (float), like scale
  int64_t row_bytes;  // of codes
  int64_t scales;     // per row
  int32_t stochastic;
  int32_t live;  // not negative, and a value above 0 must not become 0
} lb_operand;

// One stage of a program. Arrays have slots: 0 is p, 1 is g, then the moments, then the vectors.
typedef struct lb_stage {
  lb_kernel kernel;
  lb_choose_fused fused;  // of an update, where there is one for this instruction set
  int32_t kind, reduce, over;
  int32_t reads, writes;
  int32_t reads_g;    // whether g is among them
  int32_t plain;      // a measure's value is the magnitude of g
  int32_t unit;       // number of a scalar: the value is the square of g times this, a power of two; -1: it is not
  int32_t above;      // number of a scalar: an update of g leaves what is not above it as it is; -1: it does not
  uint32_t rootable;  // a bit per write: whether the kernel can write its root
  int32_t read[LB_ARRAYS], write[LB_ARRAYS];
  int32_t s[LB_SCALARS], c[LB_CONSTANTS];
} lb_stage;

typedef struct lb_program {
  const lb_stage *stages;
  int32_t count, guarded;
  int32_t moments;               // slots 2 .. 2 + moments - 1
  int32_t vectors, temporaries;  // slots after that: persistent vectors, then those of one step
  int32_t scalars, kept;         // scalars in all, and how many of them persist
  int32_t over[LB_ARRAYS];       // of each vector
  float initial[LB_SCALARS];     // of the scalars that do not persist
} lb_program;

// One tensor in one step.
typedef struct lb_job {
  const lb_program *program;
  void *param;
  const void *grad;
  void *companion;
  int64_t *skipped;  // blocks, tensors
  int64_t rows, cols, group_rows;
  int32_t param_dtype, grad_dtype, master;
  int32_t stochastic;  // how the parameter is rounded
  int64_t seed, step, tensor;
  int64_t first;  // of its values in the whole tensor, for random bits; even
  lb_operand moments[LB_MOMENTS];
  float *vectors[LB_ARRAYS];
  float *scalars[LB_SCALARS];
  float constants[LB_CONSTANTS];
  lb_operand weight;  // the parameter, if it is codes and scales (lowbit/stored.py); format null: it is `param`
  int8_t *rest;       // of a split weight: [rows, cols]
  // Its scales, as lowbit/scales.py has them: `weight.scale` points to floats, bf16 numbers or bytes.
  const float *tensor_scale;  // what all of them are multiplied with; null: nothing
  int32_t scaled, last;       // how they are stored; the largest code of a power of two
  float headroom, unroom, least_scale;  // times powers of two, and its inverse; the least of e4m3
} lb_job;

// A whole matrix to codes and back, or to the values that its codes stand for.
typedef struct lb_matrix {
  void *values;  // to encode: float32, bfloat16 or float16, [rows, filled]; zeros follow them
  void *out;     // [rows, cols], contiguous: what the codes stand for; or null
  int64_t rows, cols, filled;
  int64_t stride;   // of the numbering of elements, for random bits
  int64_t step;     // values from a row to the next, or from a column to the next
  int32_t columns;  // whether columns lie one after the other in memory, and not rows
  int32_t dtype, out_dtype;
  int32_t stochastic;
  int32_t rotation;  // runs of so many values are rotated before they are encoded; negative: rotated back
  int32_t flips;     // whether the rotation changes signs
  int32_t tile;               // rows that share a scale; where it is not 1, scales are given
  uint32_t key[2], signs[2];  // of random bits, and of the rotation's signs
  // Scales that are given, one for each block (lowbit/scales.py), [ceil(rows / tile), packed.scales]: values are encoded
  // in units of them, x * inverse, and packed.scale is what codes are multiplied by. Null: scales are absmax / top, and
  // are written to packed.scale.
  const float *inverse;
  lb_operand packed;  // codes may be null: values are enough
  // Scales that are stored in bytes, [ceil(rows / tile), packed.scales], and what each of the 256 stands for; the library
  // derives those of blocks in rows. An outer scale that all have in common, or 0; or those that format->outer values
  // share, [rows, ceil(cols / outer)], and then no tables.
  uint8_t *bytes;
  const float *multipliers, *inverses;
  float *outers;
  // Which values in units of their scales are not beyond the edge, a bit each, [rows, ceil(cols / 8)]; or, where values
  // are rotated back, which of them are multiplied by 1, and not by 0.
  uint8_t *mask;
  float outer, edge;
  int32_t run;  // MS-EDEN (lowbit/eden.py): so many values share a correction; random bits are those of blocks
} lb_matrix;

// What can be found out about each part of a row that lies in one block, [rows, packed.scales]: the largest magnitude
// (fp32; NaN > infinity > finite); and sums (float64; blocks.total in Python), in units of the given scales: of squares,
// of magnitudes; of the squares of what rounding to nearest loses; of products with what it makes. Or no number: values
// in units of the given scales are written to `out`.
enum lb_statistic { LB_PEAKS, LB_SQUARES, LB_MAGNITUDES, LB_LOSSES, LB_PRODUCTS, LB_UNITS };
