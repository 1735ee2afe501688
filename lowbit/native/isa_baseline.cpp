// The driver for whatever the compiler's default target is: x86-64 with SSE2, ARM with NEON.
#define LB_SPACE baseline
#include "clone.h"
