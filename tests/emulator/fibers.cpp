// Blocks and warps on one thread of the CPU: each CUDA thread is a fiber, which runs until it waits for others.
//
// A fiber that waits hands over to one that is ready; which, is the schedule: forward (0) and reverse (1) let a thread
// run ahead of the others as far as it can, and every other number is the seed of a shuffled one. Blocks run one at a
// time, in an order of the same kind. So a kernel that lacks a barrier gives other results under other schedules.
//
// ThreadSanitizer takes each CUDA thread for a thread, and a barrier, a __syncwarp and a fence for what orders them;
// shuffles order nothing, as in CUDA. It then reports any two accesses to memory that nothing orders, whichever came
// first here. Every other block has the same threads, so two blocks in a row have none in common: what one writes and
// the next one reads is reported too. What blocks share only here (stacks, shared memory) it forgets before each block.
// This file itself is compiled without sanitizers: what it does is no thread's doing.
#include "fibers.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "sanitizers.h"

// ---- stacks

#ifdef __x86_64__
// What a called function must keep goes onto the stack of the one, and comes from the stack of the other.
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
.size emulator_switch, . - emulator_switch
)");
struct Context {
  void *top;
};
static void prepare(Context &context, char *bottom, size_t size, void (*entry)()) {
  void **top = (void **)(bottom + size);
  *--top = nullptr;  // where the entry would return to
  *--top = (void *)entry;
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  context.top = top;
}
static void change(Context &from, Context &to) { emulator_switch(&from.top, to.top); }
#else
#include <ucontext.h>
struct Context {
  ucontext_t context;
};
static void prepare(Context &context, char *bottom, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = bottom;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
static void change(Context &from, Context &to) { swapcontext(&from.context, &to.context); }
#endif

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
unsigned char *dynamic_memory;

namespace {

enum State { READY, AT_BARRIER, AT_WARP, DONE };
const char *const NAMES[] = {"__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
                             "__ballot_sync",     "__any_sync",        "__all_sync",        "__reduce_max_sync",
                             "__reduce_min_sync", "__reduce_add_sync", "__reduce_and_sync", "__reduce_or_sync",
                             "__reduce_xor_sync", "__syncwarp"};

constexpr unsigned SIGHTS = 8;

struct Fiber {
  Context context;
  char *stack;
  void *tsan;
  Index index;
  unsigned number;
  State state;
  bool yes;             // at a barrier
  Operation operation;  // of a warp: what this lane brings, and what it takes away
  uint32_t mask;
  int source;
  uint64_t value, result;
  Site site;     // where it waits
  bool fenced;   // before the next atomic
  unsigned sights;
  void *seen[SIGHTS];  // by atomics, of late
};

// What orders the lanes of a mask. Those that have passed use the other key: the next meeting may be under way.
struct Meeting {
  uint32_t mask;
  unsigned passed;
  char key[2];
};
constexpr int MEETINGS = 64;

struct Warp {
  uint32_t arrived;
  int meetings;
  Meeting meeting[MEETINGS];
};

#ifdef EMULATOR_THREAD_SANITIZER
constexpr bool RACES = true;
#else
constexpr bool RACES = false;
#endif
constexpr size_t STACK = 256 << 10, PAGE = 4096;
constexpr unsigned MOST_THREADS = 1024;

Fiber fibers[MOST_THREADS], *self;
Warp warps[2][MOST_THREADS / 32];
void *threads[2][MOST_THREADS];
bool odd;  // which of the two the block has
char *stacks;                                          // of all fibers
unsigned count, exits, waiting, barriers, yes, answer;  // of this block; the last two of a barrier
Fiber *exited, *at_barrier;                            // one of those
Fiber *ready[MOST_THREADS];
unsigned readies, schedule;
uint64_t dice;
Context host;
bool from_host;
void *host_tsan;
const void *host_stack;
size_t host_stack_size;
char start_key, end_key, barrier_key[2][2];
const Launch *current;
char message[1024];

unsigned throw_dice(unsigned sides) {  // xorshift64, Marsaglia 2003: https://doi.org/10.18637/jss.v008.i14
  dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
  return (unsigned)((dice >> 32) * sides >> 32);
}

// From a fiber or the host to a fiber, or to the host (null).
void change_to(Fiber *to, Context &from, bool for_good) {
  self = to;
  if (to) thread_index = to->index;
  __tsan_switch_to_fiber(to ? to->tsan : host_tsan, 1 /* this orders nothing */);
  void *fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, to ? to->stack : host_stack, to ? STACK : host_stack_size);
  change(from, to ? to->context : host);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

[[noreturn, gnu::format(printf, 3, 4)]] void give_up(const Fiber &fiber, Site site, const char *format, ...) {
  char what[512];
  va_list values;
  va_start(values, format);
  vsnprintf(what, sizeof what, format, values);
  va_end(values);
  const Index t = fiber.index, b = block_index;
  snprintf(message, sizeof message, "%s:%d: thread (%u,%u,%u) of block (%u,%u,%u) of %s %s", site.file, site.line, t.x,
           t.y, t.z, b.x, b.y, b.z, current->kernel->name, what);
  change_to(nullptr, self->context, true);
  abort();
}

// Fibers [first, end) may go on, but for one of them.
template <class Choose> void now_ready(unsigned first, unsigned end, Choose choose) {
  for (unsigned k = 0; k < end - first; ++k) {
    Fiber &fiber = fibers[schedule == 1 ? first + k : end - 1 - k];  // the last one comes first
    if (!choose(fiber)) continue;
    fiber.state = READY;
    ready[readies++] = &fiber;
  }
}

[[noreturn]] void nobody_is_ready() {
  unsigned lanes = 0;
  const Fiber *lane = nullptr;
  for (unsigned k = count; k--;) {
    if (fibers[k].state == AT_WARP) ++lanes, lane = &fibers[k];
  }
  // Somebody waits in a warp: who exits while others are at a barrier is told so at once.
  const char *said = "waits for ever, like %u others, in %s with mask 0x%08x; %u threads wait at a __syncthreads";
  give_up(*lane, lane->site, said, lanes - 1, NAMES[lane->operation], lane->mask, waiting);
}

// Let another fiber run; the host when all are done.
void next(bool for_good) {
  Fiber *const from = self, *to = nullptr;
  if (readies) {
    const unsigned k = schedule > 1 ? throw_dice(readies) : readies - 1;
    to = ready[k];
    ready[k] = ready[--readies];
  } else if (exits < count) {
    nobody_is_ready();
  }
  change_to(to, from ? from->context : host, for_good);
}

void run_fiber() {
  const void *bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (from_host) host_stack = bottom, host_stack_size = size;
  from_host = false;
  Fiber &me = *self;
  __tsan_acquire(&start_key);
  current->kernel->call(current->arguments);
  __tsan_release(&end_key);
  me.state = DONE;
  exited = &me;
  ++exits;
  if (waiting) give_up(me, at_barrier->site, "exits while %u threads wait here, at a __syncthreads", waiting);
  for (unsigned k = me.number / 32 * 32; k < count && k / 32 == me.number / 32; ++k) {
    const Fiber &f = fibers[k];
    if (f.state == AT_WARP && (f.mask >> me.number % 32 & 1u))
      give_up(me, f.site, "exits while lane %u waits for it here, in %s", k % 32, NAMES[f.operation]);
  }
  next(true);
  abort();
}

char *key_of(Warp &warp, const Fiber &fiber) {
  for (int k = 0; k < warp.meetings; ++k) {
    if (warp.meeting[k].mask == fiber.mask) return &warp.meeting[k].key[warp.meeting[k].passed & 1u];
  }
  if (warp.meetings == MEETINGS) give_up(fiber, fiber.site, "uses too many different masks for the emulator");
  Meeting &meeting = warp.meeting[warp.meetings++];
  meeting.mask = fiber.mask, meeting.passed = 0;
  return meeting.key;
}
void pass(Warp &warp, uint32_t mask) {
  for (int k = 0; k < warp.meetings; ++k) warp.meeting[k].passed += warp.meeting[k].mask == mask;
}

// What each lane gets, once all lanes of a mask are there.
void finish(Fiber *lanes, const Fiber &last) {
  uint32_t votes = 0, most = 0, least = 0xFFFFFFFFu, sum = 0, all = 0xFFFFFFFFu, some = 0, odd = 0;
  const uint32_t mask = last.mask;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int k = __builtin_ctz(rest);
    const Fiber &f = lanes[k];
    if (f.operation != last.operation || f.mask != mask || f.site.line != last.site.line ||
        strcmp(f.site.file, last.site.file))
      give_up(last, last.site, "is in %s with mask 0x%08x, but lane %d in %s with mask 0x%08x, at %s:%d",
              NAMES[last.operation], mask, k, NAMES[f.operation], f.mask, f.site.file, f.site.line);
    const uint32_t x = (uint32_t)f.value;
    votes |= (x & 1u) << k;
    most = x > most ? x : most, least = x < least ? x : least;
    sum += x, all &= x, some |= x, odd ^= x;
  }
  const uint32_t results[] = {votes, votes != 0, votes == mask, most, least, sum, all, some, odd, 0};
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    Fiber &f = lanes[__builtin_ctz(rest)];
    if (f.operation >= BALLOT) {
      f.result = results[f.operation - BALLOT];
      continue;
    }
    if (!(mask >> f.source & 1u))
      give_up(f, f.site, "reads lane %d in %s, which mask 0x%08x does not name", f.source, NAMES[f.operation], mask);
    f.result = lanes[f.source].value;
  }
}

void prepare_memory() {
  const Shared shared = current->shared;
  const size_t size = (size_t)(shared.end - shared.begin);
  if (RACES) {
    const size_t pages = (size + PAGE - 1) / PAGE * PAGE;
    char others[PAGE];  // what is behind, on the last page
    memcpy(others, shared.end, pages - size);
    shared.renew(shared.begin, pages);
    memcpy(shared.end, others, pages - size);
    shared.renew(stacks, count * STACK);
    if (current->dynamic_bytes) shared.renew(dynamic_memory, current->dynamic_bytes);
  }
  if (size) memset(shared.begin, 0xFF, size);
  memset(dynamic_memory, 0xFF, current->dynamic_bytes);
}

const char *run_block(unsigned number) {
  const Index grid = current->grid, block = current->block;
  block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  prepare_memory();
  odd = !odd;
  exits = waiting = barriers = yes = readies = 0;
  message[0] = 0;
  for (unsigned k = 0; k < (count + 31) / 32; ++k) warps[odd][k].arrived = warps[odd][k].meetings = 0;
  for (unsigned k = 0; k < count; ++k) {
    Fiber &f = fibers[k];
    f.number = k;
    f.fenced = false, f.sights = 0;
    f.index = {k % block.x, k / block.x % block.y, k / block.x / block.y};
    f.stack = stacks + k * STACK;
    if (RACES && !threads[odd][k]) threads[odd][k] = __tsan_create_fiber(0);
    f.tsan = threads[odd][k];
    // Not all at the same place of a page, or they compete for the same lines of the cache.
    prepare(f.context, f.stack, STACK - k % 61 * 576, run_fiber);
  }
  now_ready(0, count, [](const Fiber &) { return true; });
  from_host = true;
  self = nullptr;
  next(false);
  // After a fault, fibers hang in the middle of the kernel.
  if (message[0]) __asan_unpoison_memory_region(stacks, MOST_THREADS * STACK);
  return message[0] ? message : nullptr;
}

void *pages(size_t size) {
  void *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) abort();
  return at;
}

}  // namespace

unsigned barrier(bool says_yes, Site site) {
  Fiber &me = *self;
  me.site = site;
  if (exits) give_up(me, site, "waits at a __syncthreads, but thread %u has exited", exited->number);
  if (waiting && (at_barrier->site.line != site.line || strcmp(at_barrier->site.file, site.file)))
    give_up(me, site, "waits at this __syncthreads, but thread %u at %s:%d", at_barrier->number, at_barrier->site.file,
            at_barrier->site.line);
  char *const key = &barrier_key[odd][barriers & 1u];  // who passes first may be at the next one before others leave
  __tsan_release(key);
  yes += says_yes;
  at_barrier = &me;
  if (++waiting == count) {
    ++barriers;
    answer = yes;
    waiting = yes = 0;
    now_ready(0, count, [&](const Fiber &f) { return &f != &me; });
  } else {
    me.state = AT_BARRIER;
    next(false);
  }
  __tsan_acquire(key);
  return answer;
}

uint64_t meet(Operation operation, uint32_t mask, uint64_t value, int source, Site site) {
  Fiber &me = *self;
  const unsigned lane = me.number % 32, first = me.number - lane, end = first + 32 < count ? first + 32 : count;
  Warp &warp = warps[odd][me.number / 32];
  Fiber *const lanes = fibers + first;
  me.operation = operation, me.mask = mask, me.value = value, me.source = source, me.site = site;
  if (!(mask >> lane & 1u)) give_up(me, site, "is not in the mask 0x%08x of its %s", mask, NAMES[operation]);
  char *const key = operation == SYNC ? key_of(warp, me) : nullptr;
  if (key) __tsan_release(key);
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) == mask) {
    finish(lanes, me);
    warp.arrived &= ~mask;
    if (key) pass(warp, mask);
    now_ready(first, end, [&](const Fiber &f) { return &f != &me && (mask >> f.number % 32 & 1u); });
  } else {
    for (uint32_t rest = mask & ~warp.arrived; rest; rest &= rest - 1) {
      const unsigned k = (unsigned)__builtin_ctz(rest);
      if (first + k >= count) give_up(me, site, "names lane %u in %s, which does not exist", k, NAMES[operation]);
      if (lanes[k].state == DONE) give_up(me, site, "waits for lane %u in %s, which has exited", k, NAMES[operation]);
    }
    me.state = AT_WARP;
    next(false);
  }
  if (key) __tsan_acquire(key);
  return me.result;
}

void atomic(void *at) {
  if (!RACES) return;
  Fiber &me = *self;
  if (me.fenced) __tsan_release(at);
  me.seen[me.sights++ % SIGHTS] = at;
}

void fence() {
  Fiber &me = *self;
  for (unsigned k = 0; k < SIGHTS && k < me.sights; ++k) __tsan_acquire(me.seen[k]);
  me.fenced = true;
}

void fail(const char *what, Site site) { give_up(*self, site, "is wrong: %s", what); }

const char *run(const Launch &launch, unsigned which) {
  current = &launch;
  schedule = which;
  dice = which * 0x9E3779B97F4A7C15ull + 1;
  grid_size = launch.grid, block_size = launch.block;
  count = launch.block.x * launch.block.y * launch.block.z;
  host_tsan = __tsan_get_current_fiber();
  __tsan_release(&start_key);
  if (!stacks) stacks = (char *)pages(MOST_THREADS * STACK);
  const size_t bytes = launch.dynamic_bytes ? launch.dynamic_bytes : 1;
  dynamic_memory = (unsigned char *)(RACES ? pages(bytes) : malloc(bytes));  // of exactly this size
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  unsigned *const order = (unsigned *)malloc(blocks * sizeof *order);
  for (unsigned k = 0; k < blocks; ++k) {
    const unsigned to = which > 1 ? throw_dice(k + 1) : k;  // which block runs k-th: shuffled as it grows
    order[k] = order[to];
    order[to] = which == 1 ? blocks - 1 - k : k;
  }
  const char *fault = nullptr;
  for (unsigned k = 0; k < blocks && !fault; ++k) fault = run_block(order[k]);
  __tsan_acquire(&end_key);
  free(order);
  RACES ? (void)munmap(dynamic_memory, bytes) : free(dynamic_memory);
  return fault;
}

}  // namespace emulator
