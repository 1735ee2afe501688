// The CPU driver under a sanitizer, without Python: runs the calls that tests/test_sanitizers.py has recorded, every
// operand in heap memory of exactly its size, and compares what comes out with what the library made of it.
//
// LB_DRIVER is the driver's source for one instruction set; own.h (written by the test) has the kernels that no header
// of the library has, and a table of all of them. Without -fopenmp the driver starts threads of its own.
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include LB_DRIVER
#include "own.h"

static FILE *file;

[[noreturn]] static void stop(const char *why) {
  fprintf(stderr, "harness: %s\n", why);
  exit(3);
}

static int64_t number() {
  int64_t n;
  if (fread(&n, 8, 1, file) != 1) stop("the recording ends early");
  return n;
}

struct Bytes {  // as long as the harness runs; `shift` bytes off the alignment of the heap
  char *data = nullptr;
  size_t size = 0;
};

static Bytes bytes() {
  Bytes b;
  const int64_t shift = number();
  b.size = (size_t)number();
  if (!b.size) return b;
  b.data = (char *)malloc(b.size + shift) + shift;
  if (fread(b.data, 1, b.size, file) != b.size) stop("the recording ends early");
  return b;
}

template <class T> static T record() {
  T value;
  const Bytes b = bytes();
  if (b.size != sizeof value) stop("a struct has another size");
  memcpy(&value, b.data, sizeof value);
  free(b.data);
  return value;
}

static const Kernel &kernel(const Bytes &name) {
  for (const Kernel &k : KERNELS) {
    if (name.size == strlen(k.name) && !memcmp(name.data, k.name, name.size)) return k;
  }
  stop("a kernel is missing");
}

static std::vector<lb_format> formats;
static std::vector<lb_program> programs;
static std::vector<std::vector<lb_stage>> stages;

static void operand(lb_operand &o, std::vector<Bytes> &written) {
  o.format = &formats[(size_t)number()];
  const Bytes codes = bytes(), scale = bytes(), extra = bytes();
  o.codes = codes.data;
  o.scale = (float *)scale.data;
  o.extra = extra.data;
  written.insert(written.end(), {codes, scale, extra});
}

static void compare(const std::vector<Bytes> &written, int64_t call) {
  for (size_t k = 0; k < written.size(); ++k) {
    const Bytes expected = bytes();
    if (expected.size != written[k].size) stop("an operand has another size");
    for (size_t i = 0; i < expected.size; ++i) {
      if (expected.data[i] == written[k].data[i]) continue;
      fprintf(stderr, "harness: call %lld, operand %zu differs at byte %zu\n", (long long)call, k, i);
      exit(4);
    }
  }
}

static void step(int64_t call, int threads) {
  std::vector<lb_job> jobs((size_t)number());
  std::vector<Bytes> written;
  for (lb_job &job : jobs) {
    job = record<lb_job>();
    job.program = &programs[(size_t)number()];
    const Bytes param = bytes(), grad = bytes(), companion = bytes(), skipped = bytes();
    job.param = param.data;
    job.grad = grad.data;
    job.companion = companion.data;
    job.skipped = (int64_t *)skipped.data;
    written.insert(written.end(), {param, companion, skipped});
    for (int k = 0; k < job.program->moments; ++k) operand(job.moments[k], written);
    if (number()) {
      job.weight.format = &formats[(size_t)number()];
      const Bytes codes = bytes(), scale = bytes(), rest = bytes(), whole = bytes();
      job.weight.codes = codes.data;
      job.weight.scale = (float *)scale.data;
      job.rest = (int8_t *)rest.data;
      job.tensor_scale = (const float *)whole.data;
      written.insert(written.end(), {codes, scale, rest, whole});
    }
    for (int k = 0; k < job.program->vectors; ++k) {
      written.push_back(bytes());
      job.vectors[k] = (float *)written.back().data;
    }
    for (int k = 0; k < job.program->kept; ++k) {
      written.push_back(bytes());
      job.scalars[k] = (float *)written.back().data;
    }
  }
  if (LB_NAME(step)(jobs.data(), (int)jobs.size(), threads)) stop("no memory");
  compare(written, call);
  for (const Bytes &b : written) (void)b;  // kept: LeakSanitizer is off, the process ends soon
}

enum { STEP, ENCODE, DECODE, MEASURE };

static void matrix(int64_t call, int64_t kind, int threads) {
  const int what = (int)number();
  lb_matrix m = record<lb_matrix>();
  const Bytes values = bytes(), inverse = bytes(), out = bytes(), found = bytes();
  m.values = values.data;
  m.inverse = (const float *)inverse.data;
  m.out = out.data;
  const Bytes stored = bytes(), multipliers = bytes(), inverses = bytes();
  m.bytes = (uint8_t *)stored.data;
  m.multipliers = (const float *)multipliers.data;
  m.inverses = (const float *)inverses.data;
  const Bytes outers = bytes(), mask = bytes();
  m.outers = (float *)outers.data;
  m.mask = (uint8_t *)mask.data;
  std::vector<Bytes> written = {out, found, stored, outers, mask};
  operand(m.packed, written);
  const int failed = kind == DECODE   ? LB_NAME(decode)(&m, threads)
                     : kind == ENCODE ? LB_NAME(encode)(&m, threads)
                                      : LB_NAME(measure)(&m, what, found.data, threads);
  if (failed) stop("no memory");
  compare(written, call);
}

int main(int count, char **arguments) {
  if (count != 2 || !(file = fopen(arguments[1], "rb"))) stop("say which recording");
  formats.resize((size_t)number());
  for (lb_format &f : formats) {
    f = record<lb_format>();
    f.cells = (const uint32_t *)bytes().data;
  }
  programs.resize((size_t)number());
  stages.resize(programs.size());
  for (size_t k = 0; k < programs.size(); ++k) {
    programs[k] = record<lb_program>();
    stages[k].resize((size_t)programs[k].count);
    for (lb_stage &stage : stages[k]) {
      stage = record<lb_stage>();
      const Kernel &found = kernel(bytes());
      stage.kernel = found.kernel;
      stage.fused = found.fused;
    }
    programs[k].stages = stages[k].data();
  }
  const int64_t calls = number();
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t kind = number();
    const int threads = (int)number();
    if (kind == STEP) step(call, threads);
    else matrix(call, kind, threads);
  }
  printf("%lld calls\n", (long long)calls);
  return 0;
}
