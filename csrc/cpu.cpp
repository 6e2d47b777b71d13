// The CPU's operations between the projections: checks, the division of work among threads, and the
// names of lfm2_fast/ops/native_library.py. The headers have the computations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cache_checks.h"
#include "checks.h"
#include "embed.h"
#include "flash_decode_floats.h"
#include "gated_conv.h"
#include "group_matrix.h"
#include "operations.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "rope.h"
#include "swiglu.h"
#include "threads.h"

namespace {

using namespace lfm2;

bool lacks_avx2_native() {
#ifdef LFM2_LACKS_AVX2
  return true;
#else
  return false;
#endif
}

void rms_norm_native(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.size(0);
    const int64_t width = weight.numel();
    expect(x, "x", kType<T>, {rows, width});
    expect_packed(weight, "weight", kType<T>, {width});
    expect(out, "out", kType<T>, {rows, width});
    const auto from = rows_of<const T>(x);
    const auto to = rows_of<T>(out);
    const T* scale = read<T>(weight);
    parallel_for(0, rows, grain(width), [=](int64_t first, int64_t last) {
      rms_norm(from, scale, static_cast<float>(eps), width, to, first, last);
    });
  });
}

void add_rms_norm_native(const Tensor& x, const Tensor& delta, const Tensor& weight, double eps,
                         const Tensor& total, const Tensor& out) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.size(0);
    const int64_t width = weight.numel();
    expect(x, "x", kType<T>, {rows, width});
    expect(delta, "delta", kType<T>, {rows, width});
    expect_packed(weight, "weight", kType<T>, {width});
    expect(total, "total", kType<T>, {rows, width});
    expect(out, "out", kType<T>, {rows, width});
    const auto a = rows_of<const T>(x);
    const auto b = rows_of<const T>(delta);
    const auto sum = rows_of<T>(total);
    const auto to = rows_of<T>(out);
    const T* scale = read<T>(weight);
    parallel_for(0, rows, grain(width), [=](int64_t first, int64_t last) {
      add_rms_norm(a, b, scale, static_cast<float>(eps), width, sum, to, first, last);
    });
  });
}

void embed_native(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& scales,
                  const Tensor& out) {
  with_type(out, [&](auto number) {
    using T = decltype(number);
    const int64_t count = out.size(0);
    const int64_t width = out.size(1);
    const int64_t rows = weight.size(0);
    const bool grouped = scales && scales->dim() == 2;
    expect_packed(tokens, "tokens", ScalarType::Long, {count});
    if (!grouped) {
      expect(weight, "weight", scales ? ScalarType::Char : kType<T>, {rows, width});
      if (scales) expect_packed(*scales, "scales", ScalarType::Float, {rows});
    }
    expect(out, "out", kType<T>, {count, width});
    const int64_t* at = read<int64_t>(tokens);
    for (int64_t t = 0; t < count; ++t) {
      STD_TORCH_CHECK(at[t] >= 0 && at[t] < rows, "token ", at[t], " must be from 0 to ",
                      rows - 1);
    }
    const auto to = rows_of<T>(out);
    if (grouped) {
      const GroupMatrix matrix = group_matrix_of(weight, *scales, rows, width);
      for (int64_t t = 0; t < count; ++t) widen_row(matrix, at[t], to[t]);
    } else if (scales) {
      const auto from = rows_of<const int8_t>(weight);
      const float* by = read<float>(*scales);
      parallel_for(0, count, grain(width), [=](int64_t first, int64_t last) {
        embed_int8(at, from, by, width, to, first, last);
      });
    } else {
      const auto from = rows_of<const T>(weight);
      parallel_for(0, count, grain(width), [=](int64_t first, int64_t last) {
        embed(at, from, width, to, first, last);
      });
    }
  });
}

void swiglu_native(const Tensor& gate_up, const Tensor& out) {
  with_type(gate_up, [&](auto number) {
    using T = decltype(number);
    const int64_t rows = out.size(0);
    const int64_t width = out.size(1);
    expect(gate_up, "gate_up", kType<T>, {rows, 2 * width});
    expect(out, "out", kType<T>, {rows, width});
    const auto from = rows_of<const T>(gate_up);
    const auto to = rows_of<T>(out);
    parallel_for(0, rows, grain(4 * width), [=](int64_t first, int64_t last) {
      swiglu(from, width, to, first, last);
    });
  });
}

template <class T>
GatedConv<T> conv_of(const Tensor& bcx, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& window, const Tensor& out) {
  const int64_t hidden = weight.size(0);
  const int64_t width = weight.size(1);
  const int64_t tokens = out.size(0);
  expect(bcx, "bcx", kType<T>, {tokens, 3 * hidden});
  expect_packed(weight, "weight", kType<T>, {hidden, width});
  expect(window, "window", kType<T>, {-1, -1, hidden});
  expect(out, "out", kType<T>, {tokens, hidden});
  if (bias) expect_packed(*bias, "bias", kType<T>, {hidden});
  STD_TORCH_CHECK(width >= 1 && window.size(1) >= width, "a window of ", window.size(1),
                  " rows is too short for a convolution over ", width);
  return {rows_of<const T>(bcx),
          read<T>(weight),
          bias ? read<T>(*bias) : nullptr,
          write<T>(window),
          window.stride(0),
          window.stride(1),
          window.size(1),
          hidden,
          width,
          rows_of<T>(out)};
}

template <class T>
void convolve(const GatedConv<T>& conv, const std::vector<Sequence>& sequences, int64_t tokens) {
  const int64_t count = static_cast<int64_t>(sequences.size());
  if (tokens == 0) return;
  const int64_t each = kConvTile * tokens * conv.width / count;
  parallel_for(0, conv_tiles(conv.hidden) * count, grain(each),
               [&](int64_t first, int64_t last) {
                 gated_conv(conv, sequences.data(), count, first, last);
               });
}

void gated_conv_native(const Tensor& bcx, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& window, const Tensor& cu_seqlens, const Tensor& slots,
                       const Tensor& lengths, const Tensor& out) {
  with_type(bcx, [&](auto number) {
    using T = decltype(number);
    const auto conv = conv_of<T>(bcx, weight, bias, window, out);
    convolve(conv, sequences_of(cu_seqlens, slots, lengths, out.size(0), window.size(0)),
             out.size(0));
  });
}

void gated_conv_step_native(const Tensor& bcx, const Tensor& weight,
                            const std::optional<Tensor>& bias, const Tensor& window,
                            const Tensor& positions, const Tensor& slots, const Tensor& out) {
  with_type(bcx, [&](auto number) {
    using T = decltype(number);
    const auto conv = conv_of<T>(bcx, weight, bias, window, out);
    const int64_t count = out.size(0);
    expect_packed(slots, "slots", ScalarType::Long, {count});
    expect_packed(positions, "positions", ScalarType::Long, {count});
    std::vector<Sequence> sequences;
    sequences.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = read<int64_t>(slots)[i];
      const int64_t position = read<int64_t>(positions)[i];
      expect_slot(slot, window.size(0));
      STD_TORCH_CHECK(position >= 0, "position ", position, " is negative");
      // Adjacent tokens of one slot are a run of it, summed as single steps are.
      if (!sequences.empty() && sequences.back().slot == slot &&
          sequences.back().position + sequences.back().count == position) {
        ++sequences.back().count;
      } else {
        sequences.push_back({slot, position, i, 1});
      }
    }
    convolve(conv, sequences, count);
  });
}

void rope_native(const Tensor& positions, const Tensor& inv_freq, const Tensor& cos,
                 const Tensor& sin) {
  with_type(cos, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = positions.numel();
    const bool own = inv_freq.dim() == 2;  // every token has its own frequencies
    const int64_t pairs = own ? inv_freq.size(1) : inv_freq.numel();
    expect_packed(positions, "positions", ScalarType::Long, {tokens});
    if (own) {
      expect_packed(inv_freq, "inv_freq", ScalarType::Float, {tokens, pairs});
    } else {
      expect_packed(inv_freq, "inv_freq", ScalarType::Float, {pairs});
    }
    const int64_t stride = own ? pairs : 0;
    expect_packed(cos, "cos", kType<T>, {tokens, 1, 2 * pairs});
    expect_packed(sin, "sin", kType<T>, {tokens, 1, 2 * pairs});
    const int64_t* at = read<int64_t>(positions);
    const float* frequencies = read<float>(inv_freq);
    T* cosines = write<T>(cos);
    T* sines = write<T>(sin);
    // A cosine costs about as much as a hundred multiplications.
    parallel_for(0, tokens, grain(100 * pairs), [=](int64_t first, int64_t last) {
      rope(at, frequencies, stride, pairs, first, last, cosines, sines);
    });
  });
}

void qk_norm_rope_native(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                         double eps, const Tensor& cos, const Tensor& sin, const Tensor& k_pages,
                         const Tensor& v_pages, const Tensor& table, const Tensor& cu_seqlens,
                         const Tensor& slots, const Tensor& lengths,
                         const std::optional<Tensor>& write_from, const Tensor& q) {
  with_type(qkv, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = q.size(0);
    const int64_t heads = q.size(1);
    const int64_t width = q.size(2);
    const int64_t kv_heads = k_pages.size(1);
    expect(qkv, "qkv", kType<T>, {tokens, (heads + 2 * kv_heads) * width});
    expect_packed(q_weight, "q_weight", kType<T>, {width});
    expect_packed(k_weight, "k_weight", kType<T>, {width});
    expect_packed(cos, "cos", kType<T>, {tokens, 1, width});
    expect_packed(sin, "sin", kType<T>, {tokens, 1, width});
    expect(k_pages, "k_pages", kType<T>, {-1, kv_heads, -1, width});
    expect(v_pages, "v_pages", kType<T>, {k_pages.size(0), kv_heads, k_pages.size(2), width});
    expect_packed(q, "q", kType<T>, {tokens, heads, width});
    STD_TORCH_CHECK(width % 2 == 0, "a head of odd size ", width, " has no pairs to rotate");
    const QKNormRope<T> op{rows_of<const T>(qkv),
                           read<T>(q_weight),
                           read<T>(k_weight),
                           static_cast<float>(eps),
                           read<T>(cos),
                           read<T>(sin),
                           pages_of<T>(k_pages, "k_pages", table),
                           pages_of<T>(v_pages, "v_pages", table),
                           heads,
                           kv_heads,
                           write<T>(q)};
    const auto sequences = sequences_of(cu_seqlens, slots, lengths, tokens, table.size(0));
    for (const Sequence& sequence : sequences) {
      expect_pages(op.k, k_pages.size(0), table.size(1), sequence.slot, sequence.position,
                   sequence.position + sequence.count);
    }
    if (write_from) {
      expect_packed(*write_from, "write_from", ScalarType::Int, {slots.numel()});
    }
    const int32_t* written = write_from ? read<int32_t>(*write_from) : nullptr;
    parallel_for(0, tokens, grain(qkv.size(1)), [&](int64_t first, int64_t last) {
      for (size_t i = 0; i < sequences.size(); ++i) {
        const Sequence& sequence = sequences[i];
        const int64_t begin = std::max(first, sequence.token);
        const int64_t end = std::min(last, sequence.token + sequence.count);
        for (int64_t token = begin; token < end; ++token) {
          const int64_t position = sequence.position + token - sequence.token;
          const bool writes = !written || position >= written[i];
          qk_norm_rope(op, token, sequence.slot, position, writes);
        }
      }
    });
  });
}

// PyTorch needs three operations to store a stream. Between them a recorded step comes back to Python.
void keep_stream_native(const Tensor& x, const Tensor& slots, const Tensor& positions,
                        int64_t first, const Tensor& ring) {
  with_type(x, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = x.size(0);
    const int64_t size = x.size(1);
    expect(x, "x", kType<T>, {tokens, size});
    expect_packed(slots, "slots", ScalarType::Long, {tokens});
    expect_packed(positions, "positions", ScalarType::Long, {tokens});
    expect_packed(ring, "ring", kType<T>, {-1, -1, -1});
    const int64_t length = ring.size(1);
    const int64_t width = ring.size(2);
    STD_TORCH_CHECK(0 <= first && first <= width - size, "ring has ", width,
                    " numbers, too few for ", size, " from ", first, " on");
    const auto from = rows_of<const T>(x);
    const int64_t* slot = read<int64_t>(slots);
    const int64_t* position = read<int64_t>(positions);
    for (int64_t i = 0; i < tokens; ++i) {
      expect_slot(slot[i], ring.size(0));
      STD_TORCH_CHECK(position[i] >= 0 && length > 0, "position ", position[i],
                      " is not in a ring of ", length);
      T* to = write<T>(ring) + (slot[i] * length + position[i] % length) * width + first;
      std::copy_n(from[i], size, to);
    }
  });
}

void flash_decode_native(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                         const Tensor& table, const Tensor& slots, const Tensor& lengths,
                         const Tensor& out) {
  with_type(q, [&](auto number) {
    using T = decltype(number);
    const int64_t count = q.size(0);
    const int64_t heads = q.size(1);
    const int64_t width = q.size(2);
    const int64_t kv_heads = k_pages.size(1);
    expect_attention<T>(q, k_pages, v_pages, out);
    expect_packed(slots, "slots", ScalarType::Long, {count});
    expect_packed(lengths, "lengths", ScalarType::Int, {count});
    const int64_t group = heads / kv_heads;
    const FlashDecode<T> op{rows_of<const T>(q), pages_of<const T>(k_pages, "k_pages", table),
                            pages_of<const T>(v_pages, "v_pages", table), group};
    const int64_t* slot = read<int64_t>(slots);
    const int32_t* length = read<int32_t>(lengths);

    int64_t keys = 0;
    // Where the partials of a row begin, by splits; those of a head lie together.
    std::vector<int64_t> begins(count + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
      expect_slot(slot[i], table.size(0));
      STD_TORCH_CHECK(length[i] > 0, "a sequence of ", length[i], " tokens has nothing to attend to");
      expect_pages(op.k, k_pages.size(0), table.size(1), slot[i], 0, length[i]);
      keys += length[i] * kv_heads;
      begins[i + 1] = begins[i] + splits_of(length[i]) * kv_heads;
    }
    std::vector<Split> splits;
    int64_t most = 0;
    for (int64_t i = 0, rows; i < count; i += rows) {
      rows = 1;
      while (i + rows < count && slot[i + rows] == slot[i] && length[i + rows] == length[i] + rows) {
        ++rows;
      }
      most = std::max(most, rows);
      const int64_t end = length[i] + rows - 1;
      for (int64_t head = 0; head < kv_heads; ++head) {
        for (int64_t first = 0; first < end; first += kSplit) {
          splits.push_back({i, rows, length[i], slot[i], head, first,
                            std::min<int64_t>(first + kSplit, end)});
        }
      }
    }
    if (splits.empty()) return;
    const int64_t number_of_splits = static_cast<int64_t>(splits.size());
    const int64_t partial = partial_of(op.padded());
    std::vector<float> partials(begins[count] * group * partial);
    const auto partials_of = [&](int64_t row, int64_t head, int64_t number) {
      return &partials[(begins[row] + head * splits_of(length[row]) + number) * group * partial];
    };
    const int64_t each = 2 * width * keys / number_of_splits;
    const bool by_pairs =
        std::is_same_v<T, bf16> && LFM2_HAS_AVX512BF16 && width % kBf16Vector == 0;
    parallel_for(0, number_of_splits, grain(each), [&](int64_t first, int64_t last) {
      std::vector<float> scratch(by_pairs ? 0 : op.scratch(most));
      std::vector<T> padding(op.padding());
      std::vector<const T*> queries(by_pairs ? most * group : 0);
      std::vector<float*> into(most * group);
      for (int64_t i = first; i < last; ++i) {
        const Split& split = splits[i];
        for (int64_t n = 0; n < split.rows; ++n) {
          if (split.first >= length[split.row + n]) continue;
          float* own = partials_of(split.row + n, split.kv_head, split.first / kSplit);
          for (int64_t g = 0; g < group; ++g) into[n * group + g] = own + g * partial;
        }
        if constexpr (std::is_same_v<T, bf16>) {
          // The first is checked again, so that nothing refers to it if it was not compiled.
          if (LFM2_HAS_AVX512BF16 && by_pairs) {
            flash_decode_avx512bf16(op, split, queries.data(), into.data());
            continue;
          }
        }
        flash_decode(op, split, scratch.data(), padding.data(), into.data());
      }
    });
    std::vector<float> sums(op.padded());
    const auto to = rows_of<T>(out);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        for (int64_t g = 0; g < group; ++g) {
          combine(partials_of(row, head, 0) + g * partial, splits_of(length[row]), group * partial,
                  width, op.padded(), sums.data(), to[row] + (head * group + g) * width);
        }
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  implement(library, "rms_norm_native", TORCH_BOX(&rms_norm_native));
  implement(library, "add_rms_norm_native", TORCH_BOX(&add_rms_norm_native));
  implement(library, "embed_native", TORCH_BOX(&embed_native));
  implement(library, "swiglu_native", TORCH_BOX(&swiglu_native));
  implement(library, "gated_conv_native", TORCH_BOX(&gated_conv_native));
  implement(library, "gated_conv_step_native", TORCH_BOX(&gated_conv_step_native));
  implement(library, "rope_native", TORCH_BOX(&rope_native));
  implement(library, "qk_norm_rope_native", TORCH_BOX(&qk_norm_rope_native));
  implement(library, "flash_decode_native", TORCH_BOX(&flash_decode_native));
  implement(library, "keep_stream_native", TORCH_BOX(&keep_stream_native));
}

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CompositeExplicitAutograd, library) {
  library.impl("lacks_avx2_native", TORCH_BOX(&lacks_avx2_native));
}
