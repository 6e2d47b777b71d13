// Products, norms and gates of the CPU code through raw pointers, on a processor without torch.
//
//     bodies [dot] [i8mm] [bf16]
//
// torch 2.10's own wheel needs ARMv8.1, so that no tensor exists on ARMv8.0. The arguments name the
// instructions that the code must find here. Prints what is wrong, and ends with 1.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "group_tokens.h"
#include "linear.h"
#include "rms_norm.h"
#include "swiglu.h"

using namespace lfm2;

namespace {

constexpr int64_t kRows = 53, kSize = 2 * kSuper;
constexpr int64_t kCounts[] = {1, 2, 5, 33};
std::mt19937 generator(1);
int wrong = 0;

void expect(bool right, const char* what, int64_t count) {
  if (right) return;
  std::printf("%s is wrong for %d tokens\n", what, static_cast<int>(count));
  wrong = 1;
}

template <class T>
std::vector<T> numbers_of(int64_t count) {
  std::vector<T> made(count);
  for (T& each : made) narrow(std::normal_distribution<float>()(generator), each);
  return made;
}

std::vector<int8_t> integers_of(int64_t count) {
  std::vector<int8_t> made(count);
  for (int8_t& each : made) each = static_cast<int8_t>(generator());
  return made;
}

// Sums of floats in any order are that close to those of doubles.
bool close(float found, double exact, double magnitude) {
  return std::abs(found - exact) <= 1e-6 * magnitude;
}

template <class T>
void dense(const char* what) {
  const std::vector<T> weight = numbers_of<T>(kRows * kSize);
  for (const int64_t count : kCounts) {
    const std::vector<T> x = numbers_of<T>(count * kSize);
    const Dense<T> made({x.data(), kSize}, count, {weight.data(), kSize}, kSize);
    std::vector<float> sums(count * kChunk, NAN);
    made.dots(0, kRows, sums.data());
    bool right = true;
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t n = 0; n < kRows; ++n) {
        double exact = 0, magnitude = 0;
        for (int64_t k = 0; k < kSize; ++k) {
          const double product = double(widen(x[m * kSize + k])) * widen(weight[n * kSize + k]);
          exact += product;
          magnitude += std::abs(product);
        }
        right &= close(sums[m * kChunk + n], exact, magnitude);
      }
    }
    expect(right, what, count);
  }
}

void integers() {
  const std::vector<int8_t> weight = integers_of(kRows * kSize);
  const std::vector<float> scales(kRows + 64, 0.5f);
  for (const int64_t count : kCounts) {
    const std::vector<int8_t> x = integers_of(count * kSize);
    const Int8 made({x.data(), kSize}, scales.data(), count, {weight.data(), kSize}, scales.data(),
                    kSize);
    std::vector<float> sums(count * kChunk, NAN);
    made.dots(0, kRows, sums.data());
    bool right = true;
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t n = 0; n < kRows; ++n) {
        int32_t exact = 0;
        for (int64_t k = 0; k < kSize; ++k) exact += x[m * kSize + k] * weight[n * kSize + k];
        right &= sums[m * kChunk + n] == static_cast<float>(exact) * 0.25f;
      }
    }
    expect(right, "int8", count);
  }
}

// Bytes of which all halves and floats are finite and below 1.
std::vector<uint8_t> scales_of(int64_t bytes, bool floats) {
  std::vector<uint8_t> made(bytes);
  for (int64_t i = 0; i < bytes; ++i) {
    const auto byte = static_cast<uint8_t>(generator());
    made[i] = floats ? (i % 4 == 3 ? (byte & 0x80) | 0x3C : byte) : i % 2 ? byte & 0x9F : byte;
  }
  return made;
}

// The bits of the plain code, which is close to the sums of the numbers that the bytes stand for.
void groups(GroupKind kind) {
  GroupMatrix matrix{kind, nullptr, nullptr, kRows, kSize, 0, 0};
  bool floats = false;
  with_format(kind, [&](auto format) {
    using F = decltype(format);
    matrix.number_bytes = F::number_bytes(kSize);
    matrix.scale_bytes = F::scale_bytes(kSize);
    floats = F::kScales == Scales::kFloat;
  });
  const std::vector<int8_t> numbers = integers_of(kRows * matrix.number_bytes);
  const std::vector<uint8_t> scales = scales_of(kRows * matrix.scale_bytes, floats);
  matrix.numbers = reinterpret_cast<const uint8_t*>(numbers.data());
  matrix.scales = scales.data();
  const LastTile last(matrix);
  for (const int64_t count : kCounts) {
    const std::vector<float> x = numbers_of<float>(count * kSize);
    GroupScratch scratch(count, kSize);
    round_groups<float>({x.data(), kSize}, 0, count, scratch);
    const GroupTokens plain = scratch.tokens();
    constexpr int64_t kTiles = (kRows + kLanes - 1) / kLanes;
    std::vector<Lanes> by_tile(kTiles * count);
    GroupTile tiles[kTiles];
    for (int64_t t = 0; t < kTiles; ++t) {
      tiles[t] = (t + 1) * kLanes <= kRows ? matrix.tile(t) : last.tile();
    }
    groups_plain(kind, plain, tiles, kTiles, 0, by_tile.data());
    std::vector<float> of_group(scratch.scales);
    std::vector<int8_t> rounded(scratch.numbers);
    const bool paired = groups_by_pairs(kind, count);
    std::vector<float> sums(count * kChunk, NAN);
    const GroupTokens tokens = paired ? pair_tokens(plain, scratch) : plain;
    Grouped(tokens, matrix, last).dots(0, kRows, sums.data());
    bool right = true;
    for (int64_t n = 0; n < kRows; ++n) {
      std::vector<float> row(kSize);
      widen_row(matrix, n, row.data());
      for (int64_t m = 0; m < count; ++m) {
        double exact = 0, magnitude = 0;
        for (int64_t k = 0; k < kSize; ++k) {
          const int64_t at = k / kPiece * count + m;
          const double by = double(of_group[at]) * rounded[at * kPiece + k % kPiece];
          exact += by * row[k];
          magnitude += std::abs(by) * (std::abs(row[k]) + 1);
        }
        const float found = sums[m * kChunk + n];
        right &= close(found, exact, magnitude);
        right &= bits_of(found) == bits_of(by_tile[n / kLanes * count + m][n % kLanes]);
      }
    }
    expect(right, "a format of groups", count);
  }
}

template <class T>
void rows(double allowed) {
  const std::vector<T> x = numbers_of<T>(2 * kSize), weight = numbers_of<T>(kSize);
  std::vector<T> out(kSize);
  rms_norm<T>({x.data(), kSize}, weight.data(), 1e-5f, kSize, {out.data(), kSize}, 0, 1);
  double squares = 0;
  for (int64_t k = 0; k < kSize; ++k) squares += double(widen(x[k])) * widen(x[k]);
  bool right = true;
  for (int64_t k = 0; k < kSize; ++k) {
    const double exact = widen(x[k]) / std::sqrt(squares / kSize + 1e-5) * widen(weight[k]);
    right &= std::abs(widen(out[k]) - exact) <= allowed * std::abs(exact);
  }
  expect(right, "rms_norm", 1);
  swiglu<T>({x.data(), 2 * kSize}, kSize, {out.data(), kSize}, 0, 1);
  for (int64_t k = 0; k < kSize; ++k) {
    const double gate = widen(x[k]);
    const double exact = gate / (1 + std::exp(-gate)) * widen(x[kSize + k]);
    right &= std::abs(widen(out[k]) - exact) <= allowed * std::abs(exact);
  }
  expect(right, "swiglu", 1);
}

}  // namespace

int main(int count, char** arguments) {
  const auto given = [&](const char* name) {
    for (int i = 1; i < count; ++i) {
      if (std::strcmp(arguments[i], name) == 0) return true;
    }
    return false;
  };
  if (given("dot") != LFM2_HAS_ARM_DOT || given("i8mm") != LFM2_HAS_ARM_I8MM ||
      given("bf16") != LFM2_HAS_ARM_BF16) {
    std::printf("found: dot %d, i8mm %d, bf16 %d\n", LFM2_HAS_ARM_DOT, LFM2_HAS_ARM_I8MM,
                LFM2_HAS_ARM_BF16);
    wrong = 1;
  }
  dense<float>("float32");
  dense<bf16>("bfloat16");
  dense<fp16>("float16");
  integers();
  for (const GroupKind kind : kGroupKinds) groups(kind);
  rows<float>(1e-5);
  rows<bf16>(0.02);
  return wrong;
}
