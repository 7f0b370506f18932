#pragma once

#include "gated_attention_tiles.cuh"
#include "p2s/gated_attention.h"

// The blocks of gated attention, which every thread of a block, or a loop over its threads and warps on the host, runs
// in the same order. Between two phases that share a tile there is a barrier.
namespace p2s {
namespace {

// How numbers of a type are multiplied; of each of its tiles a forward warp has kForwardTiles.
template <class T>
struct Plan {
  using Forward = TensorProducts<T>;
  using Backward = TensorProducts<T>;
  static constexpr int kForwardTiles = 2;
};
template <>
struct Plan<Float32> {
  using Forward = PlainProducts<8>;
  using Backward = PlainProducts<4>;
  static constexpr int kForwardTiles = 1;
};

template <class T>
constexpr int kForwardRows = Plan<T>::Forward::kRows * Plan<T>::kForwardTiles;  // of a warp
template <class T>
constexpr int kBackwardRows = Plan<T>::Backward::kRows;  // or keys

// What all kernels of a call share. Matrices of an item have adjacent channels.
struct Call {
  GatedAttentionArgs a;
  const float* mean_map;  // (batch, n)
  float scale;            // 1 / sqrt(d)
};

struct Gradients {
  GatedAttentionGradArgs a;
  float* delta;        // (batch, heads, rows): sum over the head's channels of out * grad_out
  float* grad_logits;  // (batch, queries, n): what the maps add to the gradient of each head's scaled logits
};

// What a block of one head works on, `per_warp` rows or keys a warp. The last block of a head may have too few for all
// its warps; which of them go without changes from head to head, or one scheduler would always have more to do.
struct Part {
  int64_t item, head, channel;  // `channel`: the head's first
  int first;                    // row or key
  int per_warp, turn;

  P2S_TILE Part(const GatedAttentionArgs& a, int64_t index, int64_t count, int per_warp) : per_warp(per_warp) {
    const int64_t per = kWarps * per_warp, tiles = (count + per - 1) / per;
    first = static_cast<int>(index % tiles * per);
    head = index / tiles % a.heads;
    item = index / tiles / a.heads;
    channel = a.dim / a.heads * head;
    turn = static_cast<int>(index / tiles % kWarps);
  }

  P2S_TILE int first_of(int warp) const { return first + (warp + turn) % kWarps * per_warp; }
};

// Of a block that multiplies with P.
template <class P, int STEPS>
struct Shared : P::template Space<STEPS> {
  static constexpr int kTile = P::kTile, kSides = kThreads / kTile;
  using Shape = p2s::Shape<typename P::Type, STEPS>;

  alignas(16) typename P::Type::Element x[2][kTile * Shape::kLine];  // k or q, this tile and the next
  alignas(16) typename P::Type::Element y[2][kTile * Shape::kLine];  // v or grad_out
  float gate[2][kTile];
  float lse[kTile], delta[kTile], sides[kSides][kTile];
};

template <class T, int STEPS>
using ForwardShared = Shared<typename Plan<T>::Forward, STEPS>;
template <class T, int STEPS>
using BackwardShared = Shared<typename Plan<T>::Backward, STEPS>;

// Begins to copy rows first, ... of `m` into a tile.
template <class S, class T>
P2S_TILE void stage(typename T::Element* tile, const Matrix<T>& m, int first, int thread) {
  constexpr int parts = S::Shape::kParts, at_once = kThreads / parts;
  const int channel = thread % parts * kInChunk<T>;
  const auto* from = m.at + (first + thread / parts) * m.stride + channel;
  for (int row = thread / parts; row < S::kTile; row += at_once, from += at_once * m.stride) {
    const bool there = first + row < m.limit;
    Block::copy(reinterpret_cast<Chunk*>(tile + row * S::Shape::kLine + channel),
                reinterpret_cast<const Chunk*>(there ? from : m.at), there);
  }
}

// compute(first row, buffer) for each tile of `count` rows, while stage(first row, buffer, thread) fetches the next one.
template <int TILE, class S, class C>
P2S_TILE void for_tiles(int count, S stage, C compute) {
  if (count == 0) return;
  Block::threads([&](int thread) { stage(0, 0, thread); });
  Block::commit();
  for (int start = 0, buffer = 0; start < count; start += TILE, buffer ^= 1) {
    if (start + TILE < count) Block::threads([&](int thread) { stage(start + TILE, buffer ^ 1, thread); });
    Block::commit();
    Block::wait();
    compute(start, buffer);
    Block::barrier();
  }
}

// compute(warp, first key, buffer, keys that are there) for each tile of the head's keys, values and gates.
template <class P, int STEPS, class C>
P2S_TILE void for_keys(Shared<P, STEPS>& shared, const Call& c, const Part& part, C compute) {
  using S = Shared<P, STEPS>;
  const GatedAttentionArgs& a = c.a;
  const auto n = static_cast<int>(a.n);
  const Matrix<typename P::Type> k(a.k, part.item * a.k_item + part.channel, a.k_row, n);
  const Matrix<typename P::Type> v(a.v, part.item * a.v_item + part.channel, a.v_row, n);
  const auto fetch = [&](int start, int buffer, int thread) {
    stage<S>(shared.x[buffer], k, start, thread);
    stage<S>(shared.y[buffer], v, start, thread);
    if (thread >= S::kTile) return;
    const int key = start + thread;
    shared.gate[buffer][thread] = !a.gate ? 1.0f : key < n ? c.mean_map[part.item * n + key] : 0.0f;
  };
  for_tiles<S::kTile>(n, fetch, [&](int start, int buffer) {
    Block::barrier();
    Block::warps([&](int warp) { compute(warp, start, buffer, n - start < S::kTile ? n - start : S::kTile); });
  });
}

// Maps and their mean for kBackwardRows keys of an item.
template <class T>
P2S_TILE void maps_tile(const Call& c, float* mean_map, int64_t item, int first) {
  using P = typename Plan<T>::Backward;
  const GatedAttentionArgs& a = c.a;
  const float scale = -c.scale / static_cast<float>(a.heads) * kLog2e;
  const auto queries = static_cast<int>(a.queries);
  Lanes<typename P::PerRow> total;
  Warp::each([&](int lane) { total[lane] = {}; });
  for (int query0 = 0; query0 < queries; query0 += 8) {
    Lanes<typename P::Sums> logits;
    Warp::each([&](int lane) { logits[lane] = {}; });
    for (int64_t channel = 0; channel < a.dim; channel += 16) {
      const Matrix<T> keys(a.k, item * a.k_item + channel, a.k_row, a.n);
      const Matrix<T> asked(a.q, item * a.q_item + (a.n - queries) * a.q_row + channel, a.q_row, queries);
      P::add_channels(logits, keys, first, asked, query0);
    }
    Warp::each([&](int lane) {
      for (int i = 0; i < P::kLaneSums; ++i) {
        const int query = query0 + P::column(lane, i), key = first + P::row(lane, P::row_of(i));
        if (query >= queries || key >= a.n) continue;
        const float probability = 1.0f / (1.0f + power_of_two(logits[lane].x[i] * scale));
        a.maps[(item * queries + query) * a.n + key] = probability;
        total[lane].x[P::row_of(i)] += probability;
      }
    });
  }
  Warp::row_sum<P::kAcross>(total);
  Warp::each([&](int lane) {
    for (int i = 0; i < P::kLaneRows; ++i) {
      const int key = first + P::row(lane, i);
      if (lane % P::kAcross == 0 && key < a.n) {
        mean_map[item * a.n + key] = total[lane].x[i] / static_cast<float>(queries);
      }
    }
  });
}

template <class T, int STEPS>
P2S_TILE void forward_block(ForwardShared<T, STEPS>& shared, const Call& c, int64_t index) {
  const GatedAttentionArgs& a = c.a;
  const Part part(a, index, a.rows, kForwardRows<T>);
  const auto rows = static_cast<int>(a.rows);
  const Matrix<T> q(a.q, part.item * a.q_item + a.first_row * a.q_row + part.channel, a.q_row, rows);
  Block::PerWarp<ForwardTile<typename Plan<T>::Forward, STEPS, Plan<T>::kForwardTiles>> tiles;
  Block::warps([&](int warp) { tiles[warp].begin(q, part.first_of(warp), shared, warp); });
  for_keys(shared, c, part, [&](int warp, int, int buffer, int keys) {
    if (part.first_of(warp) >= rows) return;
    tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.gate[buffer], keys, c.scale * kLog2e);
  });
  Block::warps([&](int warp) {
    tiles[warp].end(a.out, part.item * a.rows * a.dim + part.channel, a.dim,
                    a.lse + (part.item * a.heads + part.head) * a.rows, part.first_of(warp), rows);
  });
}

template <class T, int STEPS>
P2S_TILE void keys_block(BackwardShared<T, STEPS>& shared, const Call& c, const Gradients& g, int64_t index) {
  using S = BackwardShared<T, STEPS>;
  const GatedAttentionArgs& a = c.a;
  const Part part(a, index, a.n, kBackwardRows<T>);
  const auto n = static_cast<int>(a.n), rows = static_cast<int>(a.rows);
  const int64_t output = part.item * a.rows * a.dim + part.channel, scores = (part.item * a.heads + part.head) * a.rows;
  const Matrix<T> k(a.k, part.item * a.k_item + part.channel, a.k_row, n);
  const Matrix<T> v(a.v, part.item * a.v_item + part.channel, a.v_row, n);
  const Matrix<T> q(a.q, part.item * a.q_item + a.first_row * a.q_row + part.channel, a.q_row, rows);
  const Matrix<T> out(a.out, output, a.dim, rows), above(g.a.grad_out, output, a.dim, rows);
  Block::PerWarp<KeysTile<typename Plan<T>::Backward, STEPS>> tiles;
  Block::warps([&](int warp) {
    const float* gates = a.gate ? c.mean_map + part.item * n : nullptr;
    tiles[warp].begin(k, v, gates, part.first_of(warp), shared, warp);
  });
  const auto fetch = [&](int start, int buffer, int thread) {
    stage<S>(shared.x[buffer], q, start, thread);
    stage<S>(shared.y[buffer], above, start, thread);
  };
  for_tiles<S::kTile>(rows, fetch, [&](int start, int buffer) {
    Block::threads([&](int thread) {
      constexpr int parts = S::Shape::kParts / S::kSides;
      const int row = start + thread % S::kTile, side = thread / S::kTile;
      float sum = 0.0f;
      for (int i = 0; row < rows && i < parts; ++i) {
        const int channel = (side * parts + i) * kInChunk<T>;
        const Chunk x = out.chunk(row, channel), y = above.chunk(row, channel);
        for (int j = 0; j < kInChunk<T>; ++j) sum += value<T>(x, j) * value<T>(y, j);
      }
      shared.sides[side][thread % S::kTile] = sum;
    });
    Block::barrier();
    Block::threads([&](int thread) {
      if (thread >= S::kTile) return;
      const int row = start + thread;
      float sum = shared.sides[0][thread];
      for (int side = 1; side < S::kSides; ++side) sum += shared.sides[side][thread];
      shared.delta[thread] = sum;
      shared.lse[thread] = row < rows ? a.lse[scores + row] * kLog2e : INFINITY;
      if (part.first == 0 && row < rows) g.delta[scores + row] = sum;
    });
    Block::barrier();
    Block::warps([&](int warp) {
      if (part.first_of(warp) >= n) return;
      tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.lse, shared.delta,
                      rows - start < S::kTile ? rows - start : S::kTile, c.scale * kLog2e);
    });
  });
  Block::warps([&](int warp) {
    float* grad_gate = a.gate ? g.a.grad_gate + (part.item * a.heads + part.head) * n : nullptr;
    tiles[warp].end(g.a.grad_k, g.a.grad_v, part.item * n * a.dim + part.channel, a.dim, grad_gate,
                    part.first_of(warp), n, c.scale);
  });
}

// A chunk of one key's channels: what the maps add to grad_k; the first also leaves grad_logits.
template <class T>
P2S_TILE void maps_gradient(const Call& c, const Gradients& g, int64_t index) {
  constexpr int count = kInChunk<T>;
  const GatedAttentionArgs& a = c.a;
  const int64_t parts = a.dim / count, channel = index % parts * count, key = index / parts % a.n;
  const int64_t item = index / parts / a.n;
  float to_mean = 0.0f;
  for (int64_t head = 0; a.gate && head < a.heads; ++head) to_mean += g.a.grad_gate[(item * a.heads + head) * a.n + key];
  if (a.gate) to_mean /= static_cast<float>(a.queries);
  const Matrix<T> asked(a.q, item * a.q_item + (a.n - a.queries) * a.q_row, a.q_row, a.queries);
  float change[count] = {};
  for (int64_t query = 0; query < a.queries; ++query) {
    const int64_t at = (item * a.queries + query) * a.n + key;
    const float probability = a.maps[at];
    const float slope = (g.a.grad_maps[at] + to_mean) * probability * (1.0f - probability) / static_cast<float>(a.heads);
    if (channel == 0) g.grad_logits[at] = slope;
    const Chunk x = asked.chunk(static_cast<int>(query), channel);
    for (int i = 0; i < count; ++i) change[i] += slope * value<T>(x, i);
  }
  auto* to = static_cast<typename T::Element*>(g.a.grad_k) + (item * a.n + key) * a.dim + channel;
  const Chunk before = *reinterpret_cast<const Chunk*>(to);
  for (int i = 0; i < count; ++i) change[i] = value<T>(before, i) + change[i] * c.scale;
  *reinterpret_cast<Chunk*>(to) = chunk_of<T>(change);
}

template <class T, int STEPS>
P2S_TILE void rows_block(BackwardShared<T, STEPS>& shared, const Call& c, const Gradients& g, int64_t index) {
  using P = typename Plan<T>::Backward;
  const GatedAttentionArgs& a = c.a;
  const Part part(a, index, a.n, kBackwardRows<T>);
  const auto n = static_cast<int>(a.n), rows = static_cast<int>(a.rows), queries = static_cast<int>(a.queries);
  const int64_t scores = (part.item * a.heads + part.head) * a.rows;
  const Matrix<T> q(a.q, part.item * a.q_item + part.channel, a.q_row, n);
  const Matrix<T> above(g.a.grad_out, part.item * rows * a.dim + part.channel, a.dim, rows);
  Block::PerWarp<RowsTile<P, STEPS>> tiles;
  Block::warps([&](int warp) {
    const int first = part.first_of(warp);
    tiles[warp].begin(q, first, above, a.lse + scores, g.delta + scores, first - static_cast<int>(a.first_row), shared,
                      warp);
  });
  for_keys(shared, c, part, [&](int warp, int start, int buffer, int keys) {
    const int first = part.first_of(warp);
    if (first >= n) return;
    const auto maps = [&](int lane, int i, int key) {
      const int query = first + P::row(lane, i) - (n - queries);
      return query < 0 || query >= queries ? 0.0f : g.grad_logits[(part.item * queries + query) * n + start + key];
    };
    tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.gate[buffer], keys, c.scale * kLog2e,
                    first + part.per_warp > n - queries, maps);
  });
  Block::warps([&](int warp) {
    store<P, STEPS>(g.a.grad_q, part.item * n * a.dim + part.channel, a.dim, part.first_of(warp), n,
                    tiles[warp].to_q, [&](int, int) { return c.scale; });
  });
}

}  // namespace
}  // namespace p2s
