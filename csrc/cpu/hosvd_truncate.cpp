// Truncated higher-order SVD of cores of different sizes in one call:
//     C' = C ×_i P_iᵀ,  P_i the leading left singular vectors of Mat_i(C), ranks by tolerance or given.
//
// Layout: cores in C order. The trailing modes that hold at most 32 entries together (the window of a
// convolution) form one combined mode: one Gram matrix for all of them (the single ones are partial traces of
// it) and one product with the Kronecker product of their projections. Work: three rounds over the list, each
// one problem per thread and the dearest first: norms, then the vectors of every (core, combined mode), then
// products and the error of every core. Numerics: float64 Gram matrices where the tolerance leaves them room
// (they square singular values), QR and Jacobi of the unfolding otherwise; products in T. The error is
// sqrt(|C|² − |C'|²) where that difference is far above the rounding of C', and is measured while the
// projections are applied otherwise. Given ranks of a float32 core whose energy lies in its leading corner,
// as after a small step in training, take no solve at all: one orthogonal iteration per mode gives the
// subspaces, held to the same bound (fixed_ranks.cpp), and the error comes from its blocks where they know
// it. Results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "core/dispatch.h"
#include "core/scratch.h"
#include "cpu/core_tensor.h"
#include "cpu/fixed_ranks.h"
#include "cpu/leading_vectors.h"
#include "cpu/linalg.h"
#include "cpu/mode_product.h"
#include "cpu/problems.h"
#include "cpu/projection.h"

namespace tk {
namespace {

constexpr int64_t small_window = 32;
// Below this tolerance the rounding of a float64 Gram matrix (1e-16 of |C|² per eigenvalue) could change a
// rank.
constexpr double smallest_gram_tolerance = 1e-5;
// Below this one the rounding of a float32 Gram matrix could; with given ranks the same part must have been
// discarded.
constexpr double smallest_single_tolerance = 1e-2;

template <class T>
struct Limits {
  // |C|² − |C'|² is taken for the squared error only where a mode discards more than this part of |C|². Where
  // one entry of C' holds most of the energy, its rounding (four products) moves |C'|² by 20 u; the error is
  // still right to 1e-3 of itself.
  static constexpr double plain_difference = std::is_same_v<T, float> ? 2e-3 : 2e-11;
};

int64_t product(const int64_t* begin, const int64_t* end) {
  return std::accumulate(begin, end, int64_t(1), std::multiplies<int64_t>());
}

template <class T>
struct Truncation {
  using Values = std::vector<T, Uninitialised<T>>;
  const tk_hosvd_truncate_problem& p;
  const T* core = nullptr;            // the input, or a scaled copy of it where squares would overflow
  std::unique_ptr<Buffer<T>> scaled;  // that copy, core · 2^−exponent
  int exponent = 0;
  double energy = 0, bound = 0;     // |C|² and what one mode may discard of it; bound < 0: fixed ranks
  bool finite = true, gram = true;  // gram: singular values may be squared
  bool exact = true;                // the Gram matrices need float64 products
  int64_t d, tail;                  // modes; the first of the trailing modes that are done together
  int64_t rank[TK_MAX_MODES];
  std::unique_ptr<Buffer<T>> vectors[TK_MAX_MODES];  // P_iᵀ, rank × shape; none: the identity
  double discarded[TK_MAX_MODES] = {};               // energy outside them, to rounding of the Gram matrix
  std::unique_ptr<FixedRanks<T>> steps;              // one orthogonal iteration per mode instead of solves

  explicit Truncation(const tk_hosvd_truncate_problem& problem)
      : p(problem), d(problem.modes), tail(problem.modes) {
    while (tail > 0 && product(p.shape + tail - 1, p.shape + d) <= small_window) --tail;
    std::copy_n(p.shape, d, rank);
  }

  int64_t size() const { return product(p.shape, p.shape + d); }
  int64_t groups() const { return tail + (tail < d ? 1 : 0); }
  bool truncates(int64_t mode) const { return p.truncated[mode] != 0; }

  void prepare(double tol, bool per_mode) {
    core = static_cast<const T*>(p.core);
    double length = norm(size(), core);
    finite = std::isfinite(length);
    if (!finite) return;
    // Squares must neither overflow nor underflow in T, also those of entries far below the largest.
    const double limit = std::is_same_v<T, float> ? 1e8 : 1e100;
    if (length > 0 && !(length > 1 / limit && length < limit)) {
      std::frexp(length, &exponent);
      scaled = std::make_unique<Buffer<T>>(size());
      for (int64_t i = 0; i < size(); ++i) (*scaled)[i] = static_cast<T>(std::ldexp(core[i], -exponent));
      core = *scaled;
      length = norm(size(), core);
    }
    energy = length * length;
    const int64_t count = std::count_if(p.truncated, p.truncated + d, [](int64_t f) { return f != 0; });
    if (tol < 0) {
      bound = -1;
      gram = std::is_same_v<T, float>;
      exact = !gram;
      if (!gram) return;  // in float64 a step of training is to equal the literal one to rounding
      for (int64_t mode = 0; mode < d; ++mode)
        if (truncates(mode)) rank[mode] = std::min(p.max_rank[mode], p.shape[mode]);
      steps = std::make_unique<FixedRanks<T>>(core, d, p.shape, rank);
      // Ranks that were asked for may cut where only float64 products see anything.
      for (int64_t mode = 0; mode < d; ++mode)
        exact |= steps->cut(mode) &&
                 steps->tail_energy(mode) < smallest_single_tolerance * smallest_single_tolerance * energy;
      if (!steps->promising()) steps.reset();
      return;
    }
    bound = tol * tol * energy / (per_mode ? 1 : std::max<int64_t>(count, 1));
    gram = tol >= smallest_gram_tolerance;
    exact = std::is_same_v<T, double> || tol < smallest_single_tolerance;
  }

  RankRule rule(int64_t mode) const {
    // Singular values at the rounding level of float64 count as zero, also for tolerance zero.
    const double noise = p.shape[mode] * std::numeric_limits<double>::epsilon();
    return {bound < 0 ? -1 : std::max(bound, noise * noise * energy), p.min_rank[mode], p.max_rank[mode]};
  }

  void store(int64_t mode, int64_t found, const double* rows) {
    rank[mode] = found;
    vectors[mode] = std::make_unique<Buffer<T>>(found * p.shape[mode]);
    std::copy_n(rows, found * p.shape[mode], vectors[mode]->data());
  }

  void find_vectors(int64_t group) {
    const int64_t end = group < tail ? group + 1 : d;
    if (!finite || std::none_of(p.truncated + group, p.truncated + end, [](int64_t f) { return f != 0; }))
      return;
    if (steps) {
      for (int64_t mode = group; mode < end; ++mode) {
        if (!steps->cut(mode)) continue;
        vectors[mode] = std::make_unique<Buffer<T>>(rank[mode] * p.shape[mode]);
        if (!steps->step(mode, *vectors[mode])) vectors[mode].reset();
      }
      return;
    }
    if (!gram) {
      for (int64_t mode = group; mode < end; ++mode)
        if (truncates(mode)) vectors_of_unfolding(mode);
      return;
    }
    vectors_of_gram(group, end, exact);
    const double visible = smallest_single_tolerance * smallest_single_tolerance * energy;
    for (int64_t mode = group; mode < end && !exact && bound < 0; ++mode)
      if (rank[mode] < p.shape[mode] && discarded[mode] < visible) return vectors_of_gram(group, end, true);
  }

  bool stepped_well() const {
    for (int64_t mode = 0; mode < d; ++mode)
      if (steps->cut(mode) && !vectors[mode]) return false;
    return steps->optimal();
  }

  void vectors_of_unfolding(int64_t mode) {
    const int64_t n = p.shape[mode], outer = product(p.shape, p.shape + mode), inner = size() / outer / n;
    Buffer<double> unfolded(size()), rows(n * n);
    unfold(core, outer, n, inner, unfolded.data());
    store(mode, leading_singular_vectors(n, outer * inner, unfolded, rule(mode), rows, &discarded[mode]),
          rows);
  }

  void vectors_of_gram(int64_t group, int64_t end, bool in_float64) {
    const int64_t width = product(p.shape + group, p.shape + end);
    Buffer<double> whole(width * width), own(width * width), rows(width * width);
    mode_gram(core, product(p.shape, p.shape + group), width, product(p.shape + end, p.shape + d), in_float64,
              whole);
    for (int64_t mode = group; mode < end; ++mode) {
      if (!truncates(mode)) continue;
      const int64_t n = p.shape[mode], after = product(p.shape + mode + 1, p.shape + end),
                    before = width / after / n;
      const double* matrix = whole;
      if (width != n) {  // the partial trace over the other modes of the group
        std::fill_n(own.data(), n * n, 0.0);
        for (int64_t o = 0; o < before; ++o)
          for (int64_t i = 0; i < after; ++i)
            for (int64_t a = 0; a < n; ++a)
              for (int64_t b = 0; b < n; ++b)
                own[a * n + b] += whole[((o * n + a) * after + i) * width + (o * n + b) * after + i];
        matrix = own;
      }
      store(mode, leading_eigenvectors(n, matrix, rule(mode), !in_float64, rows, &discarded[mode]), rows);
    }
  }

  // The combined projection of a group, P_aᵀ ⊗ P_bᵀ …, rows × width; empty where nothing is truncated.
  Values combined(int64_t group) const {
    const int64_t end = group < tail ? group + 1 : d;
    if (std::none_of(vectors + group, vectors + end, [](const auto& v) { return bool(v); })) return {};
    Values result{T(1)};
    int64_t rows = 1, width = 1;
    for (int64_t mode = group; mode < end; ++mode) {
      const int64_t r = rank[mode], n = p.shape[mode];
      Values next(rows * r * width * n);
      for (int64_t a = 0; a < rows; ++a)
        for (int64_t i = 0; i < r; ++i)
          for (int64_t b = 0; b < width; ++b)
            for (int64_t j = 0; j < n; ++j)
              next[((a * r + i) * width + b) * n + j] =
                  result[a * width + b] * (vectors[mode] ? (*vectors[mode])[i * n + j] : T(i == j));
      result = std::move(next);
      rows *= r;
      width *= n;
    }
    return result;
  }

  static void multiply_mode(const ModeProduct<T>& mode_product, const T* x, Values& y) {
    if (!mode_product.run(x, y.data(), 1)) throw std::bad_alloc();
  }

  // C ×_groups projections; where `lost` is given, with |C − C ×_i P_i P_iᵀ|² in it.
  Values project(double* lost) const {
    const int64_t count = groups();
    int64_t from[TK_MAX_MODES], to[TK_MAX_MODES], order[TK_MAX_MODES];
    for (int64_t g = 0; g < count; ++g) {
      const int64_t end = g < tail ? g + 1 : d;
      from[g] = product(p.shape + g, p.shape + end);
      to[g] = product(rank + g, rank + end);
      order[g] = g;
    }
    const T* x = core;
    Values result;
    // The mode that shrinks most comes first.
    std::stable_sort(order, order + count, [&](int64_t a, int64_t b) {
      return 1.0 / to[a] - 1.0 / from[a] > 1.0 / to[b] - 1.0 / from[b];
    });
    if (lost) *lost = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t g = order[k], n = from[g], rows = to[g];
      const Values matrix = combined(g);
      if (matrix.empty()) continue;
      const int64_t outer = product(from, from + g), inner = product(from + g + 1, from + count);
      Values y(outer * rows * inner);
      if (lost)
        *lost += project_and_measure(outer, n, inner, rows, matrix.data(), x, y.data());
      else
        multiply_mode({outer, n, inner, rows, matrix.data(), n, 1}, x, y);
      result.swap(y);
      x = result.data();
      from[g] = rows;
    }
    if (result.empty()) result.assign(x, x + size());
    return result;
  }

  // Cuts every rank that exceeds the product of the others to that product. Nothing is lost by it.
  void make_feasible(Values& small) {
    for (int64_t mode = 0; mode < d; ++mode) {
      const int64_t all = product(rank, rank + d), others = all / std::max<int64_t>(rank[mode], 1);
      if (!truncates(mode) || rank[mode] <= others) continue;
      const int64_t old = rank[mode], n = p.shape[mode];
      const int64_t outer = product(rank, rank + mode), inner = product(rank + mode + 1, rank + d);
      Buffer<double> unfolded(all), rows(old * old);
      unfold(small.data(), outer, old, inner, unfolded.data());
      if (gram) {
        Buffer<double> g(old * old);
        mode_gram(small.data(), outer, old, inner, true, g.data());
        leading_eigenvectors(old, g, {-1, others, others}, false, rows);
      } else {
        leading_singular_vectors(old, others, unfolded, {-1, others, others}, rows);
      }
      Values rotation(rows.data(), rows.data() + others * old), y(outer * others * inner);
      multiply_mode({outer, old, inner, others, rotation.data(), old, 1}, small.data(), y);
      small.swap(y);
      auto rotated = std::make_unique<Buffer<T>>(others * n);
      if (vectors[mode])
        multiply<T>(others, n, old, 1, rotation.data(), old, 1, *vectors[mode], n, 1, 0, *rotated, n);
      else
        std::copy_n(rotation.data(), others * n, rotated->data());
      vectors[mode] = std::move(rotated);
      rank[mode] = others;
      mode = -1;  // other modes may have become infeasible
    }
  }

  void finish(int64_t* ranks, double& relative_error) {
    T* result = static_cast<T*>(p.new_core);
    if (!finite) {
      std::copy_n(core, size(), result);
      for (int64_t mode = 0; mode < d; ++mode)
        if (truncates(mode)) write_projection(mode);
      relative_error = std::numeric_limits<double>::quiet_NaN();
      std::copy_n(p.shape, d, ranks);
      return;
    }
    if (steps && !stepped_well()) {
      steps.reset();
      for (int64_t group = 0; group < groups(); ++group) find_vectors(group);
    }
    double lost = steps ? steps->squared_error() : -1;
    const bool measure =
        lost < 0 && *std::max_element(discarded, discarded + d) <= Limits<T>::plain_difference * energy;
    Values small = project(measure ? &lost : nullptr);
    if (lost < 0) {
      const double kept = norm(small.size(), small.data());
      lost = std::max(energy - kept * kept, 0.0);
    }
    relative_error = energy > 0 ? std::sqrt(lost / energy) : 0;
    make_feasible(small);
    for (int64_t mode = 0; mode < d; ++mode)
      if (truncates(mode)) write_projection(mode);
    write_core(small, result);
    std::copy_n(rank, d, ranks);
  }

  void write_projection(int64_t mode) const {
    const int64_t n = p.shape[mode];
    T* out = static_cast<T*>(p.projection[mode]);
    std::fill_n(out, n * n, T(0));
    if (vectors[mode]) return transpose(rank[mode], n, vectors[mode]->data(), n, out, n);
    for (int64_t i = 0; i < n; ++i) out[i * n + i] = 1;
  }

  void write_core(const Values& small, T* result) const {
    std::fill_n(result, size(), T(0));
    if (small.empty()) return;
    int64_t index[TK_MAX_MODES] = {};
    const int64_t run = rank[d - 1];
    for (int64_t from = 0; from < static_cast<int64_t>(small.size()); from += run) {
      int64_t to = 0;
      for (int64_t mode = 0; mode < d; ++mode) to = to * p.shape[mode] + index[mode];
      if (scaled)
        for (int64_t i = 0; i < run; ++i) result[to + i] = std::ldexp(small[from + i], exponent);
      else
        std::copy_n(small.data() + from, run, result + to);
      for (int64_t mode = d - 2; mode >= 0 && ++index[mode] == rank[mode]; --mode) index[mode] = 0;
    }
  }
};

template <class T>
tk_status hosvd_truncate(const tk_hosvd_truncate_problem* problems, int64_t count, const double* tol,
                         bool per_mode, int64_t* ranks, int64_t width, double* errors, int threads) {
  std::vector<Truncation<T>> work(problems, problems + count);
  std::vector<double> cost(count);
  for (int64_t l = 0; l < count; ++l) cost[l] = work[l].size();
  tk_status status = for_each_problem(cost, threads, [&](int64_t l) { work[l].prepare(tol[l], per_mode); });
  if (status != TK_OK) return status;

  std::vector<std::pair<int64_t, int64_t>> parts;  // (core, combined mode)
  cost.clear();
  for (int64_t l = 0; l < count; ++l)
    for (int64_t g = 0; g < work[l].groups(); ++g) {
      const double n = g < work[l].tail ? problems[l].shape[g] : small_window;
      parts.emplace_back(l, g);
      cost.push_back(n * work[l].size() + 10 * n * n * n);
    }
  status =
      for_each_problem(cost, threads, [&](int64_t i) { work[parts[i].first].find_vectors(parts[i].second); });
  if (status != TK_OK) return status;

  cost.resize(count);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t* shape = problems[l].shape;
    cost[l] = static_cast<double>(work[l].size()) * *std::max_element(shape, shape + problems[l].modes);
    std::fill_n(ranks + l * width, width, 0);
  }
  return for_each_problem(cost, threads, [&](int64_t l) { work[l].finish(ranks + l * width, errors[l]); });
}

}  // namespace
}  // namespace tk

tk_status tk_hosvd_truncate_cpu(tk_dtype dtype, const tk_hosvd_truncate_problem* problems, int64_t count,
                                const double* tol, int per_mode, int64_t* ranks, int64_t width,
                                double* errors, int threads) {
  if (count < 0 || threads < 1) return TK_INVALID_ARGUMENT;
  for (int64_t l = 0; l < count; ++l) {
    const tk_hosvd_truncate_problem& p = problems[l];
    if (p.modes < 1 || p.modes > TK_MAX_MODES || p.modes > width) return TK_INVALID_ARGUMENT;
    for (int64_t i = 0; i < p.modes; ++i)
      if (p.shape[i] < 1 || p.min_rank[i] < 1 || p.max_rank[i] < 1) return TK_INVALID_ARGUMENT;
  }
  return tk::dispatch(dtype, [&](auto zero) {
    return tk::hosvd_truncate<decltype(zero)>(problems, count, tol, per_mode != 0, ranks, width, errors,
                                              threads);
  });
}
