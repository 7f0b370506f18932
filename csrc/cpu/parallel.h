#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace p2s {

// Starts a region of GNU OpenMP: function(data) on so many threads, flags 0.
using OpenMpRegion = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// That of the GNU OpenMP which this process has loaded already (torch brings it), or null. Its workers keep their cores
// busy for milliseconds after each of torch's loops; threads of our own would have to share the cores with them.
inline OpenMpRegion openmp_region() {
#if defined(__linux__)
  static const OpenMpRegion region = [] {
    void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<OpenMpRegion>(dlsym(library, "GOMP_parallel")) : nullptr;
  }();
  return region;
#else
  return nullptr;
#endif
}

// Runs body(begin, end) over consecutive parts of [0, count) on up to `threads` threads, the caller being one of them.
// `grain` is the least number of items worth a thread. Only for translation units of the baseline instruction set.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / std::max<int64_t>(1, grain)));
  const auto bound = [&](int64_t part) { return count / parts * part + std::min(part, count % parts); };
  std::atomic<int64_t> next{0};
  // Every part once, whichever threads there are.
  auto work = [&] {
    for (int64_t part = next++; part < parts; part = next++) body(bound(part), bound(part + 1));
  };
  if (parts == 1) return work();
  if (const OpenMpRegion region = openmp_region()) {
    region([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> workers;
  try {
    workers.reserve(static_cast<size_t>(parts));
    while (static_cast<int64_t>(workers.size()) + 1 < parts) workers.emplace_back(work);
  } catch (const std::exception&) {
    // No more threads or memory to be had: those that there are do the rest.
  }
  work();
  for (auto& worker : workers) worker.join();
}

}  // namespace p2s
