// Micro-kernels of the fused Tucker convolution; see tucker_conv.h for the formulas.
//
// Tiling: the result of a window product is cut into panels of 2W channels (W lanes per vector; the last ones
// are W or W/2 wide) and tiles of up to MR pixels, so that MR × 2 accumulators stay in registers over all
// taps and all k. Weights are packed [panel][tap][k][width] and stream from L2 (8 bytes a cycle at most);
// pixels are broadcast straight from the image, nothing of it is copied. Panels are the outer loop: a panel
// of the weights (taps · k · 2W elements, ≤ 300 kB at 9 · 256) is read once per call, or several where they
// stay in the first cache (16 kB), whose pixels are then written whole. Three pixels by two vectors already
// run at the rate of the multiplier, so short rows at the border of an image cost nothing. Outer products
// keep MR × 2W of c in registers over all pixels of the call.
//
// Memory: few products per pixel are not enough to hide it. Results are fetched for writing some tiles ahead,
// and those of k ≤ 32 are written 4W channels at a time, nearer to the order of memory (measured, 64 channels
// from 8: half of the time; fetching ahead, 256 from 32: 0.9). Pixels that are read from memory are fetched a
// tile or more ahead line by line in that order; along the rows of a tile, as they are used, that gains
// nothing (measured).
//
// Numerics: sums in T with fused multiply-add, taps in window order, k ascending within a tap, pixels in run
// order; the value of a result does not depend on how pixels are grouped.
#include "cpu/simd/tucker_conv.h"

#include "cpu/simd/copy.h"
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

constexpr int64_t fetch_cycles = 500;  // within which memory answers
constexpr int max_rows = vector_bytes == 64 ? 12 : vector_bytes == 32 ? 6 : 4;

template <class T>
constexpr int W = Vector<T>::lanes;

// The narrowest panel: half a vector where there is one.
template <class T>
constexpr int unit = vector_bytes > 16 ? W<T> / 2 : W<T>;

template <class T>
int64_t padded(int64_t n) {
  return (n + unit<T> - 1) / unit<T> * unit<T>;
}

// Where few products make a result, all of a pixel is written at once: half of the pixels, twice the vectors.
constexpr int wide = 4;
inline bool is_wide(int64_t taps, int64_t k) { return vector_bytes == 64 && taps == 1 && k <= 32; }

// Width of the panel that starts `rest` padded channels before the end.
template <class T>
int64_t panel_width(int64_t taps, int64_t k, int64_t rest) {
  if (is_wide(taps, k) && rest >= wide * W<T>) return wide * W<T>;
  return rest >= 2 * W<T> ? 2 * W<T> : rest >= W<T> ? W<T> : unit<T>;
}

template <class T>
int64_t panel_count(int64_t taps, int64_t k, int64_t n) {
  int64_t count = 0;
  for (int64_t rest = padded<T>(n); rest > 0; rest -= panel_width<T>(taps, k, rest)) ++count;
  return count;
}

template <class T>
int64_t panel_start(int64_t taps, int64_t k, int64_t n, int64_t panel) {
  const int64_t all = padded<T>(n);
  int64_t start = 0;
  for (; panel > 0; --panel) start += panel_width<T>(taps, k, all - start);
  return start;
}

template <class T>
void pack(const PackArgs<T>& g, int64_t panel) {
  const int64_t all = padded<T>(g.n), start = panel_start<T>(g.taps, g.k, g.n, panel);
  const int64_t width = panel_width<T>(g.taps, g.k, all - start);
  const int64_t live = g.n - start < width ? g.n - start : width;
  const T* from = g.from + start * g.n_step;
  T* to = g.to + g.taps * g.k * start;
  if (g.taps > 1 && (g.tap_step == 1 || g.tap_step == -1)) {  // taps lie next to each other
    const int64_t first = g.tap_step < 0 ? g.taps - 1 : 0, plane = g.tap_step * g.k * width;
    for (int64_t k = 0; k < g.k; ++k)
      transpose<T>(live, g.taps, from + k * g.k_step - first, g.n_step, to + first * g.k * width + k * width,
                   plane);
  } else {
    for (int64_t tap = 0; tap < g.taps; ++tap)
      for (int64_t k = 0; k < g.k; ++k) {
        T* row = to + (tap * g.k + k) * width;
        for (int64_t j = 0; j < live; ++j) row[j] = from[tap * g.tap_step + k * g.k_step + j * g.n_step];
      }
  }
  if (live < width)
    for (int64_t row = 0; row < g.taps * g.k; ++row)
      for (int64_t j = live; j < width; ++j) to[row * width + j] = T(0);
}

// ---- window products --------------------------------------------------------------------------------------

template <class T>
struct Tile {
  const WindowJob* job;
  const T *source, *weight, *bias;  // of this tile's first pixel and this panel
  T* result;
  int64_t k;
  const T *source_ahead, *result_ahead;  // of a tile to come
  bool streams;
};

template <class T, class L, int vectors, int rows>
__attribute__((noinline)) void window_tile(const Tile<T>& g) {
  using V = typename L::Type;
  constexpr int lanes = L::lanes, line = 64 / sizeof(T);
  const WindowJob& job = *g.job;
  const int64_t step = job.source_step, k = g.k;
  V sum[rows][vectors];
  TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) {
    sum[i][j] = V{};
    TK_PREFETCH_WRITE(g.result_ahead + i * job.result_step + j * lanes);
  }
  for (int64_t tap = 0; tap < job.tap_count; ++tap) {
    const T *a = g.source + job.source_tap[tap], *ahead = g.source_ahead;
    const T* b = g.weight + job.weight_tap[tap] * k * vectors * lanes;
    for (int64_t rest = k; rest > 0; rest -= line, ahead += rows * line) {
      if (g.streams) TK_UNROLL for (int i = 0; i < rows; ++i) __builtin_prefetch(ahead + i * line);
      for (const T* end = a + (rest < line ? rest : line); a < end; ++a, b += vectors * lanes) {
        V w[vectors];
        TK_UNROLL for (int j = 0; j < vectors; ++j) w[j] = L::load(b + j * lanes);
        TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] +=
            a[i * step] * w[j];
      }
    }
  }
  if (g.bias) TK_UNROLL for (int j = 0; j < vectors; ++j) {
      const V b = L::load(g.bias + j * lanes);
      TK_UNROLL for (int i = 0; i < rows; ++i) sum[i][j] += b;
    }
  T* result = g.result;
  TK_UNROLL for (int i = 0; i < rows; ++i, result += job.result_step)
      TK_UNROLL for (int j = 0; j < vectors; ++j) L::store(result + j * lanes, sum[i][j]);
}

template <class T, class L, int vectors, int most = max_rows>
void window_rows(int64_t rows, const Tile<T>& tile) {
  if (rows == most)
    window_tile<T, L, vectors, most>(tile);
  else if constexpr (most > 1)
    window_rows<T, L, vectors, most - 1>(rows, tile);
}

// The tiles of a job, one after the other: strips are cut into sizes that differ by one at most.
class Tiles {
 public:
  Tiles(const WindowJob& job, int64_t most) : job_(job), most_(most) { enter(); }
  bool done() const { return strip_ == job_.strip_count; }
  int64_t rows() const { return low_ + (left_ <= higher_); }
  int64_t source() const { return source_; }
  int64_t result() const { return result_; }
  void next() {
    source_ += rows() * job_.source_step, result_ += rows() * job_.result_step;
    if (--left_) return;
    ++strip_;
    enter();
  }

 private:
  void enter() {
    if (done()) return;
    const Strip& strip = job_.strips[strip_];
    left_ = (strip.count + most_ - 1) / most_, low_ = strip.count / left_, higher_ = strip.count % left_;
    source_ = strip.source, result_ = strip.result;
  }

  const WindowJob& job_;
  const int64_t most_;
  int64_t strip_ = 0, left_, low_, higher_, source_, result_;
};

template <class T>
void window_panel(int64_t width, int64_t rows, const Tile<T>& tile) {
  if constexpr (vector_bytes == 64)
    if (width == wide * W<T>) return window_rows<T, Vector<T>, wide, max_rows / 2>(rows, tile);
  if (width == 2 * W<T>)
    window_rows<T, Vector<T>, 2>(rows, tile);
  else if (width == W<T>)
    window_rows<T, Vector<T>, 1>(rows, tile);
  else
    window_rows<T, Lanes<T, unit<T>>, 1>(rows, tile);
}

// Panels from channel `start` to `end`, tile by tile.
template <class T>
void window_panels(const WindowArgs<T>& g, int64_t start, int64_t end) {
  const int64_t all = padded<T>(g.n);
  for (int64_t j = 0; j < g.job_count; ++j) {
    const WindowJob& job = g.jobs[j];
    // Rows a multiple of 4 kB apart share one set of the first cache, which holds eight.
    const int64_t most =
        job.source_step * sizeof(T) % 4096 && !is_wide(g.taps, g.k) ? max_rows : (max_rows + 1) / 2;
    Tiles ahead(job, most);
    for (int64_t cycles = 0; cycles < fetch_cycles && !ahead.done(); ahead.next())
      cycles += max_rows * (end - start) / W<T> * g.k * job.tap_count;
    for (Tiles now(job, most); !now.done(); now.next()) {
      const Tiles& to_come = ahead.done() ? now : ahead;
      Tile<T> tile = {
          &job,    g.source + now.source(), nullptr, nullptr, nullptr, g.k, g.source + to_come.source(),
          nullptr, g.streams && start == 0};
      for (int64_t c = start; c < end;) {
        const int64_t width = panel_width<T>(g.taps, g.k, all - c);
        tile.weight = g.weight + g.taps * g.k * c, tile.bias = g.bias ? g.bias + c : nullptr;
        tile.result = g.result + now.result() + c, tile.result_ahead = g.result + to_come.result() + c;
        window_panel<T>(width, now.rows(), tile);
        tile.streams = false, c += width;
      }
      if (!ahead.done()) ahead.next();
    }
  }
}

template <class T>
void window(const WindowArgs<T>& g) {
  const int64_t all = padded<T>(g.n);
  int64_t depth = 1;
  for (int64_t j = 0; j < g.job_count; ++j)
    if (depth < g.jobs[j].tap_count * g.k) depth = g.jobs[j].tap_count * g.k;
  // Panels whose weights stay in the first cache together, so that pixels are written whole.
  const int64_t most = 16 * 1024 / int64_t(sizeof(T)) / depth;
  for (int64_t start = 0; start < all;) {
    int64_t end = start + panel_width<T>(g.taps, g.k, all - start);
    while (end < all && end + panel_width<T>(g.taps, g.k, all - end) - start <= most)
      end += panel_width<T>(g.taps, g.k, all - end);
    window_panels(g, start, end);
    start = end;
  }
}

// ---- outer products over pixels ---------------------------------------------------------------------------

template <class T, class L, int vectors, int rows>
__attribute__((noinline)) void outer_tile(const OuterArgs<T>& g, int64_t i0, int64_t j0) {
  using V = typename L::Type;
  constexpr int lanes = L::lanes;
  // The first tile of every eight lines fetches them all.
  constexpr int64_t line = 64 / sizeof(T), most = 8 * line;
  const int64_t ahead = fetch_cycles / (rows * vectors) * g.b_step, rest = padded<T>(g.n) - j0;
  const int64_t lines =
      g.streams && i0 == 0 && j0 % most == 0 ? ((rest < most ? rest : most) + line - 1) / line : 0;
  V sum[rows][vectors];
  TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] = V{};
  for (int64_t r = 0; r < g.run_count; ++r) {
    const T *a = g.a + g.runs[r].a + i0, *b = g.b + g.runs[r].b + j0;
    for (int64_t p = g.runs[r].count; p > 0; --p, a += g.a_step, b += g.b_step) {
      V w[vectors];
      TK_UNROLL for (int j = 0; j < vectors; ++j) w[j] = L::load(b + j * lanes);
      for (int64_t j = 0; j < lines; ++j) __builtin_prefetch(b + ahead + j * line);
      TK_UNROLL for (int i = 0; i < rows; ++i) TK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] +=
          a[i] * w[j];
    }
  }
  T* c = g.c + i0 * g.c_row + j0;
  TK_UNROLL for (int i = 0; i < rows; ++i, c += g.c_row) TK_UNROLL for (int j = 0; j < vectors; ++j) {
    T* to = c + j * lanes;
    L::store(to, g.fresh ? sum[i][j] : L::load(to) + sum[i][j]);
  }
}

template <class T, class L, int vectors, int most = max_rows>
void outer_rows(int64_t rows, const OuterArgs<T>& g, int64_t i0, int64_t j0) {
  if (rows == most)
    outer_tile<T, L, vectors, most>(g, i0, j0);
  else if constexpr (most > 1)
    outer_rows<T, L, vectors, most - 1>(rows, g, i0, j0);
}

template <class T, class L, int vectors>
void outer_panel(const OuterArgs<T>& g, int64_t start) {
  const int64_t count = (g.m + max_rows - 1) / max_rows;
  for (int64_t i = 0, row = 0; i < count; ++i) {
    const int64_t rows = (g.m + i) / count;
    outer_rows<T, L, vectors>(rows, g, row, start);
    row += rows;
  }
}

template <class T>
void outer(const OuterArgs<T>& g) {
  const int64_t all = padded<T>(g.n);
  for (int64_t start = 0; start < all;) {
    const int64_t width = panel_width<T>(0, 0, all - start);
    if (width == 2 * W<T>)
      outer_panel<T, Vector<T>, 2>(g, start);
    else if (width == W<T>)
      outer_panel<T, Vector<T>, 1>(g, start);
    else
      outer_panel<T, Lanes<T, unit<T>>, 1>(g, start);
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
