// What the tests of hot functions share: registration, arrays of a dtype chosen at run time, comparison.
//
// A test is TRADY_TEST(name) { ... expect(...) ... } in the file of its operator; main.cpp runs each on every
// instruction set that this CPU has. No torch and no framework, so that it also runs under sanitizers and, cross
// compiled, on other CPUs.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

#define TRADY_TEST(name)                                                     \
  static void test_##name();                                                 \
  static const ::trady::Registration registered_##name(#name, &test_##name); \
  static void test_##name()

namespace trady {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();
struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

// Notes a failed comparison; the words are put behind those of the cases that are open.
void fail(const std::string& words);
template <class... Words>
void expect(bool right, const Words&... words) {
  if (right) return;
  std::ostringstream sentence;
  (sentence << ... << words);
  fail(sentence.str());
}

// Words that say what is being compared, while the object lives.
class Case {
 public:
  template <class... Words>
  explicit Case(const Words&... words) {
    std::ostringstream sentence;
    (sentence << ... << words);
    open().push_back(sentence.str());
  }
  ~Case() { open().pop_back(); }
  Case(const Case&) = delete;
  static std::vector<std::string>& open();
};

// ---- elements of any dtype ---------------------------------------------------------------------------------

constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
const char* name_of(Dtype dtype);
int size_of(Dtype dtype);
// To the nearest, ties to even: what the hardware's own conversions do, by arithmetic alone.
double rounded(Dtype dtype, double value);

// The dtype that sums over elements of `dtype` are taken in, and the unit roundoff of those sums.
constexpr Dtype accumulate_type(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

// `count` elements on the heap, without slack, so that AddressSanitizer sees the element behind the last. All NaN at
// first: what nobody writes fails its comparison.
class Array {
 public:
  Array(Dtype dtype, int64_t count);
  Dtype dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  double get(int64_t i) const;
  void set(int64_t i, double value);
  char* data() { return bytes_.data(); }
  const char* data() const { return bytes_.data(); }
  // Address of element i.
  void* at(int64_t i) { return bytes_.data() + i * size_of(dtype_); }
  const void* at(int64_t i) const { return bytes_.data() + i * size_of(dtype_); }

 private:
  Dtype dtype_;
  int64_t count_;
  std::vector<char> bytes_;
};

// The same numbers in every run.
std::mt19937_64& random();
int64_t random_integer(int64_t least, int64_t most);
// Normally distributed elements.
Array random_array(Dtype dtype, int64_t count);

// Equal as numbers and in sign, or both NaN.
bool identical(double a, double b);
void expect_identical(const char* what, int64_t index, double got, double expected);
// The bound of tests/tolerances.py on a sum of `length` products whose magnitudes add up to `magnitude`.
void expect_sum(const char* what, int64_t index, Dtype dtype, double got, double expected, double magnitude,
                int64_t length);

}  // namespace trady
