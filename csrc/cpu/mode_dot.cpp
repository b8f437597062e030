// mode_dot and multi_mode_dot on the host; the product itself is in mode_product.cpp.
//
// A chain Y = X ×_{m₁} M₁ ×_{m₂} M₂ … is multiplied in the order with the fewest operations. Doing mode i
// before mode j (sizes n, then rows) costs less exactly when 1/n_i − 1/rows_i < 1/n_j − 1/rows_j, whatever
// the other modes are, so sorting by that number is optimal (adjacent exchange). Dimensions before the first
// multiplied one are a batch: slabs of it go through the whole chain while the intermediates (at most 256 KiB
// each) stay in the second-level cache, and threads split the slabs. Without such a batch threads split each
// product.
#include "core/dispatch.h"
#include "core/scratch.h"
#include "cpu/mode_product.h"
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

template <class T>
Chain<T> plan(const tk_mode_products& p) {
  Chain<T> chain;
  chain.count = p.products;
  int order[TK_MAX_MODES], first = p.ndim;
  double key[TK_MAX_MODES];
  int64_t shape[TK_MAX_MODES];
  for (int d = 0; d < p.ndim; ++d) shape[d] = p.shape[d];
  for (int i = 0; i < p.products; ++i) {
    const int64_t n = shape[p.modes[i]], rows = p.rows[i];
    key[i] = 1.0 / static_cast<double>(n > 0 ? n : 1) - 1.0 / static_cast<double>(rows > 0 ? rows : 1);
    int at = i;
    for (; at > 0 && key[order[at - 1]] > key[i]; --at) order[at] = order[at - 1];
    order[at] = i;
    if (p.modes[i] < first) first = p.modes[i];
  }
  for (int d = 0; d < first; ++d) chain.batch *= shape[d];
  for (int s = 0; s < p.products; ++s) {
    const int i = order[s], mode = p.modes[i];
    ModeProduct<T>& step = chain.steps[s];
    step = {1, shape[mode], 1, p.rows[i], static_cast<const T*>(p.matrices[i]), shape[mode], 1};
    if (p.transpose) step.row = 1, step.col = step.rows;
    for (int d = first; d < mode; ++d) step.outer *= shape[d];
    for (int d = mode + 1; d < p.ndim; ++d) step.inner *= shape[d];
    shape[mode] = step.rows;
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

template <class T>
tk_status multi_mode_dot(const tk_mode_products& p, int threads) {
  const Chain<T> chain = plan<T>(p);
  const T* x = static_cast<const T*>(p.tensor);
  T* y = static_cast<T*>(p.out);
  const auto& first = chain.steps[0];
  const auto& last = chain.steps[chain.count - 1];
  const int64_t x_size = first.columns() * first.n, y_size = last.columns() * last.rows;
  if (y_size == 0 || chain.batch == 0) return TK_OK;
  const int64_t size = (chain.intermediate() + 15) / 16 * 16;
  const int64_t slab = size <= slab_elements ? slab_elements / (size > 0 ? size : slab_elements) : 0;
  if (chain.count == 1 || slab == 0 || chain.batch < threads) {
    Scratch<T> buffer(2 * size * chain.batch);
    if (!buffer) return TK_OUT_OF_MEMORY;
    T* const buffers[2] = {buffer.data(), buffer.data() + size * chain.batch};
    const bool good =
        walk(chain, x, y, buffers, chain.batch,
             [&](const ModeProduct<T>& step, const T* from, T* to) { return step.run(from, to, threads); });
    return good ? TK_OK : TK_OUT_OF_MEMORY;
  }
  int64_t scratch = 0;
  for (int s = 0; s < chain.count; ++s) {
    const int64_t needed = chain.step(s, slab).scratch();
    if (needed > scratch) scratch = needed;
  }
  const bool good =
      parallel_for(chain.batch, 1, chain.work() < parallel_work ? 1 : threads, [&](Range range) {
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
  return good ? TK_OK : TK_OUT_OF_MEMORY;
}

bool valid(const tk_mode_products& p) {
  if (p.ndim < 1 || p.ndim > TK_MAX_MODES || p.products < 1 || p.products > p.ndim) return false;
  bool seen[TK_MAX_MODES] = {};
  for (int d = 0; d < p.ndim; ++d)
    if (p.shape[d] < 0) return false;
  for (int i = 0; i < p.products; ++i) {
    const int mode = p.modes[i];
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

tk_status tk_multi_mode_dot_cpu(tk_dtype dtype, const tk_mode_products* products, int threads) {
  if (threads < 1 || !tk::valid(*products)) return TK_INVALID_ARGUMENT;
  return tk::dispatch(dtype,
                      [&](auto zero) { return tk::multi_mode_dot<decltype(zero)>(*products, threads); });
}
