// Threads: OpenMP's (one team, which torch shares: `torch.set_num_threads` decides how many), else the system's.
#ifndef _OPENMP
#include <pthread.h>
#endif

namespace LB_SPACE {

enum { MOST_THREADS = 256 };

// How many of the threads that may be had are worth starting: one for some ten thousand values.
static int worthwhile(int threads, int64_t values) {
  const int64_t useful = 1 + values / 16384;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  return threads > useful ? (int)useful : threads;
}

struct Crew {
  Step *step;
  Room *rooms;
  double *spaces;
};

enum Task { ENCODE, DECODE, MEASURE };

struct Hand {  // a matrix, and what is to be done with it
  const lb_matrix *matrix;
  Task task;
  Asked asked;
  bool failed;
  int64_t next;
};

static void one_of_crew(Crew &crew, int thread) {
  work(*crew.step, thread, crew.rooms + thread, crew.spaces + thread * crew.step->longest);
}

static void one_hand(Hand &hand) {
  Desk desk;
  const lb_matrix &m = *hand.matrix;
  const Pieces pieces(m, hand.task == MEASURE || !m.inverse);
  const int64_t each = 1 + WIDE / pieces.values(), pairs = pieces.each / LB_BLOCK + 1;
  double *work = nullptr;  // and behind it, the room for a piece
  bool fine = !posix_memalign((void **)&work, 64, sizeof(double) * (pairs + pieces.values() / 2 + 1));
  float *room = (float *)(work + pairs);
  while (fine) {
    const int64_t first = __atomic_fetch_add(&hand.next, each, __ATOMIC_RELAXED);
    if (first >= pieces.count) break;
    for (int64_t k = first; fine && k < first + each && k < pieces.count; ++k) {
      if (hand.task == DECODE) decode_piece(m, pieces[k], desk);
      else if (hand.task == MEASURE) fine = measure_piece(m, pieces[k], hand.asked, room, work, desk);
      else fine = encode_piece(m, pieces[k], room, desk);
    }
  }
  if (!fine) hand.failed = true;
  free(work);
}

#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);

static void run_threads(Crew &crew, int threads) {
#pragma omp parallel num_threads(threads)
  one_of_crew(crew, omp_get_thread_num());
}

static void run_threads(Hand &hand, int threads) {
#pragma omp parallel num_threads(threads)
  one_hand(hand);
}
#else
template <class Task> struct Start {
  Task *task;
  int thread;
};

static void *start_crew(void *argument) {
  Start<Crew> *s = (Start<Crew> *)argument;
  one_of_crew(*s->task, s->thread);
  return nullptr;
}

static void *start_hand(void *argument) {
  one_hand(*((Start<Hand> *)argument)->task);
  return nullptr;
}

template <class Task> static void run_started(Task &task, int threads, void *(*body)(void *)) {
  pthread_t others[MOST_THREADS];
  Start<Task> starts[MOST_THREADS];
  for (int k = 0; k < threads; ++k) {
    starts[k] = {&task, k};
    if (k && pthread_create(&others[k], nullptr, body, &starts[k])) __builtin_trap();
  }
  body(&starts[0]);
  for (int k = 1; k < threads; ++k) pthread_join(others[k], nullptr);
}

static void run_threads(Crew &crew, int threads) { run_started(crew, threads, start_crew); }
static void run_threads(Hand &hand, int threads) { run_started(hand, threads, start_hand); }
#endif

static bool run_matrix(const lb_matrix &matrix, Task task, Asked asked, int threads) {
  Hand hand = {&matrix, task, asked, false, 0};
  run_threads(hand, worthwhile(threads, matrix.rows * matrix.cols));
  return hand.failed;
}

}  // namespace LB_SPACE
