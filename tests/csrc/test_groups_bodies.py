"""The bodies of groups.h, each beside the plain one: equal to the bit on every processor.

VNNI's own instruction is emulated where the processor has none: what stands around it is the same.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lfm2_fast.weights.formats import FORMATS, Groups

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]
# In the order of GroupKind.
GROUPED = [format for format in FORMATS.values() if isinstance(format, Groups)]
SIZE = 512
TILES = 7  # four at once, two, and one alone

pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler"),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
        reason="this machine is no x86-64-v3",
    ),
]

EMULATED = """
#pragma GCC target("arch=x86-64-v3")
#pragma GCC optimize("fp-contract=off")
#include <immintrin.h>
#include <cstdint>

static inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
  uint8_t left[32];
  int8_t right[32];
  int32_t sums[8];
  _mm256_storeu_si256((__m256i*)left, a);
  _mm256_storeu_si256((__m256i*)right, b);
  _mm256_storeu_si256((__m256i*)sums, sum);
  for (int i = 0; i < 32; ++i) sums[i / 4] += left[i] * right[i];
  return _mm256_loadu_si256((const __m256i*)sums);
}

#define LFM2_DPBUSD dpbusd
#include "groups_vnni.h"
#include "groups_wide_blocks.h"

namespace lfm2 {

struct Emulated : Vnni {
  template <class V>
  static void join(const void* first, const void* second, V& both) {
    std::memcpy(&both, first, 32);
    std::memcpy(reinterpret_cast<char*>(&both) + 32, second, 32);
  }

  static void add_products(const WidePlaces& row, const WidePlaces& token, WidePlaces& sum) {
    __m256i left[2], right[2], sums[2];
    std::memcpy(left, &row, sizeof row);
    std::memcpy(right, &token, sizeof token);
    std::memcpy(sums, &sum, sizeof sum);
    for (int i = 0; i < 2; ++i) sums[i] = dpbusd(sums[i], left[i], right[i]);
    std::memcpy(&sum, sums, sizeof sum);
  }
};

void groups_emulated(GroupKind kind, const GroupTokens& x, const GroupTile* tiles, int64_t count,
                     int64_t ahead, Lanes* sums) {
  with_format(kind, [&](auto format) {
    dots_by_wide_blocks<Emulated, decltype(format)>(x, tiles, count, ahead, sums);
  });
}
}  // namespace lfm2
"""

CALLS = """
#include "group_tokens.h"

using namespace lfm2;
namespace lfm2 {
void groups_emulated(GroupKind, const GroupTokens&, const GroupTile*, int64_t, int64_t, Lanes*);
}

extern "C" bool dots(int body, int kind, const float* x, int64_t count, int64_t size,
                     const uint8_t* numbers, const uint8_t* scales, int64_t number_bytes,
                     int64_t scale_bytes, Lanes* out) {
  GroupScratch scratch(count, size);
  round_groups(Rows<const float>{x, size}, 0, count, scratch);
  const GroupTokens tokens = scratch.tokens();
  constexpr int kTiles = 7;
  GroupTile tiles[kTiles];
  for (int t = 0; t < kTiles; ++t) {
    tiles[t] = {numbers + t * number_bytes, scales + t * scale_bytes};
  }
  const GroupDots bodies[] = {&groups_plain, &groups_avx2, &groups_emulated, &groups_avxvnni,
                              &groups_avx512vnni};
  const int here[] = {1, LFM2_HAS_AVX2, LFM2_HAS_AVX2, LFM2_HAS_AVXVNNI, LFM2_HAS_AVX512VNNI};
  if (here[body]) bodies[body](GroupKind(kind), tokens, tiles, kTiles, 0, out);
  return here[body];
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("groups")
    (folder / "emulated.cpp").write_text(EMULATED, encoding="utf-8")
    (folder / "calls.cpp").write_text(CALLS, encoding="utf-8")
    options = ("-std=c++17", "-O2", "-fopenmp-simd", "-fPIC", "-shared", "-Wno-psabi", f"-I{CSRC}")
    sources = [*sorted(CSRC.glob("groups_*.cpp")), "emulated.cpp", "calls.cpp"]
    command = [*COMPILER, *options, *map(str, sources), "-o", "groups.so"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "groups.so"))


def sums_of(library: ctypes.CDLL, body: int, kind: int, count: int) -> torch.Tensor | None:
    """Return what a body makes of random tokens and ``TILES``, or None if it cannot run."""
    torch.manual_seed(count)
    format = GROUPED[kind]
    x = torch.randn(count, SIZE)
    (shape, _), (width, dtype) = format.parts((8 * TILES, SIZE)).values()
    numbers = torch.randint(256, shape, dtype=torch.uint8)
    # Some sums are the largest that there can be: of 127 with 15 or 0.
    x[0] = 1
    numbers[:4], numbers[4:8] = 255, 0
    if dtype == torch.uint8:
        scales = torch.randint(256, width, dtype=torch.uint8)
        # The upper bytes of float16 words, interleaved, come to no infinity.
        scales[scales & 0x7C == 0x7C] ^= 0x40
    else:
        scales = torch.randn(width).to(dtype)
    floats = TILES * count * 8
    storage = torch.full((floats + 8,), float("nan"))
    start = -storage.data_ptr() % 32 // 4
    out = storage[start : start + floats]
    x_at, numbers_at, scales_at, out_at = (
        ctypes.c_void_p(each.data_ptr()) for each in (x, numbers, scales, out)
    )
    rows, size, of_numbers, of_scales = (
        ctypes.c_int64(each)
        for each in (count, SIZE, numbers.nbytes // TILES, scales.nbytes // TILES)
    )
    library.dots.restype = ctypes.c_bool
    ran = library.dots(
        body, kind, x_at, rows, size, numbers_at, scales_at, of_numbers, of_scales, out_at
    )
    return out if ran else None


@pytest.mark.parametrize("body", range(1, 5), ids=["avx2", "emulated", "avxvnni", "avx512vnni"])
@pytest.mark.parametrize("kind", range(len(GROUPED)), ids=[each.name for each in GROUPED])
def test_bodies_give_the_same_bits(library, body: int, kind: int) -> None:
    for count in (1, 2, 3, 4, 5, 9, 14, 64, 65):
        found = sums_of(library, body, kind, count)
        if found is None:
            pytest.skip("this machine does not have its instructions")
        plain = sums_of(library, 0, kind, count)
        assert plain is not None and plain.isfinite().all() and plain.abs().max() > 0
        assert torch.equal(found.view(torch.int32), plain.view(torch.int32))
