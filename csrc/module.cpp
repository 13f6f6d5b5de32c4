// trady_kernels._C: what has no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/roofline.h"

namespace py = pybind11;

namespace {

std::vector<std::string> names(bool available_only) {
  std::vector<std::string> result;
  for (int i = 0; i < static_cast<int>(trady::Isa::count); ++i) {
    const auto isa = static_cast<trady::Isa>(i);
    if (!available_only || trady::isa_available(isa)) result.emplace_back(trady::isa_name(isa));
  }
  return result;
}

std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (const auto& word : words) result += (result.empty() ? "" : ", ") + word;
  return result;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < static_cast<int>(trady::Isa::count); ++i) {
    const auto isa = static_cast<trady::Isa>(i);
    if (name == trady::isa_name(isa) && trady::isa_available(isa)) return trady::set_isa(isa);
  }
  throw py::value_error("instruction set: got '" + name + "', expected one that this CPU has: " + joined(names(true)));
}

// A probe that holds no Python lock while it measures, and refuses what it cannot measure.
template <class F>
auto measured(F probe) {
  return [probe](int64_t bytes, int threads) {
    if (bytes < 1) throw py::value_error("bytes: got " + std::to_string(bytes) + ", expected at least 1");
    if (threads < 1) throw py::value_error("threads: got " + std::to_string(threads) + ", expected at least 1");
    py::gil_scoped_release release;
    return probe(bytes, threads);
  };
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["isas"] = names(false);
  facts["missing_isas"] = TRADY_MISSING_ISAS;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return std::string(trady::isa_name(trady::current_isa())); });
  m.def("available_isas", [] { return names(true); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("build_facts", &build_facts);
  m.def("copy_bandwidth", measured(&trady::copy_bandwidth), py::arg("bytes"), py::arg("threads") = 1);
  m.def(
      "fma_peak", [probe = measured([](int64_t, int threads) {
                     return trady::fma_peak(threads);
                   })](int threads) { return probe(1, threads); },
      py::arg("threads") = 1);
}
