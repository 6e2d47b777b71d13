// Calls a kernel of csrc/ or of llama.cpp, as often as asked: arm_instructions.py counts what runs.
//
//     arm_instructions KERNEL CALLS
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dots.h"
#include "groups.h"

using namespace lfm2;

// llama.cpp's, of `n` numbers along a row: `rows` tokens by `columns` rows of a matrix.
extern "C" {
using Repacked = void(int n, float* sums, size_t stride, const void* weight, const void* tokens,
                      int rows, int columns);
using Dot = void(int n, float* sum, size_t, const void* weight, size_t, const void* token, size_t,
                 int);
Repacked ggml_gemv_q4_0_4x4_q8_0, ggml_gemv_q4_0_4x8_q8_0, ggml_gemm_q4_0_4x4_q8_0;
Repacked ggml_gemm_q4_0_4x8_q8_0, ggml_gemv_q8_0_4x4_q8_0, ggml_gemv_q8_0_4x8_q8_0;
Repacked ggml_gemm_q8_0_4x4_q8_0, ggml_gemm_q8_0_4x8_q8_0;
Dot ggml_vec_dot_q4_0_q8_0;
float ggml_table_f32_f16[1 << 16];
}

namespace {

constexpr int64_t kSize = 1024, kRows = 16, kMany = 16;

std::vector<char> zeros(64 * kSize * kMany);

void groups(GroupDots body, int64_t count, bool paired = false) {
  const void* all = zeros.data();
  const GroupTokens x{count,
                      kSize,
                      static_cast<const int8_t*>(all),
                      static_cast<const float*>(all),
                      static_cast<const int32_t*>(all),
                      static_cast<const float*>(all),
                      static_cast<const float*>(all),
                      paired};
  const auto* bytes = static_cast<const uint8_t*>(all);
  const GroupTile tiles[kRows / kLanes] = {{bytes, bytes}, {bytes, bytes}};
  static Lanes sums[kRows / kLanes * kMany];
  body(GroupKind::kInt4, x, tiles, kRows / kLanes, 0, sums);
}

template <class Body, class Number, class Total>
void rows(Body body, int64_t count, Number, Total) {
  static Total sums[kRows * kMany];
  const auto* weight = reinterpret_cast<const Number*>(zeros.data());
  body(reinterpret_cast<const Line*>(zeros.data()), count, {weight, kSize}, kSize, 0, kRows, sums,
       kRows);
}

void repacked(Repacked body, int count) {
  static float sums[kRows * kMany];
  body(kSize, sums, kRows, zeros.data(), zeros.data(), count, kRows);
}

void dots(Dot body) {
  float sum;
  for (int r = 0; r < kRows; ++r) body(kSize, &sum, 0, zeros.data(), 0, zeros.data(), 0, 1);
}

void call(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("groups_neon 1")) return groups(groups_neon, 1);
  if (is("groups_neondot 1")) return groups(groups_neondot, 1);
  if (is("groups_neondot 16")) return groups(groups_neondot, kMany);
  if (is("groups_neoni8mm 16")) return groups(groups_neoni8mm, kMany, true);
  if (is("dots_neondot 1")) return rows(dots_neondot, 1, int8_t(), int32_t());
  if (is("dots_neondot 16")) return rows(dots_neondot, kMany, int8_t(), int32_t());
  if (is("dots_neoni8mm 16")) return rows(dots_neoni8mm, kMany, int8_t(), int32_t());
  if (is("vec_dot_q4_0 1")) return dots(ggml_vec_dot_q4_0_q8_0);
  if (is("gemv_q4_0_4x4 1")) return repacked(ggml_gemv_q4_0_4x4_q8_0, 1);
  if (is("gemv_q4_0_4x8 1")) return repacked(ggml_gemv_q4_0_4x8_q8_0, 1);
  if (is("gemm_q4_0_4x4 16")) return repacked(ggml_gemm_q4_0_4x4_q8_0, kMany);
  if (is("gemm_q4_0_4x8 16")) return repacked(ggml_gemm_q4_0_4x8_q8_0, kMany);
  if (is("gemv_q8_0_4x4 1")) return repacked(ggml_gemv_q8_0_4x4_q8_0, 1);
  if (is("gemv_q8_0_4x8 1")) return repacked(ggml_gemv_q8_0_4x8_q8_0, 1);
  if (is("gemm_q8_0_4x4 16")) return repacked(ggml_gemm_q8_0_4x4_q8_0, kMany);
  if (is("gemm_q8_0_4x8 16")) return repacked(ggml_gemm_q8_0_4x8_q8_0, kMany);
  std::exit(2);
}

}  // namespace

int main(int, char** arguments) {
  for (int i = std::atoi(arguments[2]); i > 0; --i) call(arguments[1]);
}
