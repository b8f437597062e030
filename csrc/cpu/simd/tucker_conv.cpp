// Micro-kernels of the fused Tucker convolution; see tucker_conv.h for the formulas.
//
// Tiling: the result of a window product is cut into panels of 2W channels (W lanes per vector; the last ones
// are W or W/2 wide) and tiles of up to MR pixels, so that MR × 2 accumulators stay in registers over all
// taps and all k. Weights are packed [panel][tap][k][width] and stream from L2 (8 bytes a cycle at most);
// pixels are broadcast straight from the image, nothing of it is copied. Panels are the outer loop: a panel
// of the weights (taps · k · 2W elements, ≤ 300 kB at 9 · 256) is read once per call. Three pixels by two
// vectors already run at the rate of the multiplier, so short rows at the border of an image cost nothing.
// Outer products keep MR × 2W of c in registers over all pixels of the call.
//
// Numerics: sums in T with fused multiply-add, taps in window order, k ascending within a tap, pixels in run
// order; the value of a result does not depend on how pixels are grouped.
#include "cpu/simd/tucker_conv.h"

#include "cpu/simd/vector.h"

// Loops over registers, which must not become loops over memory.
#define TK_UNROLL _Pragma("GCC unroll 32")
#if defined(__x86_64__)
#define TK_PREFETCH_WRITE(p) asm volatile("prefetchw %0" : : "m"(*(const char*)(p)))
#else
#define TK_PREFETCH_WRITE(p) __builtin_prefetch(p, 1)
#endif

namespace tk::TK_ISA {
namespace {

constexpr int max_rows = vector_bytes == 64 ? 12 : vector_bytes == 32 ? 6 : 4;

template <class T, int bytes>
struct Lanes {
  typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};

template <class T>
constexpr int W = Vector<T>::lanes;

// The narrowest panel: half a vector where there is one.
template <class T>
constexpr int unit = vector_bytes > 16 ? W<T> / 2 : W<T>;

template <class T>
int64_t padded(int64_t n) {
  return (n + unit<T> - 1) / unit<T> * unit<T>;
}

// Width of the panel that starts `rest` padded channels before the end.
template <class T>
int64_t panel_width(int64_t rest) {
  return rest >= 2 * W<T> ? 2 * W<T> : rest >= W<T> ? W<T> : unit<T>;
}

template <class T>
int64_t panel_count(int64_t n) {
  int64_t count = 0;
  for (int64_t rest = padded<T>(n); rest > 0; rest -= panel_width<T>(rest)) ++count;
  return count;
}

template <class T>
int64_t panel_start(int64_t n, int64_t panel) {
  const int64_t all = padded<T>(n), full = all / (2 * W<T>);
  int64_t start = (panel < full ? panel : full) * 2 * W<T>;
  for (int64_t p = full; p < panel; ++p) start += panel_width<T>(all - start);
  return start;
}

template <class T>
void pack(const PackArgs<T>& g, int64_t panel) {
  const int64_t all = padded<T>(g.n), start = panel_start<T>(g.n, panel);
  const int64_t width = panel_width<T>(all - start);
  const int64_t live = g.n - start < width ? g.n - start : width;
  constexpr int64_t block = 16;  // of k, so that interleaved taps are read from cache
  T* to = g.to + g.taps * g.k * start;
  for (int64_t k0 = 0; k0 < g.k; k0 += block) {
    const int64_t k1 = g.k - k0 < block ? g.k : k0 + block;
    for (int64_t tap = 0; tap < g.taps; ++tap)
      for (int64_t k = k0; k < k1; ++k) {
        const T* from = g.from + tap * g.tap_step + k * g.k_step + start * g.n_step;
        T* row = to + (tap * g.k + k) * width;
        int64_t j = 0;
        for (; j < live; ++j) row[j] = from[j * g.n_step];
        for (; j < width; ++j) row[j] = T(0);
      }
  }
}

// ---- window products --------------------------------------------------------------------------------------

template <class T>
struct Tile {
  const WindowJob* job;
  const T *source, *weight, *bias;  // of this tile's first pixel and this panel
  T* result;
  int64_t k;
};

template <class T, class V, int vectors, int rows>
__attribute__((noinline)) void window_tile(const Tile<T>& g) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  const WindowJob& job = *g.job;
  const int64_t step = job.source_step, k = g.k;
  T* result = g.result;
  V sum[rows][vectors];
  TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) {
    sum[i][j] = V{};
    TK_PREFETCH_WRITE(result + (rows + i) * job.result_step + j * lanes);  // of the next tile
  }
  for (int64_t tap = 0; tap < job.tap_count; ++tap) {
    const T* a = g.source + job.source_tap[tap];
    const T* b = g.weight + job.weight_tap[tap] * k * vectors * lanes;
    for (int64_t p = 0; p < k; ++p, b += vectors * lanes) {
      V w[vectors];
      TK_UNROLL for (int j = 0; j < vectors; ++j) w[j] = *reinterpret_cast<const V*>(b + j * lanes);
      TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] +=
          a[i * step + p] * w[j];
    }
  }
  if (g.bias) TK_UNROLL for (int j = 0; j < vectors; ++j) {
      const V b = *reinterpret_cast<const V*>(g.bias + j * lanes);
      TK_UNROLL for (int i = 0; i < rows; ++i) sum[i][j] += b;
    }
  TK_UNROLL for (int i = 0; i < rows; ++i, result += job.result_step)
          TK_UNROLL for (int j = 0; j < vectors; ++j) *
      reinterpret_cast<V*>(result + j * lanes) = sum[i][j];
}

template <class T, class V, int vectors, int most = max_rows>
void window_rows(int64_t rows, const Tile<T>& tile) {
  if (rows == most)
    window_tile<T, V, vectors, most>(tile);
  else if constexpr (most > 1)
    window_rows<T, V, vectors, most - 1>(rows, tile);
}

template <class T, class V, int vectors>
void window_panel(const WindowArgs<T>& g, int64_t start) {
  for (int64_t j = 0; j < g.job_count; ++j) {
    const WindowJob& job = g.jobs[j];
    // Rows a multiple of 4 kB apart share one set of the first cache, which holds eight.
    const int64_t most = job.source_step * sizeof(T) % 4096 ? max_rows : (max_rows + 1) / 2;
    for (int64_t s = 0; s < job.strip_count; ++s) {
      const Strip& strip = job.strips[s];
      Tile<T> tile = {&job,
                      g.source + strip.source,
                      g.weight + g.taps * g.k * start,
                      g.bias ? g.bias + start : nullptr,
                      g.result + strip.result + start,
                      g.k};
      const int64_t count = (strip.count + most - 1) / most;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t rows = (strip.count + i) / count;  // sizes that differ by one at most
        window_rows<T, V, vectors>(rows, tile);
        tile.source += rows * job.source_step;
        tile.result += rows * job.result_step;
      }
    }
  }
}

template <class T>
void window(const WindowArgs<T>& g) {
  const int64_t all = padded<T>(g.n);
  for (int64_t start = 0; start < all;) {
    const int64_t width = panel_width<T>(all - start);
    if (width == 2 * W<T>)
      window_panel<T, typename Lanes<T, vector_bytes>::type, 2>(g, start);
    else if (width == W<T>)
      window_panel<T, typename Lanes<T, vector_bytes>::type, 1>(g, start);
    else
      window_panel<T, typename Lanes<T, unit<T> * sizeof(T)>::type, 1>(g, start);
    start += width;
  }
}

// ---- outer products over pixels ---------------------------------------------------------------------------

template <class T, class V, int vectors, int rows>
__attribute__((noinline)) void outer_tile(const OuterArgs<T>& g, int64_t i0, int64_t j0) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[rows][vectors];
  TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] = V{};
  for (int64_t r = 0; r < g.run_count; ++r) {
    const T *a = g.a + g.runs[r].a + i0, *b = g.b + g.runs[r].b + j0;
    for (int64_t p = g.runs[r].count; p > 0; --p, a += g.a_step, b += g.b_step) {
      V w[vectors];
      TK_UNROLL for (int j = 0; j < vectors; ++j) w[j] = *reinterpret_cast<const V*>(b + j * lanes);
      TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] +=
          a[i] * w[j];
    }
  }
  T* c = g.c + i0 * g.c_row + j0;
  TK_UNROLL for (int i = 0; i < rows; ++i, c += g.c_row) TK_UNROLL for (int j = 0; j < vectors; ++j) {
    V* to = reinterpret_cast<V*>(c + j * lanes);
    *to = g.fresh ? sum[i][j] : *to + sum[i][j];
  }
}

template <class T, class V, int vectors, int most = max_rows>
void outer_rows(int64_t rows, const OuterArgs<T>& g, int64_t i0, int64_t j0) {
  if (rows == most)
    outer_tile<T, V, vectors, most>(g, i0, j0);
  else if constexpr (most > 1)
    outer_rows<T, V, vectors, most - 1>(rows, g, i0, j0);
}

template <class T, class V, int vectors>
void outer_panel(const OuterArgs<T>& g, int64_t start) {
  const int64_t count = (g.m + max_rows - 1) / max_rows;
  for (int64_t i = 0, row = 0; i < count; ++i) {
    const int64_t rows = (g.m + i) / count;
    outer_rows<T, V, vectors>(rows, g, row, start);
    row += rows;
  }
}

template <class T>
void outer(const OuterArgs<T>& g) {
  const int64_t all = padded<T>(g.n);
  for (int64_t start = 0; start < all;) {
    const int64_t width = panel_width<T>(all - start);
    if (width == 2 * W<T>)
      outer_panel<T, typename Lanes<T, vector_bytes>::type, 2>(g, start);
    else if (width == W<T>)
      outer_panel<T, typename Lanes<T, vector_bytes>::type, 1>(g, start);
    else
      outer_panel<T, typename Lanes<T, unit<T> * sizeof(T)>::type, 1>(g, start);
    start += width;
  }
}

}  // namespace

extern const TuckerConvKernels<float> tucker_conv_f32 = {unit<float>,  panel_count<float>, panel_start<float>,
                                                         pack<float>,  window<float>,      outer<float>,
                                                         &winograd_f32};
extern const TuckerConvKernels<double> tucker_conv_f64 = {
    unit<double>,   panel_count<double>, panel_start<double>, pack<double>,
    window<double>, outer<double>,       &winograd_f64};

}  // namespace tk::TK_ISA
