// Included by nms_<isa>.cpp with P2S_ISA defined; see floats.h for what differs between the instruction sets.

#include "floats.h"
#include "nms_isa.h"
#include "words.h"

namespace p2s {
namespace {
inline namespace P2S_ISA {

// Which of the 64 boxes from `at` on have an IoU with box i above the threshold. 0 / 0 isn't.
inline uint64_t overlapping(const NmsBoxes& b, int64_t i, int64_t at) {
  const Floats zero = Floats::all(0.0f), area = Floats::all(b.areas[i]), threshold = Floats::all(b.threshold);
  const Floats x0 = Floats::all(b.x0[i]), x1 = Floats::all(b.x1[i]);
  const Floats y0 = Floats::all(b.y0[i]), y1 = Floats::all(b.y1[i]);
  uint64_t bits = 0;
  for (int64_t j = 0; j < 64; j += Floats::size) {
    const auto side = [&](Floats low, Floats high, const float* lows, const float* highs) {
      const Floats from = Floats::max(low, Floats::load(lows + at + j));
      return Floats::max(zero, Floats::min(high, Floats::load(highs + at + j)) - from);
    };
    const Floats inter = side(x0, x1, b.x0, b.x1) * side(y0, y1, b.y0, b.y1);
    bits |= (inter / (area + Floats::load(b.areas + at + j) - inter)).above(threshold) << j;
  }
  return bits;
}

}  // namespace P2S_ISA
}  // namespace

int64_t P2S_NAME(nms_greedy)(const NmsBoxes& boxes, int64_t* keep, const char** name) {
  int64_t kept = 0;
  for (int64_t word = 0; word < boxes.words; ++word) {
    while (boxes.alive[word] != 0) {
      const int64_t i = word * 64 + __builtin_ctzll(boxes.alive[word]);
      keep[kept++] = i;
      boxes.alive[word] &= boxes.alive[word] - 1;
      for (int64_t w = word; w < boxes.words; ++w) {
        if (boxes.alive[w] != 0) boxes.alive[w] &= ~overlapping(boxes, i, w * 64);
      }
    }
  }
  *name = kIsaName;
  return kept;
}

}  // namespace p2s
