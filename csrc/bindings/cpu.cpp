#include "binding.h"
#include "p2s/isa.h"
#include "p2s/threads.h"

namespace p2s {

void bind_contour_sweep(py::module_& m);
void bind_decode(py::module_& m);
void bind_gated_attention(py::module_& m);
void bind_mask_clean(py::module_& m);
void bind_mask_match(py::module_& m);
void bind_mask_measure(py::module_& m);
void bind_nms(py::module_& m);

}  // namespace p2s

using namespace p2s;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels. Pointers are integers; the caller has checked every argument.";

  m.attr("sources") = P2S_SOURCES;  // SHA-256 over csrc
  m.def("isa_active", [] { return isa_name(isa_active()); }, "Name of the instruction set that kernels use.");
  m.def(
      "isa_available",
      [] {
        py::list names;
        for (int i = 0; i < kIsaCount; ++i) {
          if (isa_available(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
        }
        return names;
      },
      "Names of the instruction sets that can be forced here, worst first.");
  m.def(
      "isa_force", [](const std::string& name) { raise_unless_ok(isa_force(name.c_str()), name.c_str()); },
      py::arg("name"), "Make `name` the active instruction set of this process.");
  m.def("openmp_used", &openmp_used, "Whether the OpenMP runtime that the process holds shares work out.");
  m.def("openmp_allow", &openmp_allow, py::arg("allowed"), "False makes this process use threads of its own instead.");

  bind_contour_sweep(m);
  bind_decode(m);
  bind_gated_attention(m);
  bind_mask_clean(m);
  bind_mask_match(m);
  bind_mask_measure(m);
  bind_nms(m);
}
