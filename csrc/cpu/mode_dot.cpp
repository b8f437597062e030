// mode_dot and multi_mode_dot on the host; the product itself is in mode_product.cpp.
//
// A chain Y = X ×_{m₁} M₁ ×_{m₂} M₂ … is multiplied in the order with the fewest operations. Dimensions
// before the first multiplied one are a batch: slabs of it go through the whole chain while the intermediates
// (at most 256 KiB each) stay in the second-level cache, and threads split the slabs. Without such a batch
// threads split each product.
#include "core/dispatch.h"
#include "core/mode_order.h"
#include "core/scratch.h"
#include "cpu/mode_product.h"
#include "cpu/problems.h"
#include "tucker_kernels.h"

namespace tk {
namespace {

constexpr int64_t slab_elements = 64 * 1024;

template <class T>
struct Chain {
  int64_t batch = 1;  // product of the dimensions before the first multiplied one
  int count = 0;
  ModeProduct<T> steps[TK_MAX_MODES];  // for one element of the batch

  int64_t work() const {
    int64_t sum = 0;
    for (int s = 0; s < count; ++s) sum += steps[s].work();
    return batch * sum;
  }
  // Elements of the largest intermediate result, per element of the batch.
  int64_t intermediate() const {
    int64_t most = 0;
    for (int s = 0; s + 1 < count; ++s) {
      const int64_t size = steps[s].columns() * steps[s].rows;
      if (size > most) most = size;
    }
    return most;
  }
  ModeProduct<T> step(int s, int64_t batched) const {
    ModeProduct<T> product = steps[s];
    product.outer *= batched;
    return product;
  }
};

// A multiplied mode: M[r,k] at matrix[r * row + k * col].
template <class T>
struct Mode {
  int place;
  int64_t n, rows;
  const T* matrix;
  int64_t row, col;
  bool pair;  // of merged modes
};

// Two neighbouring short modes as one, with the Kronecker product of their matrices: a 3×3 window then takes
// one pass over the tensor and not two.
constexpr int64_t longest_merged = 25;

template <class T>
Mode<T> merged(const Mode<T>& a, const Mode<T>& b, T* out) {
  const Mode<T> both = {a.place, a.n * b.n, a.rows * b.rows, out, a.n * b.n, 1, true};
  for (int64_t r = 0; r < both.rows; ++r)
    for (int64_t k = 0; k < both.n; ++k)
      out[r * both.n + k] =
          a.matrix[r / b.rows * a.row + k / b.n * a.col] * b.matrix[r % b.rows * b.row + k % b.n * b.col];
  return both;
}

template <class T>
Chain<T> plan(const tk_multi_mode_dot_problem& p,
              T (&products)[TK_MAX_MODES / 2][longest_merged * longest_merged]) {
  int64_t shape[TK_MAX_MODES];
  Mode<T> modes[TK_MAX_MODES];
  int multiplied[TK_MAX_MODES], ndim = 0, count = 0, merges = 0;
  for (int d = 0; d < p.ndim; ++d) multiplied[d] = -1;
  for (int i = 0; i < p.products; ++i) multiplied[p.modes[i]] = i;
  for (int d = 0; d < p.ndim; ++d) {
    shape[ndim] = p.shape[d];
    if (const int i = multiplied[d]; i >= 0) {
      const T* matrix = static_cast<const T*>(p.matrices[i]);
      const int64_t row = p.transpose ? 1 : p.shape[d], col = p.transpose ? p.rows[i] : 1;
      const Mode<T> mode = {ndim, p.shape[d], p.rows[i], matrix, row, col, false};
      Mode<T>* before = count > 0 ? &modes[count - 1] : nullptr;
      const bool fits = before && before->place == ndim - 1 && before->n * mode.n <= longest_merged &&
                        before->rows * mode.rows <= longest_merged && !before->pair;
      if (fits) {
        *before = merged(*before, mode, products[merges++]);
        shape[ndim - 1] = before->n;
        continue;
      }
      modes[count++] = mode;
    }
    ++ndim;
  }
  int64_t n[TK_MAX_MODES], rows[TK_MAX_MODES];
  int order[TK_MAX_MODES];
  for (int i = 0; i < count; ++i) n[i] = modes[i].n, rows[i] = modes[i].rows;
  cheapest_order(count, n, rows, order);
  Chain<T> chain;
  chain.count = count;
  for (int d = 0; d < modes[0].place; ++d) chain.batch *= shape[d];
  for (int s = 0; s < count; ++s) {
    const Mode<T>& mode = modes[order[s]];
    ModeProduct<T>& step = chain.steps[s];
    step = {1, mode.n, 1, mode.rows, mode.matrix, mode.row, mode.col};
    for (int d = modes[0].place; d < mode.place; ++d) step.outer *= shape[d];
    for (int d = mode.place + 1; d < ndim; ++d) step.inner *= shape[d];
    shape[mode.place] = mode.rows;
  }
  return chain;
}

// Runs the chain on the batch elements [begin, end) with two buffers for the intermediates.
template <class T, class Run>
bool walk(const Chain<T>& chain, const T* x, T* y, T* const (&buffers)[2], int64_t batched, Run&& run) {
  for (int s = 0; s < chain.count; ++s) {
    T* to = s + 1 == chain.count ? y : buffers[s % 2];
    if (!run(chain.step(s, batched), x, to)) return false;
    x = to;
  }
  return true;
}

// False when memory ran out.
template <class T>
bool multi_mode_dot(const tk_multi_mode_dot_problem& p, int threads) {
  T products[TK_MAX_MODES / 2][longest_merged * longest_merged];
  const Chain<T> chain = plan<T>(p, products);
  const T* x = static_cast<const T*>(p.tensor);
  T* y = static_cast<T*>(p.out);
  const auto& first = chain.steps[0];
  const auto& last = chain.steps[chain.count - 1];
  const int64_t x_size = first.columns() * first.n, y_size = last.columns() * last.rows;
  if (y_size == 0 || chain.batch == 0) return true;
  const int64_t size = (chain.intermediate() + 15) / 16 * 16;
  const int64_t slab = size <= slab_elements ? slab_elements / (size > 0 ? size : slab_elements) : 0;
  if (chain.count == 1 || slab == 0 || chain.batch < threads) {
    Scratch<T> buffer(2 * size * chain.batch);
    if (!buffer) return false;
    T* const buffers[2] = {buffer.data(), buffer.data() + size * chain.batch};
    return walk(chain, x, y, buffers, chain.batch, [&](const ModeProduct<T>& step, const T* from, T* to) {
      return step.run(from, to, threads);
    });
  }
  int64_t scratch = 0;
  for (int s = 0; s < chain.count; ++s) {
    const int64_t needed = chain.step(s, slab).scratch();
    if (needed > scratch) scratch = needed;
  }
  return parallel_for(chain.batch, 1, chain.work() < parallel_work ? 1 : threads, [&](Range range) {
    Scratch<T> buffer(scratch + 2 * size * slab);
    if (!buffer) return false;
    T* const buffers[2] = {buffer.data() + scratch, buffer.data() + scratch + size * slab};
    for (int64_t b = range.begin; b < range.end; b += slab) {
      const int64_t batched = slab < range.end - b ? slab : range.end - b;
      walk(chain, x + b * x_size, y + b * y_size, buffers, batched,
           [&](const ModeProduct<T>& step, const T* from, T* to) {
             step.run(from, to, Range{0, step.columns()}, buffer.data());
             return true;
           });
    }
    return true;
  });
}

// Multiply-adds of a valid problem, in the order given: what its neighbours are weighed against.
double operations(const tk_multi_mode_dot_problem& p) {
  double size = 1, sum = 0;
  for (int d = 0; d < p.ndim; ++d) size *= double(p.shape[d]);
  for (int i = 0; i < p.products; ++i) {
    sum += size * double(p.rows[i]);
    if (size > 0) size = size / double(p.shape[p.modes[i]]) * double(p.rows[i]);
  }
  return sum;
}

bool valid(const tk_multi_mode_dot_problem& p) {
  if (p.ndim < 1 || p.ndim > TK_MAX_MODES || p.products < 1 || p.products > p.ndim) return false;
  bool seen[TK_MAX_MODES] = {};
  for (int d = 0; d < p.ndim; ++d)
    if (p.shape[d] < 0) return false;
  for (int i = 0; i < p.products; ++i) {
    const int64_t mode = p.modes[i];
    if (mode < 0 || mode >= p.ndim || seen[mode] || p.rows[i] < 0) return false;
    seen[mode] = true;
  }
  return true;
}

}  // namespace
}  // namespace tk

tk_status tk_mode_dot_cpu(tk_dtype dtype, const void* x, int64_t outer, int64_t n, int64_t inner,
                          const void* matrix, int64_t rows, int transpose, void* y, int threads) {
  if (outer < 0 || n < 0 || inner < 0 || rows < 0 || threads < 1) return TK_INVALID_ARGUMENT;
  if (outer == 0 || inner == 0 || rows == 0) return TK_OK;
  return tk::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t row = transpose ? 1 : n, col = transpose ? rows : 1;
    const tk::ModeProduct<T> product = {outer, n, inner, rows, static_cast<const T*>(matrix), row, col};
    const bool good = product.run(static_cast<const T*>(x), static_cast<T*>(y), threads);
    return good ? TK_OK : TK_OUT_OF_MEMORY;
  });
}

tk_status tk_multi_mode_dot_cpu(tk_dtype dtype, const tk_multi_mode_dot_problem* problems, int64_t count,
                                int threads) {
  if (count < 0 || threads < 1) return TK_INVALID_ARGUMENT;
  std::vector<double> cost(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!tk::valid(problems[i])) return TK_INVALID_ARGUMENT;
    cost[i] = tk::operations(problems[i]);
  }
  return tk::dispatch(dtype, [&](auto zero) {
    return tk::share_problems(cost, threads, [&](int64_t i, int used) {
      return tk::multi_mode_dot<decltype(zero)>(problems[i], used);
    });
  });
}
