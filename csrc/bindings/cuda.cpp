#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "p2s/mask_match.h"
#include "status.h"

namespace py = pybind11;
using namespace p2s;

namespace {

py::dict device_info() {
  int runtime = 0, driver = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  py::dict info;
  info["runtime_version"] = runtime;
  info["driver_version"] = driver;  // 0: no driver
  info["device_count"] = error == cudaSuccess ? devices : 0;
  info["error"] = error == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(error));
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels. Pointers and the stream are integers; the caller has checked every argument.";
  m.attr("architectures") = P2S_CUDA_ARCHITECTURES;
  m.def("device_info", &device_info, "Versions (1000 * major + 10 * minor), device count, and the reason if there are none.");

  m.def(
      "mask_match",
      [](uintptr_t masks, uintptr_t query, uintptr_t scores, uintptr_t best, int64_t count, int64_t words, int device,
         uintptr_t stream) {
        raise_unless_ok(mask_match_cuda({pointer<const uint64_t>(masks), pointer<const uint64_t>(query),
                                         pointer<float>(scores), pointer<int64_t>(best), count, words},
                                        device, pointer<void>(stream)),
                        "mask_match");
      },
      py::call_guard<py::gil_scoped_release>(),
      "masks (count, words), query (words) -> scores (count), best (1).");
  m.def(
      "mask_iou",
      [](uintptr_t a, uintptr_t b, uintptr_t iou, int64_t rows, int64_t columns, int64_t words, int device,
         uintptr_t stream) {
        raise_unless_ok(mask_iou_cuda({pointer<const uint64_t>(a), pointer<const uint64_t>(b), pointer<float>(iou),
                                       rows, columns, words},
                                      device, pointer<void>(stream)),
                        "mask_iou");
      },
      py::call_guard<py::gil_scoped_release>(),
      "a (rows, words), b (columns, words) -> iou (rows, columns).");
}
