#include "p2s/nms.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "nms_isa.h"
#include "p2s/isa.h"

namespace p2s {
Status nms_cpu(const NmsArgs& args, const char** isa) {
  const int64_t words = (args.count + 63) / 64, padded = words * 64;
  const char* ran = nullptr;
  try {
    std::vector<float> columns(static_cast<size_t>(5 * padded));
    std::vector<uint64_t> alive(static_cast<size_t>(words), ~uint64_t{0});
    if (args.count < padded) alive.back() >>= padded - args.count;
    float* column[5];
    for (int c = 0; c < 5; ++c) column[c] = columns.data() + c * padded;
    for (int64_t i = 0; i < args.count; ++i) {
      const float* box = args.boxes + 4 * args.order[i];
      for (int c = 0; c < 4; ++c) column[c][i] = box[c];
      column[4][i] = (box[2] - box[0]) * (box[3] - box[1]);
    }
    *args.kept = P2S_DISPATCH(nms_greedy)({column[0], column[1], column[2], column[3], column[4], alive.data(), words,
                                           float_below(args.threshold)},
                                          args.keep, &ran);
  } catch (const std::exception&) {
    return {"out of memory"};
  }
  std::for_each(args.keep, args.keep + *args.kept, [&](int64_t& i) { i = args.order[i]; });
  std::fill(args.keep + *args.kept, args.keep + args.count, int64_t{-1});
  if (isa) *isa = ran;
  return {};
}

}  // namespace p2s
