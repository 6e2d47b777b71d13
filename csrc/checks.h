// Checks of every operation before it reads or writes through a pointer.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <type_traits>

#include "dtypes.h"

namespace lfm2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kType = ScalarType::Undefined;
template <>
constexpr ScalarType kType<float> = ScalarType::Float;
template <>
constexpr ScalarType kType<bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType kType<fp16> = ScalarType::Half;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<int32_t> = ScalarType::Int;
template <>
constexpr ScalarType kType<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kType<uint8_t> = ScalarType::Byte;
template <>
constexpr ScalarType kType<bool> = ScalarType::Bool;

// Fails unless `tensor` has this type and shape, and no gaps in its last dimension. -1 is any size.
inline void expect(const Tensor& tensor, const char* name, ScalarType type,
                   std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, " has ", tensor.dim(),
                  " dimensions, not ", shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || tensor.size(dim) == size, name, " has size ", tensor.size(dim),
                    " in dimension ", dim, ", not ", size);
    ++dim;
  }
  STD_TORCH_CHECK(dim == 0 || tensor.size(dim - 1) < 2 || tensor.stride(dim - 1) == 1, name,
                  " must be contiguous in its last dimension");
}

// Like `expect`, for tensors without gaps.
inline void expect_packed(const Tensor& tensor, const char* name, ScalarType type,
                          std::initializer_list<int64_t> shape) {
  expect(tensor, name, type, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data_of(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return read<std::remove_const_t<T>>(tensor);
  } else {
    return write<T>(tensor);
  }
}

// A matrix, or a tensor whose other dimensions have no gaps.
template <class T>
Rows<T> rows_of(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.stride(0)};
}

// Calls `body` with a number of the tensor's type.
template <class Body>
void with_type(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bf16{});
    case ScalarType::Half:
      return body(fp16{});
    default:
      STD_TORCH_CHECK(false, "only float32, bfloat16 and float16 are supported");
  }
}

}  // namespace lfm2
