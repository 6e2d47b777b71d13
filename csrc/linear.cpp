// Projections of a few tokens, with the norm before them and the addition or SwiGLU after them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "linear.h"
#include "rms_norm.h"
#include "threads.h"

namespace {

using namespace lfm2;

// Calls `work(first, last)` for chunks of all `rows`, each of which moves `size` numbers.
template <class Work>
void for_chunks(int64_t rows, int64_t size, const Work& work) {
  parallel_for(0, rows, grain(size), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += kChunk) work(n, std::min(n + kChunk, last));
  });
}

// Calls `work(first, tokens)` for the tokens that are multiplied at once.
template <class Work>
void for_tokens(int64_t tokens, const Work& work) {
  for (int64_t m = 0; m < tokens; m += kTokens) work(m, std::min(kTokens, tokens - m));
}

template <class T>
void linear(Rows<const T> x, int64_t tokens, Rows<const T> weight, int64_t rows, int64_t size,
            const T* bias, Rows<const T> residual, Rows<T> out) {
  for_tokens(tokens, [&](int64_t m, int64_t count) {
    const Rows<const T> here{x[m], x.stride};
    const Rows<const T> base{residual.data == nullptr ? nullptr : residual[m], residual.stride};
    const Rows<T> to{out[m], out.stride};
    for_chunks(rows, size, [&](int64_t first, int64_t last) {
      float sums[kTokens * kChunk];
      dots(here, count, weight, size, first, last, sums);
      finish_linear(sums, count, bias, base, first, last, to);
    });
  });
}

// The norm of x, in memory of its own.
template <class T>
std::vector<T> normed(const Tensor& x, const Tensor& norm, double eps) {
  const int64_t tokens = x.size(0);
  const int64_t size = norm.numel();
  expect(x, "x", kType<T>, {tokens, size});
  expect_packed(norm, "norm", kType<T>, {size});
  std::vector<T> made(tokens * size);
  rms_norm(rows_of<const T>(x), read<T>(norm), static_cast<float>(eps), size,
           Rows<T>{made.data(), size}, 0, tokens);
  return made;
}

void norm_linear_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t rows = out.size(1);
    const int64_t size = norm.numel();
    expect(x, "x", kType<T>, {tokens, size});
    expect(weight, "weight", kType<T>, {rows, size});
    if (bias) expect_packed(*bias, "bias", kType<T>, {rows});
    expect(out, "out", kType<T>, {tokens, rows});
    const std::vector<T> y = normed<T>(x, norm, eps);
    linear<T>({y.data(), size}, tokens, rows_of<const T>(weight), rows, size,
              bias ? read<T>(*bias) : nullptr, {nullptr, 0}, rows_of<T>(out));
  });
}

void linear_add_native(const Tensor& y, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& residual, const Tensor& out) {
  with_type(y, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t rows = out.size(1);
    const int64_t size = y.size(1);
    expect(y, "y", kType<T>, {tokens, size});
    expect(weight, "weight", kType<T>, {rows, size});
    if (bias) expect_packed(*bias, "bias", kType<T>, {rows});
    expect(residual, "residual", kType<T>, {tokens, rows});
    expect(out, "out", kType<T>, {tokens, rows});
    linear<T>(rows_of<const T>(y), tokens, rows_of<const T>(weight), rows, size,
              bias ? read<T>(*bias) : nullptr, rows_of<const T>(residual), rows_of<T>(out));
  });
}

void norm_swiglu_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t width = out.size(1);
    const int64_t size = norm.numel();
    expect(x, "x", kType<T>, {tokens, size});
    expect(weight, "weight", kType<T>, {2 * width, size});
    expect(out, "out", kType<T>, {tokens, width});
    const std::vector<T> y = normed<T>(x, norm, eps);
    const auto gates = rows_of<const T>(weight);
    const Rows<const T> ups{gates[width], gates.stride};
    const auto to = rows_of<T>(out);
    for_tokens(tokens, [&](int64_t m, int64_t count) {
      const Rows<const T> here{y.data() + m * size, size};
      for_chunks(width, 2 * size, [&](int64_t first, int64_t last) {
        float gate[kTokens * kChunk];
        float up[kTokens * kChunk];
        dots(here, count, gates, size, first, last, gate);
        dots(here, count, ups, size, first, last, up);
        finish_swiglu(gate, up, count, first, last, Rows<T>{to[m], to.stride});
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  library.impl("norm_linear_native", TORCH_BOX(&norm_linear_native));
  library.impl("linear_add_native", TORCH_BOX(&linear_add_native));
  library.impl("norm_swiglu_native", TORCH_BOX(&norm_swiglu_native));
}
