// C * causal_conv(B * x) for one token per sequence on a GPU, moving the window in place.
//
// A thread computes `kEach` neighbouring channels of one sequence: those of 16 bytes if everything
// is aligned to that, else one. No other thread touches their window.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lfm2 {

template <class T>
struct GatedConvStep {
  Rows<const T> bcx;  // [sequences, 3 * hidden]: B, C and x side by side
  const T* weight;  // [hidden, width], newest tap last
  const T* bias;    // [hidden], or null
  T* window;        // [slots, ring, hidden], kept by position modulo ring
  int64_t slot_stride;
  int64_t ring_stride;
  int ring;
  int hidden;
  const int64_t* slots;      // [sequences]
  const int64_t* positions;  // [sequences]
  Rows<T> out;               // [sequences, hidden]
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <class T, int kEach>
__device__ inline Pack<T, kEach> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kEach>*>(from);
}

template <class T, int kEach>
__device__ inline void store(const Pack<T, kEach>& pack, T* to) {
  *reinterpret_cast<Pack<T, kEach>*>(to) = pack;
}

template <class T, int kEach, int kWidth>
__global__ void gated_conv_step_kernel(const GatedConvStep<T> conv) {
  const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * kEach;
  if (channel >= conv.hidden) return;
  const int64_t sequence = blockIdx.y;
  const int position = static_cast<int>(conv.positions[sequence]);
  T* window = conv.window + conv.slots[sequence] * conv.slot_stride + channel;

  // Loads that do not depend on the previous projection come first.
  Pack<T, kEach> past[kWidth];
#pragma unroll
  for (int tap = 0; tap < kWidth - 1; ++tap) {
    const int source = position - (kWidth - 1 - tap);
    past[tap] = {};
    if (source >= 0) past[tap] = load<T, kEach>(window + source % conv.ring * conv.ring_stride);
  }
  // The taps of a thread's channels are together: `kWidth` loads of `kEach` numbers.
  Pack<T, kEach> taps[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    taps[i] = load<T, kEach>(conv.weight + static_cast<int64_t>(channel) * kWidth + i * kEach);
  }
  Pack<T, kEach> bias = {};
  if (conv.bias) bias = load<T, kEach>(conv.bias + channel);

  const T* row = conv.bcx[sequence] + channel;
  const Pack<T, kEach> b = load<T, kEach>(row);
  const Pack<T, kEach> c = load<T, kEach>(row + conv.hidden);
  const Pack<T, kEach> x = load<T, kEach>(row + 2 * conv.hidden);
  Pack<T, kEach> out;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    narrow(widen(b.at[i]) * widen(x.at[i]), past[kWidth - 1].at[i]);
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < kWidth; ++tap) {
      const int place = i * kWidth + tap;
      sum += widen(taps[place / kEach].at[place % kEach]) * widen(past[tap].at[i]);
    }
    if (conv.bias) sum += widen(bias.at[i]);
    narrow(widen(c.at[i]) * rounded<T>(sum), out.at[i]);
  }
  store(past[kWidth - 1], window + position % conv.ring * conv.ring_stride);
  store(out, conv.out[sequence] + channel);
}

}  // namespace lfm2
