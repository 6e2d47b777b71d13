// The next step's inputs, from the tokens that this step chose; advance_ref has their meaning.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lfm2 {

// Inputs of a step's rows, updated in place.
struct StepInputs {
  int64_t* tokens;
  int64_t* slots;
  int64_t* positions;
  int32_t* lengths;
  bool* finished;
};

// `eos` has `ends` tokens a row. `dummy_slot` is null if finished rows stay in their slots.
inline void advance(const int64_t* chosen, const int64_t* eos, int64_t ends,
                    const int64_t* dummy_slot, const StepInputs& inputs, int64_t rows,
                    int64_t* written) {
  for (int64_t row = 0; row < rows; ++row) {
    bool& finished = inputs.finished[row];
    if (!finished) ++inputs.positions[row];
    const bool none = chosen[row] < 0;
    const int64_t* own = eos + row * ends;
    finished = finished || none || std::find(own, own + ends, chosen[row]) != own + ends;
    written[row] = chosen[row];
    inputs.tokens[row] = none ? 0 : chosen[row];
    if (dummy_slot != nullptr && finished) {
      inputs.positions[row] = 0;
      inputs.slots[row] = *dummy_slot;
    }
    inputs.lengths[row] = static_cast<int32_t>(inputs.positions[row] + 1);
  }
}

}  // namespace lfm2
