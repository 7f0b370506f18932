#include "binding.h"
#include "p2s/nms.h"

namespace p2s {

void bind_nms(py::module_& m) {
  m.def(
      "nms",
      [](uintptr_t boxes, uintptr_t order, uintptr_t keep, uintptr_t kept, int64_t count, double threshold) {
        const char* isa = nullptr;
        raise_unless_ok(nms_cpu({pointer<const float>(boxes), pointer<const int64_t>(order), pointer<int64_t>(keep),
                                 pointer<int64_t>(kept), count, threshold},
                                &isa),
                        "nms");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "boxes (count, 4), order (count) -> keep (count), kept (1). Returns the instruction set that ran.");
}

}  // namespace p2s
