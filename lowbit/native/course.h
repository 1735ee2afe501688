// The blocks of a tensor as drafts, in two courses: first all whole ones, as they lie, then the short ones with which rows
// end, one below the other. For a draft and what is stored meanwhile have one length.
//
// Short blocks that are not made of 32s are copied there and back, their last value repeated: that changes neither what
// is largest nor what is finite.
#pragma once
#include "draft.h"

namespace LB_SPACE {

// A block's place in the course that it belongs to, and there its number.
struct Spot {
  int64_t row, col;
};
static int64_t whole_blocks(const Drafts &drafts) { return drafts.run->job->cols / LB_BLOCK; }  // of a row
static Spot spot(const Drafts &drafts, int64_t number) {
  const int64_t whole = whole_blocks(drafts);
  return drafts.ends ? Spot{number, whole * LB_BLOCK} : Spot{number / whole, number % whole * LB_BLOCK};
}
static int64_t numbered(const Run &run, Spot s) { return s.row * run.cut.stride + s.col; }  // its first value
static const Survey &survey_of(const Run &run, Spot s) { return run.surveys[numbered(run, s) / LB_BLOCK]; }

// What blocks of a course have in common.
static void begin_course(Drafts &drafts, bool ends) {
  const Run &run = *drafts.run;
  const lb_stage &last = *drafts.last;
  lb_fused &call = drafts.call;
  drafts.ends = ends;
  const int n = ends ? (int)(run.job->cols % LB_BLOCK) : LB_BLOCK;
  const int64_t in_row = ends ? 1 : whole_blocks(drafts);  // 0: a course without blocks
  drafts.padded = n % 32 != 0;
  call.values = (n + 31) / 32 * 32;
  call.in_row = in_row;
  for (int i = 0; i < drafts.before; ++i) drafts.frames[i].n = drafts.frames[i].piece = (n + 15) / 16 * 16;
  struct {
    lb_apart block, row;
    bool second;
  } step[LB_ARRAYS];
  for (int slot = 0; slot < drafts.slots; ++slot) {
    const Place &p = drafts.places[slot];
    const int64_t bytes = LB_BLOCK * p.bits / 8, scales = LB_BLOCK >> p.shift, before = in_row - 1;
    const lb_apart row = {p.row_bytes - before * bytes, p.scales - before * scales};
    step[slot] = {{bytes, scales}, row, p.shift == 7 && n > PIECE};
  }
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    if (slot >= drafts.slots) continue;
    call.apart[0][i] = step[slot].block;
    call.apart[1][i] = step[slot].row;
    call.second[i] = step[slot].second;
  }
  call.whole = 0;
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    call.apart_to[0][w] = step[slot].block;
    call.apart_to[1][w] = step[slot].row;
    call.second_to[w] = step[slot].second;
    if (!step[slot].second) call.whole |= 3u << (2 * w);
  }
}

// Some values of so many bits and the last of them again, up to `count`.
static void pad(const void *from, int bits, int n, int count, void *to) {
  uint8_t *bytes = (uint8_t *)to;
  memcpy(bytes, from, (size_t)(n * bits + 7) / 8);
  if (bits == 4) {
    const int twice = (bytes[(n - 1) / 2] >> (n - 1) % 2 * 4 & 15) * 17;
    memset(bytes + n / 2, twice, (size_t)(count / 2 - n / 2));
    return;
  }
  const int size = bits / 8;
  for (int i = n; i < count; ++i) memcpy(bytes + i * size, bytes + (n - 1) * size, (size_t)size);
}

// A padded block that has been stored, to where it belongs.
static void copy_back(const Drafts &drafts, int64_t block) {
  if (!drafts.padded || block < 0) return;
  const Spot to = spot(drafts, block);
  const int64_t n = drafts.run->job->cols - to.col;
  for (int w = 0; w < drafts.last->writes; ++w) {
    if (w == drafts.weight) continue;
    const Place &p = drafts.places[drafts.last->write[w]];
    char *at = p.start + to.row * p.row_bytes + to.col * p.bits / 8;
    memcpy(at, drafts.copies_to[w], (size_t)(n * p.bits + 7) / 8);
    if (n * p.bits % 8) at[n * p.bits / 8] &= 0x0F;
  }
}

// The gradient of a block after plain updates, in room or, where it is as it came, in the tensor (null).
static const float *read_gradient(Drafts &drafts, const Span &s, uint32_t *peak_of_gradient, Room &room) {
  const Run &run = *drafts.run;
  const lb_job &job = *run.job;
  const float *g = drafts.widen ? read_floats(job.grad, job.grad_dtype, s, room.array[1]) : nullptr;
  if (drafts.before) {  // loops ask for the next block of what they read, but this gradient they read from room
    const Place &p = drafts.places[1];
    const char *next = p.start + s.row * p.row_bytes + (s.col + LB_BLOCK) * p.bits / 8;
    for (int line = 0; line < LB_BLOCK * p.bits / 8; line += 64) __builtin_prefetch(next + line, 0, 3);
  }
  if (drafts.before && !g) g = read_floats(job.grad, job.grad_dtype, s, room.array[1]);
  if (g == room.array[1]) clear_tail(room.array[1], s.n);
  bool raw = run.foreseen >= 0;  // g is what the first sweep has noted the peaks of
  for (int i = 0; i < drafts.before; ++i) {
    lb_frame &f = drafts.frames[i];
    uint32_t peaks[2];
    if (raw && drafts.stages[i]->above >= 0) {
      const float most = survey_of(run, {s.row, s.col}).most;
      if (i == drafts.gauged) *peak_of_gradient = bits_of(most);
      if (most <= run.scalars[drafts.stages[i]->above]) continue;  // it would change nothing
    }
    raw = false;
    f.in[0] = g;
    f.out[0] = room.array[1];
    f.peaks = peaks;
    drafts.stages[i]->kernel(&f);
    g = room.array[1];
    if (i == drafts.gauged) *peak_of_gradient = peaks[1];
  }
  return g;
}

// How many of the next `most` blocks no plain update would change, as far as the first sweep has noted.
static int64_t unchanged(const Drafts &drafts, int64_t block, int64_t most) {
  const Run &run = *drafts.run;
  if (!drafts.before) return most;
  float limit = __FLT_MAX__;
  for (int i = 0; i < drafts.before; ++i) {
    if (run.foreseen < 0 || drafts.stages[i]->above < 0) return 0;
    limit = lb::minimum(limit, run.scalars[drafts.stages[i]->above]);
  }
  int64_t count = 0;
  while (count < most && survey_of(run, spot(drafts, block + count)).most <= limit) ++count;
  return count;
}

// What the loop is told of a block and those after it.
static void begin_at(Drafts &drafts, Spot first) {
  lb_fused &call = drafts.call;
  const lb_stage &last = *drafts.last;
  char *at[LB_ARRAYS];
  float *scale_at[LB_ARRAYS];
  for (int slot = 0; slot < drafts.slots; ++slot) {
    const Place &p = drafts.places[slot];
    at[slot] = p.start + first.row * p.row_bytes + first.col * p.bits / 8;
    scale_at[slot] = p.scale ? p.scale + first.row * p.scales + (first.col >> p.shift) : nullptr;
  }
  for (int i = 0; i < last.reads; ++i) {
    const int slot = last.read[i];
    if (slot >= drafts.slots) continue;
    call.frame.in[i] = slot == 0 && drafts.weight >= 0 ? drafts.decoded : (const float *)at[slot];
    call.scale[i] = scale_at[slot];
  }
  for (int w = 0; w < last.writes; ++w) {
    const int slot = last.write[w];
    call.to[w] = w == drafts.weight ? (char *)drafts.nowhere : drafts.padded ? (char *)drafts.copies_to[w] : at[slot];
    call.scale_to[w] = scale_at[slot];
  }
}

// The bits to round with of the blocks that are stored while `count` are drafted, the one that waits and others from
// `block` on; and how many can be drafted so.
static int64_t draw(Drafts &drafts, int64_t block, int64_t count, Room &room) {
  const Run &run = *drafts.run;
  lb_fused &call = drafts.call;
  call.draws = nullptr;
  if (!run.job->stochastic || drafts.weight >= 0) return count;
  if (drafts.waits < 0) return 1;
  const int n = (int)call.values;
  if (count > SPAN / n) count = SPAN / n;
  for (int k = 0; k < (int)count; ++k) {
    const int64_t number = numbered(run, spot(drafts, k ? block + k - 1 : drafts.waits));
    call.draws = room.draws.fill(run.key[0], number, n, k * n);
  }
  return count;
}

// The stored weight of the block that waits, from its draft.
static void store_waiting_weight(Drafts &drafts, Room &room) {
  if (drafts.weight < 0 || drafts.waits < 0) return;
  const Run &run = *drafts.run;
  const Spot waits = spot(drafts, drafts.waits);
  bool good = true;
  room.at[0] = drafts.call.draft[drafts.call.turn][drafts.weight];
  room.finite = true;
  store_weight(run, one_block(*run.job, run.cut, waits.row, waits.col, 0), &good, true, room);
}

// Stores the block that waits. The loop always makes a draft as well: here of what it has read before, for nothing.
static void store_last(Drafts &drafts, Room &room) {
  if (drafts.waits < 0) return;
  lb_fused &call = drafts.call;
  for (int w = 0; w < drafts.last->writes; ++w) call.scale_to[w] = drafts.nowhere;
  draw(drafts, 0, 1, room);
  store_waiting_weight(drafts, room);
  call.blocks = 1;
  drafts.fused(&call);
  copy_back(drafts, drafts.waits);
  nothing_waits(drafts);
}

// Makes drafts of blocks from one on, `most` at most; how many. The last then waits, unless the next cannot be drafted.
static int64_t draft_blocks(Drafts &drafts, int64_t block, int64_t most, Room &room) {
  const Run &run = *drafts.run;
  const lb_program &program = *run.job->program;
  const lb_stage &last = *drafts.last;
  lb_fused &call = drafts.call;
  int64_t count = drafts.singly || drafts.padded ? 0 : unchanged(drafts, block, most);
  const Spot first = spot(drafts, block);
  const Span s = one_block(*run.job, run.cut, first.row, first.col, 0);
  uint32_t peak_of_gradient = 0;
  const float *g = count ? nullptr : read_gradient(drafts, s, &peak_of_gradient, room);
  if (!finite_bits(peak_of_gradient)) return 0;
  begin_at(drafts, first);
  if (!count) {
    count = 1;
    if (drafts.weight >= 0) load_weight(run, s, drafts.decoded, room);
    for (int i = 0; i < last.reads; ++i) {
      const int slot = last.read[i];
      if (slot >= drafts.slots) {
        const int k = slot - drafts.slots;
        load_vector(run, s, slot, program.over[k], run.vectors[k], room);
        call.frame.in[i] = room.at[slot];
      } else if (slot == 1 && g) {
        call.frame.in[i] = g;
      }
      if (!drafts.padded) continue;
      const bool floats = slot >= drafts.slots || (slot == 1 && g) || (slot == 0 && drafts.weight >= 0);
      pad(call.frame.in[i], floats ? 32 : drafts.places[slot].bits, s.n, (int)call.values, drafts.copies[i]);
      call.frame.in[i] = drafts.copies[i];
    }
  }
  call.at = first.col / LB_BLOCK % call.in_row;
  call.blocks = draw(drafts, block, count, room);
  store_waiting_weight(drafts, room);
  const int64_t made = drafts.fused(&call);
  copy_back(drafts, drafts.waits);
  drafts.waits = block + made - 1;
  if (made < call.blocks) nothing_waits(drafts);
  return made;
}

// A course's blocks `first` to `end`; how many were left alone.
static int64_t update_course(Drafts &drafts, int64_t first, int64_t end, int piece, const uint32_t *roots, Room &room) {
  const Run &run = *drafts.run;
  int64_t lost = 0;
  for (int64_t block = first; block < end;) {
    const int64_t made = draft_blocks(drafts, block, end - block, room);
    block += made;
    if (made && drafts.waits >= 0) continue;
    store_last(drafts, room);
    const Spot at = spot(drafts, block);
    const Span s = one_block(*run.job, run.cut, at.row, at.col, numbered(run, at) / LB_BLOCK);
    lost += update_span(run, s, s, piece, roots, room);
    ++block;
  }
  store_last(drafts, room);
  return lost;
}

// Blocks `first` to `end` of a tensor; how many were left alone.
static int64_t update_blocks(Drafts &drafts, int64_t first, int64_t end, int piece, const uint32_t *roots, Room &room) {
  const int64_t of_row = drafts.run->cut.per_row, whole = whole_blocks(drafts);
  room.feed.count = 0;
  begin_course(drafts, false);
  int64_t lost = update_course(drafts, first - (first / of_row) * (of_row - whole), end - end / of_row * (of_row - whole),
                               piece, roots, room);
  if (of_row == whole) return lost;
  begin_course(drafts, true);
  return lost + update_course(drafts, first / of_row, end / of_row, piece, roots, room);
}

}  // namespace LB_SPACE
