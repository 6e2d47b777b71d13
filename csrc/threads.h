// Division of work among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace lfm2 {

using torch::stable::parallel_for;

// Fewest tasks for a thread, if a task moves that many numbers. Waking a thread costs as much as a
// small operation, so those of a single token stay on the calling thread.
inline int64_t grain(int64_t numbers) {
  constexpr int64_t kWorthWaking = 32768;
  return std::max<int64_t>(1, kWorthWaking / std::max<int64_t>(1, numbers));
}

}  // namespace lfm2
