#include "binding.h"
#include "p2s/nms.h"

namespace p2s {

void bind_nms(py::module_& m) {
  m.def(
      "nms",
      [](uintptr_t boxes, uintptr_t order, uintptr_t taking_part, uintptr_t keep, uintptr_t kept, uintptr_t alive,
         uintptr_t overlaps, int64_t count, int64_t words_at_once, double threshold, int device, uintptr_t stream) {
        raise_unless_ok(nms_cuda({pointer<const float>(boxes), pointer<const int64_t>(order), pointer<int64_t>(keep),
                                  pointer<int64_t>(kept), count, threshold},
                                 {pointer<const int64_t>(taking_part), pointer<uint64_t>(alive),
                                  pointer<uint64_t>(overlaps), words_at_once},
                                 device, pointer<void>(stream)),
                        "nms");
      },
      py::call_guard<py::gil_scoped_release>(),
      "boxes (count, 4), order (count), taking_part (1) or 0 -> keep (count), kept (1); scratch: alive (words), overlaps "
      "(words_at_once, 64 * words), words of 64 boxes.");
}

}  // namespace p2s
