// Projections of a few tokens, with the norm before them and the addition or SwiGLU after them; and
// what 8-bit projections of many tokens need around the product.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "int8.h"
#include "linear.h"
#include "rms_norm.h"
#include "threads.h"

namespace {

using namespace lfm2;
using MaybeTensor = std::optional<Tensor>;

// Calls `work(m, tokens, first, last)` for pieces of all tokens and rows that are multiplied and
// finished at once, shared among threads by rows, each of which moves `size` numbers.
template <class Work>
void for_pieces(int64_t tokens, int64_t rows, int64_t size, const Work& work) {
  for (int64_t m = 0; m < tokens; m += kTokens) {
    const int64_t count = std::min(kTokens, tokens - m);
    parallel_for(0, rows, grain(size), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n += kChunk) {
        work(m, count, n, std::min(n + kChunk, last));
      }
    });
  }
}

// Calls `body` with the tokens and the matrix [rows, size] that multiplies them, as they are
// multiplied: if the matrix has scales, in 8-bit integers.
template <class T, class Body>
void with_factors(Rows<const T> x, int64_t tokens, const Tensor& weight, const MaybeTensor& scales,
                  int64_t rows, int64_t size, const Body& body) {
  if (!scales) {
    expect(weight, "weight", kType<T>, {rows, size});
    return body(Dense<T>{x, rows_of<const T>(weight), size});
  }
  expect(weight, "weight", ScalarType::Char, {rows, size});
  expect_packed(*scales, "scales", ScalarType::Float, {rows});
  std::vector<int8_t> numbers(tokens * size);
  std::vector<float> token_scales(tokens);
  quantize(x, size, Rows<int8_t>{numbers.data(), size}, token_scales.data(), 0, tokens);
  body(Int8{{numbers.data(), size},
            token_scales.data(),
            rows_of<const int8_t>(weight),
            read<float>(*scales),
            size});
}

template <class T>
const T* bias_of(const MaybeTensor& bias, int64_t rows) {
  if (!bias) return nullptr;
  expect_packed(*bias, "bias", kType<T>, {rows});
  return read<T>(*bias);
}

// The norm of x, in memory of its own.
template <class T>
std::vector<T> normed(const Tensor& x, const Tensor& norm, double eps, int64_t tokens) {
  const int64_t size = norm.numel();
  expect(x, "x", kType<T>, {tokens, size});
  expect_packed(norm, "norm", kType<T>, {size});
  std::vector<T> made(tokens * size);
  rms_norm(rows_of<const T>(x), read<T>(norm), static_cast<float>(eps), size,
           Rows<T>{made.data(), size}, 0, tokens);
  return made;
}

// out = x @ weight.T + bias, with `residual` added where there is one.
template <class T>
void linear(Rows<const T> x, const Tensor& weight, const MaybeTensor& scales,
            const MaybeTensor& bias, int64_t size, Rows<const T> residual, const Tensor& out) {
  const int64_t tokens = out.size(0);
  const int64_t rows = out.size(1);
  expect(out, "out", kType<T>, {tokens, rows});
  const T* added = bias_of<T>(bias, rows);
  const auto to = rows_of<T>(out);
  with_factors(x, tokens, weight, scales, rows, size, [&](const auto& factors) {
    for_pieces(tokens, rows, size, [&](int64_t m, int64_t count, int64_t first, int64_t last) {
      float sums[kTokens * kChunk];
      factors.dots(m, count, first, last, sums);
      const T* base = residual.data == nullptr ? nullptr : residual[m];
      finish_linear(sums, count, added, Rows<const T>{base, residual.stride}, first, last,
                    Rows<T>{to[m], to.stride});
    });
  });
}

void norm_linear_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const MaybeTensor& scales, const MaybeTensor& bias, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t size = norm.numel();
    const std::vector<T> y = normed<T>(x, norm, eps, out.size(0));
    linear<T>({y.data(), size}, weight, scales, bias, size, {nullptr, 0}, out);
  });
}

void linear_add_native(const Tensor& y, const Tensor& weight, const MaybeTensor& scales,
                       const MaybeTensor& bias, const Tensor& residual, const Tensor& out) {
  with_type(y, [&](auto number) {
    using T = decltype(number);
    const int64_t size = y.size(1);
    expect(y, "y", kType<T>, {out.size(0), size});
    expect(residual, "residual", kType<T>, {out.size(0), out.size(1)});
    linear<T>(rows_of<const T>(y), weight, scales, bias, size, rows_of<const T>(residual), out);
  });
}

void norm_swiglu_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const MaybeTensor& scales, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t width = out.size(1);
    const int64_t size = norm.numel();
    expect(out, "out", kType<T>, {tokens, width});
    const std::vector<T> y = normed<T>(x, norm, eps, tokens);
    const auto to = rows_of<T>(out);
    const Rows<const T> from{y.data(), size};
    with_factors(from, tokens, weight, scales, 2 * width, size, [&](const auto& factors) {
      for_pieces(tokens, width, 2 * size,
                 [&](int64_t m, int64_t count, int64_t first, int64_t last) {
                   float gates[kTokens * kChunk];
                   float ups[kTokens * kChunk];
                   factors.dots(m, count, first, last, gates);
                   factors.dots(m, count, width + first, width + last, ups);
                   finish_swiglu(gates, ups, count, first, last, Rows<T>{to[m], to.stride});
                 });
    });
  });
}

void quantize_native(const Tensor& x, const Tensor& out, const Tensor& scales) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t width = out.size(1);
    expect(x, "x", kType<T>, {tokens, width});
    expect(out, "out", ScalarType::Char, {tokens, width});
    expect_packed(scales, "scales", ScalarType::Float, {tokens});
    const auto from = rows_of<const T>(x);
    const auto to = rows_of<int8_t>(out);
    float* each = write<float>(scales);
    parallel_for(0, tokens, grain(width), [=](int64_t first, int64_t last) {
      quantize(from, width, to, each, first, last);
    });
  });
}

void finish_products_native(const Tensor& products, const Tensor& token_scales,
                            const Tensor& row_scales, const MaybeTensor& bias, const Tensor& out) {
  with_type(out, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t width = out.size(1);
    expect(products, "products", ScalarType::Int, {tokens, width});
    expect_packed(token_scales, "token_scales", ScalarType::Float, {tokens});
    expect_packed(row_scales, "row_scales", ScalarType::Float, {width});
    expect(out, "out", kType<T>, {tokens, width});
    const T* added = bias_of<T>(bias, width);
    const auto from = rows_of<const int32_t>(products);
    const auto to = rows_of<T>(out);
    const float* by_token = read<float>(token_scales);
    const float* by_row = read<float>(row_scales);
    parallel_for(0, tokens, grain(width), [=](int64_t first, int64_t last) {
      finish_products(from, by_token, by_row, added, width, first, last, to);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  library.impl("norm_linear_native", TORCH_BOX(&norm_linear_native));
  library.impl("linear_add_native", TORCH_BOX(&linear_add_native));
  library.impl("norm_swiglu_native", TORCH_BOX(&norm_swiglu_native));
  library.impl("quantize_native", TORCH_BOX(&quantize_native));
  library.impl("finish_products_native", TORCH_BOX(&finish_products_native));
}
