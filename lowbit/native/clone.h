// The driver for one instruction set: each isa_*.cpp includes this once, with its own target, namespace and names.
#include <sched.h>

#ifndef LB_BARRIER  // without OpenMP (and under ThreadSanitizer, which does not know libgomp): a barrier of our own
#ifdef _OPENMP
#define LB_BARRIER() _Pragma("omp barrier")
#else
#define LB_BARRIER() meet(step)
#endif
#endif
#include "statistic.h"
#include "step.h"
#include "exports.h"

#include "rules.h"
#include "kernels.h"

#include "threads.h"

// From values to codes, to what the codes stand for, or to both. 1: no memory.
LB_EXPORT int LB_NAME(encode)(const lb_matrix *matrix, int32_t threads) {
  return LB_SPACE::run_matrix(*matrix, LB_SPACE::ENCODE, {}, threads);
}

// From codes to what they stand for, row after row.
LB_EXPORT int LB_NAME(decode)(const lb_matrix *matrix, int32_t threads) {
  return LB_SPACE::run_matrix(*matrix, LB_SPACE::DECODE, {}, threads);
}

// An lb_statistic of each part of a row that lies in one block, to [rows, packed.scales].
LB_EXPORT int LB_NAME(measure)(const lb_matrix *matrix, int32_t what, void *to, int32_t threads) {
  return LB_SPACE::run_matrix(*matrix, LB_SPACE::MEASURE, {what, to}, threads);
}

// 0, or 1 when there is no memory (then nothing has changed).
LB_EXPORT int LB_NAME(step)(const lb_job *jobs, int32_t count, int32_t threads) {
  using namespace LB_SPACE;
  Step step = {};
  step.count = count;
  step.runs = (Run *)calloc(count + 1, sizeof(Run));
  step.first = (int64_t *)calloc(count + 2, sizeof(int64_t));
  bool fine = step.runs && step.first;
  step.longest = 1;
  int64_t values = 0;
  for (int k = 0; fine && k < count; ++k) {
    fine = prepare(step.runs[k], jobs[k], &step.longest);
    values += jobs[k].rows * jobs[k].cols;
  }
  step.threads = threads = worthwhile(threads, values);
  Room *rooms = nullptr;
  double *spaces = nullptr;
  if (fine) {
    if (posix_memalign((void **)&rooms, 64, sizeof(Room) * threads)) rooms = nullptr;
    spaces = (double *)malloc(sizeof(double) * step.longest * threads);
    fine = rooms && spaces;
  }
  if (fine) {
    Crew crew = {&step, rooms, spaces};
    run_threads(crew, threads);
    fine = !step.failed;
  }
  if (fine) {
    for (int k = 0; k < count; ++k) finish(step.runs[k]);
  }
  for (int k = 0; step.runs && k < count; ++k) free(step.runs[k].sums);
  free(step.runs);
  free(step.first);
  free(rooms);
  free(spaces);
  return fine ? 0 : 1;
}
