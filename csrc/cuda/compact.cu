#include "compact.cuh"
#include "launch.h"

namespace p2s {

Status compact_cuda(const CompactArgs& args, int device, void* stream) {
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  compact_kernel<<<1, kCompactThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return to_status(cudaGetLastError());
}

}  // namespace p2s
