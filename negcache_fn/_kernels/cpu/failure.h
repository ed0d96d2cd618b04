// An exception may leave neither a kernel nor a parallel region: either would end the process.
#pragma once

#include <atomic>
#include <new>

namespace negcache {

// The status that a kernel returns; call.py raises an error for anything except kDone.
enum Status : int { kDone = 0, kUnknownStorage = 1, kNoMemory = 2 };

// Calls a kernel, all of whose exceptions are of the memory that it asks for.
template <typename Function>
Status guarded(Function function) noexcept {
  try {
    return function();
  } catch (...) {
    return kNoMemory;
  }
}

// Carries a failure of any thread to the one that waits for them.
class Failure {
 public:
  // Calls a function in a parallel region; after a failure it may be left out.
  template <typename Function>
  void attempt(Function function) noexcept {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      function();
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);
    }
  }
  // Behind the region.
  void raise() const {
    if (failed_) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> failed_{false};
};

}  // namespace negcache
