#include "parallel.h"

#include "p2s/threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace p2s {
namespace {

// GCC's OpenMP runtime: runs function(data) on a team of threads, which is the one that torch keeps.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__linux__)
int find_runtime(dl_phdr_info* library, size_t, void* found) {
  const char* name = std::strrchr(library->dlpi_name, '/');
  if (!name || std::strncmp(name, "/libgomp", 8) != 0) return 0;
  void* handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  *static_cast<void**>(found) = dlsym(handle, "GOMP_parallel");
  return 1;
}

Parallel find_parallel() {
  void* found = nullptr;
  dl_iterate_phdr(find_runtime, &found);
  return reinterpret_cast<Parallel>(found);
}
#else
Parallel find_parallel() { return nullptr; }
#endif

Parallel openmp() {
  static const Parallel parallel = find_parallel();
  return parallel;
}

std::atomic<bool> openmp_allowed{true};

}  // namespace

bool run_on_openmp(int threads, void (*task)(void*), void* context) {
  if (!openmp_used()) return false;
  openmp()(task, context, static_cast<unsigned>(threads), 0);
  return true;
}

bool openmp_used() { return openmp() && openmp_allowed; }

void openmp_allow(bool allowed) { openmp_allowed = allowed; }

}  // namespace p2s
