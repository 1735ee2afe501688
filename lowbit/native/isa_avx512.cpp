// The driver for x86-64-v4: AVX-512 as far as the compiler finds use for it.
#if defined(__x86_64__)
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define LB_SPACE avx512
#define LB_AVX2
#define LB_AVX512
#include "clone.h"
#endif
