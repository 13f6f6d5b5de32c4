#include "roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace trady {
namespace {

using Clock = std::chrono::steady_clock;

// Rate of the best of several rounds: others' work on the machine only ever makes one slower. `prepare(thread)` gives a
// pass that returns the work it did; passes are repeated until a round has lasted long enough to be timed.
template <class F>
double best_rate(int threads, const F& prepare) {
  constexpr int rounds = 5;
  constexpr std::chrono::milliseconds length{20};
  std::vector<std::thread> workers;
  std::vector<std::vector<double>> rates(threads, std::vector<double>(rounds));
  std::atomic<int> arrived{0};
  for (int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      auto pass = prepare(thread);
      pass();
      for (int round = 0; round < rounds; ++round) {
        ++arrived;
        while (arrived < threads * (round + 1)) std::this_thread::yield();
        const auto start = Clock::now();
        double work = 0;
        auto now = start;
        do {
          work += static_cast<double>(pass());
          now = Clock::now();
        } while (now - start < length);
        rates[thread][round] = work / std::chrono::duration<double>(now - start).count();
      }
    });
  }
  for (auto& worker : workers) worker.join();
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    double total = 0;
    for (const auto& rate : rates) total += rate[round];
    best = std::max(best, total);
  }
  return best;
}

// Written to so that no pass is left out as unused.
std::atomic<float> sink;

int64_t floats_a_thread(int64_t bytes, int threads) {
  return std::max<int64_t>(1024, bytes / static_cast<int64_t>(sizeof(float)) / threads);
}

}  // namespace

double read_bandwidth(int64_t bytes, int threads) {
  const auto pass = TRADY_KERNEL(read_pass);
  const int64_t count = floats_a_thread(bytes, threads);
  return best_rate(threads, [&](int) {
    return [pass, source = std::vector<float>(count, 1.0f)] {
      sink.store(pass(source.data(), static_cast<int64_t>(source.size())), std::memory_order_relaxed);
      return source.size() * sizeof(float);
    };
  });
}

double copy_bandwidth(int64_t bytes, int threads) {
  const auto pass = TRADY_KERNEL(copy_pass);
  const int64_t count = std::max<int64_t>(1024, floats_a_thread(bytes, threads) / 2);
  return best_rate(threads, [&](int) {
    return [pass, source = std::vector<float>(count, 1.0f), target = std::vector<float>(count)]() mutable {
      pass(source.data(), target.data(), static_cast<int64_t>(source.size()));
      return 2 * source.size() * sizeof(float);
    };
  });
}

double fma_peak(int threads) {
  const auto pass = TRADY_KERNEL(fma_pass);
  return best_rate(threads, [&](int) {
    return [pass] {
      float result;
      const int64_t work = pass(&result);
      sink.store(result, std::memory_order_relaxed);
      return work;
    };
  });
}

}  // namespace trady
