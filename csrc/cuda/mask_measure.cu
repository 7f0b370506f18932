#include "mask_measure.cuh"

#include "launch.h"

namespace p2s {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;
// Tiles are counted in 32 bits; positions are exact in float32.
constexpr int64_t kMaxSide = int64_t{1} << 23;

bool fits(const MaskFrame& f, int64_t image_height, int64_t words) {
  for (int64_t side : {f.rows, f.columns, f.img_size, f.height, f.width, image_height, 64 * words}) {
    if (side > kMaxSide) return false;
  }
  return true;
}

int64_t parts_of(int64_t height) { return (height + kPartRows - 1) / kPartRows; }

}  // namespace

int64_t mask_partial_values_cuda(int64_t count, int64_t height) { return count * parts_of(height) * kPartValues; }

Status mask_measure_cuda(const MaskMeasureArgs& args, int64_t* partial, int device, void* stream) {
  const int64_t parts = parts_of(args.frame.height), blocks = args.count * parts;
  if (blocks == 0) return {};
  if (blocks > kMaxBlocks || !fits(args.frame, 0, 0)) return {"too many masks or pixels for one launch"};
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  const auto queue = static_cast<cudaStream_t>(stream);
  const MaskResize resize = mask_resize(args.frame, kCudaFuses);
  const auto kernel = resize.copies ? mask_measure_kernel<true> : mask_measure_kernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, queue>>>(args, resize, partial, parts);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return to_status(error);
  const auto joins = static_cast<unsigned>((args.count + kMaskWarps - 1) / kMaskWarps);
  mask_join_kernel<<<joins, kMaskThreads, 0, queue>>>(args, partial, parts);
  return to_status(cudaGetLastError());
}

Status mask_pack_cuda(const MaskPackArgs& args, int device, void* stream) {
  const int64_t parts = parts_of(args.image_height), blocks = args.count * parts;
  if (blocks == 0) return {};
  if (blocks > kMaxBlocks || !fits(args.frame, args.image_height, args.words)) {
    return {"too many masks or pixels for one launch"};
  }
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return to_status(guard.error());
  const MaskResize resize = mask_resize(args.frame, kCudaFuses);
  const auto kernel = resize.copies ? mask_pack_kernel<true> : mask_pack_kernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, resize, parts);
  return to_status(cudaGetLastError());
}

}  // namespace p2s
