#include <cuda_runtime.h>

#include "binding.h"

namespace p2s {

void bind_compact(py::module_& m);
void bind_gated_attention(py::module_& m);
void bind_mask_match(py::module_& m);
void bind_mask_measure(py::module_& m);
void bind_nms(py::module_& m);

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
}  // namespace p2s

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels. Pointers and the stream are integers; the caller has checked every argument.";
  m.attr("architectures") = P2S_CUDA_ARCHITECTURES;
  m.def("device_info", &p2s::device_info,
        "Versions (1000 * major + 10 * minor), device count, and the reason if there are none.");
  p2s::bind_compact(m);
  p2s::bind_gated_attention(m);
  p2s::bind_mask_match(m);
  p2s::bind_mask_measure(m);
  p2s::bind_nms(m);
}
