// One optimizer step on the CPU: every tensor of every group in one call and one parallel region.
//
// The work is a few sweeps over all tensors, each cut into chunks that threads take one after the other:
//
//     plan    one thread: folds, up to each tensor's next measurement
//     sweep   all threads: measure every block, or (last) update every block
//     reduce  all threads: each tensor's measurement from its blocks
//
// A span of four blocks, each up to 256 values of a row, is decoded into the first-level cache, run through the printed
// stages, checked, encoded and stored: no moment is fp32 anywhere else.
// What is computed, to the bit, is said by lowbit/backends/reference.py.
#pragma once
#include <stdlib.h>

#include "course.h"

namespace LB_SPACE {

struct Step {
  int64_t arrived, phase;  // of a barrier of our own
  Run *runs;
  int count, threads;
  bool updating, done, failed;
  int64_t *first;   // of each run, its first unit of this sweep; then the end
  int64_t units, next_unit, next_run;
  int64_t longest;  // doubles a thread needs for reductions
};

#ifndef _OPENMP
static void meet(Step &step) {
  const int64_t phase = __atomic_load_n(&step.phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&step.arrived, 1, __ATOMIC_ACQ_REL) == step.threads) {
    __atomic_store_n(&step.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&step.phase, phase + 1, __ATOMIC_RELEASE);
  } else {
    while (__atomic_load_n(&step.phase, __ATOMIC_ACQUIRE) == phase) sched_yield();
  }
}
#endif

static int64_t units_of(const Run &run, bool updating) {
  const lb_program &program = *run.job->program;
  if (updating) return run.skip ? 0 : (run.cut.spans + CHUNK - 1) / CHUNK;
  if (run.waiting || run.next >= program.count) return 0;
  if (program.stages[run.next].over == LB_COLUMN) {
    return (run.job->rows + TILE - 1) / TILE * run.cut.per_row;
  }
  return (run.cut.spans + CHUNK - 1) / CHUNK;
}

static void fold(Run &run, const lb_stage &stage) {
  const lb_program &program = *run.job->program;
  lb_frame f = {};
  f.s = run.scalars;
  f.si = stage.s;
  f.c = run.job->constants;
  f.ci = stage.c;
  f.x = run.x;
  f.n = 16;
  const int first = 2 + program.moments;
  for (int k = 0; k < stage.reads; ++k) f.in[k] = run.vectors[stage.read[k] - first];
  for (int k = 0; k < stage.writes; ++k) f.out[k] = run.vectors[stage.write[k] - first];
  if (stage.writes) f.n = (run.lengths[stage.write[0] - first] + 15) / 16 * 16;
  stage.kernel(&f);
}

// Fold up to the next measurement.
static void advance(Run &run) {
  const lb_program &program = *run.job->program;
  for (; run.next < program.count; ++run.next) {
    const lb_stage &stage = program.stages[run.next];
    if (stage.kind == LB_FOLD) fold(run, stage);
    if (stage.kind == LB_MEASURE) break;
  }
  run.wanted = 0;
  for (int k = 0; k <= run.next && k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind == LB_FOLD || (stage.kind == LB_MEASURE && k != run.next)) continue;
    for (int i = 0; i < stage.reads; ++i) run.wanted |= 1 << stage.read[i];
  }
}

static bool all_finite(const float *x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!finite_bits(magnitude_bits(x[i]))) return false;
  }
  return true;
}

// A measurement over all tensors: those that are left alone do not count.
static void total(Step &step) {
  bool max = false;
  int64_t n = 0;
  double *each = (double *)malloc(sizeof(double) * (step.count + 1));
  if (!each) {
    step.failed = true;
    return;
  }
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    if (!run.waiting) continue;
    max = run.job->program->stages[run.next].reduce == LB_MAX;
    if (run.job->program->guarded && !finite_bits(magnitude_bits((float)run.total))) run.skip = true;
    each[n++] = run.skip ? 0.0 : run.total;
  }
  double value = 0.0;
  if (max) {
    for (int64_t k = 0; k < n; ++k) value = each[k] > value || each[k] != each[k] ? each[k] : value;
  } else {
    value = halve(each, n);
  }
  free(each);
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    if (!run.waiting) continue;
    run.x[0] = (float)value;
    run.waiting = false;
    ++run.next;
    advance(run);
  }
}

// What the next sweep does. One thread.
static void plan(Step &step, bool start) {
  if (step.updating) {
    step.done = true;
    return;
  }
  bool unfinished = false, ready = false;
  for (int k = 0; k < step.count; ++k) {
    Run &run = step.runs[k];
    const lb_program &program = *run.job->program;
    if (!start && !run.waiting && run.next < program.count) {  // has just been measured
      if (program.stages[run.next].over == LB_ALL) run.waiting = true;
      else ++run.next;
    }
    if (!run.waiting) advance(run);
    if (run.next < program.count) (run.waiting ? unfinished : ready) = true;
  }
  if (!ready && unfinished) total(step);
  ready |= unfinished;
  bool left = false;
  for (int k = 0; k < step.count; ++k) left |= step.runs[k].next < step.runs[k].job->program->count;
  step.updating = !left;
  if (step.updating) {
    for (int k = 0; k < step.count; ++k) {
      Run &run = step.runs[k];
      const lb_program &program = *run.job->program;
      bool measures = false;
      for (int i = 0; i < program.count; ++i) measures |= program.stages[i].kind == LB_MEASURE;
      if (program.guarded && measures) {
        run.skip |= !all_finite(run.scalars, program.scalars);
        for (int i = 0; i < program.vectors + program.temporaries; ++i) {
          run.skip |= !all_finite(run.vectors[i], run.lengths[i]);
        }
      }
      run.wanted |= 3 | ((1 << program.moments) - 1) << 2;
    }
  }
  step.units = 0;
  for (int k = 0; k < step.count; ++k) {
    step.first[k] = step.units;
    step.units += units_of(step.runs[k], step.updating);
  }
  step.first[step.count] = step.units;
  step.next_unit = step.next_run = 0;
}

static void sweep(Step &step, Room &room) {
  int at = 0;  // units come in rising order, so the run is found by going on
  int prepared = -1, piece = 0;
  bool drafting = false;
  uint32_t roots[LB_STAGES];
  Drafts drafts;
  for (;;) {
    const int64_t unit = __atomic_fetch_add(&step.next_unit, 1, __ATOMIC_RELAXED);
    if (unit >= step.units) return;
    while (unit >= step.first[at + 1]) ++at;
    Run &run = step.runs[at];
    const int64_t local = unit - step.first[at];
    if (!step.updating && run.job->program->stages[run.next].over == LB_COLUMN) {
      measure_columns(run, local, room);
      continue;
    }
    const int64_t last = (local + 1) * CHUNK < run.cut.spans ? (local + 1) * CHUNK : run.cut.spans;
    if (step.updating && prepared != at) {
      root_masks(run, roots);
      piece = piece_of(run);
      prepared = at;
#ifdef LB_AVX2
      prepare_drafts(run, roots, drafts);
      drafting = drafts.fused;
#endif
    }
    const Span last_span = span(*run.job, run.cut, last - 1);
    const int64_t first = span(*run.job, run.cut, local * CHUNK).block, end = last_span.block + last_span.blocks;
    if (!step.updating && survey_whole(run, first, end)) continue;
    int64_t lost = 0;
    if (step.updating && drafting) {
      lost = update_blocks(drafts, first, end, piece, roots, room);
      if (lost) __atomic_fetch_add(&run.lost, lost, __ATOMIC_RELAXED);
      continue;
    }
    for (int64_t k = local * CHUNK; k < last; ++k) {
      const Span s = span(*run.job, run.cut, k);
      const Span ahead = span(*run.job, run.cut, k + 1 < run.cut.spans ? k + 1 : k);
      if (step.updating) lost += update_span(run, s, ahead, piece, roots, room);
      else if (run.next == run.foreseen && settle(run, s)) continue;
      else measure_span(run, s, &ahead, room);
    }
    if (lost) __atomic_fetch_add(&run.lost, lost, __ATOMIC_RELAXED);
  }
}

static void reduce(Step &step, double *work) {
  for (;;) {
    const int64_t k = __atomic_fetch_add(&step.next_run, 1, __ATOMIC_RELAXED);
    if (k >= step.count) return;
    Run &run = step.runs[k];
    if (step.first[k + 1] > step.first[k]) reduce_run(run, work);
  }
}

static void finish(Run &run) {
  const lb_job &job = *run.job;
  const lb_program &program = *job.program;
  if (run.skip) run.lost = job.rows * run.cut.per_row;
  job.skipped[0] += run.lost;
  job.skipped[1] += run.skip;
  if (run.skip) return;
  for (int k = 0; k < program.kept; ++k) *job.scalars[k] = run.scalars[k];
  for (int k = 0; k < program.vectors; ++k) memcpy(job.vectors[k], run.vectors[k], 4 * run.lengths[k]);
}

static int64_t elements_over(const lb_job &job, int over) {
  return over == LB_ROW      ? job.rows
         : over == LB_COLUMN ? job.cols
         : over == LB_GROUP  ? (job.rows + job.group_rows - 1) / job.group_rows
                             : 1;
}

// Room for measurements, zeroed. False if there is no memory.
static bool prepare(Run &run, const lb_job &job, int64_t *longest) {
  const lb_program &program = *job.program;
  run.job = &job;
  run.cut = cut(job);
  int64_t elements = 1, sums = 0, blocks = 0;
  for (int k = 0; k < program.count; ++k) {
    const lb_stage &stage = program.stages[k];
    if (stage.kind == LB_UPDATE) {
      for (int i = 0; i < stage.writes; ++i) run.written |= 1 << stage.write[i];
    }
    if (stage.kind != LB_MEASURE) continue;
    const int64_t n = elements_over(job, stage.over), tiles = (job.rows + TILE - 1) / TILE;
    const int64_t needed = stage.over == LB_COLUMN ? tiles * job.cols : job.rows;
    const int64_t work = stage.over == LB_COLUMN ? tiles : run.cut.per_row;
    elements = n > elements ? n : elements;
    sums = needed > sums ? needed : sums;
    *longest = work > *longest ? work : *longest;
    if (stage.over != LB_COLUMN) blocks = job.rows * run.cut.per_row;
  }
  const int vectors = program.vectors + program.temporaries;
  int64_t floats = (elements + 31) / 16 * 16 + blocks;
  for (int k = 0; k < vectors; ++k) {
    run.lengths[k] = elements_over(job, program.over[k]);
    floats += (run.lengths[k] + 15) / 16 * 16;
  }
  run.foreseen = foreseen(program, &run.first);
  const int64_t surveyed = run.foreseen >= 0 ? blocks : 0;
  char *memory = (char *)calloc(1, sizeof(double) * sums + sizeof(float) * floats + sizeof(Survey) * surveyed);
  if (!memory) return false;
  run.sums = (double *)memory;
  run.x = (float *)(run.sums + sums);
  float *free = run.x + (elements + 31) / 16 * 16;
  for (int k = 0; k < vectors; ++k) {
    run.vectors[k] = free;
    free += (run.lengths[k] + 15) / 16 * 16;
    if (k < program.vectors) memcpy(run.vectors[k], job.vectors[k], 4 * run.lengths[k]);
  }
  run.partial = free;
  run.surveys = (Survey *)(free + blocks);
  for (int k = 0; k < program.scalars; ++k) {
    run.scalars[k] = k < program.kept ? *job.scalars[k] : program.initial[k];
  }
  for (int k = 0; k <= program.moments; ++k) {
    stream_key(job.seed, job.step, job.tensor, k, run.key[k]);
    run.key[k][0] += (uint32_t)(job.first / 2);  // values are numbered from there; below 2**33 nothing is carried
  }
  uint32_t roots[LB_STAGES];
  run.rooted = root_masks(run, roots);
  run.gauge = gauge(program, program.count);
  return true;
}

static void work(Step &step, int thread, Room *room, double *space) {
  for (bool start = true;; start = false) {
    if (thread == 0) plan(step, start);
    LB_BARRIER();
    if (step.done || step.failed) return;
    sweep(step, *room);
    LB_BARRIER();
    if (!step.updating) reduce(step, space);
    LB_BARRIER();
  }
}

}  // namespace LB_SPACE
