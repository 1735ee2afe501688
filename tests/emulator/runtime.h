// What an emulated kernel and the machine that runs it know of each other. A kernel's text is a library of its own, and
// all of them are run by one machine (fibers.cpp).
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_THREAD__)
#define EMULATOR_THREAD_SANITIZER 1
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS_SANITIZER 1
#endif

#ifdef EMULATOR_THREAD_SANITIZER
#include <sys/mman.h>
#endif

namespace emulator {

struct Index {
  unsigned x, y, z;
};

struct Site {  // where in the kernel's text a thread waits
  const char *file;
  int line;
};

enum Operation { SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, ANY, ALL, MAX, MIN, ADD, AND, OR, XOR, SYNC };

#define EMULATOR_API __attribute__((visibility("default")))

extern EMULATOR_API Index thread_index, block_index, block_size, grid_size;
extern EMULATOR_API unsigned char *dynamic_memory;

// Wait for all threads of the block. Returns how many of them say yes.
EMULATOR_API unsigned barrier(bool yes, Site site);

// Meet the other lanes of the mask, which all call the same; returns what the operation makes of all their values.
EMULATOR_API uint64_t meet(Operation operation, uint32_t mask, uint64_t value, int source, Site site);

// Between blocks: a fence and then an atomic of one thread, an atomic on the same and then a fence of another: these
// order what the one did before and what the other does after.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#release-acquire-patterns
EMULATOR_API void fence();
EMULATOR_API void atomic(void *at);

[[noreturn]] EMULATOR_API void fail(const char *message, Site site);

struct Kernel {
  const char *name;
  void (*call)(void **arguments);
  const size_t *sizes;  // of the arguments
  size_t count;
  size_t most_threads;
};

struct Shared {  // the static shared memory of a library
  char *begin, *end;
  void (*renew)(void *pages, size_t size);  // ThreadSanitizer: forget who has been in this memory
};

#ifdef EMULATOR_THREAD_SANITIZER
// It forgets what is mapped anew, if the call comes from code that it watches, as that of kernels is.
inline void renew(void *pages, size_t size) {
  mmap(pages, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
#else
constexpr void (*renew)(void *, size_t) = nullptr;
#endif

template <size_t... K> struct Numbers {};
template <size_t COUNT, size_t... K> struct Count : Count<COUNT - 1, COUNT - 1, K...> {};
template <size_t... K> struct Count<0, K...> {
  using type = Numbers<K...>;
};

// A kernel as the driver calls it: by the addresses of its arguments.
template <auto FUNCTION> struct Entry;
template <class... A, void (*FUNCTION)(A...)> struct Entry<FUNCTION> {
  static constexpr size_t sizes[] = {sizeof(A)..., 0};
  template <size_t... K> static void pass([[maybe_unused]] void **arguments, Numbers<K...>) {
    FUNCTION(*(A *)arguments[K]...);
  }
  static void call(void **arguments) { pass(arguments, typename Count<sizeof...(A)>::type()); }
  static constexpr Kernel kernel(const char *name, size_t most_threads) {
    return {name, call, sizes, sizeof...(A), most_threads};
  }
};

}  // namespace emulator
