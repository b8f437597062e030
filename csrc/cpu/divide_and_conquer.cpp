// Eigenvalues and leading eigenvectors of a symmetric tridiagonal matrix by divide and conquer:
//     T = [T₁ 0; 0 T₂] + ρ u uᵀ,   1 + ρ Σ_j z_j² / (d_j − λ) = 0,   z = [Q₁ᵀ 0; 0 Q₂ᵀ] u  (Cuppen 1981).
//
// Layout: one eigenvector per row. Blocks of at most 32 are solved by implicit QL; merging deflates (tiny
// z_j, equal d_j), solves the secular equation for every remaining root relative to its nearer pole,
// recomputes z so that the vectors are orthogonal to rounding (Gu & Eisenstat 1995), and multiplies them into
// the halves' vectors with two products. At the top only the vectors asked for are formed. Numerics: float64;
// one thread, fixed order.
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

constexpr int64_t leaf = 32;
constexpr double eps = std::numeric_limits<double>::epsilon();

// Implicit QL with Wilkinson shifts (Dubrulle, Martin & Wilkinson 1968); rows of q are rotated along. e has n
// entries.
void implicit_ql(int64_t n, double* d, double* e, double* q, int64_t row) {
  const auto rotate = simd<double>().rotate;
  for (int64_t low = 0; low < n; ++low)
    for (;;) {
      int64_t m = low;
      while (m + 1 < n && std::fabs(e[m]) > eps * (std::fabs(d[m]) + std::fabs(d[m + 1]))) ++m;
      if (m == low) break;
      double g = (d[low + 1] - d[low]) / (2 * e[low]);
      g = d[m] - d[low] + e[low] / (g + std::copysign(std::sqrt(g * g + 1), g));
      double s = 1, c = 1, p = 0, r = 0;
      int64_t i = m - 1;
      for (; i >= low; --i) {
        const double f = s * e[i], b = c * e[i];
        e[i + 1] = r = std::sqrt(f * f + g * g);  // T is scaled to one: no overflow
        if (r == 0) {
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * s + 2 * c * b;
        d[i + 1] = g + (p = s * t);
        g = c * t - b;
        rotate(n, q + i * row, q + (i + 1) * row, c, s);
      }
      if (r == 0 && i >= low) continue;
      d[low] -= p;
      e[low] = g;
      e[m] = 0;
    }
}

// Root number i of 1/ρ + Σ w_j / (d_j − λ) = 0, d ascending, as d_origin + mu; gaps[j] = d_j − λ without
// cancellation.
double secular_root(int64_t k, int64_t i, const double* d, const double* w, double rho, double total,
                    double* shifted, double* gaps) {
  const auto sums = simd<double>().secular;
  const double inverse_rho = 1 / rho;
  const bool last = i == k - 1;
  const double width = last ? rho * total : d[i + 1] - d[i];
  double low_sum[2], high_sum[2];
  const auto evaluate = [&](double mu) {
    sums(i + 1, shifted, w, mu, low_sum);
    sums(k - i - 1, shifted + i + 1, w + i + 1, mu, high_sum);
    return inverse_rho + low_sum[0] + high_sum[0];
  };
  int64_t origin = i;
  const auto shift_to = [&](int64_t pole) {
    origin = pole;
    for (int64_t j = 0; j < k; ++j) shifted[j] = d[j] - d[pole];
  };
  shift_to(i);
  double low = 0, high = width * (1 + 8 * eps), mu = width / 2;  // the last root may lie on its bound
  double value = evaluate(mu);
  if (!last && value < 0) {  // the root lies nearer to the pole above it
    shift_to(i + 1);
    low = -width / 2;
    high = 0;
    mu = low;
  } else if (value >= 0) {
    high = mu;
  } else {
    low = mu;
  }
  for (int step = 0; step < 100; ++step) {
    value = evaluate(mu);
    const double size = std::fabs(low_sum[0]) + std::fabs(high_sum[0]) + inverse_rho;
    if (std::fabs(value) <= 2 * eps * size) break;
    (value < 0 ? low : high) = mu;
    if (high - low <= 2 * eps * std::max(std::fabs(low), std::fabs(high))) break;
    // The two nearest poles are kept, the rest enters through the derivative (Bunch, Nielsen & Sorensen 1978;
    // Li 1994).
    const double slope = low_sum[1] + high_sum[1];
    double next;
    if (last) {
      // One pole below, none above: s / (δ_i − η) + c matches value and slope.
      const double di = shifted[i] - mu, c = value - di * slope;
      next = c > 0 ? mu + di * value / c : mu - value / slope;  // root of c + slope di² / (di − η)
    } else {
      const double di = shifted[i] - mu, dj = shifted[i + 1] - mu;
      const double gap = d[i] - d[i + 1];
      const double c = origin == i ? value - dj * slope - gap * (w[i] / di / di)
                                   : value - di * slope + gap * (w[i + 1] / dj / dj);
      const double a = (di + dj) * value - di * dj * slope, b = di * dj * value;
      const double root = std::sqrt(std::fabs(a * a - 4 * b * c));
      next = mu + (c == 0 ? b / a : a <= 0 ? (a - root) / (2 * c) : 2 * b / (a + root));
    }
    if (!(next > low && next < high) || step % 8 == 7) {
      // Outside the bracket, or slow: halve it, in magnitude when the ends are far apart.
      const double small = std::min(std::fabs(low), std::fabs(high)),
                   large = std::max(std::fabs(low), std::fabs(high));
      const double sign = low + high < 0 ? -1 : 1;
      next =
          small > 0 && small < 0.01 * large ? sign * std::sqrt(small) * std::sqrt(large) : 0.5 * (low + high);
    }
    mu = next;
  }
  for (int64_t j = 0; j < k; ++j) gaps[j] = shifted[j] - mu;
  return d[origin] + mu;
}

// Which half's vectors a combination needs: 1 the upper, 2 the lower, 3 both (after a rotation between them).
struct Merge {
  int64_t n, upper;  // sizes: of the block, of its upper half
  double *d, *q;     // eigenvalues and vectors (rows, stride row) of the halves
  int64_t row;
  double* work;  // room for n×n

  // Deflates; returns the poles that stay, ascending by d, with the upper half's vectors before mixed before
  // lower ones.
  std::vector<int64_t> deflate(double rho, std::vector<double>& z, std::vector<int>& side) {
    std::vector<int64_t> order(n), stay;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return d[a] < d[b]; });
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max({largest, std::fabs(d[i]), std::fabs(z[i])});
    const double tolerance = 8 * eps * largest;
    int64_t held = -1;
    for (int64_t i : order) {
      if (rho * std::fabs(z[i]) <= tolerance) continue;
      if (held >= 0) {
        const double length = std::hypot(z[i], z[held]), c = z[i] / length, s = z[held] / length;
        const double gap = d[i] - d[held];
        if (std::fabs(gap * c * s) <= tolerance) {  // rotate the held one's weight away
          simd<double>().rotate(n, q + held * row, q + i * row, c, s);
          z[i] = length;
          z[held] = 0;
          const double below = d[held] * c * c + d[i] * s * s;
          d[i] = d[held] * s * s + d[i] * c * c;
          d[held] = below;
          side[i] |= side[held];
          side[held] = side[i];
        } else {
          stay.push_back(held);
        }
      }
      held = i;
    }
    if (held >= 0) stay.push_back(held);
    return stay;
  }

  // Merges the halves around the off-diagonal entry `off`; `choose` says how many of the largest are wanted.
  // On return d and the rows of q hold the wanted pairs first, in descending order, if `choose` is set, else
  // all.
  int64_t run(double off, const std::function<int64_t(double*)>* choose, double* values) {
    const double rho = 2 * std::fabs(off), root_half = std::sqrt(0.5);
    std::vector<double> z(n);
    std::vector<int> side(n);
    for (int64_t i = 0; i < n; ++i) {
      z[i] = i < upper ? q[i * row + upper - 1] : std::copysign(1.0, off) * q[i * row + upper];
      z[i] *= root_half;
      side[i] = i < upper ? 1 : 2;
    }
    const std::vector<int64_t> stay = deflate(rho, z, side);
    const int64_t k = stay.size();
    std::vector<double> poles(k), weights(k), shifted(k), fresh(k, 1.0), roots(k);
    double total = 0;
    for (int64_t i = 0; i < k; ++i) {
      poles[i] = d[stay[i]];
      weights[i] = z[stay[i]] * z[stay[i]];
      total += weights[i];
    }
    Buffer<double> gaps(std::max<int64_t>(k * k, 1));
    for (int64_t i = 0; i < k; ++i)
      roots[i] = secular_root(k, i, poles.data(), weights.data(), rho, total, shifted.data(), gaps + i * k);
    // z anew, so that the computed roots are exact for it: z_i² = Π_j (λ_j − d_i) / Π_{j≠i} (d_j − d_i).
    for (int64_t j = 0; j < k; ++j) {
      const double* g = gaps + j * k;
      simd<double>().scale_by_ratio(j, g, poles.data(), poles[j], fresh.data());
      fresh[j] *= g[j];
      simd<double>().scale_by_ratio(k - j - 1, g + j + 1, poles.data() + j + 1, poles[j],
                                    fresh.data() + j + 1);
    }
    for (int64_t i = 0; i < k; ++i) fresh[i] = std::copysign(std::sqrt(std::fabs(fresh[i])), z[stay[i]]);

    // All eigenvalues in descending order: (value, root) for a combination, (value, −1 − row) for a deflated
    // vector.
    std::vector<std::pair<double, int64_t>> all;
    std::vector<char> stays(n, 0);
    for (int64_t i = 0; i < k; ++i) {
      stays[stay[i]] = 1;
      all.emplace_back(roots[i], i);
    }
    for (int64_t i = 0; i < n; ++i)
      if (!stays[i]) all.emplace_back(d[i], -1 - i);
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (int64_t i = 0; i < n; ++i) values[i] = all[i].first;
    const int64_t wanted = choose ? (*choose)(values) : n;

    // Poles by the half their vectors live in, so that each half is one product without zero columns.
    std::vector<int64_t> columns;
    int64_t first_lower = 0, end_upper = 0;
    for (int kind : {1, 3, 2}) {
      if (kind == 3) first_lower = columns.size();
      for (int64_t i = 0; i < k; ++i)
        if (side[stay[i]] == kind) columns.push_back(i);
      if (kind == 3) end_upper = columns.size();
    }
    const int64_t lower = n - upper, in_lower = k - first_lower;
    double *top = work, *bottom = top + end_upper * upper;
    for (int64_t c = 0; c < k; ++c) {
      const double* source = q + stay[columns[c]] * row;
      if (c < end_upper) std::copy_n(source, upper, top + c * upper);
      if (c >= first_lower) std::copy_n(source + upper, lower, bottom + (c - first_lower) * lower);
    }
    // Coefficients of the wanted combinations, one per row, and copies of the wanted deflated vectors.
    std::vector<int64_t> place, kept_place;
    std::vector<double> ratios(k);
    Buffer<double> coefficients(std::max<int64_t>(k * k, 1)), kept(std::max<int64_t>((n - k) * n, 1)),
        result(n * n);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t source = all[i].second;
      if (source < 0) {
        std::copy_n(q + (-1 - source) * row, n, kept + static_cast<int64_t>(kept_place.size()) * n);
        kept_place.push_back(i);
        continue;
      }
      double* out = coefficients + static_cast<int64_t>(place.size()) * k;
      std::fill(ratios.begin(), ratios.end(), 1.0);
      simd<double>().scale_by_ratio(k, fresh.data(), gaps + source * k, 0.0, ratios.data());
      const double scale = 1 / std::sqrt(simd<double>().sum_squares(k, ratios.data()));
      for (int64_t c = 0; c < k; ++c) out[c] = scale * ratios[columns[c]];
      place.push_back(i);
    }
    const int64_t count = place.size();
    multiply<double>(count, upper, end_upper, 1, coefficients, k, 1, top, upper, 1, 0, result, n);
    multiply<double>(count, lower, in_lower, 1, coefficients + first_lower, k, 1, bottom, lower, 1, 0,
                     result + upper, n);
    for (int64_t i = 0; i < count; ++i) std::copy_n(result + i * n, n, q + place[i] * row);
    for (size_t i = 0; i < kept_place.size(); ++i) std::copy_n(kept + i * n, n, q + kept_place[i] * row);
    std::copy_n(values, n, d);
    return wanted;
  }
};

// Solves rows and columns [begin, end); the vectors go to the diagonal block of q.
int64_t solve(int64_t begin, int64_t end, double* d, double* e, double* q, int64_t row, double* work,
              double* values, const std::function<int64_t(double*)>* choose) {
  const int64_t n = end - begin;
  double* block = q + begin * row + begin;
  if (n <= leaf) {
    for (int64_t i = 0; i < n; ++i) block[i * row + i] = 1;
    implicit_ql(n, d + begin, e + begin, block, row);
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return d[begin + a] > d[begin + b]; });
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(block + order[i] * row, n, work + i * n);
      values[i] = d[begin + order[i]];
    }
    for (int64_t i = 0; i < n; ++i) std::copy_n(work + i * n, n, block + i * row);
    std::copy_n(values, n, d + begin);
    return choose ? (*choose)(values) : n;
  }
  const int64_t middle = begin + n / 2;
  const double off = e[middle - 1];
  d[middle - 1] -= std::fabs(off);
  d[middle] -= std::fabs(off);
  solve(begin, middle, d, e, q, row, work, values, nullptr);
  solve(middle, end, d, e, q, row, work, values, nullptr);
  Merge merge{n, n / 2, d + begin, block, row, work};
  return merge.run(off, choose, values);
}

}  // namespace

int64_t tridiagonal_eigen(int64_t n, double* d, double* e, const std::function<int64_t(double*)>& choose,
                          double* values, double* q) {
  Buffer<double> work(n * n);
  std::fill_n(q, n * n, 0.0);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i)
    largest = std::max({largest, std::fabs(d[i]), i + 1 < n ? std::fabs(e[i]) : 0.0});
  const double scale = largest > 0 ? largest : 1;
  for (int64_t i = 0; i < n; ++i) {
    d[i] /= scale;
    e[i] = i + 1 < n ? e[i] / scale : 0;
  }
  const std::function<int64_t(double*)> scaled = [&](double*) {
    for (int64_t i = 0; i < n; ++i) values[i] *= scale;
    return choose(values);
  };
  return solve(0, n, d, e, q, n, work, values, &scaled);
}

}  // namespace tk
