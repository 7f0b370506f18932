#include <pybind11/stl.h>

#include <array>

#include "binding.h"
#include "p2s/decode.h"

namespace p2s {
namespace {

// pair, tiles, pixels, row_words, prompts, heads, tokens, width, channels, channels1, channels2
using Shape = std::array<int64_t, 11>;
// bases, values, norms, positional, image
using Image = std::array<uintptr_t, 5>;

const float* floats(uintptr_t address) { return pointer<const float>(address); }

DecodeShape decode_shape(const Shape& n, float eps) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], eps};
}

DecodeImage decode_image(const Image& p) {
  return {floats(p[0]), floats(p[1]), floats(p[2]), floats(p[3]), pointer<const int64_t>(p[4])};
}

}  // namespace

void bind_decode(py::module_& m) {
  // p2s/decode.h describes the arrays.
  m.def(
      "decode_sweep0",
      [](const Shape& shape, const Image& image, uintptr_t q, uintptr_t out, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(decode_sweep0_cpu({decode_shape(shape, 0), decode_image(image), floats(q), pointer<float>(out)},
                                          threads, &isa),
                        "decode_sweep0");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(), "q -> out. Returns the instruction set that ran.");
  m.def(
      "decode_sweep1",
      [](const Shape& shape, float eps, const Image& image, const std::array<uintptr_t, 5>& in, uintptr_t out,
         uintptr_t r1, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(
            decode_sweep1_cpu({decode_shape(shape, eps), decode_image(image), floats(in[0]), floats(in[1]),
                               floats(in[2]), floats(in[3]), floats(in[4]), pointer<float>(out), pointer<float>(r1)},
                              threads, &isa),
            "decode_sweep1");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "k0, v0, q1, maps, bias -> out, r1. Returns the instruction set that ran.");
  m.def(
      "decode_sweep2",
      [](const Shape& shape, float eps, const Image& image, const std::array<uintptr_t, 8>& in, float beta_norm,
         uintptr_t out, uintptr_t r2, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(decode_sweep2_cpu({decode_shape(shape, eps), decode_image(image), floats(in[0]), floats(in[1]),
                                           floats(in[2]), floats(in[3]), floats(in[4]), floats(in[5]), floats(in[6]),
                                           floats(in[7]), beta_norm, pointer<float>(out), pointer<float>(r2)},
                                          threads, &isa),
                        "decode_sweep2");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "r1, k0, v0, k1, v1, qf, maps, vectors -> out, r2. Returns the instruction set that ran.");
  m.def(
      "decode_upscale",
      [](const Shape& shape, float eps, const Image& image, const std::array<uintptr_t, 14>& in, int64_t grid_height,
         int64_t grid_width, uintptr_t out, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(
            decode_upscale_cpu({decode_shape(shape, eps), decode_image(image), floats(in[0]), floats(in[1]),
                                floats(in[2]), floats(in[3]), floats(in[4]), floats(in[5]), floats(in[6]),
                                pointer<const int64_t>(in[7]), floats(in[8]), floats(in[9]), floats(in[10]),
                                floats(in[11]), floats(in[12]), floats(in[13]), grid_height, grid_width,
                                pointer<float>(out)},
                               threads, &isa),
            "decode_upscale");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "r1, r2, k0, v0, k1, v1, hyper, first, query, maps, vectors, norm, weight, bias -> out. Returns the instruction "
      "set that ran.");
}

}  // namespace p2s
