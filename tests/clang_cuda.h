// What clang needs to read kernels as CUDA without NVIDIA's headers: the words of the language, and of its functions those
// that kernels may use, declared and no more. Included before a kernel's text (tests/test_cuda_build.py).
#pragma once
#define __CUDACC__
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
extern const __device__ uint3 threadIdx, blockIdx;
extern const __device__ dim3 blockDim, gridDim;

__device__ void __syncthreads();
__device__ int __syncthreads_or(int);
__device__ void __syncwarp(unsigned mask = 0xFFFFFFFFu);
__device__ void __threadfence();
__device__ void __trap();
__device__ unsigned __ballot_sync(unsigned, int);
__device__ int __any_sync(unsigned, int);
__device__ unsigned long __cvta_generic_to_shared(const void *);
__device__ unsigned __reduce_max_sync(unsigned, unsigned);
template <class T> __device__ T __shfl_sync(unsigned, T, int, int width = 32);
template <class T> __device__ T __shfl_xor_sync(unsigned, T, int, int width = 32);
template <class T> __device__ T __shfl_down_sync(unsigned, T, unsigned, int width = 32);
template <class T> __device__ T __shfl_up_sync(unsigned, T, unsigned, int width = 32);
template <class T> __device__ T __ldg(const T *);
template <class T> __device__ T atomicAdd(T *, T);
template <class T> __device__ T atomicMax(T *, T);
template <class T> __device__ T atomicOr(T *, T);

__device__ __attribute__((const)) unsigned __isGlobal(const void *);
__device__ __attribute__((const)) unsigned __umulhi(unsigned, unsigned);
__device__ float fmaxf(float, float);
__device__ float fminf(float, float);
__device__ float fabsf(float);
__device__ float __fmaf_rn(float, float, float);
__device__ float __fsqrt_rn(float);
__device__ float __fadd_rd(float, float);
__device__ float __uint_as_float(unsigned);
__device__ unsigned __float_as_uint(float);
__device__ double __longlong_as_double(long long);
__device__ long long __double_as_longlong(double);
__device__ unsigned __byte_perm(unsigned, unsigned, unsigned);
__device__ int __popc(unsigned);
__device__ __attribute__((const)) unsigned __isShared(const void *);
__device__ float __saturatef(float);
