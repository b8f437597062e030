// A linear layer with a Tucker weight on the host, all modes in one call, forward and backward:
//
//   z = x ×_in Vᵀ          t = C z            y = t ×_out U + bias
//   dt = dy ×_out Uᵀ       dC = Σ dt zᵀ       dbias = Σ dy
//   dz = Cᵀ dt             dx = dz ×_in V     dU, dV: a factor's gradient is that of its product below
//
// Layout: row-major, rows first. Both chains multiply one mode after another in the cheapest order. Going
// back through product s, from a_{s−1} to a_s, costs two products of the same size: the gradient of its
// matrix, a cross_gram of a_{s−1} and da_s, and da_{s−1}. The a_s inside the chains are computed again, so
// that z and t are all that is kept between the passes. Threads split every product.
//
// Numerics: sums in T, in an order that depends on sizes only.
#include "core/dispatch.h"
#include "core/mode_order.h"
#include "core/scratch.h"
#include "cpu/cross_gram.h"
#include "cpu/mode_product.h"
#include "tucker_kernels.h"

namespace tk {
namespace {

// Products along modes one after another, a_0 → a_1 → … → a_count, each a (rows, …) tensor.
template <class T>
struct Chain {
  bool projects;
  int count = 0;
  int mode[TK_MAX_MODES];  // of the layer
  ModeProduct<T> steps[TK_MAX_MODES];

  int64_t before(int s) const { return steps[s].columns() * steps[s].n; }
  int64_t after(int s) const { return steps[s].columns() * steps[s].rows; }
  int64_t inside() const {  // elements of a_1 … a_{count−1}
    int64_t sum = 0;
    for (int s = 0; s + 1 < count; ++s) sum += after(s);
    return sum;
  }
  int64_t largest_inside() const {
    int64_t most = 0;
    for (int s = 0; s + 1 < count; ++s)
      if (after(s) > most) most = after(s);
    return most;
  }
};

// Null also stands for a factor without elements.
bool factored(const tk_linear& layer, int64_t i) { return layer.factor[i] || layer.size[i] != layer.rank[i]; }

// Modes begin … end − 1: from sizes to ranks (`project`, with transposed factors) or from ranks to sizes.
template <class T>
Chain<T> chain(const tk_linear& layer, int begin, int end, bool project) {
  const int64_t *from = project ? layer.size : layer.rank, *to = project ? layer.rank : layer.size;
  Chain<T> c;
  c.projects = project;
  int64_t n[TK_MAX_MODES], rows[TK_MAX_MODES];
  int modes[TK_MAX_MODES], order[TK_MAX_MODES];
  for (int i = begin; i < end; ++i)
    if (factored(layer, i)) n[c.count] = from[i], rows[c.count] = to[i], modes[c.count++] = i;
  cheapest_order(c.count, n, rows, order);
  for (int s = 0; s < c.count; ++s) c.mode[s] = modes[order[s]];
  int64_t shape[TK_MAX_MODES];
  for (int i = begin; i < end; ++i) shape[i] = from[i];
  for (int s = 0; s < c.count; ++s) {
    const int m = c.mode[s];
    const int64_t rank = layer.rank[m];
    ModeProduct<T>& step = c.steps[s];
    step = {layer.rows,         from[m],           1, to[m], static_cast<const T*>(layer.factor[m]),
            project ? 1 : rank, project ? rank : 1};
    for (int i = begin; i < m; ++i) step.outer *= shape[i];
    for (int i = m + 1; i < end; ++i) step.inner *= shape[i];
    shape[m] = to[m];
  }
  return c;
}

template <class T>
ModeProduct<T> reversed(const ModeProduct<T>& p) {
  return {p.outer, p.rows, p.inner, p.n, p.matrix, p.col, p.row};
}

int64_t product(const int64_t* sizes, int64_t begin, int64_t end) {
  int64_t result = 1;
  for (int64_t i = begin; i < end; ++i) result *= sizes[i];
  return result;
}

template <class T>
class Layer {
 public:
  Layer(const tk_linear& layer, int threads)
      : rows_(layer.rows),
        n_out_(product(layer.size, 0, layer.out_modes)),
        n_in_(product(layer.size, layer.out_modes, layer.modes)),
        r_out_(product(layer.rank, 0, layer.out_modes)),
        r_in_(product(layer.rank, layer.out_modes, layer.modes)),
        project_(chain<T>(layer, int(layer.out_modes), int(layer.modes), true)),
        expand_(chain<T>(layer, 0, int(layer.out_modes), false)),
        core_{rows_, r_in_, 1, r_out_, static_cast<const T*>(layer.core), r_in_, 1},
        threads_(threads) {}

  bool forward(const T* x, const T* bias, T* y, T* z, T* t) const {
    const int64_t first = project_.largest_inside(), second = expand_.largest_inside();
    const int64_t most = rounded(first > second ? first : second);
    Scratch<T> scratch(2 * most + rounded(rows_ * r_in_) + rounded(rows_ * r_out_));
    if (!scratch) return false;
    T* const between[2] = {scratch.data(), scratch.data() + most};
    if (!z) z = between[1] + most;
    if (!t) t = between[1] + most + rounded(rows_ * r_in_);
    if (project_.count == 0) z = const_cast<T*>(x);
    if (expand_.count == 0) t = y;
    if (!walk(project_, x, between, z) || !run(core_, z, t) || !walk(expand_, t, between, y)) return false;
    if (bias)
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t i = 0; i < n_out_; ++i) y[r * n_out_ + i] += bias[i];
    return true;
  }

  bool backward(const T* dy, const T* x, const T* z, const T* t, const tk_linear_gradients& d) const {
    if (project_.count == 0) z = x;
    T* const dx = static_cast<T*>(d.input);
    const bool wants_in = dx || wanted(project_, d);
    const int64_t most = largest_gradient();
    Scratch<T> scratch(expand_.inside() + project_.inside() + rows_ + 2 * most);
    if (!scratch) return false;
    T* const expanded = scratch.data();
    T* const projected = expanded + expand_.inside();
    T* const ones = projected + project_.inside();
    T* const between[2] = {ones + rows_, ones + rows_ + most};
    if (d.bias) {
      for (int64_t r = 0; r < rows_; ++r) ones[r] = 1;
      if (!cross_gram<T>(ones, 1, dy, n_out_, rows_, 1, static_cast<T*>(d.bias), threads_)) return false;
    }
    const T* da = dy;
    int next = 0;  // which of `between` is free
    T* const dt = static_cast<T*>(d.t);
    if (!back(expand_, t, expanded, d, dt || d.core || wants_in, between, dt, da, next)) return false;
    if (d.core && !cross_gram<T>(da, r_out_, z, r_in_, rows_, 1, static_cast<T*>(d.core), threads_))
      return false;
    if (!wants_in) return true;
    T* const dz = project_.count == 0 ? dx : between[next];
    if (!run(reversed(core_), da, dz)) return false;
    da = dz, next = 1 - next;
    return back(project_, x, projected, d, dx != nullptr, between, dx, da, next);
  }

 private:
  static int64_t rounded(int64_t elements) { return (elements + 15) / 16 * 16; }

  bool run(const ModeProduct<T>& p, const T* a, T* b) const {
    return p.columns() == 0 || p.rows == 0 || p.run(a, b, threads_);
  }

  // a_0 → … → a_count; `between` takes turns.
  bool walk(const Chain<T>& c, const T* a, T* const (&between)[2], T* last) const {
    for (int s = 0; s < c.count; ++s) {
      T* const to = s + 1 == c.count ? last : between[s % 2];
      if (!run(c.steps[s], a, to)) return false;
      a = to;
    }
    return true;
  }

  static bool wanted(const Chain<T>& c, const tk_linear_gradients& d) {
    for (int s = 0; s < c.count; ++s)
      if (d.factor[c.mode[s]]) return true;
    return false;
  }

  int64_t largest_gradient() const {
    int64_t most = rows_ * (r_in_ > r_out_ ? r_in_ : r_out_);
    for (const Chain<T>* c : {&project_, &expand_})
      if (c->largest_inside() > most) most = c->largest_inside();
    return rounded(most);
  }

  // From da = da_count to the gradients of the chain's factors and, if `through`, to da = da_0 (in `last`, or
  // in one of `between`). inside: room for a_1 … a_{count−1}.
  bool back(const Chain<T>& c, const T* a, T* inside, const tk_linear_gradients& d, bool through,
            T* const (&between)[2], T* last, const T*& da, int& next) const {
    int first =
        0;  // the first factor whose gradient is wanted: from there on a_s are needed, and da down to it
    while (first < c.count && !d.factor[c.mode[first]]) ++first;
    const T* a_s[TK_MAX_MODES + 1] = {a};
    int needed = 0;
    for (int s = 0; s < c.count; ++s)
      if (d.factor[c.mode[s]]) needed = s;
    for (int s = 0; s < needed; ++s) {
      if (!run(c.steps[s], a_s[s], inside)) return false;
      a_s[s + 1] = inside;
      inside += c.after(s);
    }
    for (int s = c.count - 1; s >= (through ? 0 : first); --s) {
      const ModeProduct<T>& step = c.steps[s];
      if (void* gradient = d.factor[c.mode[s]]) {
        T* const out = static_cast<T*>(gradient);
        // A factor has a row for each entry of its mode, whichever way the product goes.
        const bool good =
            c.projects ? cross_gram<T>(a_s[s], step.n, da, step.rows, step.outer, step.inner, out, threads_)
                       : cross_gram<T>(da, step.rows, a_s[s], step.n, step.outer, step.inner, out, threads_);
        if (!good) return false;
      }
      if (!through && s == first) break;
      T* const to = s == 0 && last ? last : between[next];
      if (!run(reversed(step), da, to)) return false;
      da = to, next = 1 - next;
    }
    return true;
  }

  int64_t rows_, n_out_, n_in_, r_out_, r_in_;
  Chain<T> project_, expand_;
  ModeProduct<T> core_;
  int threads_;
};

bool valid(const tk_linear& layer, int threads) {
  if (threads < 1 || layer.rows < 0 || layer.modes < 2 || layer.modes > TK_MAX_MODES) return false;
  if (layer.out_modes < 1 || layer.out_modes >= layer.modes) return false;
  for (int64_t i = 0; i < layer.modes; ++i) {
    if (layer.size[i] < 0 || layer.rank[i] < 0) return false;
    if (!layer.factor[i] && layer.size[i] != layer.rank[i] && layer.size[i] * layer.rank[i] > 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace tk

tk_status tk_tucker_linear_forward_cpu(tk_dtype dtype, const tk_linear* layer, const void* x,
                                       const void* bias, void* y, void* z, void* t, int threads) {
  if (!tk::valid(*layer, threads)) return TK_INVALID_ARGUMENT;
  return tk::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool good = tk::Layer<T>(*layer, threads)
                          .forward(static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y),
                                   static_cast<T*>(z), static_cast<T*>(t));
    return good ? TK_OK : TK_OUT_OF_MEMORY;
  });
}

tk_status tk_tucker_linear_backward_cpu(tk_dtype dtype, const tk_linear* layer, const void* grad,
                                        const void* x, const void* z, const void* t,
                                        const tk_linear_gradients* gradients, int threads) {
  if (!tk::valid(*layer, threads)) return TK_INVALID_ARGUMENT;
  return tk::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool good = tk::Layer<T>(*layer, threads)
                          .backward(static_cast<const T*>(grad), static_cast<const T*>(x),
                                    static_cast<const T*>(z), static_cast<const T*>(t), *gradients);
    return good ? TK_OK : TK_OUT_OF_MEMORY;
  });
}
