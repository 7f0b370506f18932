#include "binding.h"
#include "p2s/mask_clean.h"

namespace p2s {

void bind_mask_clean(py::module_& m) {
  m.def(
      "mask_clean",
      [](uintptr_t masks, uintptr_t changed, int64_t count, int64_t height, int64_t width, int64_t words,
         double min_area, int threads) {
        const MaskCleanArgs args{pointer<uint64_t>(masks), pointer<bool>(changed), count, height, width, words, min_area};
        raise_unless_ok(mask_clean_cpu(args, threads), "mask_clean");
      },
      py::call_guard<py::gil_scoped_release>(), "masks (count, height, words), in place -> changed (count).");
}

}  // namespace p2s
