// Block Gram–Schmidt with reorthogonalisation as a sequence of launches over many matrices: the columns of d
// become orthonormal to those of u and to each other, or exactly zero where they depend on them.
//
//   W ← (D − U Uᵀ D) diag(1/‖d_j‖);  W ← W − U Uᵀ W;  W ← W R⁻¹ with RᵀR = WᵀW in float64, dependent pivots
//   dropped; W ← W − U Uᵀ W;  V ← W R⁻¹ once more.
//
// Source: Giraud, Langou, Rozložník & van den Eshof 2005; Stathopoulos & Wu 2002 (Gram-based block
// orthogonalisation).
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cuda/gram_table.h"

namespace tk {

template <class T>
struct Orthonormalization {
  const T* u;   // n×r, contiguous; may be null with r = 0
  Matrix<T> d;  // n×p
  T* v;         // n×p, or p×n where transposed, contiguous
  int64_t n, r, p;
  bool unit;  // the columns of d are unit vectors or zero already (and r = 0)
  bool transposed;
  bool pack;         // kept columns first
  double tolerance;  // squared: a pivot at or below it is a dependent column
  int64_t* rank;     // null, or where the number of kept columns goes
  int32_t* flag;
  OnFlag on_flag;
};

// The squared size, relative to its column, below which what remains of a column is rounding: (8 √n 2u)².
template <class T>
double dependence_tolerance(int64_t n) {
  return 64 * static_cast<double>(n) * std::pow(std::numeric_limits<T>::epsilon(), 2);
}

// What a Gram matrix in float64 can tell from zero, relative to its diagonal.
inline double gram_resolution(int64_t n) {
  return 8 * static_cast<double>(n) * std::numeric_limits<double>::epsilon();
}

template <class T>
class OrthonormalizePlan {
 public:
  OrthonormalizePlan(PlanBuilder& builder, const std::vector<Orthonormalization<T>>& all)
      : builder_(builder), all_(all) {
    for (const auto& o : all) {
      Buffers b{};
      if (!o.unit) {
        b.w = builder.scratch<T>(o.n * o.p);
        b.scale = builder.scratch<T>(o.p);
      }
      b.x = builder.scratch<T>(o.n * o.p);
      b.t = builder.scratch<T>(o.r * o.p);
      b.gram = builder.scratch<double>(o.p * o.p);
      b.inverse = builder.scratch<T>(o.p * o.p);
      buffers_.push_back(b);
    }
  }

  void build() {
    norms();
    project_and_scale();
    project([this](size_t i) { return buffers_[i].w; });
    factor([this](size_t i) { return input(i); }, [this](size_t i) { return all_[i].tolerance; }, false);
    solve([this](size_t i) { return input(i); }, false);
    project([this](size_t i) { return buffers_[i].x; });
    const auto second = [this](size_t i) { return plain(buffers_[i].x, i); };
    factor(second, [](size_t) { return 0.25; }, true);
    solve(second, true);
  }

 private:
  struct Buffers {
    T *w, *scale, *x, *t;
    double* gram;
    T* inverse;
  };

  Matrix<T> plain(const T* data, size_t i) const { return {data, all_[i].p, 1}; }
  Matrix<T> input(size_t i) const { return all_[i].unit ? all_[i].d : plain(buffers_[i].w, i); }
  Matrix<T> basis(size_t i) const { return {all_[i].u, all_[i].r, 1}; }

  void norms() {
    std::vector<NormProblem<T>> problems;
    int64_t tiles = 0;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      if (o.unit) continue;
      NormProblem<T> p{};
      p.d = o.d.data, p.d_row = o.d.row, p.d_col = o.d.col;
      p.u = o.u, p.u_cols = static_cast<int32_t>(o.r);
      p.scale = buffers_[i].scale, p.flag = o.flag;
      p.rows = static_cast<int32_t>(o.n), p.cols = static_cast<int32_t>(o.p);
      p.first_tile = static_cast<int32_t>(tiles);
      const int64_t own = (o.p + norm_columns - 1) / norm_columns + (o.r + norm_columns - 1) / norm_columns;
      tiles += own;
      if (own) problems.push_back(p);
    }
    builder_.persistent(Kernel::column_norms, problems, tiles, norm_threads);
  }

  // t = uᵀ x
  void inner_products(const std::vector<Matrix<T>>& x) {
    GemmTable<T> table;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      if (o.r > 0) table.add(o.r, o.p, o.n, basis(i).transposed(), x[i], buffers_[i].t, o.p).flag = o.flag;
    }
    table.launch(builder_);
  }

  // w = (d − u uᵀ d) scale
  void project_and_scale() {
    std::vector<Matrix<T>> x;
    for (const auto& o : all_) x.push_back(o.d);
    inner_products(x);
    GemmTable<T> table;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      if (o.unit) continue;
      GemmProblem<T>& p = table.add(o.n, o.p, o.r, basis(i), plain(buffers_[i].t, i), buffers_[i].w, o.p);
      p.source = o.d.data, p.source_row = o.d.row, p.source_col = o.d.col;
      p.alpha = -1, p.beta = 1, p.scale = buffers_[i].scale, p.flag = o.flag;
    }
    table.launch(builder_);
  }

  // x ← x − u uᵀ x
  template <class Which>
  void project(Which which) {
    std::vector<Matrix<T>> x;
    for (size_t i = 0; i < all_.size(); ++i) x.push_back(plain(which(i), i));
    inner_products(x);
    GemmTable<T> table;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      if (o.r == 0) continue;
      GemmProblem<T>& p = table.add(o.n, o.p, o.r, basis(i), plain(buffers_[i].t, i), which(i), o.p);
      p.source = which(i), p.source_row = o.p, p.source_col = 1;
      p.alpha = -1, p.beta = 1, p.flag = o.flag;
    }
    table.launch(builder_);
  }

  template <class X, class Tolerance>
  void factor(X x, Tolerance tolerance, bool last) {
    GramTable<T> grams;
    CholeskyTable<T> factors;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      grams.add(builder_, x(i).transposed(), o.p, o.n, buffers_[i].gram, o.flag);
      CholeskyProblem<T>& p = factors.add(builder_, buffers_[i].gram, o.p, tolerance(i), o.flag);
      p.relative = last ? 0 : gram_resolution(o.n);
      p.inverse = buffers_[i].inverse;
      p.pack = o.pack;
      p.rank = last ? o.rank : nullptr;
    }
    grams.launch(builder_);
    factors.launch(builder_);
  }

  // x R⁻¹, into the buffer x or, at the end, into v
  template <class X>
  void solve(X x, bool last) {
    GemmTable<T> table;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      const Matrix<T> inverse = plain(buffers_[i].inverse, i);
      if (!last) {
        table.add(o.n, o.p, o.p, x(i), inverse, buffers_[i].x, o.p).flag = o.flag;
        continue;
      }
      GemmProblem<T>& p = o.transposed
                              ? table.add(o.p, o.n, o.p, inverse.transposed(), x(i).transposed(), o.v, o.n)
                              : table.add(o.n, o.p, o.p, x(i), inverse, o.v, o.p);
      p.flag = o.flag;
      p.on_flag = o.on_flag;
    }
    table.launch(builder_);
  }

  PlanBuilder& builder_;
  const std::vector<Orthonormalization<T>>& all_;
  std::vector<Buffers> buffers_;
};

template <class T>
void orthonormalise(PlanBuilder& builder, const std::vector<Orthonormalization<T>>& all) {
  OrthonormalizePlan<T>(builder, all).build();
}

}  // namespace tk
