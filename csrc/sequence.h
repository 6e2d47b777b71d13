// The tokens of a step that belong to a sequence, and their positions in it.
#pragma once

#include <cstdint>

namespace lfm2 {

// The tokens of one sequence in this step.
struct Sequence {
  int64_t slot;
  int64_t position;  // of its first token
  int64_t token;     // its first row
  int64_t count;
};

}  // namespace lfm2
