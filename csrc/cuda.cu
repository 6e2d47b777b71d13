// The GPU's gated convolution of one token; the CPU's is in cpu.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "gated_conv_step.cuh"

namespace {

using namespace lfm2;

template <class T, int kEach, int kWidth>
void launch(const GatedConvStep<T>& conv, int sequences, cudaStream_t stream) {
  constexpr int kThreads = 64;
  const int threads = (conv.hidden + kEach - 1) / kEach;
  const dim3 grid((threads + kThreads - 1) / kThreads, sequences);
  gated_conv_step_kernel<T, kEach, kWidth><<<grid, kThreads, 0, stream>>>(conv);
}

template <class T>
using Launch = void (*)(const GatedConvStep<T>&, int, cudaStream_t);

template <class T, int kEach>
Launch<T> launch_of(int64_t width) {
  constexpr Launch<T> kOfWidth[] = {launch<T, kEach, 2>, launch<T, kEach, 3>, launch<T, kEach, 4>,
                                    launch<T, kEach, 5>, launch<T, kEach, 6>, launch<T, kEach, 7>,
                                    launch<T, kEach, 8>};
  STD_TORCH_CHECK(2 <= width && width <= 8, "there are kernels for convolutions over 2 to 8, not ",
                  width, "; choose another backend");
  return kOfWidth[width - 2];
}

bool aligned(const void* pointer, int64_t numbers, int64_t number_size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && numbers * number_size % 16 == 0;
}

void gated_conv_step_native(const Tensor& bcx, const Tensor& weight,
                            const std::optional<Tensor>& bias, const Tensor& window,
                            const Tensor& positions, const Tensor& slots, const Tensor& out) {
  with_type(bcx, [&](auto number) {
    using T = decltype(number);
    const int64_t count = out.size(0);
    const int64_t hidden = weight.size(0);
    const int64_t width = weight.size(1);
    const int64_t ring = window.size(1);
    const auto device = bcx.get_device_index();
    expect(bcx, "bcx", kType<T>, {count, 3 * hidden});
    expect_packed(weight, "weight", kType<T>, {hidden, width});
    expect(window, "window", kType<T>, {-1, ring, hidden});
    expect_packed(slots, "slots", ScalarType::Long, {count});
    expect_packed(positions, "positions", ScalarType::Long, {count});
    expect(out, "out", kType<T>, {count, hidden});
    if (bias) expect_packed(*bias, "bias", kType<T>, {hidden});
    for (const Tensor* tensor : {&weight, &window, &slots, &positions, &out, &bcx}) {
      STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                      "all tensors must be on one GPU");
    }
    STD_TORCH_CHECK(!bias || (bias->is_cuda() && bias->get_device_index() == device),
                    "all tensors must be on one GPU");
    STD_TORCH_CHECK(count <= 65535, "a launch holds 65,535 sequences, not ", count);
    STD_TORCH_CHECK(ring >= width, "a window of ", ring, " rows is too short for a convolution over ",
                    width);
    if (count == 0 || hidden == 0) return;

    const GatedConvStep<T> conv{rows_of<const T>(bcx),
                                read<T>(weight),
                                bias ? read<T>(*bias) : nullptr,
                                write<T>(window),
                                window.stride(0),
                                window.stride(1),
                                static_cast<int>(ring),
                                static_cast<int>(hidden),
                                read<int64_t>(slots),
                                read<int64_t>(positions),
                                rows_of<T>(out)};
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    constexpr int kEach = 16 / sizeof(T);
    const int64_t size = sizeof(T);
    const bool whole = aligned(conv.bcx.data, conv.bcx.stride, size) &&
                       aligned(conv.weight, hidden, size) && aligned(conv.bias, hidden, size) &&
                       aligned(conv.window, conv.slot_stride, size) &&
                       aligned(conv.window, conv.ring_stride, size) &&
                       aligned(conv.out.data, conv.out.stride, size);
    const auto launch = whole ? launch_of<T, kEach>(width) : launch_of<T, 1>(width);
    launch(conv, static_cast<int>(count), static_cast<cudaStream_t>(stream));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CUDA, library) {
  library.impl("gated_conv_step_native", TORCH_BOX(&gated_conv_step_native));
}
