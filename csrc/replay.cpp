// Many operations in one call, so that neither Python nor its lock is needed between them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "operations.h"

namespace lfm2 {

std::map<std::string, Operation>& operations() {
  static std::map<std::string, Operation> known;
  return known;
}

}  // namespace lfm2

namespace {

using namespace lfm2;
using torch::stable::detail::from;

// Kinds of arguments in a program. lfm2_fast/ops/native_program.py has the same numbers, and takes
// them from the schemas, because an operation cannot check the kind of its arguments.
enum Kind : int64_t {
  kNone,
  kTensor,
  kOptionalTensor,
  kInt,
  kOptionalInt,
  kFloat,
  kBool,
};

// Reads the numbers of a program one after the other.
class Reader {
 public:
  explicit Reader(const Tensor& program)
      : next_(read<int64_t>(program)), end_(next_ + program.numel()) {}

  bool done() const { return next_ == end_; }

  int64_t number() {
    STD_TORCH_CHECK(next_ != end_, "program ends in the middle of a call");
    return *next_++;
  }

  int64_t index(int64_t size, const char* of) {
    const int64_t found = number();
    STD_TORCH_CHECK(0 <= found && found < size, "program asks for number ", found, " of ", size,
                    " ", of);
    return found;
  }

 private:
  const int64_t* next_;
  const int64_t* end_;
};

StableIValue argument(Reader& program, const std::vector<Tensor>& tensors) {
  const int64_t kind = program.number();
  const auto tensor = [&] { return tensors[program.index(tensors.size(), "tensors")]; };
  switch (kind) {
    case kNone:
      return from(std::nullopt);
    case kTensor:
      return from(tensor());
    case kOptionalTensor:
      return from(std::optional<Tensor>(tensor()));
    case kInt:
      return from(program.number());
    case kOptionalInt:
      return from(std::optional<int64_t>(program.number()));
    case kFloat: {
      const int64_t bits = program.number();
      double value;
      std::memcpy(&value, &bits, sizeof(value));
      return from(value);
    }
    case kBool:
      return from(program.number() != 0);
  }
  STD_TORCH_CHECK(false, "program has an argument of kind ", kind);
}

// Operations by their names in ASCII, with a space between two. The names come as a tensor, because
// torch 2.13's conversion of a string leaks it.
std::vector<Operation> named(const Tensor& names) {
  expect_packed(names, "names", kType<uint8_t>, {names.numel()});
  std::vector<Operation> found;
  std::istringstream words(std::string(read<char>(names), names.numel()));
  for (std::string name; words >> name;) {
    const auto known = operations().find(name);
    STD_TORCH_CHECK(known != operations().end(), "there is no operation ", name);
    found.push_back(known->second);
  }
  return found;
}

void replay_native(const std::vector<Tensor>& tensors, const Tensor& program,
                   const Tensor& names) {
  expect_packed(program, "program", kType<int64_t>, {program.numel()});
  const std::vector<Operation> known = named(names);
  std::vector<StableIValue> stack;
  for (Reader reader(program); !reader.done();) {
    const Operation operation = known[reader.index(known.size(), "operations")];
    const int64_t count = reader.number();
    STD_TORCH_CHECK(count >= 0, "program has a call with ", count, " arguments");
    stack.clear();
    for (int64_t i = 0; i < count; ++i) {
      stack.push_back(argument(reader, tensors));
    }
    operation(stack.data(), count, 0);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfm2_fast, CPU, library) {
  library.impl("replay_native", TORCH_BOX(&replay_native));
}
