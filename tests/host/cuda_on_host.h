#pragma once

// Runs CUDA kernels on the host, so that their arithmetic, index maps and barriers can be tested without a GPU: a fibre a
// thread, blocks one after another. Warp functions take all 32 lanes; a barrier that not every thread reaches is an error.

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 << 10;

struct Barrier {
  int arrived = 0;
  unsigned passed = 0;
};

struct Fibre {
  ucontext_t context;
  jmp_buf at;
  std::vector<char> stack;
  bool begun, done;
};

struct Machine {
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;
  Barrier block;
  jmp_buf scheduler;
  std::function<void()> body;
  int current = 0, live = 0, threads = 0;
  bool moved = false;
};

inline Machine machine;

// Jumps, unlike swapcontext, make no system call.
inline void leave() {
  if (_setjmp(machine.fibres[machine.current].at) == 0) _longjmp(machine.scheduler, 1);
}

inline void enter(Fibre& fibre) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.at, 1);
  fibre.begun = true;
  setcontext(&fibre.context);
}

inline void run_fibre() {
  machine.body();
  machine.fibres[machine.current].done = true;
  --machine.live;
  machine.moved = true;
  _longjmp(machine.scheduler, 1);
}

// Every one of `count` threads waits for the others.
inline void wait(Barrier& barrier, int count) {
  const unsigned before = barrier.passed;
  machine.moved = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == before) leave();
}

// What every lane of the warp gave, by lane.
inline std::array<uint64_t, kLanes> exchange(uint64_t value) {
  const int warp = machine.current / kLanes;
  machine.slots[machine.current] = value;
  wait(machine.warps[warp], kLanes);
  std::array<uint64_t, kLanes> all;
  std::memcpy(all.data(), &machine.slots[warp * kLanes], sizeof all);
  wait(machine.warps[warp], kLanes);
  return all;
}

inline int lane() { return machine.current % kLanes; }

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof bits);
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(T value, int from) {
  const auto all = exchange(to_bits(value));
  return from >= 0 && from < kLanes ? from_bits<T>(all[from]) : value;
}

inline void run_block(int threads) {
  machine.live = machine.threads = threads;
  machine.fibres.resize(threads);
  machine.warps.assign((threads + kLanes - 1) / kLanes, {});
  machine.slots.assign(threads, 0);
  machine.block = {};
  for (Fibre& fibre : machine.fibres) {
    fibre.begun = fibre.done = false;
    fibre.stack.resize(kStack);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
  }
  while (machine.live > 0) {
    machine.moved = false;
    for (int i = 0; i < threads; ++i) {
      if (machine.fibres[i].done) continue;
      machine.current = i;
      threadIdx = dim3(i, 0, 0);
      enter(machine.fibres[i]);
    }
    if (!machine.moved) throw std::runtime_error("a barrier that not every thread reaches");
  }
}

// kernel<<<blocks, threads>>>(arguments...)
template <class Kernel, class... Arguments>
void launch(dim3 blocks, int threads, Kernel kernel, Arguments... arguments) {
  machine.body = [=] { kernel(arguments...); };
  gridDim = blocks;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(threads);
    }
  }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::machine.block, host::machine.threads); }
inline void __syncwarp() { host::exchange(0); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return host::shuffle(value, from % host::kLanes);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  return host::shuffle(value, host::lane() - lanes);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int lanes) {
  return host::shuffle(value, host::lane() + lanes);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host::shuffle(value, host::lane() ^ lanes);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  unsigned bits = 0;
  const auto all = host::exchange(flag);
  for (int i = 0; i < host::kLanes; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline bool __all_sync(unsigned mask, bool flag) { return __ballot_sync(mask, flag) == 0xffffffffu; }
inline bool __any_sync(unsigned mask, bool flag) { return __ballot_sync(mask, flag) != 0; }
inline unsigned __reduce_or_sync(unsigned, unsigned bits) {
  unsigned joined = 0;
  for (uint64_t other : host::exchange(bits)) joined |= static_cast<unsigned>(other);
  return joined;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
