#include "roofline.h"

#include <time.h>
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace trady {
namespace {

// Seconds that this thread has run: on a busy machine others' turns are in no rate, as they are in no benchmark of one
// thread.
double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Rate of the best of several rounds: others' work on the machine only ever makes one slower. `prepare(thread)` gives a
// function of a number of passes that returns the work it did. There are enough passes between two looks at the clock
// that a look, some 300 ns, is not in the rate: a pass over the first-level cache takes less than one.
template <class F>
double best_rate(int threads, const F& prepare) {
  constexpr int rounds = 5;
  constexpr double length = 20e-3, stretch = 100e-6;
  std::vector<std::thread> workers;
  std::vector<std::vector<double>> rates(threads, std::vector<double>(rounds));
  std::atomic<int> arrived{0};
  for (int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      auto run = prepare(thread);
      int64_t passes = 1;
      for (run(passes);; passes *= 2) {
        const double start = now();
        run(passes);
        if (now() - start >= stretch) break;
      }
      for (int round = 0; round < rounds; ++round) {
        ++arrived;
        while (arrived < threads * (round + 1)) std::this_thread::yield();
        const double start = now();
        double work = 0, took = 0;
        do {
          work += static_cast<double>(run(passes));
          took = now() - start;
        } while (took < length);
        rates[thread][round] = work / took;
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

// Floats on a cache line of their own, all written once: a load across two lines takes twice as long, and a page that
// was never written is one page of zeros for all.
class Floats {
 public:
  explicit Floats(int64_t count) : data_(static_cast<float*>(std::aligned_alloc(kAlignment, bytes(count)))) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::fill_n(data_.get(), bytes(count) / sizeof(float), 1.0f);
  }
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static constexpr size_t kAlignment = 4096;
  static size_t bytes(int64_t count) { return (count * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment; }
  std::unique_ptr<float, Free> data_;
};

int64_t floats_a_thread(int64_t bytes, int threads) {
  return std::max<int64_t>(1024, bytes / static_cast<int64_t>(sizeof(float)) / threads) / kProbeStep * kProbeStep;
}

}  // namespace

double copy_bandwidth(int64_t bytes, int threads) {
  const auto kernel = TRADY_KERNEL(copy_passes);
  const int64_t count = floats_a_thread(bytes / 2, threads);
  // Half a page off, so that a load never waits for the store to the same place in another page.
  static constexpr int64_t kApart = 512;
  return best_rate(threads, [&](int) {
    return [kernel, count, source = Floats(count), target = Floats(count + kApart)](int64_t passes) {
      kernel(source.data(), target.data() + kApart, count, passes);
      return 2 * passes * count * static_cast<int64_t>(sizeof(float));
    };
  });
}

double fma_peak(int threads) {
  const auto kernel = TRADY_KERNEL(fma_passes);
  return best_rate(threads, [&](int) {
    return [kernel](int64_t passes) {
      float result;
      const int64_t work = kernel(&result, passes);
      sink.store(result, std::memory_order_relaxed);
      return work;
    };
  });
}

}  // namespace trady
