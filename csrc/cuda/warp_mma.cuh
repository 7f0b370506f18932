#pragma once

#include <cstdint>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define P2S_TILE __device__ __forceinline__
#define P2S_UNROLL _Pragma("unroll")
#define P2S_UNROLL_TWO _Pragma("unroll 2")
#else
#include <cmath>
#include <cstring>
#define P2S_TILE inline
#define P2S_UNROLL
#define P2S_UNROLL_TWO
#endif

// What a warp does as one: 16 x 8 x 16 products, loads of their factors, reductions. Tile code is written once against
// these names, for a warp of threads and, without nvcc, for 32 lanes in a loop, which run the layouts that the PTX manual
// gives (mma.m16n8k16, ldmatrix). Linkage is internal to whoever includes it.
namespace p2s {
namespace {

// Factors and sums of D (16 x 8) = A (16 x 16) B (16 x 8) + C as lane 4 g + t holds them; two 16-bit numbers a word.
//   Left: words 0, 1: rows g, g + 8, columns 2 t, 2 t + 1; words 2, 3: the same of columns 8 to 15
//   Right: word 0: rows 2 t, 2 t + 1 of column g; word 1: rows 2 t + 8, 2 t + 9
//   Sums: 0, 1: row g, columns 2 t, 2 t + 1; 2, 3: row g + 8
struct Left {
  uint32_t x[4];
};
struct Right {
  uint32_t x[2];
};
struct Sums {
  float x[4];
};
struct Words {
  uint32_t x[4];
};
// 16 bytes of numbers of any type.
struct __attribute__((may_alias, aligned(16))) Chunk {
  uint32_t x[4];
};

P2S_TILE float as_float(uint32_t word) {
#if defined(__CUDACC__)
  return __uint_as_float(word);
#else
  float x;
  std::memcpy(&x, &word, sizeof(x));
  return x;
#endif
}

P2S_TILE uint32_t as_word(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  return word;
#endif
}

struct Float32 {
  using Element = float;
};

struct Bfloat16 {
  using Element = uint16_t;
  static P2S_TILE float wide(uint16_t bits) { return as_float(uint32_t{bits} << 16); }
  static P2S_TILE uint16_t narrow(float x) {
#if defined(__CUDACC__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t word = as_word(x);
    return static_cast<uint16_t>(x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fff);
#endif
  }
};

struct Float16 {
  using Element = uint16_t;
  static P2S_TILE float wide(uint16_t bits) {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(bits));
#else
    _Float16 x;
    std::memcpy(&x, &bits, sizeof(x));
    return static_cast<float>(x);
#endif
  }
  static P2S_TILE uint16_t narrow(float x) {
#if defined(__CUDACC__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const auto rounded = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    return bits;
#endif
  }
};

// `low` in the lower half of the word.
template <class T>
P2S_TILE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  if constexpr (std::is_same<T, Bfloat16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
#else
  return T::narrow(low) | uint32_t{T::narrow(high)} << 16;
#endif
}

template <class T>
P2S_TILE float half(uint32_t word, int i) {
  return T::wide(static_cast<uint16_t>(word >> i % 2 * 16));
}

template <class T>
constexpr int kInChunk = 16 / sizeof(typename T::Element);

template <class T>
P2S_TILE float value(const Chunk& chunk, int i) {
  if constexpr (kInChunk<T> == 4) {
    return as_float(chunk.x[i]);
  } else {
    return half<T>(chunk.x[i / 2], i);
  }
}

template <class T>
P2S_TILE Chunk chunk_of(const float (&x)[kInChunk<T>]) {
  Chunk chunk;
  for (int i = 0; i < 4; ++i) {
    if constexpr (kInChunk<T> == 4) {
      chunk.x[i] = as_word(x[i]);
    } else {
      chunk.x[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return chunk;
}

P2S_TILE float power_of_two(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

constexpr int kWarps = 4, kThreads = 32 * kWarps;

#if defined(__CUDACC__)

// A block of kWarps warps: every thread or every warp does its part, then waits at the barrier.
struct Block {
  template <class T>
  struct PerWarp {
    T mine;
    P2S_TILE T& operator[](int) { return mine; }
  };

  template <class F>
  static P2S_TILE void threads(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  static P2S_TILE void warps(F f) {
    f(static_cast<int>(threadIdx.x / 32));
  }
  static P2S_TILE void barrier() { __syncthreads(); }

  // Begins to copy into shared memory, zeros if it isn't `there`; a group ends at each commit.
  static P2S_TILE void copy(Chunk* to, const Chunk* from, bool there) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
  }
  static P2S_TILE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // For this thread's copies but those of the last group.
  static P2S_TILE void wait() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
};

struct Warp {
  static constexpr unsigned kAll = 0xffffffffu;

  // What each lane has.
  template <class T>
  struct Lanes {
    T mine;
    P2S_TILE T& operator[](int) { return mine; }
  };

  template <class F>
  static P2S_TILE void each(F f) {
    f(static_cast<int>(threadIdx.x % 32));
  }

  // What the lanes wrote, they all see from here on.
  static P2S_TILE void sync() { __syncwarp(); }

  // Number i of one of the ACROSS neighbouring lanes that `asker` is among; every lane asks.
  template <int ACROSS, class T>
  static P2S_TILE float of_lane(Lanes<T>& x, int i, int /*asker*/, int lane) {
    return __shfl_sync(kAll, x.mine.x[i], lane, ACROSS);
  }

  // Over each ACROSS neighbouring lanes, every number for itself.
  template <int ACROSS, class T>
  static P2S_TILE void row_max(Lanes<T>& x) {
    reduce<ACROSS>(x.mine.x, [](float a, float b) { return fmaxf(a, b); });
  }
  template <int ACROSS, class T>
  static P2S_TILE void row_sum(Lanes<T>& x) {
    reduce<ACROSS>(x.mine.x, [](float a, float b) { return a + b; });
  }

  template <class T>
  static P2S_TILE void multiply(Lanes<Sums>& sums, Lanes<Left>& left, Lanes<Right>& right) {
    float* c = sums.mine.x;
    const uint32_t *a = left.mine.x, *b = right.mine.x;
    if constexpr (std::is_same<T, Bfloat16>::value) {
      asm(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }

  // Four 8 x 8 matrices in shared memory: lane 8 i + j gives the address of row j of matrix i. Word i of lane 4 g + t is
  // row g, columns 2 t and 2 t + 1 of matrix i, or of its transpose.
  template <bool transposed, class F>
  static P2S_TILE void load(Lanes<Words>& words, F address) {
    uint32_t* x = words.mine.x;
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(address(static_cast<int>(threadIdx.x % 32))));
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(at)
                   : "memory");
    }
  }

 private:
  template <int ACROSS, int COUNT, class F>
  static P2S_TILE void reduce(float (&x)[COUNT], F f) {
    for (int i = 0; i < COUNT; ++i) {
      for (int distance = 1; distance < ACROSS; distance *= 2) x[i] = f(x[i], __shfl_xor_sync(kAll, x[i], distance));
    }
  }
};

#else

struct Block {
  template <class T>
  struct PerWarp {
    T all[kWarps];
    T& operator[](int warp) { return all[warp]; }
  };

  template <class F>
  static void threads(F f) {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
  template <class F>
  static void warps(F f) {
    for (int warp = 0; warp < kWarps; ++warp) f(warp);
  }
  static void barrier() {}
  static void copy(Chunk* to, const Chunk* from, bool there) { *to = there ? *from : Chunk{}; }
  static void commit() {}
  static void wait() {}
};

struct Warp {
  template <class T>
  struct Lanes {
    T all[32];
    T& operator[](int lane) { return all[lane]; }
  };

  template <class F>
  static void each(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  }

  static void sync() {}

  template <int ACROSS, class T>
  static float of_lane(Lanes<T>& x, int i, int asker, int lane) {
    return x[asker / ACROSS * ACROSS + lane].x[i];
  }

  template <int ACROSS, class T>
  static void row_max(Lanes<T>& x) {
    reduce<ACROSS>(x, [](float a, float b) { return std::fmax(a, b); });
  }
  template <int ACROSS, class T>
  static void row_sum(Lanes<T>& x) {
    reduce<ACROSS>(x, [](float a, float b) { return a + b; });
  }

  template <class T>
  static void multiply(Lanes<Sums>& sums, Lanes<Left>& left, Lanes<Right>& right) {
    float a[16][16], b[16][8];
    each([&](int lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {  // a_i of the manual: row g + 8 for i in {2, 3, 6, 7}, columns from 8 for i >= 4
        a[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = half<T>(left[lane].x[i / 2], i);
      }
      for (int i = 0; i < 4; ++i) b[t * 2 + i % 2 + i / 2 * 8][g] = half<T>(right[lane].x[i / 2], i);
    });
    each([&](int lane) {
      for (int i = 0; i < 4; ++i) {
        float& sum = sums[lane].x[i];
        for (int k = 0; k < 16; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      }
    });
  }

  template <bool transposed, class F>
  static void load(Lanes<Words>& words, F address) {
    each([&](int lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        uint32_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const uint16_t* row = address(8 * i + (transposed ? 2 * t + j : g));
          pair[j] = row[transposed ? g : 2 * t + j];
        }
        words[lane].x[i] = pair[0] | pair[1] << 16;
      }
    });
  }

 private:
  template <int ACROSS, class T, class F>
  static void reduce(Lanes<T>& x, F f) {
    for (int distance = 1; distance < ACROSS; distance *= 2) {
      Lanes<T> before = x;
      each([&](int lane) {
        for (size_t i = 0; i < sizeof(T) / sizeof(float); ++i) {
          x[lane].x[i] = f(before[lane].x[i], before[lane ^ distance].x[i]);
        }
      });
    }
  }
};

#endif

}  // namespace
}  // namespace p2s
