// silu(gate) * up; a row has its gates and then its ups.
#pragma once

#include "dtypes.h"
#include "exp.h"

namespace lfm2 {

// Rows from `first` to before `last`; `width` is that of `out`.
template <class T>
LFM2_CLONES void swiglu(Rows<const T> gate_up, int64_t width, Rows<T> out, int64_t first,
                        int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = gate_up[row];
    const T* up = gate + width;
    T* result = out[row];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float x = widen(gate[i]);
      narrow(rounded<T>(x / (1.0f + exponential(-x))) * widen(up[i]), result[i]);
    }
  }
}

}  // namespace lfm2
