// Fills the tables of Gram matrices, of their semidefinite Cholesky factors, of products with what these
// give, of Newton steps, and of Jacobi rotations.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/gemm_table.h"
#include "kernels/limits.h"

namespace tk {

template <class T>
class GramTable {
 public:
  static constexpr int64_t tile = gram_tile, split_depth = 512;

  // gram (size×size) of the rows of a (size×depth). How the depth is split depends on the problem alone, so
  // that a problem's result does not depend on what else is in the call. The caller sets a second dimension
  // of k.
  GramProblem<T>& add(PlanBuilder& builder, Matrix<T> a, int64_t size, int64_t depth, double* gram) {
    GramProblem<T> p{};
    p.a = a.data, p.row = a.row, p.col = a.col;
    p.gram = gram;
    p.size = static_cast<int32_t>(size), p.depth = static_cast<int32_t>(depth);
    p.splits = static_cast<int32_t>(std::max<int64_t>(1, (depth + split_depth - 1) / split_depth));
    p.split_depth = static_cast<int32_t>(split_depth);
    const int64_t blocks = (size + tile - 1) / tile, lower = blocks * (blocks + 1) / 2;
    if (p.splits > 1) {
      p.partial = builder.scratch<double>(p.splits * size * size);
      p.finished = builder.initialised(std::vector<int32_t>(lower));
    }
    p.first_tile = static_cast<int32_t>(tiles_);
    tiles_ += lower * p.splits;
    problems_.push_back(p);
    return problems_.back();
  }

  // The same of the unfolding along the middle index of a tensor (outer, n, inner).
  GramProblem<T>& add_unfolding(PlanBuilder& builder, const T* tensor, int64_t outer, int64_t n,
                                int64_t inner, double* gram) {
    GramProblem<T>& p = add(builder, {tensor, inner, inner == 1 ? n : 1}, n, outer * inner, gram);
    p.inner = outer > 1 && inner > 1 ? static_cast<int32_t>(inner) : 0;
    p.col_outer = n * inner;
    return p;
  }

  void launch(PlanBuilder& builder) const {
    builder.persistent(Kernel::gram, problems_, tiles_, gram_threads);
  }

 private:
  std::vector<GramProblem<T>> problems_;
  int64_t tiles_ = 0;
};

// How many rows of a Cholesky factor of this size fit the shared memory of one block.
inline int32_t resident_rows(int64_t size, int64_t shared_bytes) {
  int64_t resident = size;
  while (resident > 0 && semidefinite_cholesky_shared(size, resident) > shared_bytes) --resident;
  return static_cast<int32_t>(resident);
}

template <class T>
class CholeskyTable {
 public:
  CholeskyProblem<T>& add(PlanBuilder& builder, const double* gram, int64_t size, double tolerance,
                          int32_t* flag) {
    CholeskyProblem<T> p{};
    p.gram = gram, p.flag = flag;
    p.size = static_cast<int32_t>(size), p.tolerance = tolerance;
    p.resident = resident_rows(size, builder.shared_bytes(Kernel::semidefinite_cholesky));
    if (p.resident < size) p.work = builder.scratch<double>(size * (size + 1) / 2);
    shared_ = std::max(shared_, semidefinite_cholesky_shared(size, p.resident));
    problems_.push_back(p);
    return problems_.back();
  }

  void launch(PlanBuilder& builder) const {
    builder.one_block_each(Kernel::semidefinite_cholesky, problems_, semidefinite_cholesky_threads, shared_);
  }

 private:
  std::vector<CholeskyProblem<T>> problems_;
  int64_t shared_ = 0;
};

template <class T>
class TriangularTable {
 public:
  // out (m×n, contiguous) = a (m×n) b (n×n); the caller adds what else it wants. Empty ones are left out.
  TriangularProblem<T>& add(int64_t m, int64_t n, Matrix<T> a, const double* b, T* out, const int32_t* flag) {
    TriangularProblem<T> p{};
    p.a = a.data, p.a_row = a.row, p.a_col = a.col;
    p.b = b, p.flag = flag;
    p.out = out, p.out_row = n, p.out_col = 1;
    p.m = static_cast<int32_t>(m), p.n = static_cast<int32_t>(n);
    p.first_tile = static_cast<int32_t>(tiles_);
    if (m == 0 || n == 0) return unused_ = p;
    tiles_ += GemmTable<T>::tiles(m, n);
    problems_.push_back(p);
    return problems_.back();
  }

  void launch(PlanBuilder& builder) const {
    builder.persistent(Kernel::triangular_product, problems_, tiles_, gram_threads);
  }

 private:
  std::vector<TriangularProblem<T>> problems_;
  TriangularProblem<T> unused_;
  int64_t tiles_ = 0;
};

// One Newton step towards the nearest orthonormal matrix, Q ← 3/2 Q − 1/2 Q (QᵀQ): a defect ‖QᵀQ − I‖ = δ
// becomes 3/4 δ². Columns that are zero stay so. Two launches.
template <class T>
class NewtonTable {
 public:
  // to = the step from `from`, both m×n and contiguous.
  void add(PlanBuilder& builder, const T* from, int64_t m, int64_t n, T* to, const int32_t* flag,
           OnFlag on_flag) {
    double* gram = builder.scratch<double>(n * n);
    grams_.add(builder, {from, 1, n}, n, m, gram);
    TriangularProblem<T>& step = steps_.add(m, n, {from, n, 1}, gram, to, flag);
    step.packed = true;
    step.newton = true;
    step.on_flag = on_flag;
  }

  void launch(PlanBuilder& builder) const {
    grams_.launch(builder);
    steps_.launch(builder);
  }

 private:
  GramTable<T> grams_;
  TriangularTable<T> steps_;
};

template <class T>
class JacobiTable {
 public:
  JacobiProblem<T>& add(PlanBuilder& builder, T* factor, int64_t size) {
    JacobiProblem<T> p{};
    p.factor = factor;
    p.size = static_cast<int32_t>(size);
    const int64_t most = builder.shared_bytes(Kernel::jacobi_svd);
    int64_t bytes = jacobi_svd_shared<T>(size, size);
    if (bytes > most) {  // column blocks of the largest power of two of which two fit
      p.width = most_columns;
      while (jacobi_svd_shared<T>(2 * p.width, size) > most) p.width /= 2;
      p.meetings = (p.size + 2 * p.width - 1) / (2 * p.width);
      p.progress = builder.initialised(std::vector<int32_t>(3));
      bytes = jacobi_svd_shared<T>(2 * p.width, size);  // to sort all columns where they lie takes less
    }
    shared_ = std::max(shared_, bytes);
    p.first_block = blocks_;
    blocks_ += std::max(p.meetings, 1);
    problems_.push_back(p);
    return problems_.back();
  }

  void launch(PlanBuilder& builder) const {
    builder.blocks(Kernel::jacobi_svd, problems_, blocks_, jacobi_svd_threads, shared_);
  }

 private:
  static constexpr int32_t most_columns = 32;  // of a column block

  std::vector<JacobiProblem<T>> problems_;
  int32_t blocks_ = 0;
  int64_t shared_ = 0;
};

}  // namespace tk
