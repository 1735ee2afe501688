// The driver for x86-64-v3: AVX2, FMA (never used unasked: -ffp-contract=off) and F16C.
#if defined(__x86_64__)
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v3")
#define LB_SPACE avx2
#define LB_AVX2
#include "clone.h"
#endif
