// What both halves of the bindings read problems with: addresses are integers, each problem is one tuple.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "tucker_kernels.h"

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Turns a status other than success into an exception.
inline void check(tk_status status, const char* what) {
  if (status != TK_OK) throw std::runtime_error(std::string(what) + ": " + tk_status_string(status));
}

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

inline void copy_sizes(const char* what, const Sizes& from, int64_t (&to)[TK_MAX_MODES], size_t expected) {
  if (from.size() != expected || expected > TK_MAX_MODES)
    throw std::runtime_error(std::string(what) +
                             ": at most 8 modes, and as many entries as modes in every list");
  std::copy(from.begin(), from.end(), to);
}

// (tensor, out, shape, modes, rows, matrices, transpose)
using GivenProducts = std::tuple<uintptr_t, uintptr_t, Sizes, Sizes, Sizes, Addresses, bool>;
inline tk_mode_products mode_products(const GivenProducts& given) {
  const auto& [tensor, out, shape, modes, rows, matrices, transpose] = given;
  tk_mode_products p{};
  p.tensor = pointer(tensor);
  p.out = pointer(out);
  p.ndim = static_cast<int32_t>(shape.size());
  p.products = static_cast<int32_t>(modes.size());
  p.transpose = transpose;
  copy_sizes("multi_mode_dot", shape, p.shape, shape.size());
  copy_sizes("multi_mode_dot", rows, p.rows, modes.size());
  if (matrices.size() != modes.size()) throw std::runtime_error("multi_mode_dot: one matrix for each mode");
  for (size_t k = 0; k < modes.size(); ++k) {
    p.modes[k] = static_cast<int32_t>(modes[k]);
    p.matrices[k] = pointer(matrices[k]);
  }
  return p;
}
