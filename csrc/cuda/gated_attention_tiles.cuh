#pragma once

#include "warp_products.cuh"

// What a warp does of gated attention and its gradient, with the products P; `gate`, `lse` and `delta` go with the rows
// of the tiles in shared memory that are added one after another.
namespace p2s {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows first, ... of a contiguous (rows, stride) matrix; `factor` of each of the lane's rows.
template <class P, int STEPS, class F>
P2S_TILE void store(void* data, int64_t offset, int64_t stride, int first, int limit,
                    Lanes<typename P::Sums> (&sums)[2 * STEPS], F factor) {
  auto* to = static_cast<typename P::Type::Element*>(data) + offset;
  Warp::each([&](int lane) {
    for (int i = 0; i < P::kLaneRows; ++i) {
      const int row = first + P::row(lane, i);
      if (row < limit) P::template store<STEPS>(to + row * stride, sums, lane, i, factor(lane, i));
    }
  });
}

// P::kRows * BLOCKS rows of the output.
template <class P, int STEPS, int BLOCKS>
struct ForwardTile {
  static constexpr int kKeys = 32, kHeld = P::kLaneSums;  // a step of the running softmax; sums of a lane
  using Sums = typename P::Sums;
  using PerRow = typename P::PerRow;

  typename P::template Rows<STEPS> q[BLOCKS];
  Lanes<Sums> out[BLOCKS][2 * STEPS];
  Lanes<PerRow> top[BLOCKS], total[BLOCKS];

  P2S_TILE void begin(const Matrix<typename P::Type>& rows, int first, typename P::template Space<STEPS>& space,
                      int warp) {
    P2S_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      P::load(q[block], rows, first + block * P::kRows, space.rows(warp, block));
      Warp::each([&](int lane) {
        for (int n = 0; n < 2 * STEPS; ++n) out[block][n][lane] = Sums{};
        for (int i = 0; i < P::kLaneRows; ++i) top[block][lane].x[i] = -INFINITY;
        total[block][lane] = PerRow{};
      });
    }
  }

  // `keys` of the tiles' keys are there; gate: their factors. scale: of the logits, for powers of two.
  template <class E>
  P2S_TILE void add(const E* k, const E* v, const float* gate, int keys, float scale) {
    for (int start = 0; start < keys; start += kKeys) {
      P2S_UNROLL
      for (int block = 0; block < BLOCKS; ++block) {
        Lanes<Sums> weights[kKeys / 8];
        P::against_rows(weights, q[block], k, start);
        Lanes<PerRow> highest;
        Warp::each([&](int lane) {
          highest[lane] = top[block][lane];
          for (int i = 0; i < kKeys / 8 * kHeld; ++i) {
            float& x = weights[i / kHeld][lane].x[i % kHeld];
            x = start + i / kHeld * 8 + P::column(lane, i) < keys ? x * scale : -INFINITY;
            highest[lane].x[P::row_of(i)] = fmaxf(highest[lane].x[P::row_of(i)], x);
          }
        });
        Warp::row_max<P::kAcross>(highest);
        Warp::each([&](int lane) {
          float shrink[P::kLaneRows], sum[P::kLaneRows] = {};
          for (int i = 0; i < P::kLaneRows; ++i) shrink[i] = power_of_two(top[block][lane].x[i] - highest[lane].x[i]);
          for (int i = 0; i < kKeys / 8 * kHeld; ++i) {
            float& x = weights[i / kHeld][lane].x[i % kHeld];
            x = power_of_two(x - highest[lane].x[P::row_of(i)]);
            sum[P::row_of(i)] += x;
            x *= gate[start + i / kHeld * 8 + P::column(lane, i)];
          }
          for (int i = 0; i < P::kLaneRows; ++i) {
            total[block][lane].x[i] = total[block][lane].x[i] * shrink[i] + sum[i];
          }
          for (int n = 0; n < 2 * STEPS; ++n) {
            for (int i = 0; i < kHeld; ++i) out[block][n][lane].x[i] *= shrink[P::row_of(i)];
          }
          top[block][lane] = highest[lane];
        });
        P2S_UNROLL
        for (int i = 0; i < kKeys / 16; ++i) {
          P::template add_rows<STEPS>(out[block], weights[2 * i], weights[2 * i + 1], v, start + 16 * i);
        }
      }
    }
  }

  P2S_TILE void end(void* to, int64_t offset, int64_t stride, float* lse, int first, int limit) {
    P2S_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      Warp::row_sum<P::kAcross>(total[block]);
      const int row = first + block * P::kRows;
      store<P, STEPS>(to, offset, stride, row, limit, out[block],
                      [&](int lane, int i) { return 1.0f / total[block][lane].x[i]; });
      Warp::each([&](int lane) {
        for (int i = 0; i < P::kLaneRows; ++i) {
          const int mine = row + P::row(lane, i);
          if (lane % P::kAcross == 0 && mine < limit) {
            lse[mine] = (top[block][lane].x[i] + log2f(total[block][lane].x[i])) * kLn2;
          }
        }
      });
    }
  }
};

// Gradients of P::kRows keys and their values.
template <class P, int STEPS>
struct KeysTile {
  static constexpr int kHeld = P::kLaneSums;
  using Sums = typename P::Sums;

  typename P::template Rows<STEPS> k, v;
  Lanes<Sums> to_k[2 * STEPS], to_v[2 * STEPS];
  Lanes<typename P::PerRow> gate;

  P2S_TILE void begin(const Matrix<typename P::Type>& keys, const Matrix<typename P::Type>& values, const float* gates,
                      int first, typename P::template Space<STEPS>& space, int warp) {
    P::load(k, keys, first, space.rows(warp, 0));
    P::load(v, values, first, space.rows(warp, 1));
    Warp::each([&](int lane) {
      for (int n = 0; n < 2 * STEPS; ++n) to_k[n][lane] = to_v[n][lane] = Sums{};
      for (int i = 0; i < P::kLaneRows; ++i) {
        const int key = first + P::row(lane, i);
        gate[lane].x[i] = gates == nullptr ? 1.0f : key < keys.limit ? gates[key] : 0.0f;
      }
    });
  }

  // Tiles of `rows` rows of q and of the output's gradient; lse: times log2(e), and infinity past the end, whose
  // weights are 0; delta.
  template <class E>
  P2S_TILE void add(const E* q, const E* grad_out, const float* lse, const float* delta, int rows, float scale) {
    for (int start = 0; start < rows; start += P::kStep) {
      Lanes<Sums> weights[P::kStep / 8], slopes[P::kStep / 8];
      P::against_rows(weights, k, q, start);
      P::against_rows(slopes, v, grad_out, start);
      Warp::each([&](int lane) {
        for (int i = 0; i < P::kStep / 8 * kHeld; ++i) {
          const int row = start + i / kHeld * 8 + P::column(lane, i);
          float &weight = weights[i / kHeld][lane].x[i % kHeld], &slope = slopes[i / kHeld][lane].x[i % kHeld];
          weight = power_of_two(weight * scale - lse[row]);
          slope = weight * (slope * gate[lane].x[P::row_of(i)] - delta[row]);
        }
      });
      P2S_UNROLL
      for (int i = 0; i < P::kStep / 16; ++i) {
        P::template add_rows<STEPS>(to_v, weights[2 * i], weights[2 * i + 1], grad_out, start + 16 * i);
        P::template add_rows<STEPS>(to_k, slopes[2 * i], slopes[2 * i + 1], q, start + 16 * i);
      }
    }
  }

  // scale: of the logits; grad_gate (keys), or null without a gate.
  P2S_TILE void end(void* grad_k, void* grad_v, int64_t offset, int64_t stride, float* grad_gate, int first, int limit,
                    float scale) {
    if (grad_gate != nullptr) {
      Lanes<typename P::PerRow> sum;
      Warp::each([&](int lane) {
        sum[lane] = {};
        for (int n = 0; n < 2 * STEPS; ++n) {
          for (int i = 0; i < kHeld; ++i) sum[lane].x[P::row_of(i)] += to_v[n][lane].x[i] * P::at(v, lane, n, i);
        }
      });
      Warp::row_sum<P::kAcross>(sum);
      Warp::each([&](int lane) {
        for (int i = 0; i < P::kLaneRows; ++i) {
          const int key = first + P::row(lane, i);
          if (lane % P::kAcross == 0 && key < limit) grad_gate[key] = sum[lane].x[i];
        }
      });
    }
    store<P, STEPS>(grad_k, offset, stride, first, limit, to_k, [&](int, int) { return scale; });
    store<P, STEPS>(grad_v, offset, stride, first, limit, to_v, [&](int lane, int i) { return gate[lane].x[i]; });
  }
};

// Gradient of P::kRows rows of q.
template <class P, int STEPS>
struct RowsTile {
  static constexpr int kHeld = P::kLaneSums;
  using Sums = typename P::Sums;

  typename P::template Rows<STEPS> q, grad_out;
  Lanes<Sums> to_q[2 * STEPS];
  Lanes<typename P::PerRow> lse, delta;  // lse: times log2(e), and infinity where the row has no output

  // The tile begins at row `at` of q, which is row `first` of the output, negative where there is none yet.
  P2S_TILE void begin(const Matrix<typename P::Type>& rows, int at, const Matrix<typename P::Type>& above,
                      const float* lses, const float* deltas, int first, typename P::template Space<STEPS>& space,
                      int warp) {
    P::load(q, rows, at, space.rows(warp, 0));
    P::load(grad_out, above, first, space.rows(warp, 1));
    Warp::each([&](int lane) {
      for (int n = 0; n < 2 * STEPS; ++n) to_q[n][lane] = Sums{};
      for (int i = 0; i < P::kLaneRows; ++i) {
        const int row = first + P::row(lane, i);
        lse[lane].x[i] = above.has(row) ? lses[row] * kLog2e : INFINITY;
        delta[lane].x[i] = above.has(row) ? deltas[row] : 0.0f;
      }
    });
  }

  // maps(lane, number of its row, key of the tile): what the maps add to a logit's gradient, asked where `queried`.
  template <class E, class F>
  P2S_TILE void add(const E* k, const E* v, const float* gate, int keys, float scale, bool queried, F maps) {
    for (int start = 0; start < keys; start += P::kStep) {
      Lanes<Sums> weights[P::kStep / 8], slopes[P::kStep / 8];
      P::against_rows(weights, q, k, start);
      P::against_rows(slopes, grad_out, v, start);
      Warp::each([&](int lane) {
        for (int i = 0; i < P::kStep / 8 * kHeld; ++i) {
          const int key = start + i / kHeld * 8 + P::column(lane, i), row = P::row_of(i);
          float& slope = slopes[i / kHeld][lane].x[i % kHeld];
          const float weight = power_of_two(weights[i / kHeld][lane].x[i % kHeld] * scale - lse[lane].x[row]);
          slope = key < keys ? weight * (slope * gate[key] - delta[lane].x[row]) : 0.0f;
          if (queried && key < keys) slope += maps(lane, row, key);
        }
      });
      P2S_UNROLL
      for (int i = 0; i < P::kStep / 16; ++i) {
        P::template add_rows<STEPS>(to_q, slopes[2 * i], slopes[2 * i + 1], k, start + 16 * i);
      }
    }
  }
};

}  // namespace
}  // namespace p2s
