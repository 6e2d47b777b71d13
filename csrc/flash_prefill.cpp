// The CPU's attention of many tokens: checks, and the division of tiles among threads.
#include "flash_prefill.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cache_checks.h"
#include "cpu_features.h"
#include "flash_prefill_floats.h"
#include "operations.h"
#include "threads.h"

namespace {

using namespace lfm2;

// The tiles of up to `most` rows of all sequences and KV heads, those with most keys first.
std::vector<Tile> tiles_of(const std::vector<Sequence>& sequences, int64_t kv_heads, int64_t group,
                           int64_t most) {
  std::vector<Tile> tiles;
  for (const Sequence& sequence : sequences) {
    const int64_t rows = sequence.count * group;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t here = std::min(most, rows - first);
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

// Runs all tiles of Tiles::kRows rows.
template <class Tiles, class T>
void run_tiles(const FlashPrefill<T>& op, const std::vector<Sequence>& sequences,
               int64_t kv_heads) {
  const int64_t width = op.k.head_dim;
  const auto tiles = tiles_of(sequences, kv_heads, op.group, Tiles::kRows);
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
    std::vector<typename Tiles::Memory> scratch(Tiles::scratch(width));
    for (int64_t i; (i = next.fetch_add(1)) < count;) Tiles::run(op, tiles[i], scratch.data());
  });
}

void flash_prefill_native(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                          const Tensor& table, const Tensor& cu_seqlens, const Tensor& slots,
                          const Tensor& lengths, const Tensor& out) {
  with_type(q, [&](auto number) {
    using T = decltype(number);
    const int64_t tokens = q.size(0);
    const int64_t heads = q.size(1);
    const int64_t width = q.size(2);
    const int64_t kv_heads = k_pages.size(1);
    expect_attention<T>(q, k_pages, v_pages, out);
    STD_TORCH_CHECK(width > 0 && width % 2 == 0, "a head of size ", width, " has no pairs");
    const FlashPrefill<T> op{rows_of<const T>(q), pages_of<const T>(k_pages, "k_pages", table),
                             pages_of<const T>(v_pages, "v_pages", table), heads / kv_heads,
                             rows_of<T>(out)};
    const auto sequences = sequences_of(cu_seqlens, slots, lengths, tokens, table.size(0));
    for (const Sequence& sequence : sequences) {
      expect_pages(op.k, k_pages.size(0), table.size(1), sequence.slot, 0,
                   sequence.position + sequence.count);
    }
    if constexpr (std::is_same_v<T, bf16>) {
      if (LFM2_HAS_AVX512BF16) return run_tiles<Bf16Tiles>(op, sequences, kv_heads);
    }
    run_tiles<FloatTiles<T>>(op, sequences, kv_heads);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  implement(library, "flash_prefill_native", TORCH_BOX(&flash_prefill_native));
}
