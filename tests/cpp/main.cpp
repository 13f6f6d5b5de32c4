// Runs every test on every instruction set that this CPU has.
//
//   trady_tests             all of them
//   trady_tests avx2 ...    these sets alone; exit code 2 for one that this CPU does not have
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "check.h"

namespace trady {
namespace {

constexpr int MOST_SENTENCES = 20;
int failures = 0;

}  // namespace

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::vector<std::string>& Case::open() {
  static std::vector<std::string> words;
  return words;
}

void fail(const std::string& words) {
  if (++failures > MOST_SENTENCES) return;
  std::string where = isa_name(current_isa());
  for (const auto& open : Case::open()) where += ", " + open;
  std::printf("%s: %s\n", where.c_str(), words.c_str());
}

namespace {

std::vector<Isa> sets_of(int count, char** names) {
  std::vector<Isa> available, wanted;
  std::string words;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    const auto isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    available.push_back(isa);
    words += (words.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  for (int i = 0; i < count; ++i) {
    const auto found = std::find_if(available.begin(), available.end(),
                                    [&](Isa isa) { return isa_name(isa) == std::string(names[i]); });
    if (found == available.end()) {
      std::printf("instruction set: got '%s', expected one that this CPU has: %s\n", names[i], words.c_str());
      std::exit(2);
    }
    wanted.push_back(*found);
  }
  return count ? wanted : available;
}

int run(int count, char** names) {
  int passed = 0, failed = 0;
  for (const Isa isa : sets_of(count, names)) {
    set_isa(isa);
    const int before = failed;
    for (const auto& test : tests()) {
      failures = 0;
      const Case words(test.name);
      test.run();
      if (failures > MOST_SENTENCES) std::printf("... and %d more\n", failures - MOST_SENTENCES);
      ++(failures ? failed : passed);
    }
    std::printf("%s: %s\n", isa_name(isa), failed == before ? "passed" : "FAILED");
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}

}  // namespace
}  // namespace trady

int main(int count, char** arguments) { return trady::run(count - 1, arguments + 1); }
