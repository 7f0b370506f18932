#pragma once

#include "p2s/host_device.h"
#include "p2s/nms.h"
#include "warp.cuh"

namespace p2s {
namespace {

constexpr int kNmsWord = 64;

struct NmsBox {
  float x0, y0, x1, y1, area;
};

P2S_HD NmsBox nms_box(const float* box) {
  return {box[0], box[1], box[2], box[3], product(box[2] - box[0], box[3] - box[1])};
}

// 0 / 0 isn't above any threshold.
P2S_HD bool nms_overlap(const NmsBox& a, const NmsBox& b, float threshold) {
  const float width = fmaxf(0.0f, fminf(a.x1, b.x1) - fmaxf(a.x0, b.x0));
  const float height = fmaxf(0.0f, fminf(a.y1, b.y1) - fmaxf(a.y0, b.y0));
  const float inter = product(width, height);
  return quotient(inter, a.area + b.area - inter) > threshold;
}

// Which of a word's 64 boxes are among the first n.
P2S_HD uint64_t nms_valid(int64_t word, int64_t n) {
  const int64_t left = n - word * kNmsWord;
  return left <= 0 ? 0 : left < kNmsWord ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
}

P2S_HD int64_t nms_taking_part(const NmsArgs& args, const NmsScratch& scratch) {
  if (scratch.taking_part == nullptr) return args.count;
  const int64_t n = *scratch.taking_part;
  return n < 0 ? 0 : n < args.count ? n : args.count;
}

// Block (r, w): the 64 boxes of word r against those of word first + w that come after them.
__global__ void __launch_bounds__(kNmsWord)
    nms_overlaps_kernel(NmsArgs args, NmsScratch scratch, int64_t first, float threshold) {
  const int64_t row = blockIdx.x, word = first + blockIdx.y, n = nms_taking_part(args, scratch);
  if (row > word || word * kNmsWord >= n || (row < first && scratch.alive[row] == 0)) return;
  __shared__ NmsBox later[kNmsWord];
  const int lane = threadIdx.x;
  const int64_t i = row * kNmsWord + lane, j = word * kNmsWord + lane;
  if (j < n) later[lane] = nms_box(args.boxes + 4 * args.order[j]);
  __syncthreads();
  if (i >= n) return;
  const NmsBox box = nms_box(args.boxes + 4 * args.order[i]);
  const int end = n - word * kNmsWord < kNmsWord ? static_cast<int>(n - word * kNmsWord) : kNmsWord;
  uint64_t bits = 0;
  for (int k = row == word ? lane + 1 : 0; k < end; ++k) {
    bits |= static_cast<uint64_t>(nms_overlap(box, later[k], threshold)) << k;
  }
  scratch.overlaps[blockIdx.y * (gridDim.x * int64_t{kNmsWord}) + i] = bits;
}

constexpr int kNmsThreads = 1024;

// One block visits the boxes of words [first, last), those of the words before being settled.
__global__ void __launch_bounds__(kNmsThreads)
    nms_visit_kernel(NmsArgs args, NmsScratch scratch, int64_t first, int64_t last, int64_t words) {
  static_assert(kNmsThreads / kWarp == kWarp, "a warp joins one word of every warp");
  __shared__ uint64_t removed_by[kWarp];
  __shared__ int64_t kept;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n = nms_taking_part(args, scratch);
  if (threadIdx.x == 0) kept = first == 0 ? 0 : *args.kept;
  for (int64_t word = first; word < last && word * kNmsWord < n; ++word) {
    const uint64_t* overlaps = scratch.overlaps + (word - first) * words * kNmsWord;
    uint64_t removed = 0;
    for (int64_t i = threadIdx.x; i < word * kNmsWord; i += kNmsThreads) {
      if (scratch.alive[i / kNmsWord] >> (i % kNmsWord) & 1) removed |= overlaps[i];
    }
    removed = warp_or(removed);
    if (lane == 0) removed_by[warp] = removed;
    __syncthreads();
    if (warp == 0) {
      const uint64_t low = overlaps[word * kNmsWord + lane], high = overlaps[word * kNmsWord + kWarp + lane];
      uint64_t alive = nms_valid(word, n) & ~warp_or(removed_by[lane]);
      for (uint64_t left = alive; left != 0;) {
        const int i = __ffsll(static_cast<long long>(left)) - 1;
        alive &= ~__shfl_sync(kAllLanes, i < kWarp ? low : high, i % kWarp);
        left = alive & (~uint64_t{1} << i);
      }
      for (int i = lane; i < kNmsWord; i += kWarp) {
        const uint64_t bit = uint64_t{1} << i;
        if (alive & bit) args.keep[kept + __popcll(alive & (bit - 1))] = args.order[word * kNmsWord + i];
      }
      __syncwarp();
      if (lane == 0) {
        scratch.alive[word] = alive;
        kept += __popcll(alive);
      }
    }
    __syncthreads();
  }
  __syncthreads();
  if (threadIdx.x == 0) *args.kept = kept;
  if (last < words) return;
  for (int64_t i = kept + threadIdx.x; i < args.count; i += kNmsThreads) args.keep[i] = -1;
}

}  // namespace
}  // namespace p2s
