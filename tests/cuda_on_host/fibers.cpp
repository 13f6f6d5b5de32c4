#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

enum class State { ready, at_block, at_warp, done };

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned WARP = 32;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  ucontext_t context;
  jmp_buf here;
  bool started = false;
  State state = State::ready;
  unsigned mask = 0, index = 0, exchanges = 0;
};

struct Warp {
  // Two sets: a lane can be one exchange ahead of another, not two.
  uint64_t slots[2][WARP];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
ucontext_t scheduler;
jmp_buf scheduler_here;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
  std::abort();
}

void enter() {
  (*body)();
  current->state = State::done;
  _longjmp(scheduler_here, 1);
}

void turn(Fiber& fiber) {
  current = &fiber;
  const unsigned i = fiber.index;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  // makecontext gives the fiber its stack; later turns are jumps, which unlike swapcontext make no system call.
  if (_setjmp(scheduler_here)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  swapcontext(&scheduler, &fiber.context);
}

void yield(State state) {
  Fiber& fiber = *current;
  fiber.state = state;
  if (!_setjmp(fiber.here)) _longjmp(scheduler_here, 1);
}

// Lets go of those that everybody they wait for has joined; false where nobody could be.
bool release(unsigned count) {
  bool all_at_block = true, released = false;
  for (unsigned first = 0; first < count; first += WARP) {
    unsigned waiting = 0;
    const unsigned lanes = std::min(WARP, count - first);
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers[first + lane];
      if (fiber.state == State::at_warp) waiting |= 1u << lane;
      all_at_block = all_at_block && (fiber.state == State::at_block || fiber.state == State::done);
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const unsigned mask = fibers[first + lane]->mask;
      // Lanes that the block does not have, in its last warp, need not come.
      const unsigned expected = lanes == WARP ? mask : mask & ((1u << lanes) - 1);
      if (!(waiting >> lane & 1) || (waiting & expected) != expected) continue;
      for (unsigned other = 0; other < lanes; ++other) {
        if (!(expected >> other & 1)) continue;
        if (fibers[first + other]->mask != mask) fail("lanes of a warp wait with different masks");
        fibers[first + other]->state = State::ready;
      }
      waiting &= ~expected;
      released = true;
    }
  }
  if (all_at_block) {
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i]->state != State::at_block) continue;
      fibers[i]->state = State::ready;
      released = true;
    }
  }
  return released;
}

void run_block(bool descending) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  warps.assign((count + WARP - 1) / WARP, Warp{});
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.started = false;
    fiber.state = State::ready;
    fiber.exchanges = 0;
    fiber.index = i;
  }
  for (;;) {
    unsigned done = 0;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers[descending ? count - 1 - i : i];
      if (fiber.state == State::ready) turn(fiber);
      done += fiber.state == State::done;
    }
    if (done == count) return;
    if (!release(count)) fail("threads wait at a barrier that others never reach");
  }
}

}  // namespace

void wait_for_block() { yield(State::at_block); }

void wait_for_warp(unsigned mask) {
  current->mask = mask;
  yield(State::at_warp);
}

unsigned lane_id() { return current->index % WARP; }

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane) {
  Fiber& fiber = *current;
  auto& slots = warps[fiber.index / WARP].slots[fiber.exchanges++ % 2];
  if (!(mask >> lane_id() & 1)) fail("a lane takes part in an operation of a warp whose mask leaves it out");
  slots[lane_id()] = value;
  wait_for_warp(mask);
  return slots[lane % WARP];
}

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  static bool descending = false;
  for (uint64_t i = uint64_t{grid.x} * grid.y * grid.z; i-- > 0;) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(descending);
    descending = !descending;
  }
}

}  // namespace cuda_on_host
