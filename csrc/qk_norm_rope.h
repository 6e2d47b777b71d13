// RMSNorm and rotation of q and k, head by head. k and v are written to their pages, q to `q`. If a
// token runs again, its k and v are in their pages already and do not change.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "pages.h"
#include "rms_norm.h"

namespace lfm2 {

template <class T>
struct QKNormRope {
  Rows<const T> qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]: all q, all k, all v
  const T* q_weight;  // [head_dim]
  const T* k_weight;
  float eps;
  const T* cos;  // [tokens, head_dim]
  const T* sin;
  Pages<T> k;
  Pages<T> v;
  int64_t heads;
  int64_t kv_heads;
  T* q;  // [tokens, heads, head_dim]
};

// `x` and `turned` may be the same: element i is paired with i + head_dim / 2.
template <class T>
LFM2_INLINE void rotate(const T* x, const T* cos, const T* sin, int64_t head_dim, T* turned) {
  const int64_t pairs = head_dim / 2;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float left = widen(x[i]);
    const float right = widen(x[i + pairs]);
    const float a = rounded<T>(left * widen(cos[i]));
    const float b = rounded<T>(right * widen(sin[i]));
    const float c = rounded<T>(right * widen(cos[i + pairs]));
    const float d = rounded<T>(left * widen(sin[i + pairs]));
    narrow(a - b, turned[i]);
    narrow(c + d, turned[i + pairs]);
  }
}

template <class T>
LFM2_CLONES void qk_norm_rope(const QKNormRope<T>& op, int64_t token, int64_t slot,
                              int64_t position, bool writes) {
  const int64_t width = op.k.head_dim;
  const T* x = op.qkv[token];
  const T* cos = op.cos + token * width;
  const T* sin = op.sin + token * width;
  T* q = op.q + token * op.heads * width;
  for (int64_t head = 0; head < op.heads; ++head, x += width, q += width) {
    rms_norm_row(x, op.q_weight, op.eps, width, q);
    rotate(q, cos, sin, width, q);
  }
  if (!writes) return;
  for (int64_t head = 0; head < op.kv_heads; ++head, x += width) {
    T* k = op.k.row(slot, head, position);
    rms_norm_row(x, op.k_weight, op.eps, width, k);
    rotate(k, cos, sin, width, k);
  }
  for (int64_t head = 0; head < op.kv_heads; ++head, x += width) {
    std::copy_n(x, width, op.v.row(slot, head, position));
  }
}

}  // namespace lfm2
