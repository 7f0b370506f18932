#include <pybind11/stl.h>

#include <array>

#include "binding.h"
#include "p2s/contour_sweep.h"

namespace p2s {

void bind_contour_sweep(py::module_& m) {
  m.def(
      "contour_sweep",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 4>& sizes, int rule, bool clamp,
         int threads) {
        const auto [levels, boxes, first, empty, iou, found] = addresses;
        const auto [count, height, width, steps] = sizes;
        raise_unless_ok(contour_sweep_cpu({pointer<const int32_t>(levels), pointer<const double>(boxes),
                                           pointer<const int64_t>(first), pointer<const int64_t>(empty),
                                           pointer<double>(iou), pointer<int64_t>(found), count, height, width, steps,
                                           static_cast<ContourRule>(rule), clamp},
                                          threads),
                        "contour_sweep");
      },
      py::call_guard<py::gil_scoped_release>(),
      "levels (count, height, width), boxes (n, 4), first (count + 1), empty (4) -> iou (count, steps), found (count, "
      "steps, 4).");
}

}  // namespace p2s
