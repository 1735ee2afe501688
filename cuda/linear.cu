// A linear layer whose weight is stored in at most 8 bits, and only so: y = x Wᵀ, and dx = dy W for its backward pass.
//
// x, dy, y and dx are bf16 and sums fp32. W is [n, k], with blocks along k; its values are decoded, rounded to bf16 and
// multiplied by the tensor cores. spec.h says how W is stored (Weight), and whether every access is aligned (WHOLE).
//
// Tiles of 128 x 128 results for a block of threads, 32 terms in a step. For its 2^19 products a step loads 8 KB of
// bf16 and 2 KB of 4-bit codes; a thread decodes 32 values, a warp multiplies 64 times 16 x 8 x 16 and reads 8 KB of
// shared memory. A value of W is decoded once for every 128 rows of x; of int4, a thread takes up to 10 instructions for
// each value that it decodes, 13 transposed, the products with it among them. Few rows have kernels of their own: few.cu.
#include "linear.h"

using namespace lb;

extern "C" __global__ void __launch_bounds__(128, 2)
    linear(const uint16_t *x, const uint8_t *codes, const float *scale, const void *extra, uint16_t *y, int m, int n,
           int k) {
  __shared__ Tile left[2], right[2];
  __shared__ Tables tables;
  multiply<Rows<WHOLE>, WHOLE>(Dense{x, m, k}, Packed{codes, scale, extra, n, k}, n, left, right, tables, y);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_transposed(const uint16_t *dy, const uint8_t *codes, const float *scale, const void *extra, uint16_t *dx,
                      int m, int n, int k) {
  __shared__ Tile left[2], right[2];
  __shared__ Tables tables;
  multiply<Columns<WHOLE>, WHOLE>(Dense{dy, m, n}, Packed{codes, scale, extra, n, k}, k, left, right, tables, dx);
}
