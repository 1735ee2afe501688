// The machine that runs an emulated kernel, for driver.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "runtime.h"

namespace emulator {

struct Launch {
  const Kernel *kernel;
  Index grid, block;
  size_t dynamic_bytes;
  Shared shared;
  void **arguments;
};

// Run a grid, block after block. Returns null, or what a thread did wrong.
const char *run(const Launch &launch, unsigned schedule);

}  // namespace emulator
