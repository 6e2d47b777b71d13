// What adapters add to the products of a few tokens.
#include "low_rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "operations.h"
#include "threads.h"

namespace {

using namespace lfm2;

void low_rank_native(const Tensor& x, const Tensor& entries, const Tensor& down, const Tensor& up,
                     const Tensor& gain, const Tensor& shift, const Tensor& ends,
                     const std::optional<Tensor>& bias, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = out.size(0), rows = out.size(1), size = x.size(1);
    const int64_t count = up.size(0), parts = ends.numel(), rank = up.size(1);
    expect(x, "x", kType<T>, {tokens, size});
    expect(out, "out", kType<T>, {tokens, rows});
    expect_packed(entries, "entries", ScalarType::Long, {tokens});
    expect_packed(down, "down", kType<T>, {count, parts, rank, size});
    expect_packed(up, "up", kType<T>, {count, rank, rows});
    expect_packed(gain, "gain", kType<T>, {count, rows});
    expect_packed(shift, "shift", kType<T>, {count, rows});
    expect_packed(ends, "ends", ScalarType::Long, {parts});
    if (bias) expect_packed(*bias, "bias", kType<T>, {rows});
    const int64_t* by_token = read<int64_t>(entries);
    for (int64_t t = 0; t < tokens; ++t) {
      STD_TORCH_CHECK(by_token[t] >= 0 && by_token[t] < count, "entries has ", by_token[t],
                      ", which must be from 0 to ", count - 1);
    }
    const LowRank<T> change{read<T>(down),
                            read<T>(up),
                            read<T>(gain),
                            read<T>(shift),
                            read<int64_t>(ends),
                            bias ? read<T>(*bias) : nullptr,
                            parts,
                            rank,
                            rows,
                            size};
    const auto from = rows_of<const T>(x);
    const auto to = rows_of<T>(out);
    std::vector<float> low(tokens * change.low());
    parallel_for(0, tokens * parts, grain(rank * size), [&](int64_t first, int64_t last) {
      low_down(from, by_token, change, low.data(), first, last);
    });
    parallel_for(0, rows, grain(tokens * rank), [&](int64_t first, int64_t last) {
      low_up(low.data(), by_token, change, tokens, to, first, last);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  implement(library, "low_rank_native", TORCH_BOX(&low_rank_native));
}
