// What the sanitizers must be told about fibers; without them, nothing.
#pragma once
#include <stddef.h>

#ifdef EMULATOR_THREAD_SANITIZER
#define EMULATOR_TSAN(result, name, parameters) extern "C" result name parameters;
#else
#define EMULATOR_TSAN(result, name, parameters) [[maybe_unused]] static result name parameters { return (result)0; }
#endif
#ifdef EMULATOR_ADDRESS_SANITIZER
#define EMULATOR_ASAN(result, name, parameters) extern "C" result name parameters;
#else
#define EMULATOR_ASAN(result, name, parameters) [[maybe_unused]] static result name parameters { return (result)0; }
#endif

// https://github.com/llvm/llvm-project/blob/main/compiler-rt/include/sanitizer/tsan_interface.h
EMULATOR_TSAN(void *, __tsan_get_current_fiber, ())
EMULATOR_TSAN(void *, __tsan_create_fiber, (unsigned))
EMULATOR_TSAN(void, __tsan_destroy_fiber, (void *))
EMULATOR_TSAN(void, __tsan_switch_to_fiber, (void *, unsigned))
EMULATOR_TSAN(void, __tsan_acquire, (void *))
EMULATOR_TSAN(void, __tsan_release, (void *))
// https://github.com/llvm/llvm-project/blob/main/compiler-rt/include/sanitizer/common_interface_defs.h
EMULATOR_ASAN(void, __sanitizer_start_switch_fiber, (void **, const void *, size_t))
EMULATOR_ASAN(void, __sanitizer_finish_switch_fiber, (void *, const void **, size_t *))
EMULATOR_ASAN(void, __asan_unpoison_memory_region, (const volatile void *, size_t))
