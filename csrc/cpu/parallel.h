#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace p2s {

// Runs body(begin, end) over consecutive parts of [0, count) on up to `threads` threads, the caller being one of them.
// `grain` is the least number of items worth a thread. Only for translation units of the baseline instruction set.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / std::max<int64_t>(1, grain)));
  const auto bound = [&](int64_t part) { return count / parts * part + std::min(part, count % parts); };
  std::vector<std::thread> workers;
  int64_t started = 1;
  try {
    workers.reserve(static_cast<size_t>(parts));
    for (; started < parts; ++started) {
      workers.emplace_back(body, bound(started), bound(started + 1));
    }
  } catch (const std::exception&) {
    // No more threads or memory to be had: the caller does the rest.
  }
  body(bound(0), bound(1));
  if (started < parts) body(bound(started), count);
  for (auto& worker : workers) worker.join();
}

}  // namespace p2s
