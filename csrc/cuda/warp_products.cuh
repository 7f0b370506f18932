#pragma once

#include "warp_mma.cuh"

// How a warp multiplies its rows with tiles in shared memory: 16-bit numbers on tensor cores, float32 with fused
// multiply-adds. Both spread kRows x 8 sums over the lanes, in their own way; who uses them asks where a sum is:
//   kRows: of a warp; kLaneRows, row(lane, i): of a lane; kAcross: neighbouring lanes that have the same rows
//   kLaneSums: a lane's part of kRows x 8 sums, of which number i is in the lane's row row_of(i) and column(lane, i)
//   kTile: rows of a tile; kStep: rows of a tile that the gradients take at a time
//   Rows: a warp's rows as left factors, which may be in Space, shared memory of the block
namespace p2s {
namespace {

template <class X>
using Lanes = Warp::Lanes<X>;

// One head of a matrix of an item; rows 0 to limit - 1 are there, others are 0.
template <class T>
struct Matrix {
  const typename T::Element* at;
  int64_t stride;
  int limit;

  P2S_TILE Matrix(const void* data, int64_t offset, int64_t stride, int64_t limit)
      : at(static_cast<const typename T::Element*>(data) + offset), stride(stride), limit(static_cast<int>(limit)) {}

  P2S_TILE bool has(int row) const { return row >= 0 && row < limit; }
  P2S_TILE Chunk chunk(int row, int64_t channel) const {
    return has(row) ? *reinterpret_cast<const Chunk*>(at + row * stride + channel) : Chunk{};
  }
};

// Tiles in shared memory: rows of 16 STEPS channels; the extra chunk puts the same chunk of 8 rows on different banks.
template <class T, int STEPS>
struct Shape {
  static constexpr int kWidth = 16 * STEPS, kParts = kWidth / kInChunk<T>, kLine = kWidth + kInChunk<T>;
};

template <class T>
struct TensorProducts {
  static constexpr int kRows = 16, kLaneRows = 2, kAcross = 4, kLaneSums = 4, kTile = 64, kStep = 16;
  using Type = T;
  using Sums = p2s::Sums;
  struct PerRow {
    float x[kLaneRows];
  };

  static P2S_TILE int row(int lane, int i) { return lane / 4 + 8 * i; }
  static P2S_TILE int row_of(int i) { return i % 4 / 2; }
  static P2S_TILE int column(int lane, int i) { return lane % 4 * 2 + i % 2; }

  template <int STEPS>
  struct Space {
    P2S_TILE uint16_t* rows(int, int) { return nullptr; }
  };
  template <int STEPS>
  struct Rows {
    Lanes<Left> x[STEPS];
  };

  // Rows first, ... of `m`.
  template <int STEPS>
  static P2S_TILE void load(Rows<STEPS>& rows, const Matrix<T>& m, int first, uint16_t*) {
    for (int step = 0; step < STEPS; ++step) {
      Warp::each([&](int lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = first + lane / 4 + i % 2 * 8, channel = step * 16 + lane % 4 * 2 + i / 2 * 8;
          const uint16_t* at = m.at + row * m.stride + channel;
          rows.x[step][lane].x[i] = m.has(row) ? *reinterpret_cast<const uint32_t*>(at) : 0;
        }
      });
    }
  }

  // The number of `rows` that stands where sum i of the n-th 8 channels does.
  template <int STEPS>
  static P2S_TILE float at(Rows<STEPS>& rows, int lane, int n, int i) {
    return half<T>(rows.x[n / 2][lane].x[n % 2 * 2 + i / 2], i);
  }

  // sums[i] (16 x 8) = rows times rows first + 8 i, ... of the tile, over all channels.
  template <int STEPS, int COUNT>
  static P2S_TILE void against_rows(Lanes<Sums> (&sums)[COUNT], Rows<STEPS>& rows, const uint16_t* tile, int first) {
    for (int i = 0; i < COUNT; ++i) {
      Warp::each([&](int lane) { sums[i][lane] = Sums{}; });
      for (int step = 0; step < STEPS; step += 2) {
        Lanes<Words> words;
        Warp::load<false>(words, [&](int lane) {
          return tile + (first + 8 * i + lane % 8) * Shape<T, STEPS>::kLine + step * 16 + lane / 8 * 8;
        });
        for (int part = 0; part < 2; ++part) multiply(sums[i], rows.x[step + part], words, part);
      }
    }
  }

  // sums (16 x channels) += (low, high) (16 x 16) times rows first to first + 15 of the tile.
  template <int STEPS>
  static P2S_TILE void add_rows(Lanes<Sums> (&sums)[2 * STEPS], Lanes<Sums>& low, Lanes<Sums>& high,
                                const uint16_t* tile, int first) {
    Lanes<Left> left;
    Warp::each([&](int lane) {
      const float *a = low[lane].x, *b = high[lane].x;
      left[lane] = {{pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(b[0], b[1]), pack<T>(b[2], b[3])}};
    });
    for (int step = 0; step < STEPS; ++step) {
      Lanes<Words> words;
      Warp::load<true>(words, [&](int lane) {
        return tile + (first + lane % 16) * Shape<T, STEPS>::kLine + step * 16 + lane / 16 * 8;
      });
      for (int part = 0; part < 2; ++part) multiply(sums[2 * step + part], left, words, part);
    }
  }

  // sums (16 x 8) += rows row, ... of `left` times rows column, ... of `right`, over 16 channels in memory.
  static P2S_TILE void add_channels(Lanes<Sums>& sums, const Matrix<T>& left, int row, const Matrix<T>& right,
                                    int column) {
    Rows<1> rows;
    Lanes<Right> columns;
    load(rows, left, row, nullptr);
    Warp::each([&](int lane) {
      const int at = column + lane / 4;
      for (int i = 0; i < 2; ++i) {
        const uint16_t* from = right.at + at * right.stride + lane % 4 * 2 + i * 8;
        columns[lane].x[i] = right.has(at) ? *reinterpret_cast<const uint32_t*>(from) : 0;
      }
    });
    Warp::multiply<T>(sums, rows.x[0], columns);
  }

  // Row i of the lane, times `by`.
  template <int STEPS>
  static P2S_TILE void store(uint16_t* to, Lanes<Sums> (&sums)[2 * STEPS], int lane, int i, float by) {
    for (int n = 0; n < 2 * STEPS; ++n) {
      const float* x = sums[n][lane].x + 2 * i;
      *reinterpret_cast<uint32_t*>(to + n * 8 + lane % 4 * 2) = pack<T>(x[0] * by, x[1] * by);
    }
  }

 private:
  static P2S_TILE void multiply(Lanes<Sums>& sums, Lanes<Left>& left, Lanes<Words>& words, int part) {
    Lanes<Right> right;
    Warp::each([&](int lane) { right[lane] = {{words[lane].x[2 * part], words[lane].x[2 * part + 1]}}; });
    Warp::multiply<T>(sums, left, right);
  }
};

// Lane 8 r + c has rows r, r + 4, ... (LANE_ROWS of them) and of each 8 columns number c; but where columns are
// channels, 4 c to 4 c + 3 of each 32, which is one chunk. Left factors are in shared memory, where 8 lanes ask for the
// same chunk.
template <int LANE_ROWS>
struct PlainProducts {
  static constexpr int kRows = 4 * LANE_ROWS, kLaneRows = LANE_ROWS, kAcross = 8, kLaneSums = LANE_ROWS;
  static constexpr int kTile = 32, kStep = 32, kRowsOfSpace = 32;
  using Type = Float32;
  struct Sums {
    float x[kLaneSums];
  };
  using PerRow = Sums;

  static P2S_TILE int row(int lane, int i) { return lane / 8 + 4 * i; }
  static P2S_TILE int row_of(int i) { return i % LANE_ROWS; }
  static P2S_TILE int column(int lane, int) { return lane % 8; }

  template <int STEPS>
  struct Space {
    static constexpr int kLine = Shape<Float32, STEPS>::kLine;
    alignas(16) float numbers[kWarps][kRowsOfSpace * kLine];

    // For a warp's left factor number `which`.
    P2S_TILE float* rows(int warp, int which) { return numbers[warp] + which * kRows * kLine; }
  };
  template <int STEPS>
  struct Rows {
    const float* at;
  };

  template <int STEPS>
  static P2S_TILE void load(Rows<STEPS>& rows, const Matrix<Float32>& m, int first, float* space) {
    constexpr int parts = Shape<Float32, STEPS>::kParts;
    rows.at = space;
    Warp::each([&](int lane) {
      for (int i = lane; i < kRows * parts; i += 32) {
        const int row = i / parts, channel = i % parts * 4;
        *reinterpret_cast<Chunk*>(space + row * Shape<Float32, STEPS>::kLine + channel) = m.chunk(first + row, channel);
      }
    });
    Warp::sync();
  }

  template <int STEPS>
  static P2S_TILE float at(Rows<STEPS>& rows, int lane, int n, int i) {
    return rows.at[row(lane, i) * Shape<Float32, STEPS>::kLine + n / 4 * 32 + lane % 8 * 4 + n % 4];
  }

  template <int STEPS, int COUNT>
  static P2S_TILE void against_rows(Lanes<Sums> (&sums)[COUNT], Rows<STEPS>& rows, const float* tile, int first) {
    constexpr int line = Shape<Float32, STEPS>::kLine;
    Warp::each([&](int lane) {
      for (int n = 0; n < COUNT; ++n) sums[n][lane] = Sums{};
      P2S_UNROLL_TWO
      for (int channel = 0; channel < 16 * STEPS; channel += 4) {
        Chunk left[LANE_ROWS];
        for (int i = 0; i < LANE_ROWS; ++i) left[i] = chunk_at(rows.at + row(lane, i) * line + channel);
        for (int n = 0; n < COUNT; ++n) {
          add(sums[n][lane], left, chunk_at(tile + (first + 8 * n + lane % 8) * line + channel));
        }
      }
    });
  }

  template <int STEPS>
  static P2S_TILE void add_rows(Lanes<Sums> (&sums)[2 * STEPS], Lanes<Sums>& low, Lanes<Sums>& high, const float* tile,
                                int first) {
    constexpr int line = Shape<Float32, STEPS>::kLine;
    P2S_UNROLL
    for (int k = 0; k < 16; ++k) {
      Warp::each([&](int lane) {
        float factor[LANE_ROWS];
        for (int i = 0; i < LANE_ROWS; ++i) factor[i] = Warp::of_lane<kAcross>(k < 8 ? low : high, i, lane, k % 8);
        for (int part = 0; part < STEPS / 2; ++part) {
          const Chunk right = chunk_at(tile + (first + k) * line + part * 32 + lane % 8 * 4);
          for (int n = 0; n < 4; ++n) {
            for (int i = 0; i < LANE_ROWS; ++i) sums[part * 4 + n][lane].x[i] += factor[i] * value<Float32>(right, n);
          }
        }
      });
    }
  }

  static P2S_TILE void add_channels(Lanes<Sums>& sums, const Matrix<Float32>& left, int first,
                                    const Matrix<Float32>& right, int column) {
    Warp::each([&](int lane) {
      for (int channel = 0; channel < 16; channel += 4) {
        Chunk rows[LANE_ROWS];
        for (int i = 0; i < LANE_ROWS; ++i) rows[i] = left.chunk(first + row(lane, i), channel);
        add(sums[lane], rows, right.chunk(column + lane % 8, channel));
      }
    });
  }

  template <int STEPS>
  static P2S_TILE void store(float* to, Lanes<Sums> (&sums)[2 * STEPS], int lane, int i, float by) {
    for (int part = 0; part < STEPS / 2; ++part) {
      float x[4];
      for (int n = 0; n < 4; ++n) x[n] = sums[part * 4 + n][lane].x[i] * by;
      *reinterpret_cast<Chunk*>(to + part * 32 + lane % 8 * 4) = chunk_of<Float32>(x);
    }
  }

 private:
  static P2S_TILE Chunk chunk_at(const float* at) { return *reinterpret_cast<const Chunk*>(at); }

  // The four products of each row's chunk with one column's.
  static P2S_TILE void add(Sums& sums, const Chunk (&left)[LANE_ROWS], const Chunk& right) {
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < LANE_ROWS; ++i) sums.x[i] += value<Float32>(left[i], k) * value<Float32>(right, k);
    }
  }
};

}  // namespace
}  // namespace p2s
