// What stands in for the CUDA driver: the entry points that lowbit/gpu/entries.py names, with the driver's own names,
// arguments and errors, on a machine that runs kernels as fibers. A module is the bytes of a library that emulator.py
// has made of a kernel's text. Streams are numbers: all that is asked for is done at once, or noted while a stream is
// captured.
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "fibers.h"

using namespace emulator;

namespace {

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  LAUNCH_OUT_OF_RESOURCES = 701,
  LAUNCH_FAILED = 719,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
};

const std::map<int, std::pair<const char *, const char *>> ERRORS = {
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {LAUNCH_OUT_OF_RESOURCES, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {LAUNCH_FAILED, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {CAPTURE_UNSUPPORTED,
     {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {CAPTURE_INVALIDATED, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error"}},
};

struct Function {
  const Kernel *kernel;
  Shared shared;
  int dynamic_limit;
};
struct Module {
  void *handle;
  std::map<std::string, Function> functions;
};
struct Graph {
  std::vector<std::function<int()>> nodes;
};

std::recursive_mutex one_at_a_time;
thread_local std::vector<void *> contexts;  // 1 is the device's
std::map<void *, Graph *> captures;         // by stream
std::string fault, folder, calls;
unsigned the_schedule;
bool noting;

using Lock = std::lock_guard<std::recursive_mutex>;

void note(const std::string &what, const void *stream) {
  if (noting) calls += what + " on " + std::to_string((uintptr_t)stream) + "\n";
}

int now_or_later(void *stream, std::function<int()> act) {
  const auto found = captures.find(stream);
  if (found == captures.end()) return act();
  found->second->nodes.push_back(std::move(act));
  return SUCCESS;
}

size_t elf_size(const void *image) {
  const Elf64_Ehdr &header = *(const Elf64_Ehdr *)image;
  if (memcmp(header.e_ident, ELFMAG, SELFMAG)) return 0;
  return header.e_shoff + (size_t)header.e_shnum * header.e_shentsize;  // the table of sections is at the end
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// ---- what tests ask of the emulator itself

API void emulator_schedule(unsigned schedule) { the_schedule = schedule; }
API void emulator_folder(const char *path) { folder = path; }  // where libraries are put to be loaded
API void emulator_note_calls(int on) { noting = on, calls.clear(); }
API const char *emulator_calls() { return calls.c_str(); }

// ---- the driver

API int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
API int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
API int cuDeviceGet(int *device, int ordinal) {
  return ordinal ? INVALID_DEVICE : (*device = 0, SUCCESS);
}
API int cuDevicePrimaryCtxRetain(void **context, int device) {
  return device ? INVALID_DEVICE : (*context = (void *)1, SUCCESS);
}
API int cuCtxGetCurrent(void **context) { return *context = contexts.empty() ? nullptr : contexts.back(), SUCCESS; }
API int cuCtxPushCurrent_v2(void *context) { return contexts.push_back(context), SUCCESS; }
API int cuCtxPopCurrent_v2(void **context) {
  if (contexts.empty()) return INVALID_CONTEXT;
  *context = contexts.back();
  return contexts.pop_back(), SUCCESS;
}

#define NEED_CONTEXT \
  if (contexts.empty() || contexts.back() != (void *)1) return INVALID_CONTEXT
#define NEED_NO_CAPTURE \
  if (!captures.empty()) return CAPTURE_UNSUPPORTED

API int cuModuleLoadData(void **module, const void *image) {
  Lock lock(one_at_a_time);
  NEED_CONTEXT;
  NEED_NO_CAPTURE;
  const size_t size = elf_size(image);
  if (!size) return INVALID_IMAGE;
  static int number;
  const std::string path = folder + "/module" + std::to_string(number++) + ".so";
  FILE *file = fopen(path.c_str(), "wb");
  const bool written = file && fwrite(image, 1, size, file) == size;
  if (file) fclose(file);
  void *handle = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!handle) {
    fprintf(stderr, "the emulator cannot load %s: %s\n", path.c_str(), written ? dlerror() : "it cannot be written");
    return INVALID_IMAGE;
  }
  const Kernel *kernels = (const Kernel *)dlsym(handle, "emulator_kernels");
  const Shared *shared = (const Shared *)dlsym(handle, "emulator_shared_memory");
  if (!kernels || !shared) return INVALID_IMAGE;
  Module *made = new Module{handle, {}};
  for (const Kernel *k = kernels; k->name; ++k) made->functions[k->name] = {k, *shared, 48 << 10};
  *module = made;
  return SUCCESS;
}

API int cuModuleGetFunction(void **function, void *module, const char *name) {
  Lock lock(one_at_a_time);
  auto &functions = ((Module *)module)->functions;
  const auto found = functions.find(name);
  if (found == functions.end()) return NOT_FOUND;
  *function = &found->second;
  return SUCCESS;
}

API int cuFuncGetAttribute(int *value, int attribute, void *function) {
  Function &f = *(Function *)function;
  switch (attribute) {
    case 0: return *value = (int)f.kernel->most_threads, SUCCESS;
    case 1: return *value = (int)(f.shared.end - f.shared.begin), SUCCESS;
    case 2:
    case 3: return *value = 0, SUCCESS;
    case 4: return *value = 32, SUCCESS;
    case 8: return *value = f.dynamic_limit, SUCCESS;
    default: return INVALID_VALUE;
  }
}

API int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute != 8 || value < 0 || value > 227 << 10) return INVALID_VALUE;
  ((Function *)function)->dynamic_limit = value;
  return SUCCESS;
}

API int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  const Kernel &kernel = *((Function *)function)->kernel;
  if (index >= kernel.count) return INVALID_VALUE;
  *offset = 0;
  *size = kernel.sizes[index];
  return SUCCESS;
}

API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void *stream, void **arguments, void **extra) {
  Lock lock(one_at_a_time);
  NEED_CONTEXT;
  Function &f = *(Function *)function;
  const uint64_t threads = (uint64_t)bx * by * bz;
  if (!gx || !gy || !gz || gx > 0x7FFFFFFFu || gy > 65535u || gz > 65535u || extra) return INVALID_VALUE;
  if (!threads || threads > 1024 || bz > 64 || shared > (unsigned)f.dynamic_limit) return INVALID_VALUE;
  if (threads > f.kernel->most_threads) return LAUNCH_OUT_OF_RESOURCES;
  note(std::string("launch ") + f.kernel->name, stream);
  std::vector<std::string> values;  // as they are now
  for (size_t k = 0; k < f.kernel->count; ++k) values.emplace_back((char *)arguments[k], f.kernel->sizes[k]);
  return now_or_later(stream, [=]() mutable {
    // Each in memory of its own and of exactly its size.
    std::vector<void *> at;
    for (const std::string &value : values) at.push_back(memcpy(malloc(value.size()), value.data(), value.size()));
    const char *said =
        run({f.kernel, {gx, gy, gz}, {bx, by, bz}, shared, f.shared, at.data()}, the_schedule);
    for (void *value : at) free(value);
    if (said) fault = said;
    return said ? LAUNCH_FAILED : SUCCESS;
  });
}

API int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
  Lock lock(one_at_a_time);
  NEED_CONTEXT;
  note("write", stream);
  return now_or_later(stream, [=] { return memcpy(to, from, bytes), SUCCESS; });
}

API int cuMemAllocHost_v2(void **pointer, size_t bytes) {
  NEED_CONTEXT;
  return *pointer = malloc(bytes), SUCCESS;
}

API int cuEventCreate(void **event, unsigned) {
  NEED_CONTEXT;
  return *event = new int, SUCCESS;
}
API int cuEventRecord(void *, void *stream) { return note("record", stream), SUCCESS; }
API int cuEventQuery(void *) { return SUCCESS; }

// ---- graphs

API int cuStreamIsCapturing(void *stream, int *status) {
  Lock lock(one_at_a_time);
  return *status = captures.count(stream) ? 1 : 0, SUCCESS;
}
API int cuStreamBeginCapture_v2(void *stream, int) {
  Lock lock(one_at_a_time);
  if (!stream || captures.count(stream)) return INVALID_VALUE;
  captures[stream] = new Graph;
  return SUCCESS;
}
API int cuStreamEndCapture(void *stream, void **graph) {
  Lock lock(one_at_a_time);
  const auto found = captures.find(stream);
  if (found == captures.end()) return INVALID_VALUE;
  *graph = found->second;
  captures.erase(found);
  return SUCCESS;
}
API int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
  return *executable = graph, SUCCESS;
}
// A graph bit by bit, so that tests can put others' work in between.
API int emulator_graph_size(void *graph) { return (int)((Graph *)graph)->nodes.size(); }
API int emulator_replay_node(void *graph, int node) {
  Lock lock(one_at_a_time);
  NEED_CONTEXT;
  return ((Graph *)graph)->nodes[(size_t)node]();
}
API int cuGraphLaunch(void *executable, void *) {
  Lock lock(one_at_a_time);
  NEED_CONTEXT;
  for (const auto &node : ((Graph *)executable)->nodes) {
    if (int result = node()) return result;
  }
  return SUCCESS;
}

API int cuGetErrorName(int result, const char **name) {
  const auto found = ERRORS.find(result);
  return found == ERRORS.end() ? (*name = nullptr, INVALID_VALUE) : (*name = found->second.first, SUCCESS);
}
API int cuGetErrorString(int result, const char **text) {
  const auto found = ERRORS.find(result);
  if (found == ERRORS.end()) return *text = nullptr, INVALID_VALUE;
  *text = result == LAUNCH_FAILED && !fault.empty() ? fault.c_str() : found->second.second;
  return SUCCESS;
}
