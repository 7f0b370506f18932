// The CUDA kernels behind functions that ctypes can call; 0 is success.

#include "cuda_on_host.h"

#include <algorithm>

#include "../../csrc/cuda/compact.cuh"
#include "../../csrc/cuda/mask_measure.cuh"
#include "../../csrc/cuda/nms.cuh"

using namespace p2s;

namespace {

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

MaskFrame frame_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
}

unsigned parts_of(int64_t height) { return static_cast<unsigned>((height + kPartRows - 1) / kPartRows); }

}  // namespace

extern "C" {

int compact(const uint8_t* keep, int64_t* index, int64_t* count, int64_t n) {
  return guarded([&] { host::launch(1, kCompactThreads, compact_kernel, CompactArgs{keep, index, count, n}); });
}

int nms(const float* boxes, const int64_t* order, const int64_t* taking_part, int64_t* keep, int64_t* kept,
        uint64_t* alive, uint64_t* overlaps, int64_t count, int64_t words_at_once, double threshold) {
  const NmsArgs args{boxes, order, keep, kept, count, threshold};
  const NmsScratch scratch{taking_part, alive, overlaps, words_at_once};
  const int64_t words = (count + kNmsWord - 1) / kNmsWord;
  return guarded([&] {
    int64_t first = 0;
    do {
      const int64_t last = std::min(first + words_at_once, words);
      const dim3 blocks(static_cast<unsigned>(words), static_cast<unsigned>(last - first));
      host::launch(blocks, kNmsWord, nms_overlaps_kernel, args, scratch, first, float_below(threshold));
      host::launch(1, kNmsThreads, nms_visit_kernel, args, scratch, first, last, words);
      first = last;
    } while (first < words);
  });
}

int mask_measure(const float* low_res, int64_t* inner, int64_t* outer, int64_t* areas, int64_t* boxes, int64_t* partial,
                 int64_t count, const int64_t* sizes, float high, float low, float cut, int fused) {
  const MaskMeasureArgs args{low_res, inner, outer, areas, boxes, count, frame_of(sizes), high, low, cut};
  const MaskResize resize = mask_resize(args.frame, fused != 0);
  const unsigned parts = parts_of(args.frame.height), k = static_cast<unsigned>(count);
  return guarded([&] {
    host::launch(k * parts, kMaskThreads, resize.copies ? mask_measure_kernel<true> : mask_measure_kernel<false>, args,
                 resize, partial, int64_t{parts});
    host::launch((k + kMaskWarps - 1) / kMaskWarps, kMaskThreads, mask_join_kernel, args, partial, int64_t{parts});
  });
}

int mask_pack(const float* low_res, uint64_t* masks, int64_t count, const int64_t* sizes, float cut, int64_t height,
              int64_t words, int64_t x0, int64_t y0, int fused) {
  const MaskPackArgs args{low_res, masks, count, frame_of(sizes), cut, height, words, x0, y0};
  const MaskResize resize = mask_resize(args.frame, fused != 0);
  const unsigned parts = parts_of(height);
  return guarded([&] {
    host::launch(static_cast<unsigned>(count) * parts, kMaskThreads,
                 resize.copies ? mask_pack_kernel<true> : mask_pack_kernel<false>, args, resize, int64_t{parts});
  });
}

// first, second, w0, w1 of every output of an axis
void mask_taps(int64_t in, int64_t out, int fused, int32_t* indices, float* weights) {
  const MaskAxis axis = mask_axis(in, out, fused != 0);
  for (int32_t at = 0; at < out; ++at) {
    const MaskTap tap = mask_tap(axis, at);
    indices[2 * at] = tap.first;
    indices[2 * at + 1] = tap.second;
    weights[2 * at] = tap.w0;
    weights[2 * at + 1] = tap.w1;
  }
}
}
