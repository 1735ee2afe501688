// The constants of a step that follow from a number which only the device knows: a learning rate in a tensor.
//
// What a rule's Python does with that number was noted (lowbit/tape.py); it is done here again, in double precision, an
// IEEE operation each, in the same order. What becomes a constant is rounded to float once, as the host rounds others.
// Cost: one launch in a step; a block for each bucket loads 2 KB, and its first thread does some ten operations.
#include "job.h"

extern "C" __global__ void __launch_bounds__(LB_NODES) follow(const Node *nodes, float *constants) {
  __shared__ double value[LB_NODES];
  __shared__ int32_t op[LB_NODES], first[LB_NODES], second[LB_NODES];
  const int t = (int)threadIdx.x;
  const Node mine = nodes[blockIdx.x * LB_NODES + threadIdx.x];
  op[t] = mine.op, first[t] = mine.first, second[t] = mine.second;
  value[t] = mine.op == LB_FROM_FLOAT32   ? (double)*(const float *)mine.from
             : mine.op == LB_FROM_FLOAT64 ? *(const double *)mine.from
                                          : mine.number;
  __syncthreads();
  if (t != 0) return;
  for (int k = 0; k < LB_NODES; ++k) {
    if (op[k] <= LB_FROM_FLOAT64) continue;
    const double a = value[first[k]];
    if (op[k] == LB_STORE) {
      constants[blockIdx.x * LB_CONSTANTS + (unsigned)second[k]] = (float)a;
      continue;
    }
    const double b = value[second[k]];
    value[k] = op[k] == LB_ADD        ? a + b
               : op[k] == LB_SUBTRACT ? a - b
               : op[k] == LB_MULTIPLY ? a * b
               : op[k] == LB_DIVIDE   ? a / b
                                      : (b < a ? b : a);
  }
}
