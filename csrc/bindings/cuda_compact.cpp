#include "binding.h"
#include "p2s/compact.h"

namespace p2s {

void bind_compact(py::module_& m) {
  m.def(
      "compact",
      [](uintptr_t keep, uintptr_t index, uintptr_t count, int64_t n, int device, uintptr_t stream) {
        raise_unless_ok(compact_cuda({pointer<const uint8_t>(keep), pointer<int64_t>(index), pointer<int64_t>(count), n},
                                     device, pointer<void>(stream)),
                        "compact");
      },
      py::call_guard<py::gil_scoped_release>(), "keep (n) -> index (n), count (1).");
}

}  // namespace p2s
