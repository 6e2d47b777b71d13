// Pages of a sequence's keys or values: [pages, kv_heads, page_size, head_dim].
#pragma once

#include "dtypes.h"

namespace lfm2 {

template <class T>
struct Pages {
  T* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t page_size;
  int64_t head_dim;
  const int32_t* table;  // [slots, pages per slot]: the pages of a slot's sequence, in order
  int64_t table_stride;

  LFM2_INLINE T* row(int64_t slot, int64_t head, int64_t position) const {
    const int64_t page = table[slot * table_stride + position / page_size];
    return data + page * page_stride + head * head_stride + position % page_size * row_stride;
  }
};

}  // namespace lfm2
