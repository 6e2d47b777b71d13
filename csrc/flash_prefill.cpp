// The CPU's attention of many tokens: checks, and the division of tiles among threads.
#include "flash_prefill.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cache_checks.h"
#include "cpu_features.h"
#include "operations.h"
#include "threads.h"

namespace {

using namespace lfm2;

bool has_flash_prefill_native() { return LFM2_HAS_AVX512BF16; }

// The tiles of all sequences and KV heads, those with most keys first.
std::vector<Tile> tiles_of(const std::vector<Sequence>& sequences, int64_t kv_heads,
                           int64_t group) {
  std::vector<Tile> tiles;
  for (const Sequence& sequence : sequences) {
    const int64_t rows = sequence.count * group;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t here = std::min(kTileRows, rows - first);
      for (int64_t head = 0; head < kv_heads; ++head) {
        tiles.push_back({sequence.slot, head, sequence.position, sequence.token, first, here});
      }
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [group](const Tile& a, const Tile& b) {
    return a.keys(a.rows - 1, group) > b.keys(b.rows - 1, group);
  });
  return tiles;
}

void flash_prefill_native(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                          const Tensor& table, const Tensor& cu_seqlens, const Tensor& slots,
                          const Tensor& lengths, const Tensor& out) {
  const int64_t tokens = q.size(0);
  const int64_t heads = q.size(1);
  const int64_t width = q.size(2);
  const int64_t kv_heads = k_pages.size(1);
  expect_attention<bf16>(q, k_pages, v_pages, out);
  STD_TORCH_CHECK(width > 0 && width % 2 == 0, "a head of size ", width, " has no pairs");
  const FlashPrefill op{rows_of<const bf16>(q), pages_of<const bf16>(k_pages, "k_pages", table),
                        pages_of<const bf16>(v_pages, "v_pages", table), heads / kv_heads,
                        rows_of<bf16>(out)};
  const auto sequences = sequences_of(cu_seqlens, slots, lengths, tokens, table.size(0));
  for (const Sequence& sequence : sequences) {
    expect_pages(op.k, k_pages.size(0), table.size(1), sequence.slot, 0,
                 sequence.position + sequence.count);
  }
  STD_TORCH_CHECK(has_flash_prefill_native(), "this processor has no AVX512_BF16");
  const auto tiles = tiles_of(sequences, kv_heads, op.group);
  const int64_t count = static_cast<int64_t>(tiles.size());
  if (count == 0) return;
  int64_t work = 0;  // reads of a tile, once for each of its vectors of rows
  for (const Tile& tile : tiles) {
    work += 2 * width * tile.keys(tile.rows - 1, op.group) * ((tile.rows + 15) / 16);
  }
  // A thread takes the next tile when it is done: tiles at a prompt's beginning see few keys, later
  // ones many.
  std::atomic<int64_t> next{0};
  parallel_for(0, count, grain(work / count), [&](int64_t, int64_t) {
    std::vector<Line> scratch(op.scratch());
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      // Checked again, so that nothing refers to it if it was not compiled.
      if (LFM2_HAS_AVX512BF16) flash_prefill_avx512bf16(op, tiles[i], scratch.data());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  implement(library, "flash_prefill_native", TORCH_BOX(&flash_prefill_native));
}

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CompositeExplicitAutograd, library) {
  library.impl("has_flash_prefill_native", TORCH_BOX(&has_flash_prefill_native));
}
