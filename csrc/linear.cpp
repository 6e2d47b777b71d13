// Projections of a few tokens, with the norm before and the addition or SwiGLU after them; and the
// work around the product of 8-bit projections of many tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "group_matrix.h"
#include "group_tokens.h"
#include "int8.h"
#include "linear.h"
#include "operations.h"
#include "rms_norm.h"
#include "threads.h"

namespace {

using namespace lfm2;
using MaybeTensor = std::optional<Tensor>;

// Tokens to be multiplied: unchanged rows, or their norms.
template <class T>
struct Source {
  Rows<const T> x;
  const T* norm;
  float eps;
  int64_t size;

  // Rows from `m` on, in `made` if they have to be computed.
  Rows<const T> take(int64_t m, int64_t tokens, std::vector<T>& made) const {
    const Rows<const T> here{x[m], x.stride};
    if (norm == nullptr) return here;
    made.resize(tokens * size);
    rms_norm(here, norm, eps, size, Rows<T>{made.data(), size}, 0, tokens);
    return {made.data(), size};
  }
};

template <class T>
Source<T> source_of(const Tensor& x, int64_t tokens, const Tensor* norm, double eps) {
  const int64_t size = norm == nullptr ? x.size(1) : norm->numel();
  expect(x, "x", kType<T>, {tokens, size});
  if (norm != nullptr) expect_packed(*norm, "norm", kType<T>, {size});
  const T* by = norm == nullptr ? nullptr : read<T>(*norm);
  return {rows_of<const T>(x), by, static_cast<float>(eps), size};
}

// Most tokens that each thread rounds itself. More are divided among the threads.
constexpr int64_t kRoundedApart = 16;

// Prefetches the first rows while the tokens are packed.
template <class W>
void fetch(const W* rows) {
  const char* from = reinterpret_cast<const char*>(rows);
  for (int64_t i = 0; i < kBytesAhead; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Calls `work(factors, m, tokens, first, last)` for pieces of all tokens and rows, where
// `factors.dots` multiplies tokens from `m` on. Rows are divided among threads. Each thread packs
// the tokens itself, which is faster than waiting for another thread, unless many are rounded in
// groups. `split` of the `rows` of the matrix are divided; `factors` reach them all.
template <class T, class Work>
void multiply(const Source<T>& source, int64_t tokens, const Tensor& weight,
              const MaybeTensor& scales, int64_t rows, int64_t split, const Work& work) {
  if (split == 0) return;
  const int64_t size = source.size;
  const auto share = [&](const auto& prepare, const auto& with_tokens) {
    for (int64_t m = 0; m < tokens; m += kTokens) {
      const int64_t count = std::min(kTokens, tokens - m);
      prepare(m, count);
      parallel_for(0, split, grain(rows / split * size), [&](int64_t first, int64_t last) {
        with_tokens(m, count, first, [&](const auto& factors) {
          for (int64_t n = first; n < last; n += kChunk) {
            work(factors, m, count, n, std::min(n + kChunk, last));
          }
        });
      });
    }
  };
  const auto nothing = [](int64_t, int64_t) {};
  if (scales && scales->dim() == 2) {
    const GroupMatrix matrix = group_matrix_of(weight, *scales, rows, size);
    const LastTile last_tile(matrix);
    // Rounds those tokens after `m` that are numbered `from` to before `to`.
    const auto round = [&](int64_t m, int64_t from, int64_t to, GroupScratch& into) {
      std::vector<T> made;
      round_groups(source.take(m + from, to - from, made), from, to, into);
    };
    const auto tokens_of = [&](GroupScratch& scratch) {
      const GroupTokens x = scratch.tokens();
      return groups_by_pairs(matrix.kind, x.count) ? pair_tokens(x, scratch) : x;
    };
    std::unique_ptr<GroupScratch> shared;
    GroupTokens shared_tokens{};
    share(
        [&](int64_t m, int64_t count) {
          shared.reset();
          if (count <= kRoundedApart) return;
          shared = std::make_unique<GroupScratch>(count, size);
          parallel_for(0, count, grain(size), [&](int64_t from, int64_t to) {
            round(m, from, to, *shared);
          });
          shared_tokens = tokens_of(*shared);
        },
        [&](int64_t m, int64_t count, int64_t first, const auto& then) {
          fetch(matrix.tile(first / kLanes).numbers);
          if (shared != nullptr) return then(Grouped(shared_tokens, matrix, last_tile));
          GroupScratch own(count, size);
          round(m, 0, count, own);
          const GroupTokens x = tokens_of(own);
          then(Grouped(x, matrix, last_tile));
        });
  } else if (scales) {
    expect(weight, "weight", ScalarType::Char, {rows, size});
    expect_packed(*scales, "scales", ScalarType::Float, {rows});
    const auto matrix = rows_of<const int8_t>(weight);
    const float* by_row = read<float>(*scales);
    share(nothing, [&](int64_t m, int64_t count, int64_t first, const auto& then) {
      fetch(matrix[first]);
      std::vector<T> made;
      std::vector<int8_t> numbers(count * size);
      std::vector<float> by_token(count);
      quantize(source.take(m, count, made), size, Rows<int8_t>{numbers.data(), size},
               by_token.data(), 0, count);
      then(Int8({numbers.data(), size}, by_token.data(), count, matrix, by_row, size));
    });
  } else {
    expect(weight, "weight", kType<T>, {rows, size});
    const auto matrix = rows_of<const T>(weight);
    share(nothing, [&](int64_t m, int64_t count, int64_t first, const auto& then) {
      fetch(matrix[first]);
      std::vector<T> made;
      then(Dense<T>(source.take(m, count, made), count, matrix, size));
    });
  }
}

template <class T>
const T* bias_of(const MaybeTensor& bias, int64_t rows) {
  if (!bias) return nullptr;
  expect_packed(*bias, "bias", kType<T>, {rows});
  return read<T>(*bias);
}

// out = x @ weight.T + bias, plus `residual` if there is one.
template <class T>
void linear(const Source<T>& source, const Tensor& weight, const MaybeTensor& scales,
            const MaybeTensor& bias, Rows<const T> residual, const Tensor& out) {
  const int64_t tokens = out.size(0);
  const int64_t rows = out.size(1);
  expect(out, "out", kType<T>, {tokens, rows});
  const T* added = bias_of<T>(bias, rows);
  const auto to = rows_of<T>(out);
  multiply(source, tokens, weight, scales, rows, rows,
           [&](const auto& factors, int64_t m, int64_t count, int64_t first, int64_t last) {
             float sums[kTokens * kChunk];
             factors.dots(first, last, sums);
             const T* base = residual.data == nullptr ? nullptr : residual[m];
             finish_linear(sums, count, added, Rows<const T>{base, residual.stride}, first, last,
                           Rows<T>{to[m], to.stride});
           });
}

void norm_linear_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const MaybeTensor& scales, const MaybeTensor& bias, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const auto source = source_of<T>(x, out.size(0), &norm, eps);
    linear<T>(source, weight, scales, bias, {nullptr, 0}, out);
  });
}

void linear_add_native(const Tensor& y, const Tensor& weight, const MaybeTensor& scales,
                       const MaybeTensor& bias, const Tensor& residual, const Tensor& out) {
  with_type(y, [&](auto number) {
    using T = decltype(number);
    const auto source = source_of<T>(y, out.size(0), nullptr, 0);
    expect(residual, "residual", kType<T>, {out.size(0), out.size(1)});
    linear<T>(source, weight, scales, bias, rows_of<const T>(residual), out);
  });
}

void norm_swiglu_native(const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                        const MaybeTensor& scales, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0);
    const int64_t width = out.size(1);
    const auto source = source_of<T>(x, tokens, &norm, eps);
    expect(out, "out", kType<T>, {tokens, width});
    const auto to = rows_of<T>(out);
    multiply(source, tokens, weight, scales, 2 * width, width,
             [&](const auto& factors, int64_t m, int64_t count, int64_t first, int64_t last) {
               float gates[kTokens * kChunk];
               float ups[kTokens * kChunk];
               factors.dots(first, last, gates);
               factors.dots(width + first, width + last, ups);
               finish_swiglu(gates, ups, count, first, last, Rows<T>{to[m], to.stride});
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
  implement(library, "norm_linear_native", TORCH_BOX(&norm_linear_native));
  implement(library, "linear_add_native", TORCH_BOX(&linear_add_native));
  implement(library, "norm_swiglu_native", TORCH_BOX(&norm_swiglu_native));
  implement(library, "quantize_native", TORCH_BOX(&quantize_native));
  implement(library, "finish_products_native", TORCH_BOX(&finish_products_native));
}
