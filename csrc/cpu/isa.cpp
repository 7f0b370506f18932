#include "p2s/isa.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace p2s {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512bf16"};

#if defined(__x86_64__)
// XCR0: the register files that the operating system saves on a context switch.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr bool has(uint64_t value, uint64_t bits) { return (value & bits) == bits; }
constexpr uint32_t bit(int index) { return uint32_t{1} << index; }

Isa detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::scalar;
  constexpr uint32_t fma = bit(12), popcnt = bit(23), osxsave = bit(27), avx = bit(28);
  if (!has(c, fma | popcnt | osxsave | avx)) return Isa::scalar;
  const uint64_t saved = saved_state();
  constexpr uint64_t ymm = 0x6, zmm = 0xe6;
  if (!has(saved, ymm) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::scalar;
  constexpr uint32_t bmi1 = bit(3), avx2 = bit(5), bmi2 = bit(8);
  if (!has(b, bmi1 | avx2 | bmi2)) return Isa::scalar;
  constexpr uint32_t f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31), vpopcntdq = bit(14);
  if (!has(saved, zmm) || !has(b, f | dq | bw | vl) || !has(c, vpopcntdq)) return Isa::avx2;
  constexpr uint32_t bf16 = bit(5);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, bf16)) return Isa::avx512;
  return Isa::avx512bf16;
}
#else
Isa detect() { return Isa::scalar; }
#endif

Isa best() {
  static const Isa detected = detect();
  return detected;
}

constexpr int kUnset = -1;
std::atomic<int> forced{kUnset};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) { return isa <= best(); }

Isa isa_active() {
  const int choice = forced.load(std::memory_order_relaxed);
  return choice == kUnset ? best() : static_cast<Isa>(choice);
}

Status isa_force(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    if (!isa_available(static_cast<Isa>(i))) return {"this processor or build doesn't have the instruction set"};
    forced.store(i, std::memory_order_relaxed);
    return {};
  }
  return {"unknown instruction set; choose scalar, avx2, avx512 or avx512bf16"};
}

}  // namespace p2s
