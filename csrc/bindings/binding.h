#pragma once

// What every file of bindings needs. Each op or family of ops has one file with a `void bind_<op>(py::module_&)`, which the
// module's own file, cpu.cpp or cuda.cpp, declares and calls.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "p2s/status.h"

namespace p2s {

namespace py = pybind11;

// Status to exception; pybind11 turns it into a RuntimeError.
inline void raise_unless_ok(const Status& status, const char* op) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace p2s
