// Checks of a step's reads and writes in the cache, before they happen.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <type_traits>
#include <vector>

#include "checks.h"
#include "pages.h"
#include "sequence.h"

namespace lfm2 {

inline void expect_slot(int64_t slot, int64_t count) {
  STD_TORCH_CHECK(0 <= slot && slot < count, "slot ", slot, " must be from 0 to ", count - 1);
}

// Tokens of each sequence in this step; the cache has `cache_slots` slots.
inline std::vector<Sequence> sequences_of(const Tensor& cu_seqlens, const Tensor& slots,
                                          const Tensor& lengths, int64_t tokens,
                                          int64_t cache_slots) {
  const int64_t count = slots.numel();
  expect_packed(slots, "slots", ScalarType::Long, {count});
  expect_packed(lengths, "lengths", ScalarType::Int, {count});
  expect_packed(cu_seqlens, "cu_seqlens", ScalarType::Int, {count + 1});
  const int64_t* slot = read<int64_t>(slots);
  const int32_t* length = read<int32_t>(lengths);
  const int32_t* bounds = read<int32_t>(cu_seqlens);
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] == tokens, "cu_seqlens must go from 0 to ",
                  tokens);
  std::vector<Sequence> sequences;
  sequences.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = bounds[i + 1] - bounds[i];
    STD_TORCH_CHECK(number >= 0, "cu_seqlens must not fall");
    expect_slot(slot[i], cache_slots);
    STD_TORCH_CHECK(length[i] >= number, "a context of ", length[i], " cannot end in ", number,
                    " tokens");
    sequences.push_back({slot[i], length[i] - number, bounds[i], number});
  }
  return sequences;
}

template <class T>
Pages<T> pages_of(const Tensor& pages, const char* name, const Tensor& table) {
  expect(pages, name, kType<std::remove_const_t<T>>, {-1, -1, -1, -1});
  expect(table, "table", ScalarType::Int, {-1, -1});
  STD_TORCH_CHECK(pages.size(2) > 0, name, " has pages of no tokens");
  return {data_of<T>(pages), pages.stride(0), pages.stride(1),      pages.stride(2),
          pages.size(2),     pages.size(3),   read<int32_t>(table), table.stride(0)};
}

// Queries [tokens, heads, width], a token's heads side by side; pages with heads of the same width;
// and out [tokens, heads * width].
template <class T>
void expect_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                      const Tensor& out) {
  const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2);
  const int64_t kv_heads = k_pages.size(1);
  expect(q, "q", kType<T>, {tokens, heads, width});
  expect(k_pages, "k_pages", kType<T>, {-1, kv_heads, -1, width});
  expect(v_pages, "v_pages", kType<T>, {k_pages.size(0), kv_heads, k_pages.size(2), width});
  expect(out, "out", kType<T>, {tokens, heads * width});
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " heads cannot share ", kv_heads);
  STD_TORCH_CHECK(width < 2 || q.stride(1) == width, "q must hold a token's heads side by side");
}

// Positions from `first` to before `last` of `slot` must be in pages that exist.
template <class T>
void expect_pages(const Pages<T>& pages, int64_t count, int64_t per_slot, int64_t slot,
                  int64_t first, int64_t last) {
  if (first == last) return;
  STD_TORCH_CHECK((last - 1) / pages.page_size < per_slot, "slot ", slot, " has ", per_slot,
                  " pages of ", pages.page_size, ", too few for ", last, " tokens");
  for (int64_t i = first / pages.page_size; i <= (last - 1) / pages.page_size; ++i) {
    const int32_t page = pages.table[slot * pages.table_stride + i];
    STD_TORCH_CHECK(0 <= page && page < count, "page ", page, " must be from 0 to ",
                    count - 1);
  }
}

}  // namespace lfm2
