// What the host tells a step's kernels: lowbit/gpu/jobs.py states the same layouts and a test compares every offset.
#pragma once
#include "abi.h"

// One tensor, as long as it keeps its storage. Offsets are in bytes from the step's workspace.
struct Job {
  void *param;
  void *companion;  // the low bits of a 16-bit parameter, or null
  void *codes[LB_MOMENTS];
  float *scale[LB_MOMENTS];
  float *base[LB_MOMENTS];  // of log formats, or null
  float *vectors[LB_ARRAYS];  // persistent ones
  float *scalars[LB_SCALARS];  // persistent ones
  int64_t *skipped;  // blocks, tensors
  const float *constants;  // by number; what a step changes, too
  int64_t rows, cols, group_rows;
  int64_t tensor;  // its number in random bits
  int64_t first;   // of its values in the whole tensor, for random bits; even
  int64_t first_chunk;  // the first of its chunks in the launch
  int64_t first_tile;   // the first of its tiles of columns in a launch over those
  int64_t work_vectors[LB_ARRAYS];  // offsets of this step's copies of vectors, persistent ones first
  int64_t partial;  // offset: a float for each step block (lowbit/gpu/stages.py says how many)
  int64_t sums;     // offset: a double for each strip of rows, each row, or each column of each tile of 512 rows
  // Of a parameter that is codes and scales: `param` points to its codes.
  void *param_scale;  // floats, bf16 numbers or bytes
  int8_t *rest;       // of a split weight
  const float *tensor_scale;  // of all scales
};

// What a step changes about a tensor.
struct Dynamic {
  const void *grad;
  int64_t seed, step;
};

// One tensor while a step runs; in the workspace, one after the other.
struct Run {
  float scalars[LB_SCALARS];
  double total;   // what was measured over the tensor
  uint32_t most;  // the largest magnitude so far, as bits
  uint32_t skip;  // whether the tensor is left as it is
};

// What constants.cu does to find a constant: lowbit/tape.py says which number means what.
enum { LB_NODES = 64 };
enum { LB_LITERAL, LB_FROM_FLOAT32, LB_FROM_FLOAT64, LB_ADD, LB_SUBTRACT, LB_MULTIPLY, LB_DIVIDE, LB_LEAST, LB_STORE };
struct Node {
  double number;     // a literal
  const void *from;  // where a number lies
  int32_t op;
  int32_t first, second;  // numbers of nodes; of LB_STORE, the second is the constant's
};
