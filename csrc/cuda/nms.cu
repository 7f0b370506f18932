#include "nms.cuh"

#include <algorithm>

#include "launch.h"

namespace p2s {

Status nms_cuda(const NmsArgs& args, const NmsScratch& scratch, int device, void* stream) {
  const int64_t words = (args.count + kNmsWord - 1) / kNmsWord;
  if (words > 0x7fffffff) return {"too many boxes for one launch"};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  const auto queue = static_cast<cudaStream_t>(stream);
  const float threshold = float_below(args.threshold);
  int64_t first = 0;
  do {
    const int64_t last = std::min(first + scratch.words_at_once, words);
    if (last > first) {
      const dim3 blocks(static_cast<unsigned>(words), static_cast<unsigned>(last - first));
      nms_overlaps_kernel<<<blocks, kNmsWord, 0, queue>>>(args, scratch, first, threshold);
      if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return to_status(error);
    }
    nms_visit_kernel<<<1, kNmsThreads, 0, queue>>>(args, scratch, first, last, words);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return to_status(error);
    first = last;
  } while (first < words);
  return {};
}

}  // namespace p2s
