#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "p2s/contour_sweep.h"
#include "p2s/decode.h"
#include "p2s/gated_attention.h"
#include "p2s/isa.h"
#include "p2s/mask_match.h"
#include "p2s/mask_measure.h"
#include "p2s/nms.h"
#include "binding.h"

namespace py = pybind11;
using namespace p2s;

namespace {

// addresses: q, k, v, out, maps, lse; strides: of items and rows of q, k, v;
// sizes: batch, n, dim, heads, queries, first_row, rows.
GatedAttentionArgs gated_attention_args(const std::array<uintptr_t, 6>& addresses,
                                        const std::array<int64_t, 6>& strides, const std::array<int64_t, 7>& sizes,
                                        bool gate, bool bf16) {
  const auto [q, k, v, out, maps, lse] = addresses;
  const auto [q_item, q_row, k_item, k_row, v_item, v_row] = strides;
  const auto [batch, n, dim, heads, queries, first_row, rows] = sizes;
  return {pointer<const void>(q), pointer<const void>(k), pointer<const void>(v), q_item, q_row, k_item, k_row, v_item,
          v_row, pointer<void>(out), pointer<float>(maps), pointer<float>(lse), batch, n, dim, heads, queries, first_row,
          rows, gate, bf16};
}

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

  m.def(
      "mask_match",
      [](uintptr_t masks, uintptr_t query, uintptr_t scores, uintptr_t best, int64_t count, int64_t words, int threads) {
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

  // rows, columns, img_size, input_height, input_width, height, width
  using Frame = std::array<int64_t, 7>;
  const auto frame_of = [](const Frame& f) { return MaskFrame{f[0], f[1], f[2], f[3], f[4], f[5], f[6]}; };
  m.def(
      "mask_measure",
      [frame_of](uintptr_t low_res, uintptr_t inner, uintptr_t outer, uintptr_t areas, uintptr_t boxes, int64_t count,
                 const Frame& frame, float high, float low, float cut, int threads) {
        const char* isa = nullptr;
        const MaskMeasureArgs args{pointer<const float>(low_res), pointer<int64_t>(inner), pointer<int64_t>(outer),
                                   pointer<int64_t>(areas), pointer<int64_t>(boxes), count, frame_of(frame), high, low,
                                   cut};
        raise_unless_ok(mask_measure_cpu(args, threads, &isa), "mask_measure");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> inner, outer, areas (count), boxes (count, 4). Returns the instruction set "
      "that ran.");
  m.def(
      "mask_pack",
      [frame_of](uintptr_t low_res, uintptr_t masks, int64_t count, const Frame& frame, float cut, int64_t image_height,
                 int64_t words, int64_t x0, int64_t y0, int threads) {
        const char* isa = nullptr;
        raise_unless_ok(mask_pack_cpu({pointer<const float>(low_res), pointer<uint64_t>(masks), count, frame_of(frame),
                                       cut, image_height, words, x0, y0},
                                      threads, &isa),
                        "mask_pack");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "low_res (count, rows, columns) -> masks (count, image_height, words). Returns the instruction set that ran.");

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

  m.def("gated_attention_workspace", &gated_attention_workspace, py::arg("n"), py::arg("dim"), py::arg("heads"),
        py::arg("queries"), "Floats of scratch for each thread of the two functions below.");
  m.def(
      "gated_attention",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, bool bf16, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto args = gated_attention_args(addresses, strides, sizes, gate, bf16);
        raise_unless_ok(gated_attention_cpu(args, pointer<float>(workspace), threads, &isa), "gated_attention");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "q, k, v (batch, n, dim) -> out (batch, rows, dim), maps (batch, queries, n), lse (batch, heads, rows). Returns "
      "the instruction set that ran.");
  m.def(
      "gated_attention_backward",
      [](const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 6>& strides,
         const std::array<int64_t, 7>& sizes, bool gate, bool bf16, uintptr_t grad_out, uintptr_t grad_maps,
         const std::array<uintptr_t, 3>& grads, uintptr_t grad_gate, uintptr_t workspace, int threads) {
        const char* isa = nullptr;
        const auto [grad_q, grad_k, grad_v] = grads;
        const GatedAttentionGradArgs args = {gated_attention_args(addresses, strides, sizes, gate, bf16),
                                             pointer<const void>(grad_out),
                                             pointer<const float>(grad_maps),
                                             pointer<void>(grad_q),
                                             pointer<void>(grad_k),
                                             pointer<void>(grad_v),
                                             pointer<float>(grad_gate)};
        raise_unless_ok(gated_attention_backward_cpu(args, pointer<float>(workspace), threads, &isa),
                        "gated_attention_backward");
        return isa;
      },
      py::call_guard<py::gil_scoped_release>(),
      "Gradients grad_out (batch, rows, dim) and grad_maps (batch, queries, n) -> gradients of q, k, v (batch, n, "
      "dim); grad_gate: scratch (batch, heads, n). Returns the instruction set that ran.");

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
