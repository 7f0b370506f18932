#include <pybind11/stl.h>

#include <array>

#include "binding.h"
#include "p2s/mask_measure.h"

namespace p2s {
namespace {

// rows, columns, img_size, input_height, input_width, height, width
using Frame = std::array<int64_t, 7>;

MaskFrame mask_frame(const Frame& f) { return {f[0], f[1], f[2], f[3], f[4], f[5], f[6]}; }

}  // namespace

void bind_mask_measure(py::module_& m) {
  m.def(
      "mask_measure",
      [](uintptr_t low_res, uintptr_t inner, uintptr_t outer, uintptr_t areas, uintptr_t boxes, int64_t count,
         const Frame& frame, float high, float low, float cut, int threads) {
        const char* isa = nullptr;
        const MaskMeasureArgs args{pointer<const float>(low_res), pointer<int64_t>(inner), pointer<int64_t>(outer),
                                   pointer<int64_t>(areas), pointer<int64_t>(boxes), count, mask_frame(frame),
                                   high, low, cut};
        raise_unless_ok(mask_measure_cpu(args, threads, &isa), "mask_measure");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> inner, outer, areas (count), boxes (count, 4). Returns the instruction set "
      "that ran.");
  m.def(
      "mask_pack",
      [](uintptr_t low_res, uintptr_t masks, int64_t count, const Frame& frame, float cut, int64_t image_height,
         int64_t words, int64_t x0, int64_t y0, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(mask_pack_cpu({pointer<const float>(low_res), pointer<uint64_t>(masks), count,
                                       mask_frame(frame), cut, image_height, words, x0, y0},
                                      threads, &isa),
                        "mask_pack");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> masks (count, image_height, words). Returns the instruction set that ran.");
}

}  // namespace p2s
