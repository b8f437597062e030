// Chains of n-mode products over many tensors: step s multiplies every tensor's s-th mode, one launch a step.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/gemm_table.h"

namespace tk {

// y[o,r,i] = Σ_k M[r,k] x[o,k,i] as one matrix product. y's last index is the contiguous one.
template <class T>
GemmProblem<T>& add_mode_product(GemmTable<T>& table, const T* x, int64_t outer, int64_t n, int64_t inner,
                                 Matrix<T> matrix, int64_t rows, T* y) {
  if (inner == 1) return table.add(outer, rows, n, {x, n, 1}, matrix.transposed(), y, rows);
  GemmProblem<T>& p = table.add(rows, outer * inner, n, matrix, {x, inner, 1}, y, inner);
  if (outer > 1) {
    p.n_inner = static_cast<int32_t>(inner);
    p.b_col_outer = n * inner;
    p.out_col_outer = p.source_col_outer = rows * inner;
  }
  return p;
}

template <class T>
struct ModeProducts {
  const T* tensor;
  T* out;
  std::vector<int64_t> shape;
  struct Product {
    int64_t mode;
    Matrix<T> matrix;  // rows×n
    int64_t rows;
  };
  std::vector<Product> products;
};

// Appends the launches of all chains. `decorate(i, problem)` may change the last product of chain i.
template <class T, class Decorate>
void mode_products(PlanBuilder& builder, const std::vector<ModeProducts<T>>& chains, Decorate&& decorate) {
  size_t steps = 0;
  for (const auto& chain : chains) steps = std::max(steps, chain.products.size());
  std::vector<const T*> current;
  std::vector<std::vector<int64_t>> shapes;
  for (const auto& chain : chains) {
    current.push_back(chain.tensor);
    shapes.push_back(chain.shape);
  }
  for (size_t step = 0; step < steps; ++step) {
    GemmTable<T> table;
    for (size_t c = 0; c < chains.size(); ++c) {
      if (step >= chains[c].products.size()) continue;
      const auto& product = chains[c].products[step];
      const bool last = step + 1 == chains[c].products.size();
      int64_t outer = 1, inner = 1;
      for (int64_t d = 0; d < product.mode; ++d) outer *= shapes[c][d];
      for (size_t d = product.mode + 1; d < shapes[c].size(); ++d) inner *= shapes[c][d];
      T* to = last ? chains[c].out : builder.scratch<T>(outer * product.rows * inner);
      GemmProblem<T>& p = add_mode_product(table, current[c], outer, shapes[c][product.mode], inner,
                                           product.matrix, product.rows, to);
      if (last) decorate(c, p);
      current[c] = to;
      shapes[c][product.mode] = product.rows;
    }
    table.launch(builder);
  }
}

}  // namespace tk
