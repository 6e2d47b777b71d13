// The CPU's operations by name: for torch, and for replay.cpp, which calls them without torch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

namespace lfm2 {

using Operation = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

// Defined in replay.cpp.
std::map<std::string, Operation>& operations();

template <class Library>
void implement(Library& library, const char* name, Operation body) {
  library.impl(name, body);
  operations()[name] = body;
}

}  // namespace lfm2
