// The choice of tokens on the CPU, and the next step's inputs: checks, and a task for each row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>

#include "advance.h"
#include "checks.h"
#include "operations.h"
#include "sampling.h"
#include "threads.h"

namespace {

using namespace lfm2;

void best_tokens_native(const Tensor& logits, const Tensor& out) {
  with_type(logits, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.numel();
    const int64_t width = logits.size(1);
    expect(logits, "logits", kType<T>, {rows, width});
    expect_packed(out, "out", ScalarType::Long, {rows});
    STD_TORCH_CHECK(width > 0, "an empty row has no largest number");
    const auto from = rows_of<const T>(logits);
    int64_t* to = write<int64_t>(out);
    parallel_for(0, rows, 1, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) to[row] = best_token(from[row], width);
    });
  });
}

void penalize_native(const Tensor& logits, const Tensor& seen, const Tensor& penalty,
                     const Tensor& out) {
  with_type(logits, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.size(0);
    const int64_t width = out.size(1);
    expect(logits, "logits", kType<T>, {rows, width});
    expect(seen, "seen", ScalarType::Bool, {rows, width});
    expect_packed(penalty, "penalty", ScalarType::Double, {rows});
    expect(out, "out", ScalarType::Float, {rows, width});
    const auto from = rows_of<const T>(logits);
    const auto marked = rows_of<const bool>(seen);
    const auto to = rows_of<float>(out);
    const double* by = read<double>(penalty);
    parallel_for(0, rows, 1, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        penalize(from[row], marked[row], static_cast<float>(by[row]), width, to[row]);
      }
    });
  });
}

void warp_native(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                 const Tensor& top_p, const Tensor& min_p, const Tensor& out) {
  with_type(logits, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.size(0);
    const int64_t width = out.size(1);
    expect(logits, "logits", kType<T>, {rows, width});
    expect_packed(temperature, "temperature", ScalarType::Double, {rows});
    expect_packed(top_k, "top_k", ScalarType::Long, {rows});
    expect_packed(top_p, "top_p", ScalarType::Double, {rows});
    expect_packed(min_p, "min_p", ScalarType::Double, {rows});
    expect(out, "out", ScalarType::Float, {rows, width});
    const auto from = rows_of<const T>(logits);
    const auto to = rows_of<float>(out);
    const double* temperatures = read<double>(temperature);
    const int64_t* ks = read<int64_t>(top_k);
    const double* ps = read<double>(top_p);
    const double* mins = read<double>(min_p);
    parallel_for(0, rows, 1, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const Warp by{static_cast<float>(temperatures[row]), ks[row], ps[row], mins[row]};
        warp(from[row], by, width, to[row]);
      }
    });
  });
}

void draw_native(const Tensor& scores, const Tensor& seeds, const Tensor& numbers,
                 const Tensor& positions, const Tensor& out) {
  const int64_t rows = out.numel();
  const int64_t width = scores.size(1);
  expect(scores, "scores", ScalarType::Float, {rows, width});
  for (const auto& [tensor, name] : {std::pair{seeds, "seeds"}, {numbers, "rows"},
                                     {positions, "positions"}}) {
    expect_packed(tensor, name, ScalarType::Long, {rows});
  }
  expect_packed(out, "out", ScalarType::Long, {rows});
  STD_TORCH_CHECK(width > 0, "an empty row has nothing to draw");
  const auto from = rows_of<const float>(scores);
  const int64_t* seed = read<int64_t>(seeds);
  const int64_t* number = read<int64_t>(numbers);
  const int64_t* position = read<int64_t>(positions);
  int64_t* to = write<int64_t>(out);
  parallel_for(0, rows, 1, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      to[row] = draw(from[row], Place{seed[row], number[row], position[row]}, width);
    }
  });
}

// PyTorch needs eight operations for it, and the weights have evicted their code from the caches.
void advance_native(const Tensor& chosen, const Tensor& eos, std::optional<int64_t> dummy_slot,
                    const Tensor& tokens, const Tensor& slots, const Tensor& positions,
                    const Tensor& lengths, const Tensor& finished, const Tensor& written) {
  const int64_t rows = tokens.numel();
  STD_TORCH_CHECK(eos.dim() == 2, "eos must have a row for each token");
  const int64_t ends = eos.size(1);
  expect_packed(chosen, "chosen", ScalarType::Long, {rows});
  expect_packed(eos, "eos", ScalarType::Long, {rows, ends});
  expect_packed(tokens, "tokens", ScalarType::Long, {rows});
  expect_packed(slots, "slots", ScalarType::Long, {rows});
  expect_packed(positions, "positions", ScalarType::Long, {rows});
  expect_packed(lengths, "lengths", ScalarType::Int, {rows});
  expect_packed(finished, "finished", ScalarType::Bool, {rows});
  expect_packed(written, "written", ScalarType::Long, {rows});
  const StepInputs inputs{write<int64_t>(tokens), write<int64_t>(slots), write<int64_t>(positions),
                          write<int32_t>(lengths), write<bool>(finished)};
  advance(read<int64_t>(chosen), read<int64_t>(eos), ends, dummy_slot ? &*dummy_slot : nullptr,
          inputs, rows, write<int64_t>(written));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  implement(library, "best_tokens_native", TORCH_BOX(&best_tokens_native));
  implement(library, "penalize_native", TORCH_BOX(&penalize_native));
  implement(library, "warp_native", TORCH_BOX(&warp_native));
  implement(library, "draw_native", TORCH_BOX(&draw_native));
  implement(library, "advance_native", TORCH_BOX(&advance_native));
}
