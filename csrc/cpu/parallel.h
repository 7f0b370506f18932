#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace p2s {

// Runs task(context) on up to `threads` threads, the caller being one of them, and waits for all. True if an OpenMP
// runtime that the process already holds did so: torch's own threads wait for work in a loop for milliseconds after each
// of its operations, and others would have to share the processor with them.
bool run_on_openmp(int threads, void (*task)(void*), void* context);

// Runs body(begin, end) over consecutive parts of [0, count) on up to `threads` threads, the caller being one of them.
// `grain` is the least number of items worth a thread. Only for translation units of the baseline instruction set.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / std::max<int64_t>(1, grain)));
  const auto bound = [&](int64_t part) { return count / parts * part + std::min(part, count % parts); };
  if (parts == 1) return body(int64_t{0}, count);
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) body(bound(part), bound(part + 1));
  };
  const auto task = [](void* it) { (*static_cast<decltype(take)*>(it))(); };
  if (run_on_openmp(static_cast<int>(parts), task, &take)) return;
  std::vector<std::thread> workers;
  try {
    workers.reserve(static_cast<size_t>(parts));
    for (int64_t started = 1; started < parts; ++started) workers.emplace_back(take);
  } catch (const std::exception&) {
    // No more threads or memory to be had: the others do the rest.
  }
  take();
  for (auto& worker : workers) worker.join();
}

}  // namespace p2s
