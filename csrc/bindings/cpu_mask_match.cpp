#include "binding.h"
#include "p2s/mask_match.h"

namespace p2s {

void bind_mask_match(py::module_& m) {
  m.def(
      "mask_match",
      [](uintptr_t masks, uintptr_t query, uintptr_t scores, uintptr_t best, int64_t count, int64_t words,
         int threads) {
        const char* isa = nullptr;
        raise_unless_ok(mask_match_cpu({pointer<const uint64_t>(masks), pointer<const uint64_t>(query),
                                        pointer<float>(scores), pointer<int64_t>(best), count, words},
                                       threads, &isa),
                        "mask_match");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "masks (count, words), query (words) -> scores (count), best (1). Returns the instruction set that ran.");
  m.def(
      "mask_iou",
      [](uintptr_t a, uintptr_t b, uintptr_t iou, uintptr_t areas, int64_t rows, int64_t columns, int64_t words,
         int threads) {
        const char* isa = nullptr;
        raise_unless_ok(mask_iou_cpu({pointer<const uint64_t>(a), pointer<const uint64_t>(b), pointer<float>(iou), rows,
                                      columns, words},
                                     pointer<int64_t>(areas), threads, &isa),
                        "mask_iou");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "a (rows, words), b (columns, words) -> iou (rows, columns); areas: scratch (rows + columns). Returns the "
      "instruction set that ran.");
}

}  // namespace p2s
