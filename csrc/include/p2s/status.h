#pragma once

namespace p2s {

// What every kernel entry point returns. `message` has static storage; nullptr means success.
struct Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

}  // namespace p2s
