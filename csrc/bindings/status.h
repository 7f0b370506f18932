#pragma once

#include <stdexcept>
#include <string>

#include "p2s/status.h"

namespace p2s {

// Status to exception; pybind11 turns it into a RuntimeError.
inline void raise_unless_ok(const Status& status, const char* op) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace p2s
