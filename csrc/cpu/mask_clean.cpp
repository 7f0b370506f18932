#include "p2s/mask_clean.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "parallel.h"

namespace p2s {
namespace {

// The regions of a mask or of its background, as the runs of pixels in its rows: adjacent runs are joined in a
// union-find forest (Wu, Otoo, Suzuki 2009), where the parent of a run is never behind it.
class Regions {
 public:
  explicit Regions(const MaskCleanArgs& args) : args_(args) {}

  // Fills small holes. True if there were any.
  bool fill(uint64_t* mask) {
    find(mask, ~uint64_t{0});
    return flip_small(mask, -1);
  }

  // Removes small islands, but keeps the largest if all are small. True if there were any.
  bool remove(uint64_t* mask) {
    find(mask, 0);
    return flip_small(mask, only_small());
  }

 private:
  struct Run {
    int64_t row, begin, end;  // columns [begin, end)
    int64_t parent;
    int64_t area, first;  // of a root: pixels; the first of its blocks of 2 x 2 pixels, row by row
  };

  // The first column from `x` on whose bit differs from that of `flip`, or the width.
  int64_t next(const uint64_t* row, int64_t x, uint64_t flip) const {
    for (int64_t word = x / 64; word < args_.words; ++word) {
      uint64_t bits = row[word] ^ flip;
      if (word == x / 64) bits &= ~uint64_t{0} << (x % 64);
      if (bits) return std::min<int64_t>(args_.width, word * 64 + __builtin_ctzll(bits));
    }
    return args_.width;
  }

  int64_t root(int64_t run) {
    while (runs_[run].parent != run) run = runs_[run].parent = runs_[runs_[run].parent].parent;
    return run;
  }

  void join(int64_t a, int64_t b) {
    a = root(a), b = root(b);
    runs_[std::max(a, b)].parent = std::min(a, b);
  }

  void find(const uint64_t* mask, uint64_t flip) {
    runs_.clear();
    int64_t above = 0, above_end = 0;  // the runs of the row above
    for (int64_t y = 0; y < args_.height; ++y) {
      const uint64_t* row = mask + y * args_.words;
      const auto row_begin = static_cast<int64_t>(runs_.size());
      for (int64_t x = next(row, 0, flip); x < args_.width;) {
        const int64_t end = next(row, x, ~flip), index = static_cast<int64_t>(runs_.size());
        runs_.push_back({y, x, end, index, end - x, y / 2 * args_.width + x / 2});
        while (above < above_end && runs_[above].end < x) ++above;
        for (int64_t other = above; other < above_end && runs_[other].begin <= end; ++other) join(index, other);
        x = next(row, end, flip);
      }
      above = row_begin, above_end = static_cast<int64_t>(runs_.size());
    }
    for (size_t run = 0; run < runs_.size(); ++run) {
      const auto top = static_cast<size_t>(root(static_cast<int64_t>(run)));
      if (top == run) continue;
      runs_[top].area += runs_[run].area;
      runs_[top].first = std::min(runs_[top].first, runs_[run].first);
    }
  }

  bool small(const Run& root) const { return static_cast<double>(root.area) < args_.min_area; }

  // If all regions are small, the largest's root, of equally large ones that whose blocks come first; else -1.
  int64_t only_small() const {
    int64_t best = -1;
    for (size_t i = 0; i < runs_.size(); ++i) {
      const Run& run = runs_[i];
      if (run.parent != static_cast<int64_t>(i)) continue;
      if (!small(run)) return -1;
      const bool better = best < 0 || run.area > runs_[best].area ||
                          (run.area == runs_[best].area && run.first < runs_[best].first);
      if (better) best = static_cast<int64_t>(i);
    }
    return best;
  }

  bool flip_small(uint64_t* mask, int64_t kept) {
    bool any = false;
    for (size_t i = 0; i < runs_.size(); ++i) {
      const Run& run = runs_[i];
      const int64_t top = root(static_cast<int64_t>(i));
      if (!small(runs_[top])) continue;
      any = true;
      if (top == kept) continue;
      uint64_t* row = mask + run.row * args_.words;
      for (int64_t word = run.begin / 64; word * 64 < run.end; ++word) {
        uint64_t bits = ~uint64_t{0};
        if (word == run.begin / 64) bits &= ~uint64_t{0} << (run.begin % 64);
        if (run.end < (word + 1) * 64) bits &= ~(~uint64_t{0} << (run.end % 64));
        row[word] ^= bits;
      }
    }
    return any;
  }

  const MaskCleanArgs& args_;
  std::vector<Run> runs_;
};

}  // namespace

Status mask_clean_cpu(const MaskCleanArgs& args, int threads) {
  std::atomic<bool> failed{false};
  parallel_for(args.count, 1, threads, [&](int64_t begin, int64_t end) {
    try {
      Regions regions(args);
      for (int64_t i = begin; i < end; ++i) {
        uint64_t* mask = args.masks + i * args.height * args.words;
        const bool filled = regions.fill(mask);
        args.changed[i] = regions.remove(mask) || filled;
      }
    } catch (const std::exception&) {
      failed = true;
    }
  });
  return failed ? Status{"out of memory"} : Status{};
}

}  // namespace p2s
