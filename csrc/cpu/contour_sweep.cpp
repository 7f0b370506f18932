#include "p2s/contour_sweep.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace p2s {
namespace {

struct Box {
  int64_t x0, y0, x1, y1;
};

struct Run {
  int start, stop, label;  // columns [start, stop)
};

// The foreground of one map as bits, with a frame of one background pixel, and its regions as runs of rows.
class Regions {
 public:
  Regions(int64_t height, int64_t width)
      : height_(static_cast<int>(height)),
        width_(static_cast<int>(width)),
        words_(width_ / 64 + 1),
        bits_(static_cast<size_t>(height_) * words_) {}

  void reset() { std::fill(bits_.begin(), bits_.end(), uint64_t{0}); }
  void set(int y, int x) { word(y, x) |= uint64_t{1} << x % 64; }
  void clear(int y, int x) { word(y, x) &= ~(uint64_t{1} << x % 64); }
  bool has(int y, int x) const {
    if (y < 0 || y >= height_ || x < 0 || x >= width_) return false;
    return bits_[static_cast<size_t>(y) * words_ + x / 64] >> x % 64 & 1;
  }

  // 8-connected components in raster order of their first pixel.
  struct Component {
    Box box;
    int64_t pixels;
    int row, column;  // first pixel
  };
  const std::vector<Component>& components() {
    label(false, 1);
    found_.clear();
    number_.assign(parent_.size(), -1);
    for (int y = 0; y < height_; ++y) {
      for (int i = first_[y]; i < first_[y + 1]; ++i) {
        const Run& run = runs_[i];
        int& number = number_[root(run.label)];
        if (number < 0) {
          number = static_cast<int>(found_.size());
          found_.push_back({{run.start, y, run.stop, y + 1}, 0, y, run.start});
        }
        Component& c = found_[number];
        grow(c.box, run, y);
        c.pixels += run.stop - run.start;
      }
    }
    return found_;
  }

  // 4-connected background regions that do not reach the frame: their extents grown by one pixel, as the contour around
  // a hole runs over foreground.
  const std::vector<Box>& holes() {
    label(true, 0);
    holes_.clear();
    number_.assign(parent_.size(), -1);
    for (int y = 0; y < height_; ++y) {
      for (int i = first_[y]; i < first_[y + 1]; ++i) {
        const Run& run = runs_[i];
        const int r = root(run.label);
        if (r == root(0)) continue;
        if (number_[r] < 0) {
          number_[r] = static_cast<int>(holes_.size());
          holes_.push_back({run.start, y, run.stop, y + 1});
        }
        grow(holes_[number_[r]], run, y);
      }
    }
    for (Box& b : holes_) b = {b.x0 - 1, b.y0 - 1, b.x1 + 1, b.y1 + 1};
    return holes_;
  }

  // Twice the area of the polygon through the pixel centres of the outer border that starts at a component's first pixel
  // (Suzuki and Abe 1985).
  int64_t outline_area(int row, int column) const {
    static constexpr int kDx[8] = {1, 1, 0, -1, -1, -1, 0, 1}, kDy[8] = {0, 1, 1, 1, 0, -1, -1, -1};
    int from = -1;  // clockwise from the west
    for (int i = 0; i < 8 && from < 0; ++i) {
      const int d = (4 + i) % 8;
      if (has(row + kDy[d], column + kDx[d])) from = d;
    }
    if (from < 0) return 0;
    const int y1 = row + kDy[from], x1 = column + kDx[from];
    int y = row, x = column, back = from;
    int64_t twice = 0;
    while (true) {
      int d = back;
      do d = (d + 7) % 8;
      while (!has(y + kDy[d], x + kDx[d]));
      const int ny = y + kDy[d], nx = x + kDx[d];
      twice += static_cast<int64_t>(x) * ny - static_cast<int64_t>(nx) * y;
      if (ny == row && nx == column && y == y1 && x == x1) return twice < 0 ? -twice : twice;
      back = (d + 4) % 8;
      y = ny, x = nx;
    }
  }

 private:
  uint64_t& word(int y, int x) { return bits_[static_cast<size_t>(y) * words_ + x / 64]; }

  static void grow(Box& box, const Run& run, int y) {
    box.x0 = std::min<int64_t>(box.x0, run.start);
    box.x1 = std::max<int64_t>(box.x1, run.stop);
    box.y1 = y + 1;
  }

  int root(int label) {
    while (parent_[label] != label) label = parent_[label] = parent_[parent_[label]];
    return label;
  }

  void join(int a, int b) {
    a = root(a), b = root(b);
    parent_[std::max(a, b)] = std::min(a, b);
  }

  // Runs of the foreground, or of the background, joined with those of the row above that they overlap or, by `reach`,
  // touch at a corner. Background at the frame is joined with label 0.
  void label(bool background, int reach) {
    runs_.clear();
    first_.assign(1, 0);
    parent_.assign(1, 0);
    for (int y = 0; y < height_; ++y) {
      const int above = y ? first_[y - 1] : 0, here = first_[y];
      add_runs(y, background);
      first_.push_back(static_cast<int>(runs_.size()));
      int a = above;
      for (size_t i = static_cast<size_t>(here); i < runs_.size(); ++i) {
        Run& run = runs_[i];
        if (background && (y == 0 || y == height_ - 1 || run.start == 0 || run.stop == width_)) join(run.label, 0);
        while (a < here && runs_[a].stop + reach <= run.start) ++a;
        for (int j = a; j < here && runs_[j].start < run.stop + reach; ++j) join(run.label, runs_[j].label);
      }
    }
  }

  void add_runs(int y, bool background) {
    const uint64_t* row = bits_.data() + static_cast<size_t>(y) * words_;
    uint64_t before = 0;  // the pixel left of the word
    int start = background ? 0 : -1;
    for (int w = 0; w < words_; ++w) {
      uint64_t edges = row[w] ^ (row[w] << 1 | before);
      before = row[w] >> 63;
      for (; edges; edges &= edges - 1) {
        const int x = w * 64 + __builtin_ctzll(edges);
        if (start < 0) {
          start = x;
        } else {
          add_run(start, std::min(x, width_));
          start = -1;
        }
      }
    }
    if (start >= 0) add_run(start, width_);
  }

  void add_run(int start, int stop) {
    if (start >= stop) return;
    runs_.push_back({start, stop, static_cast<int>(parent_.size())});
    parent_.push_back(static_cast<int>(parent_.size()));
  }

  int height_, width_, words_;
  std::vector<uint64_t> bits_;
  std::vector<Run> runs_;
  std::vector<int> first_, parent_, number_;
  std::vector<Component> found_;
  std::vector<Box> holes_;
};

// Sides and areas count the last pixel in: x1 - x0 + 1.
double iou_plus1(const Box& a, const double* b) {
  const double w = std::min<double>(a.x1, b[2]) - std::max<double>(a.x0, b[0]) + 1;
  const double h = std::min<double>(a.y1, b[3]) - std::max<double>(a.y0, b[1]) + 1;
  if (a.x1 < a.x0 || a.y1 < a.y0 || b[2] < b[0] || b[3] < b[1]) return 0;
  const double inter = std::max(w, 0.0) * std::max(h, 0.0);
  const double area_a = static_cast<double>(a.x1 - a.x0 + 1) * static_cast<double>(a.y1 - a.y0 + 1);
  const double all = area_a + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - inter;
  return all > 0 ? inter / all : 0;
}

class Sweep {
 public:
  explicit Sweep(const ContourSweepArgs& args) : args_(args), regions_(args.height, args.width) {}

  void run(int64_t map) {
    const int64_t pixels = args_.height * args_.width;
    const int32_t* levels = args_.levels + map * pixels;
    sort_by_level(levels, pixels);
    regions_.reset();
    for (int64_t i = start_[1]; i < pixels; ++i) visit(order_[i], true);
    for (int64_t k = 0; k < args_.steps; ++k) {
      const bool same = k > 0 && start_[k] == start_[k + 1];
      double* iou = args_.iou + map * args_.steps + k;
      int64_t* found = args_.found + 4 * (map * args_.steps + k);
      if (same) {
        *iou = iou[-1];
        std::copy(found - 4, found, found);
        continue;
      }
      if (k > 0) {
        for (int64_t i = start_[k]; i < start_[k + 1]; ++i) visit(order_[i], false);
      }
      best_ = -1;
      if (start_[k + 1] == pixels) {
        offer(map, {args_.empty[0], args_.empty[1], args_.empty[2], args_.empty[3]});
      } else {
        measure(map);
      }
      *iou = best_;
      const int64_t box[4] = {box_.x0, box_.y0, box_.x1, box_.y1};
      std::copy(box, box + 4, found);
    }
  }

 private:
  // order_: pixels by level; those of level k lie in [start_[k], start_[k + 1]), all above the last step in the end.
  void sort_by_level(const int32_t* levels, int64_t pixels) {
    const auto level = [&](int64_t p) { return std::min<int64_t>(levels[p], args_.steps); };
    start_.assign(static_cast<size_t>(args_.steps + 2), 0);
    order_.resize(static_cast<size_t>(pixels));
    for (int64_t p = 0; p < pixels; ++p) ++start_[level(p) + 1];
    std::partial_sum(start_.begin(), start_.end(), start_.begin());
    next_.assign(start_.begin(), start_.end());
    for (int64_t p = 0; p < pixels; ++p) order_[next_[level(p)]++] = static_cast<int>(p);
  }

  void visit(int pixel, bool on) {
    const int y = pixel / static_cast<int>(args_.width), x = pixel % static_cast<int>(args_.width);
    on ? regions_.set(y, x) : regions_.clear(y, x);
  }

  void measure(int64_t map) {
    const auto& found = regions_.components();
    if (args_.rule == ContourRule::kAll) {
      for (const auto& c : found) offer(map, clamped(c.box));
      for (const Box& hole : regions_.holes()) offer(map, clamped(hole));
      return;
    }
    size_t chosen = 0;
    int64_t most = -1;
    for (size_t i = 0; i < found.size(); ++i) {
      const auto& c = found[i];
      if (args_.rule == ContourRule::kPixels) {
        if (c.pixels > most) most = c.pixels, chosen = i;
      } else if (found.size() > 1 && 2 * (c.box.x1 - c.box.x0 - 1) * (c.box.y1 - c.box.y0 - 1) >= most) {
        const int64_t area = regions_.outline_area(c.row, c.column);
        if (area >= most) most = area, chosen = i;
      }
    }
    offer(map, clamped(found[chosen].box));
  }

  Box clamped(Box b) const {
    if (!args_.clamp) return b;
    return {b.x0, b.y0, std::min(b.x1, args_.width - 1), std::min(b.y1, args_.height - 1)};
  }

  void offer(int64_t map, const Box& box) {
    double best = 0;
    for (int64_t i = args_.first[map]; i < args_.first[map + 1]; ++i) {
      best = std::max(best, iou_plus1(box, args_.boxes + 4 * i));
    }
    if (best > best_) best_ = best, box_ = box;
  }

  const ContourSweepArgs& args_;
  Regions regions_;
  std::vector<int64_t> start_, next_;
  std::vector<int> order_;
  double best_ = -1;
  Box box_{};
};

}  // namespace

Status contour_sweep_cpu(const ContourSweepArgs& args, int threads) {
  if (args.height * args.width > std::numeric_limits<int>::max()) return {"a map is too large"};
  std::atomic<bool> failed{false};
  parallel_for(args.count, 1, threads, [&](int64_t begin, int64_t end) {
    try {
      Sweep sweep(args);
      for (int64_t map = begin; map < end; ++map) sweep.run(map);
    } catch (const std::exception&) {
      failed = true;
    }
  });
  if (failed) return {"out of memory"};
  return {};
}

}  // namespace p2s
