// Block Gram–Schmidt with reorthogonalisation as a sequence of launches over many matrices: the columns of d
// become orthonormal to those of u and to each other, or exactly zero where they depend on them.
//
//   W ← D diag(1/‖d_j‖);  twice W ← W − U Uᵀ W;  W ← W R⁻¹ with RᵀR = WᵀW, dependent pivots dropped;
//   W ← W − U Uᵀ W;  V ← W R⁻¹ once more.
//
// R⁻¹ and the products with it are float64: in float32 a direction that nearly depends on others would be
// lost in the rounding of large coefficients. A Gram matrix in float64 sees what remains of a column down to
// √ε of it, which is enough for float32. For float64 the first factor leaves the columns with less aside, as
// what remains of them, and a second one tells them apart before the last.
//
// Source: Giraud, Langou, Rozložník & van den Eshof 2005; Stathopoulos & Wu 2002 (Gram-based block
// orthogonalisation).
#pragma once

#include <algorithm>
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
  bool transposed;   // v
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
      b.w = builder.scratch<T>(o.n * o.p);
      b.x = builder.scratch<T>(o.n * o.p);
      if (project_out_shared<T>(o.n) > builder.shared_bytes(Kernel::project_out))
        b.strips = builder.scratch<T>(strips(o) * o.n * projection_columns);
      b.gram = builder.scratch<double>(o.p * o.p);
      b.inverse = builder.scratch<double>(o.p * o.p);
      buffers_.push_back(b);
    }
  }

  void build() {
    for (int round = 0; round < rounds; ++round) {
      project(round);
      factor(round);
      solve(round);
    }
  }

 private:
  static constexpr int rounds = sizeof(T) == 8 ? 3 : 2;

  struct Buffers {
    T *w, *x, *strips;  // rounds go from w to x and back
    double *gram, *inverse;
  };

  static int64_t strips(const Orthonormalization<T>& o) {
    return std::max<int64_t>(1, (o.p + projection_columns - 1) / projection_columns);
  }

  T* buffer(size_t i, int round) const { return round % 2 ? buffers_[i].x : buffers_[i].w; }
  // What the factor of a round is of.
  Matrix<T> input(size_t i, int round) const { return {buffer(i, round), all_[i].p, 1}; }

  // w = d normalised and projected twice, or what a round left projected once more.
  void project(int round) {
    std::vector<ProjectionProblem<T>> problems;
    int64_t tiles = 0, shared = project_out_shared<T>(0);
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      if (round > 0 && o.r == 0) continue;
      const Matrix<T> from = round == 0 ? o.d : input(i, round);
      ProjectionProblem<T> p{};
      p.d = from.data, p.d_row = from.row, p.d_col = from.col;
      p.u = o.u;
      p.out = buffer(i, round);
      p.work = buffers_[i].strips;
      p.flag = o.flag;
      p.n = static_cast<int32_t>(o.n), p.r = static_cast<int32_t>(o.r), p.cols = static_cast<int32_t>(o.p);
      p.normalise = round == 0, p.passes = round == 0 ? 2 : 1;
      p.first_tile = static_cast<int32_t>(tiles);
      tiles += strips(o);
      if (p.work == nullptr) shared = std::max(shared, project_out_shared<T>(o.n));
      problems.push_back(p);
    }
    builder_.persistent(Kernel::project_out, problems, tiles, projection_threads, shared);
  }

  void factor(int round) {
    const bool end = round == rounds - 1;
    GramTable<T> grams;
    CholeskyTable<T> factors;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      grams.add(builder_, input(i, round).transposed(), o.p, o.n, buffers_[i].gram);
      CholeskyProblem<T>& p = factors.add(builder_, buffers_[i].gram, o.p, end ? 0.25 : o.tolerance, o.flag);
      p.relative = end ? 0 : gram_resolution(o.n);
      p.inverse = buffers_[i].inverse;
      p.defer = round + 2 < rounds;
      p.pack = o.pack && end;
      p.rank = end ? o.rank : nullptr;
    }
    grams.launch(builder_);
    factors.launch(builder_);
  }

  // The input times R⁻¹: for the next round, or at the end v.
  void solve(int round) {
    const bool end = round == rounds - 1;
    TriangularTable<T> products;
    for (size_t i = 0; i < all_.size(); ++i) {
      const auto& o = all_[i];
      TriangularProblem<T>& p = products.add(o.n, o.p, input(i, round), buffers_[i].inverse,
                                             end ? o.v : buffer(i, round + 1), o.flag);
      if (end && o.transposed) p.out_row = 1, p.out_col = o.n;
      p.packed = o.pack && end;
      p.on_flag = end ? o.on_flag : OnFlag::skip;
    }
    products.launch(builder_);
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
