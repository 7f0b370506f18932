#include <pybind11/stl.h>

#include <array>

#include "binding.h"
#include "p2s/mask_measure.h"

namespace p2s {
namespace {

using Sizes = std::array<int64_t, 7>;

MaskFrame frame(const Sizes& n) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6]}; }

}  // namespace

void bind_mask_measure(py::module_& m) {
  m.def("mask_partial_values", &mask_partial_values_cuda, "int64 values of scratch that mask_measure needs.");
  m.def(
      "mask_measure",
      [](uintptr_t low_res, uintptr_t inner, uintptr_t outer, uintptr_t areas, uintptr_t boxes, uintptr_t partial,
         int64_t count, const Sizes& sizes, float high, float low, float cut, int device, uintptr_t stream) {
        raise_unless_ok(mask_measure_cuda({pointer<const float>(low_res), pointer<int64_t>(inner),
                                           pointer<int64_t>(outer), pointer<int64_t>(areas), pointer<int64_t>(boxes),
                                           count, frame(sizes), high, low, cut},
                                          pointer<int64_t>(partial), device, pointer<void>(stream)),
                        "mask_measure");
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> inner, outer, areas (count), boxes (count, 4); sizes are those of MaskFrame.");
  m.def(
      "mask_pack",
      [](uintptr_t low_res, uintptr_t masks, int64_t count, const Sizes& sizes, float cut, int64_t image_height,
         int64_t words, int64_t x0, int64_t y0, int device, uintptr_t stream) {
        raise_unless_ok(mask_pack_cuda({pointer<const float>(low_res), pointer<uint64_t>(masks), count, frame(sizes),
                                        cut, image_height, words, x0, y0},
                                       device, pointer<void>(stream)),
                        "mask_pack");
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> masks (count, image_height, words).");
}

}  // namespace p2s
