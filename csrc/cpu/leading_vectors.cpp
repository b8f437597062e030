// Rank selection and the vectors kept, from a Gram matrix G or from the unfolding itself.
//
// Warm: a core kept in HOSVD form has a nearly diagonal G after a small step. Sort the diagonal, factor G = L
// Lᵀ, keep the first k columns of L, orthonormalised. Dropping the others loses at most the sum of their
// squared norms, so the bound holds; k is the optimal rank or one more, because the columns are taken only
// where k − 2 is too few even after all that rotations could gain. (One such step is a step of the QR
// iteration, so G stays nearly diagonal.) Cold: tridiagonalisation, divide and conquer for the leading
// vectors only, back-transformation. Without squaring: QR and one-sided Jacobi of the unfolding. Numerics:
// float64; the warm vectors and the tridiagonalisation in float32 where G is no better.
#include "cpu/leading_vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();

double orthogonality(int64_t n) { return 2 * eps * std::sqrt(static_cast<double>(std::max<int64_t>(n, 4))); }

// energy: squared singular values in descending order; lost: energy that is in none of them.
int64_t choose_rank(int64_t n, const double* energy, int64_t count, double lost, const RankRule& rule) {
  int64_t wanted = n;
  if (rule.bound >= 0) {
    double tail = lost;
    wanted = count;
    while (wanted > 0 && (tail += energy[wanted - 1]) <= rule.bound) --wanted;
  }
  return std::max(std::min({wanted, rule.upper, n}), std::min(rule.lower, n));
}

// How much energy plane rotations could move from the sorted diagonal's tail behind k to its head: for every
// pair across the cut, what diagonalising that pair alone would move.
double possible_gain(int64_t n, const double* g, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = k; j < n; ++j) {
      const double half = 0.5 * (g[i * n + i] - g[j * n + j]), off = g[i * n + j];
      sum += off * off / (half + std::sqrt(half * half + off * off) + 1e-300);
    }
  return sum;
}

constexpr int64_t smallest_warm = 24;  // below, a full solve costs no more
// Squares off the diagonal by those on it; with more, the result would lose the HOSVD form.
constexpr double nearly_diagonal = 1e-3;
// Where a given rank cuts: the part of the tail that rotations might still gain.
constexpr double good_head = 0.01;

// The warm way, or −1 if G is too far from diagonal. T is the type the kept columns are orthonormalised in.
template <class T>
int64_t warm_vectors(int64_t n, const double* g, const RankRule& rule, double* rows, double* discarded) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return g[i * n + i] > g[j * n + j]; });
  const int64_t row = padded<T>(n), step = padded<double>(n);
  Buffer<double> sorted(n * n), lt(n * step);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) sorted[i * n + j] = g[order[i] * n + order[j]];
  std::vector<double> tail(n + 1, 0.0), energy(n);
  const auto sum_up = [&] {
    for (int64_t k = n - 1; k >= 0; --k) tail[k] = tail[k + 1] + energy[k];
  };
  // Whether k columns are at most one too many, and a good choice where the rule's bounds decided.
  const auto sharp = [&](int64_t k, const std::vector<double>& diagonal_tail, int64_t slack) {
    const bool cut = rule.bound < 0 || (k == rule.upper && tail[k] > rule.bound);
    if (cut) return k == n || possible_gain(n, sorted, k) <= good_head * diagonal_tail[k];
    const int64_t fewer = k - 1 - slack;
    return fewer < rule.lower || diagonal_tail[fewer] - possible_gain(n, sorted, fewer) > rule.bound;
  };
  for (int64_t i = 0; i < n; ++i) energy[i] = sorted[i * n + i];
  sum_up();
  const std::vector<double> diagonal_tail = tail;
  const double all = simd<double>().sum_squares(n * n, sorted);
  const double diagonal = simd<double>().sum_squares(n, energy.data());
  if (all - diagonal > nearly_diagonal * diagonal) return -1;
  if (!sharp(choose_rank(n, energy.data(), n, 0, rule), diagonal_tail, 3)) return -1;
  const double lost = semidefinite_cholesky<double>(n, sorted, n * eps * sorted[0], lt);
  for (int64_t i = 0; i < n; ++i) energy[i] = simd<double>().sum_squares(n - i, lt + i * step + i);
  sum_up();
  const int64_t rank = choose_rank(n, energy.data(), n, lost, rule);
  if (!sharp(rank, diagonal_tail, 1)) return -1;
  Buffer<T> w(n * row);
  int64_t live = 0;
  for (int64_t k = 0; k < rank; ++k) {
    if (energy[k] == 0) continue;
    const double scale = 1 / std::sqrt(energy[k]);
    for (int64_t i = 0; i < n; ++i) w[live * row + i] = static_cast<T>(lt[k * step + i] * scale);
    ++live;
  }
  const int64_t kept = orthonormalise_rows<T>(n, nullptr, 0, 0, 0, w, live, 1e-3);
  if (kept < live) return -1;
  complete_rows<T>(n, w, row, kept, rank);
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t i = 0; i < n; ++i) rows[k * n + order[i]] = w[k * row + i];
  if (discarded) *discarded = tail[rank] + lost;
  return rank;
}

// Tridiagonalisation in T; the reflectors come back in float64, each orthogonal to rounding of float64.
template <class T>
void tridiagonalise_in(int64_t n, const double* g, double* d, double* e, double* v, double* tau) {
  const int64_t step = padded<T>(n), wide = padded<double>(n);
  Buffer<T> a(n * step), narrow(n * step), factor(n);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, g[i * n + i]);
  const double scale = largest > 0 ? largest : 1;  // squares of float32 may underflow
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) a[i * step + j] = static_cast<T>(g[i * n + j] / scale);
  tridiagonalise<T>(n, a, d, e, narrow, factor);
  for (int64_t i = 0; i < n; ++i) d[i] *= scale;
  for (int64_t i = 0; i + 1 < n; ++i) e[i] *= scale;
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(narrow + i * step, n, v + i * wide);
    const double square = simd<double>().sum_squares(n, v + i * wide);
    tau[i] = factor[i] == 0 ? 0 : 2 / square;
  }
}

}  // namespace

int64_t leading_eigenvectors(int64_t n, const double* g, const RankRule& rule, bool single, double* rows,
                             double* discarded) {
  if (n >= smallest_warm) {
    const int64_t rank = single ? warm_vectors<float>(n, g, rule, rows, discarded)
                                : warm_vectors<double>(n, g, rule, rows, discarded);
    if (rank >= 0) return rank;
  }
  Buffer<double> v(n * padded<double>(n)), d(n), e(n), tau(n), values(n);
  if (single)
    tridiagonalise_in<float>(n, g, d, e, v, tau);
  else
    tridiagonalise_in<double>(n, g, d, e, v, tau);
  const int64_t rank = tridiagonal_eigen(
      n, d, e,
      [&](double* energy) {
        for (int64_t i = 0; i < n; ++i) energy[i] = std::max(energy[i], 0.0);
        return choose_rank(n, energy, n, 0, rule);
      },
      values, rows);
  back_transform(rank, n, v, tau, rows);
  if (discarded) *discarded = std::accumulate(values + rank, values + n, 0.0);
  return rank;
}

int64_t leading_singular_vectors(int64_t n, int64_t m, const double* a, const RankRule& rule, double* rows,
                                 double* discarded) {
  const int64_t k = std::min(n, m);
  Buffer<double> s(k), vt(k * m);
  svd(n, m, a, orthogonality(n), rows, s, vt);
  std::vector<double> energy(k);
  for (int64_t i = 0; i < k; ++i) energy[i] = s[i] * s[i];
  const int64_t rank = choose_rank(n, energy.data(), k, 0, rule);
  complete_rows(n, rows, n, std::min(k, rank), rank);
  if (discarded) *discarded = std::accumulate(energy.begin() + std::min(k, rank), energy.end(), 0.0);
  return rank;
}

}  // namespace tk
