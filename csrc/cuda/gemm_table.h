// Fills a table of matrix products and counts its tiles.
#pragma once

#include <vector>

#include "cuda/plan.h"
#include "kernels/limits.h"

namespace tk {

// A matrix where it lies: element (i, j) at i * row + j * col.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;

  Matrix transposed() const { return {data, col, row}; }
};

template <class T>
class GemmTable {
 public:
  // out (m×n, rows out_row apart) = a (m×depth) b (depth×n); the caller adds what else it wants. Empty
  // products are left out (an empty sum is not: it writes zeros).
  GemmProblem<T>& add(int64_t m, int64_t n, int64_t depth, Matrix<T> a, Matrix<T> b, T* out,
                      int64_t out_row) {
    GemmProblem<T> p{};
    p.a = a.data, p.a_row = a.row, p.a_col = a.col;
    p.b = b.data, p.b_row = b.row, p.b_col = b.col;
    p.out = out, p.out_row = out_row, p.out_col = 1;
    p.source_row = out_row, p.source_col = 1;
    p.m = static_cast<int32_t>(m), p.n = static_cast<int32_t>(n), p.depth = static_cast<int32_t>(depth);
    p.alpha = 1;
    p.first_tile = static_cast<int32_t>(tiles_);
    if (m > 0 && n > 0) {
      tiles_ += tiles(m, n);
      problems_.push_back(p);
      return problems_.back();
    }
    unused_ = p;
    return unused_;
  }

  static int64_t tiles(int64_t m, int64_t n) {
    return (m + gemm_tile - 1) / gemm_tile * ((n + gemm_tile - 1) / gemm_tile);
  }

  void launch(PlanBuilder& builder) const {
    builder.persistent(Kernel::grouped_gemm, problems_, tiles_, gemm_threads);
  }

 private:
  std::vector<GemmProblem<T>> problems_;
  GemmProblem<T> unused_;
  int64_t tiles_ = 0;
};

}  // namespace tk
