#pragma once

#include "p2s/gated_attention.h"
#include "warp_mma.cuh"

// The tiles of gated attention for 16-bit q, k and v, which every thread of a block, or a loop over its threads and warps
// on the host, runs in the same order. Between two phases that share a tile there is a barrier.
namespace p2s {
namespace {

constexpr int kRows = 16, kTile = 64, kForwardBlocks = 2;  // a warp's rows, a block's, a forward warp's tiles of rows
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

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

// One head of a matrix of an item; rows 0 to limit - 1 are there, others are 0.
struct Matrix {
  const uint16_t* at;
  int64_t stride;
  int limit;
};

P2S_TILE Matrix matrix(const void* data, int64_t offset, int64_t stride, int64_t limit) {
  return {static_cast<const uint16_t*>(data) + offset, stride, static_cast<int>(limit)};
}

// What a block of one head and `per` rows or keys works on.
struct Part {
  int64_t item, head, channel;  // `channel`: the head's first
  int first;                    // row or key

  P2S_TILE Part(const GatedAttentionArgs& a, int64_t index, int64_t count, int per) {
    const int64_t tiles = (count + per - 1) / per;
    first = static_cast<int>(index % tiles) * per;
    head = index / tiles % a.heads;
    item = index / tiles / a.heads;
    channel = a.dim / a.heads * head;
  }
};

// Tiles in shared memory: kTile rows of 16 STEPS channels; the 8 extra put 8 rows on different banks.
template <int STEPS>
struct Shape {
  static constexpr int kWidth = 16 * STEPS, kLine = kWidth + 8, kSize = kTile * kLine;
};

// Begins to copy rows first, ... of `m` into a tile.
template <int STEPS>
P2S_TILE void stage(uint16_t* tile, const Matrix& m, int first, int thread) {
  constexpr int parts = 2 * STEPS;
  for (int i = thread; i < kTile * parts; i += kThreads) {
    const int row = i / parts, part = i % parts;
    const bool there = first + row < m.limit;
    const uint16_t* from = m.at + (there ? (first + row) * m.stride + part * 8 : 0);
    Block::copy(reinterpret_cast<Chunk*>(tile + row * Shape<STEPS>::kLine + part * 8),
                reinterpret_cast<const Chunk*>(from), there);
  }
}

// compute(first row, buffer) for each tile of `count` rows, while stage(first row, buffer, thread) fetches the next one.
template <class S, class C>
P2S_TILE void for_tiles(int count, S stage, C compute) {
  if (count == 0) return;
  Block::threads([&](int thread) { stage(0, 0, thread); });
  Block::commit();
  for (int start = 0, buffer = 0; start < count; start += kTile, buffer ^= 1) {
    if (start + kTile < count) Block::threads([&](int thread) { stage(start + kTile, buffer ^ 1, thread); });
    Block::commit();
    Block::wait();
    compute(start, buffer);
    Block::barrier();
  }
}

// Rows first, ... of `m` as left factors.
template <class W, int STEPS>
P2S_TILE void load_left(typename W::template Lanes<Left> (&left)[STEPS], const Matrix& m, int first) {
  for (int step = 0; step < STEPS; ++step) {
    W::each([&](int lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = first + lane / 4 + i % 2 * 8, channel = step * 16 + lane % 4 * 2 + i / 2 * 8;
        const uint16_t* at = m.at + row * m.stride + channel;
        left[step][lane].x[i] = row >= 0 && row < m.limit ? *reinterpret_cast<const uint32_t*>(at) : 0;
      }
    });
  }
}

// sums[i] (16 x 8) = left (16 rows) times rows row + 8 i, ... of the tile, over all channels.
template <class W, class T, int STEPS, int COUNT>
P2S_TILE void against_rows(typename W::template Lanes<Sums> (&sums)[COUNT],
                           typename W::template Lanes<Left> (&left)[STEPS], const uint16_t* tile, int row) {
  for (int i = 0; i < COUNT; ++i) {
    W::each([&](int lane) { sums[i][lane] = Sums{}; });
    for (int step = 0; step < STEPS; step += 2) {
      typename W::template Lanes<Words> words;
      W::template load<false>(words, [&](int lane) {
        return tile + (row + 8 * i + lane % 8) * Shape<STEPS>::kLine + step * 16 + lane / 8 * 8;
      });
      for (int part = 0; part < 2; ++part) {
        typename W::template Lanes<Right> right;
        W::each([&](int lane) {
          right[lane] = {{words[lane].x[2 * part], words[lane].x[2 * part + 1]}};
        });
        W::template multiply<T>(sums[i], left[step + part], right);
      }
    }
  }
}

// sums (16 x channels) += left (16 x 16) times rows row to row + 15 of the tile.
template <class W, class T, int STEPS>
P2S_TILE void add_rows(typename W::template Lanes<Sums> (&sums)[2 * STEPS], typename W::template Lanes<Left>& left,
                       const uint16_t* tile, int row) {
  for (int step = 0; step < STEPS; ++step) {
    typename W::template Lanes<Words> words;
    W::template load<true>(words, [&](int lane) {
      return tile + (row + lane % 16) * Shape<STEPS>::kLine + step * 16 + lane / 16 * 8;
    });
    for (int part = 0; part < 2; ++part) {
      typename W::template Lanes<Right> right;
      W::each([&](int lane) {
        right[lane] = {{words[lane].x[2 * part], words[lane].x[2 * part + 1]}};
      });
      W::template multiply<T>(sums[2 * step + part], left, right);
    }
  }
}

// Two sums (16 x 8 each) as the left factor (16 x 16) of the next product.
template <class W, class T>
P2S_TILE void as_left(typename W::template Lanes<Left>& left, typename W::template Lanes<Sums>& low,
                      typename W::template Lanes<Sums>& high) {
  W::each([&](int lane) {
    const float *a = low[lane].x, *b = high[lane].x;
    left[lane] = {{pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(b[0], b[1]), pack<T>(b[2], b[3])}};
  });
}

// Rows first, ... of a contiguous (rows, stride) matrix; `factor` of each of the lane's two rows.
template <class W, class T, int STEPS, class F>
P2S_TILE void store(void* data, int64_t offset, int64_t stride, int first, int limit,
                    typename W::template Lanes<Sums> (&sums)[2 * STEPS], F factor) {
  uint16_t* to = static_cast<uint16_t*>(data) + offset;
  W::each([&](int lane) {
    for (int i = 0; i < 2; ++i) {
      const int row = first + lane / 4 + 8 * i;
      if (row >= limit) continue;
      const float by = factor(lane, i);
      for (int n = 0; n < 2 * STEPS; ++n) {
        const float* x = sums[n][lane].x + 2 * i;
        *reinterpret_cast<uint32_t*>(to + row * stride + n * 8 + lane % 4 * 2) = pack<T>(x[0] * by, x[1] * by);
      }
    }
  });
}

// 16 * BLOCKS rows of the output.
template <class W, class T, int STEPS, int BLOCKS>
struct ForwardTile {
  static constexpr int kKeys = 32;  // a step of the running softmax
  template <class X>
  using Lanes = typename W::template Lanes<X>;

  Lanes<Left> q[BLOCKS][STEPS];
  Lanes<Sums> out[BLOCKS][2 * STEPS];
  Lanes<RowPair> top[BLOCKS], total[BLOCKS];

  P2S_TILE void begin(const Matrix& rows, int first) {
    P2S_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      load_left<W, STEPS>(q[block], rows, first + block * kRows);
      W::each([&](int lane) {
        for (int n = 0; n < 2 * STEPS; ++n) out[block][n][lane] = Sums{};
        top[block][lane] = {{-INFINITY, -INFINITY}};
        total[block][lane] = RowPair{};
      });
    }
  }

  // `keys` of the tiles' keys are there; gate: their factors. scale: of the logits, for powers of two.
  P2S_TILE void add(const uint16_t* k, const uint16_t* v, const float* gate, int keys, float scale) {
    for (int start = 0; start < keys; start += kKeys) {
      P2S_UNROLL
      for (int block = 0; block < BLOCKS; ++block) {
        Lanes<Sums> weights[kKeys / 8];
        against_rows<W, T>(weights, q[block], k, start);
        Lanes<RowPair> highest;
        W::each([&](int lane) {
          highest[lane] = top[block][lane];
          for (int i = 0; i < kKeys / 2; ++i) {
            float& x = weights[i / 4][lane].x[i % 4];
            x = start + i / 4 * 8 + lane % 4 * 2 + i % 2 < keys ? x * scale : -INFINITY;
            highest[lane].x[i % 4 / 2] = fmaxf(highest[lane].x[i % 4 / 2], x);
          }
        });
        W::row_max(highest);
        W::each([&](int lane) {
          float shrink[2], sum[2] = {};
          for (int i = 0; i < 2; ++i) shrink[i] = power_of_two(top[block][lane].x[i] - highest[lane].x[i]);
          for (int i = 0; i < kKeys / 2; ++i) {
            float& x = weights[i / 4][lane].x[i % 4];
            x = power_of_two(x - highest[lane].x[i % 4 / 2]);
            sum[i % 4 / 2] += x;
            x *= gate[start + i / 4 * 8 + lane % 4 * 2 + i % 2];
          }
          for (int i = 0; i < 2; ++i) total[block][lane].x[i] = total[block][lane].x[i] * shrink[i] + sum[i];
          for (int n = 0; n < 2 * STEPS; ++n) {
            for (int i = 0; i < 4; ++i) out[block][n][lane].x[i] *= shrink[i / 2];
          }
          top[block][lane] = highest[lane];
        });
        for (int i = 0; i < kKeys / 16; ++i) {
          Lanes<Left> left;
          as_left<W, T>(left, weights[2 * i], weights[2 * i + 1]);
          add_rows<W, T, STEPS>(out[block], left, v, start + 16 * i);
        }
      }
    }
  }

  P2S_TILE void end(void* to, int64_t offset, int64_t stride, float* lse, int first, int limit) {
    P2S_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      W::row_sum(total[block]);
      const int row = first + block * kRows;
      store<W, T, STEPS>(to, offset, stride, row, limit, out[block],
                         [&](int lane, int i) { return 1.0f / total[block][lane].x[i]; });
      W::each([&](int lane) {
        for (int i = 0; i < 2; ++i) {
          const int mine = row + lane / 4 + 8 * i;
          if (lane % 4 == 0 && mine < limit) lse[mine] = (top[block][lane].x[i] + log2f(total[block][lane].x[i])) * kLn2;
        }
      });
    }
  }
};

// Gradients of 16 keys and their values.
template <class W, class T, int STEPS>
struct KeysTile {
  template <class X>
  using Lanes = typename W::template Lanes<X>;

  Lanes<Left> k[STEPS], v[STEPS];
  Lanes<Sums> to_k[2 * STEPS], to_v[2 * STEPS];
  Lanes<RowPair> gate;

  P2S_TILE void begin(const Matrix& keys, const Matrix& values, const float* gates, int first) {
    load_left<W, STEPS>(k, keys, first);
    load_left<W, STEPS>(v, values, first);
    W::each([&](int lane) {
      for (int n = 0; n < 2 * STEPS; ++n) to_k[n][lane] = to_v[n][lane] = Sums{};
      for (int i = 0; i < 2; ++i) {
        const int key = first + lane / 4 + 8 * i;
        gate[lane].x[i] = gates == nullptr ? 1.0f : key < keys.limit ? gates[key] : 0.0f;
      }
    });
  }

  // Tiles of `rows` rows of q and of the output's gradient; lse: times log2(e), and infinity past the end, whose
  // weights are 0; delta.
  P2S_TILE void add(const uint16_t* q, const uint16_t* grad_out, const float* lse, const float* delta, int rows,
                    float scale) {
    for (int start = 0; start < rows; start += 16) {
      Lanes<Sums> weights[2], slopes[2];
      against_rows<W, T>(weights, k, q, start);
      against_rows<W, T>(slopes, v, grad_out, start);
      W::each([&](int lane) {
        for (int i = 0; i < 8; ++i) {
          const int row = start + i / 4 * 8 + lane % 4 * 2 + i % 2;
          float &weight = weights[i / 4][lane].x[i % 4], &slope = slopes[i / 4][lane].x[i % 4];
          weight = power_of_two(weight * scale - lse[row]);
          slope = weight * (slope * gate[lane].x[i % 4 / 2] - delta[row]);
        }
      });
      Lanes<Left> left;
      as_left<W, T>(left, weights[0], weights[1]);
      add_rows<W, T, STEPS>(to_v, left, grad_out, start);
      as_left<W, T>(left, slopes[0], slopes[1]);
      add_rows<W, T, STEPS>(to_k, left, q, start);
    }
  }

  // scale: of the logits; grad_gate (keys), or null without a gate.
  P2S_TILE void end(void* grad_k, void* grad_v, int64_t offset, int64_t stride, float* grad_gate, int first, int limit,
                    float scale) {
    if (grad_gate != nullptr) {
      Lanes<RowPair> sum;
      W::each([&](int lane) {
        sum[lane] = RowPair{};
        for (int n = 0; n < 2 * STEPS; ++n) {
          for (int i = 0; i < 4; ++i) {
            sum[lane].x[i / 2] += to_v[n][lane].x[i] * half<T>(v[n / 2][lane].x[n % 2 * 2 + i / 2], i);
          }
        }
      });
      W::row_sum(sum);
      W::each([&](int lane) {
        for (int i = 0; i < 2; ++i) {
          const int key = first + lane / 4 + 8 * i;
          if (lane % 4 == 0 && key < limit) grad_gate[key] = sum[lane].x[i];
        }
      });
    }
    store<W, T, STEPS>(grad_k, offset, stride, first, limit, to_k, [&](int, int) { return scale; });
    store<W, T, STEPS>(grad_v, offset, stride, first, limit, to_v, [&](int lane, int i) { return gate[lane].x[i]; });
  }
};

// Gradient of 16 rows of q.
template <class W, class T, int STEPS>
struct RowsTile {
  template <class X>
  using Lanes = typename W::template Lanes<X>;

  Lanes<Left> q[STEPS], grad_out[STEPS];
  Lanes<Sums> to_q[2 * STEPS];
  Lanes<RowPair> lse, delta;  // lse: times log2(e), and infinity where the row has no output

  // The tile begins at row `at` of q, which is row `first` of the output, negative where there is none yet.
  P2S_TILE void begin(const Matrix& rows, int at, const Matrix& above, const float* lses, const float* deltas,
                      int first) {
    load_left<W, STEPS>(q, rows, at);
    load_left<W, STEPS>(grad_out, above, first);
    W::each([&](int lane) {
      for (int n = 0; n < 2 * STEPS; ++n) to_q[n][lane] = Sums{};
      for (int i = 0; i < 2; ++i) {
        const int row = first + lane / 4 + 8 * i;
        const bool inside = row >= 0 && row < above.limit;
        lse[lane].x[i] = inside ? lses[row] * kLog2e : INFINITY;
        delta[lane].x[i] = inside ? deltas[row] : 0.0f;
      }
    });
  }

  // maps(lane's row 0 or 1, key of the tile): what the maps add to a logit's gradient, asked where `queried`.
  template <class F>
  P2S_TILE void add(const uint16_t* k, const uint16_t* v, const float* gate, int keys, float scale, bool queried,
                    F maps) {
    for (int start = 0; start < keys; start += 16) {
      Lanes<Sums> weights[2], slopes[2];
      against_rows<W, T>(weights, q, k, start);
      against_rows<W, T>(slopes, grad_out, v, start);
      W::each([&](int lane) {
        for (int i = 0; i < 8; ++i) {
          const int key = start + i / 4 * 8 + lane % 4 * 2 + i % 2, row = i % 4 / 2;
          float& slope = slopes[i / 4][lane].x[i % 4];
          const float weight = power_of_two(weights[i / 4][lane].x[i % 4] * scale - lse[lane].x[row]);
          slope = key < keys ? weight * (slope * gate[key] - delta[lane].x[row]) : 0.0f;
          if (queried && key < keys) slope += maps(lane, row, key);
        }
      });
      Lanes<Left> left;
      as_left<W, T>(left, slopes[0], slopes[1]);
      add_rows<W, T, STEPS>(to_q, left, k, start);
    }
  }
};

// Maps and their mean for 16 keys of an item.
template <class W, class T>
P2S_TILE void maps_tile(const Call& c, float* mean_map, int64_t item, int first) {
  const GatedAttentionArgs& a = c.a;
  const float scale = -c.scale / static_cast<float>(a.heads) * kLog2e;
  const auto queries = static_cast<int>(a.queries);
  typename W::template Lanes<RowPair> total;
  W::each([&](int lane) { total[lane] = RowPair{}; });
  for (int query0 = 0; query0 < queries; query0 += 8) {
    typename W::template Lanes<Sums> logits;
    W::each([&](int lane) { logits[lane] = Sums{}; });
    const Matrix asked = matrix(a.q, item * a.q_item + (a.n - queries) * a.q_row, a.q_row, queries);
    for (int64_t channel = 0; channel < a.dim; channel += 16) {
      typename W::template Lanes<Left> left[1];
      typename W::template Lanes<Right> right;
      load_left<W, 1>(left, matrix(a.k, item * a.k_item + channel, a.k_row, a.n), first);
      W::each([&](int lane) {
        const int query = query0 + lane / 4;
        for (int i = 0; i < 2; ++i) {
          const uint16_t* at = asked.at + query * asked.stride + channel + lane % 4 * 2 + i * 8;
          right[lane].x[i] = query < queries ? *reinterpret_cast<const uint32_t*>(at) : 0;
        }
      });
      W::template multiply<T>(logits, left[0], right);
    }
    W::each([&](int lane) {
      for (int i = 0; i < 4; ++i) {
        const int query = query0 + lane % 4 * 2 + i % 2, key = first + lane / 4 + i / 2 * 8;
        if (query >= queries || key >= a.n) continue;
        const float probability = 1.0f / (1.0f + power_of_two(logits[lane].x[i] * scale));
        a.maps[(item * queries + query) * a.n + key] = probability;
        total[lane].x[i / 2] += probability;
      }
    });
  }
  W::row_sum(total);
  W::each([&](int lane) {
    for (int i = 0; i < 2; ++i) {
      const int key = first + lane / 4 + 8 * i;
      if (lane % 4 == 0 && key < a.n) mean_map[item * a.n + key] = total[lane].x[i] / static_cast<float>(queries);
    }
  });
}

template <int STEPS>
struct Shared {
  alignas(16) uint16_t x[2][Shape<STEPS>::kSize];  // k or q, this tile and the next
  alignas(16) uint16_t y[2][Shape<STEPS>::kSize];  // v or grad_out
  float gate[2][kTile];
  float lse[kTile], delta[kTile], halves[2][kTile];
};

P2S_TILE void stage_gate(float* gate, const Call& c, int64_t item, int first, int thread) {
  if (thread >= kTile) return;
  const int key = first + thread;
  gate[thread] = !c.a.gate ? 1.0f : key < c.a.n ? c.mean_map[item * c.a.n + key] : 0.0f;
}

template <class T, int STEPS>
P2S_TILE void forward_block(Shared<STEPS>& shared, const Call& c, int64_t index) {
  const GatedAttentionArgs& a = c.a;
  constexpr int per_warp = kForwardBlocks * kRows;
  const Part part(a, index, a.rows, kWarps * per_warp);
  const auto n = static_cast<int>(a.n), rows = static_cast<int>(a.rows);
  const Matrix k = matrix(a.k, part.item * a.k_item + part.channel, a.k_row, n);
  const Matrix v = matrix(a.v, part.item * a.v_item + part.channel, a.v_row, n);
  const Matrix q = matrix(a.q, part.item * a.q_item + a.first_row * a.q_row + part.channel, a.q_row, rows);
  Block::PerWarp<ForwardTile<Warp, T, STEPS, kForwardBlocks>> tiles;
  Block::warps([&](int warp) { tiles[warp].begin(q, part.first + warp * per_warp); });
  const auto fetch = [&](int start, int buffer, int thread) {
    stage<STEPS>(shared.x[buffer], k, start, thread);
    stage<STEPS>(shared.y[buffer], v, start, thread);
    stage_gate(shared.gate[buffer], c, part.item, start, thread);
  };
  for_tiles(n, fetch, [&](int start, int buffer) {
    Block::barrier();
    Block::warps([&](int warp) {
      if (part.first + warp * per_warp >= rows) return;
      const int keys = n - start < kTile ? n - start : kTile;
      tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.gate[buffer], keys, c.scale * kLog2e);
    });
  });
  Block::warps([&](int warp) {
    tiles[warp].end(a.out, part.item * a.rows * a.dim + part.channel, a.dim,
                    a.lse + (part.item * a.heads + part.head) * a.rows, part.first + warp * per_warp, rows);
  });
}

template <class T, int STEPS>
P2S_TILE void keys_block(Shared<STEPS>& shared, const Call& c, const Gradients& g, int64_t index) {
  const GatedAttentionArgs& a = c.a;
  const Part part(a, index, a.n, kWarps * kRows);
  const auto n = static_cast<int>(a.n), rows = static_cast<int>(a.rows);
  const int64_t output = part.item * a.rows * a.dim + part.channel, scores = (part.item * a.heads + part.head) * a.rows;
  const Matrix k = matrix(a.k, part.item * a.k_item + part.channel, a.k_row, n);
  const Matrix v = matrix(a.v, part.item * a.v_item + part.channel, a.v_row, n);
  const Matrix q = matrix(a.q, part.item * a.q_item + a.first_row * a.q_row + part.channel, a.q_row, rows);
  const Matrix out = matrix(a.out, output, a.dim, rows), above = matrix(g.a.grad_out, output, a.dim, rows);
  Block::PerWarp<KeysTile<Warp, T, STEPS>> tiles;
  Block::warps([&](int warp) {
    tiles[warp].begin(k, v, a.gate ? c.mean_map + part.item * n : nullptr, part.first + warp * kRows);
  });
  const auto fetch = [&](int start, int buffer, int thread) {
    stage<STEPS>(shared.x[buffer], q, start, thread);
    stage<STEPS>(shared.y[buffer], above, start, thread);
  };
  for_tiles(rows, fetch, [&](int start, int buffer) {
    Block::threads([&](int thread) {
      const int row = start + thread % kTile, side = thread / kTile;
      float sum = 0.0f;
      for (int i = 0; row < rows && i < STEPS; ++i) {
        const int64_t at = row * a.dim + (side * STEPS + i) * 8;
        const Chunk x = *reinterpret_cast<const Chunk*>(out.at + at), y = *reinterpret_cast<const Chunk*>(above.at + at);
        for (int j = 0; j < 8; ++j) sum += half<T>(x.x[j / 2], j) * half<T>(y.x[j / 2], j);
      }
      shared.halves[side][thread % kTile] = sum;
    });
    Block::barrier();
    Block::threads([&](int thread) {
      if (thread >= kTile) return;
      const int row = start + thread;
      shared.delta[thread] = shared.halves[0][thread] + shared.halves[1][thread];
      shared.lse[thread] = row < rows ? a.lse[scores + row] * kLog2e : INFINITY;
      if (part.first == 0 && row < rows) g.delta[scores + row] = shared.delta[thread];
    });
    Block::barrier();
    Block::warps([&](int warp) {
      if (part.first + warp * kRows >= n) return;
      tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.lse, shared.delta,
                      rows - start < kTile ? rows - start : kTile, c.scale * kLog2e);
    });
  });
  Block::warps([&](int warp) {
    float* grad_gate = a.gate ? g.a.grad_gate + (part.item * a.heads + part.head) * n : nullptr;
    tiles[warp].end(g.a.grad_k, g.a.grad_v, part.item * n * a.dim + part.channel, a.dim, grad_gate,
                    part.first + warp * kRows, n, c.scale);
  });
}

// Eight channels of one key: what the maps add to grad_k; the first eight also leave grad_logits.
template <class T>
P2S_TILE void maps_gradient(const Call& c, const Gradients& g, int64_t index) {
  const GatedAttentionArgs& a = c.a;
  const int64_t parts = a.dim / 8, channel = index % parts * 8, key = index / parts % a.n, item = index / parts / a.n;
  float to_mean = 0.0f;
  for (int64_t head = 0; a.gate && head < a.heads; ++head) to_mean += g.a.grad_gate[(item * a.heads + head) * a.n + key];
  if (a.gate) to_mean /= static_cast<float>(a.queries);
  float change[8] = {};
  for (int64_t query = 0; query < a.queries; ++query) {
    const int64_t at = (item * a.queries + query) * a.n + key;
    const float probability = a.maps[at];
    const float slope = (g.a.grad_maps[at] + to_mean) * probability * (1.0f - probability) / static_cast<float>(a.heads);
    if (channel == 0) g.grad_logits[at] = slope;
    const auto* q = static_cast<const uint16_t*>(a.q) + item * a.q_item + (a.n - a.queries + query) * a.q_row + channel;
    const Chunk x = *reinterpret_cast<const Chunk*>(q);
    for (int i = 0; i < 8; ++i) change[i] += slope * half<T>(x.x[i / 2], i);
  }
  auto* to = reinterpret_cast<Chunk*>(static_cast<uint16_t*>(g.a.grad_k) + (item * a.n + key) * a.dim + channel);
  Chunk x = *to;
  for (int i = 0; i < 4; ++i) {
    x.x[i] = pack<T>(half<T>(x.x[i], 0) + change[2 * i] * c.scale, half<T>(x.x[i], 1) + change[2 * i + 1] * c.scale);
  }
  *to = x;
}

template <class T, int STEPS>
P2S_TILE void rows_block(Shared<STEPS>& shared, const Call& c, const Gradients& g, int64_t index) {
  const GatedAttentionArgs& a = c.a;
  const Part part(a, index, a.n, kWarps * kRows);
  const auto n = static_cast<int>(a.n), rows = static_cast<int>(a.rows), queries = static_cast<int>(a.queries);
  const int64_t scores = (part.item * a.heads + part.head) * a.rows;
  const Matrix k = matrix(a.k, part.item * a.k_item + part.channel, a.k_row, n);
  const Matrix v = matrix(a.v, part.item * a.v_item + part.channel, a.v_row, n);
  const Matrix q = matrix(a.q, part.item * a.q_item + part.channel, a.q_row, n);
  const Matrix above = matrix(g.a.grad_out, part.item * rows * a.dim + part.channel, a.dim, rows);
  Block::PerWarp<RowsTile<Warp, T, STEPS>> tiles;
  Block::warps([&](int warp) {
    const int first = part.first + warp * kRows;
    tiles[warp].begin(q, first, above, a.lse + scores, g.delta + scores, first - static_cast<int>(a.first_row));
  });
  const auto fetch = [&](int start, int buffer, int thread) {
    stage<STEPS>(shared.x[buffer], k, start, thread);
    stage<STEPS>(shared.y[buffer], v, start, thread);
    stage_gate(shared.gate[buffer], c, part.item, start, thread);
  };
  for_tiles(n, fetch, [&](int start, int buffer) {
    Block::barrier();
    Block::warps([&](int warp) {
      const int first = part.first + warp * kRows;
      if (first >= n) return;
      const auto maps = [&](int lane, int i, int key) {
        const int query = first + lane / 4 + 8 * i - (n - queries);
        return query < 0 || query >= queries ? 0.0f : g.grad_logits[(part.item * queries + query) * n + start + key];
      };
      tiles[warp].add(shared.x[buffer], shared.y[buffer], shared.gate[buffer], n - start < kTile ? n - start : kTile,
                      c.scale * kLog2e, first + kRows > n - queries, maps);
    });
  });
  Block::warps([&](int warp) {
    store<Warp, T, STEPS>(g.a.grad_q, part.item * n * a.dim + part.channel, a.dim, part.first + warp * kRows, n,
                          tiles[warp].to_q, [&](int, int) { return c.scale; });
  });
}

}  // namespace
}  // namespace p2s
