// What kernels.h needs around it, here and where a rule outside the package is compiled: how its functions are exported.
#pragma once
#include "abi.h"
#include "words.h"
#ifdef LB_AVX2
#include "fused.h"
#endif

#define LB_PASTE_(a, b) a##b
#define LB_PASTE(a, b) LB_PASTE_(a, b)
#define LB_NAME(name) LB_PASTE(lb_##name##_, LB_SPACE)
#define LB_EXPORT extern "C" __attribute__((visibility("default")))
#define LB_KERNEL(name) LB_EXPORT void LB_NAME(name)
#ifdef LB_AVX2
#define LB_FUSED(name)                                                                          \
  LB_EXPORT lb_fused_kernel LB_NAME(name##_fused)(uint64_t kinds, uint32_t roots) {             \
    return LB_SPACE::choose_fused<name##_lanes>(kinds, roots);                                  \
  }
#endif
