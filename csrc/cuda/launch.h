#pragma once

#include <cuda_runtime.h>

#include "p2s/status.h"

namespace p2s {

// Makes `device` current for the scope of a launch and puts the caller's device back afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_ = cudaSuccess;
};

// Clears the error, or the next launch would find and report it.
inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {cudaGetErrorString(error)};
}

}  // namespace p2s
