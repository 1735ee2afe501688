// The updating sweep of an optimizer step: every tensor of a bucket in two launches.
//
// A warp takes a step block: 32 lanes decode 8 values each of the parameter, the gradient and every moment, run the
// printed updates on them, agree by shuffles on the block's scales and on whether all of it is finite, encode and store.
// Nothing is fp32 outside registers, nothing waits for the host, and a block that is not finite is left as it was.
// `update` computes with quick numbers (quick.h), without choices; what they doubt, `again` does with floats.
//
// Memory, bytes of a parameter: what is stored of p (read and written), g (read), and each moment (read and written).
//   AdamW, bf16 p and g, 8-bit moments: 2 + 2 + 2 + 2 * 2 * (1 + 4/256) = 10.06; with 4 bits 2 * 2 * (1/2 + 4/128) = 8.13.
// Instructions of a parameter: 69 and 77, as `lowbit doctor --arch sm_90a` counts; an H100 can issue 99 and 80 meanwhile.
#include "turns.h"

extern "C" __global__ void __launch_bounds__(lb::UPDATERS, lb::TOGETHER)
    update(const Job *jobs, const Dynamic *dynamic, const Run *runs, const int32_t *owner, uint8_t *workspace,
           uint32_t *marks) {
  using namespace lb;
  __shared__ Tables<0> tables;
  __shared__ Told told;
  __shared__ Spots spots;
  const int32_t index = owner[blockIdx.x];
  const Run &run = runs[index];
  if (threadIdx.x == 0) {
    told.marks = marks + blockIdx.x;
    *told.marks = 0u;
  }
  if (MEASURES > 0 && GUARDED && run.skip) return;
  prepare_tables<0>(tables);
  tell(jobs[index], dynamic[index], run, blockIdx.x, told);
  const Told *its = &told;
  LB_KEEP(its);  // else its address is made anew for every use
  LB_SHARED(its);
  const Job &job = its->job;
  const Dynamic &now = its->now;
  const uint32_t first = threadIdx.x * V;
  const float *constants = job.constants;
  if (!worth_trying(constants, its->scalars)) return leave(0xFFu, *its);
  Operands old = {};
  int count;
  const auto fetch = [&](const Place &place) {
    count = place.count;
    fetch_operands(job, now, place, old);
  };
  const auto fetch_next = [&](uint32_t at) { fetch(next_place(*its, at + APART, spots)); };
  fetch(first_place(*its, first, spots));
  LB_ONE_AT_A_TIME for (uint32_t at = first; goes_on(count); at += APART) {
    const Place from = noted(*its, at, spots);
    float x[LOADED][V];
    Fresh fresh;
    load_vectors<0, Sweep<MEASURES>::READS>(job, workspace, from, x);
    if (!EARLY) constants = job.constants;  // the address is read anew each turn: no register holds it between
    const bool doubt = renew<Quick>(job, old, from, its->keys, tables, constants, its->scalars, x, fresh,
                                    [&] { if (EARLY) fetch_next(at); });
    __syncwarp();  // all lanes have loaded the scales, which one of them stores: a vote alone orders no memory
    const Place to = noted(*its, at, spots);
    if (any<32>(doubt && (ANEW || to.count > 0))) {
      leave(1u << at / APART, *its);
    } else {
      store_fresh(job, to, fresh);
    }
    if (!EARLY) fetch_next(at);
  }
}

// Blocks of threads go through chunks by turns: all of them may have marks, or only neighbours.
extern "C" __global__ void __launch_bounds__(lb::UPDATERS, 5)
    again(const Job *jobs, const Dynamic *dynamic, const Run *runs, const int32_t *owner, uint8_t *workspace,
          const uint32_t *marks, int32_t chunks) {
  using namespace lb;
  __shared__ Tables<0> tables;
  __shared__ Told told;
  bool prepared = false;
  LB_ONE_AT_A_TIME for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t of_all = marks[chunk];
    if (of_all == 0u) continue;
    if (prepared) __syncthreads();  // nobody reads any more what was told of the chunk before
    else prepare_tables<0>(tables);
    prepared = true;
    const int32_t index = owner[chunk];
    tell(jobs[index], dynamic[index], runs[index], chunk, told);
    const Job &job = told.job;
    uint32_t lost = 0u, doubtful = of_all >> 8 * warp() & 0xFFu;  // step blocks; turns, a bit each
    Operands old = {};
    LB_ONE_AT_A_TIME for (uint32_t at = threadIdx.x * V; doubtful != 0u; at += APART, doubtful >>= 1) {
      if ((doubtful & 1u) == 0u) continue;
      const Place place = place_on(told, at);
      if (!goes_on(place.count)) break;
      fetch_operands(job, told.now, place, old);
      float x[LOADED][V];
      Fresh fresh;
      load_vectors<0, Sweep<MEASURES>::READS>(job, workspace, place, x);
      const bool bad = renew<float>(job, old, place, told.keys, tables, job.constants, told.scalars, x, fresh, [] {});
      __syncwarp();
      if (GUARDED && any<LANES>(bad)) {
        lost += lane() % LANES == 0 && place.count > 0;
      } else {
        store_fresh(job, place, fresh);
      }
    }
    if (lost) atomicAdd((unsigned long long *)job.skipped, (unsigned long long)lost);
  }
}
