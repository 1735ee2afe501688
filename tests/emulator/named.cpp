// The emulator's driver under NVIDIA's name, for cuda-bindings, which asks a library of that name for its entry points:
// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DRIVER__ENTRY__POINT.html
#include <dlfcn.h>

#include <string>

#define API extern "C" __attribute__((visibility("default")))

// The newest of a name. This library is linked to the emulator's, where it is found.
API int cuGetProcAddress_v2(const char *symbol, void **function, int, unsigned long long, int *status) {
  static void *const self = [] {
    Dl_info info;
    return dladdr((void *)&cuGetProcAddress_v2, &info) ? dlopen(info.dli_fname, RTLD_NOW) : nullptr;
  }();
  *function = dlsym(self, (std::string(symbol) + "_v2").c_str());
  if (!*function) *function = dlsym(self, symbol);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
