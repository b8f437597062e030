// The core window of a Tucker convolution over a band of rows: result = core ∗ source, or its transpose, as a
// direct sum over taps or in tiles by Winograd's F(4×4, 3×3), whichever is expected to take fewer cycles.
#pragma once

#include "cpu/tucker_conv.h"

namespace tk {

// Distance between transformed elements of a block of tiles: an odd number of lines, so that they do not
// share the sets of the first cache.
template <class T>
int64_t tile_step(int64_t tiles, int64_t pitch) {
  const int64_t line = 64 / int64_t(sizeof(T));
  return (round_up(tiles * pitch, line) / line | 1) * line;
}

inline int64_t tiles_of(int64_t pixels) { return (pixels + tile_side - 1) / tile_side; }

// What a window product costs in cycles of one thread's multiplier: `direct` over the taps inside the image,
// or in tiles (negative where those do not apply), `products` of rank-space channels each.
struct WindowCost {
  double products, direct, tiles;
};
template <class T>
WindowCost window_cost(const tk_conv2d& g, const int64_t (&result)[2]) {
  const double products = double(g.r_in) * double(g.r_out) / simd<T>().lanes;
  double taps = double(g.batch), tiles = winograd_allowed() ? double(g.batch) : -1;
  for (int i = 0; i < 2; ++i) {
    double inside = 0;
    for (int64_t tap = 0; tap < g.window[i]; ++tap) inside += double(tap_range(axis(g, i), tap).count());
    taps *= inside, tiles *= double(tiles_of(result[i]));
    if (g.window[i] != 3 || g.stride[i] != 1 || g.dilation[i] != 1 || g.padding[i] > 2) tiles = -1;
  }
  return {products, taps * products, tiles};
}

template <class T>
bool prefer_tiles(const tk_conv2d& g, const int64_t (&result)[2]) {
  const WindowCost c = window_cost<T>(g, result);
  const double transforms = tile_costs.transforms * double(std::max(g.r_in, g.r_out)) / simd<T>().lanes;
  return c.tiles > 0 &&
         c.tiles * (tile_costs.products * c.products + transforms) + tile_costs.weights * c.products <
             tile_costs.gain * c.direct;
}

// The pixels of tiles of a band: pointers, `outside` where there is no pixel.
template <class T>
struct TileGrid {
  View<T> view;  // of whole images, or of a band whose first row is `shift[0]` below the tiles' first
  int64_t size[2], down, across, shift[2];

  template <int64_t side>
  void pixels(int64_t tile, T* outside, T* (&found)[side * side]) const {
    const int64_t image = tile / (down * across), row = tile / across % down, column = tile % across;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) {
        const int64_t y = row * tile_side + i + shift[0], x = column * tile_side + j + shift[1];
        const bool inside = y >= 0 && y < size[0] && x >= 0 && x < size[1];
        found[i * side + j] =
            inside ? view.data + image * view.pitch.image + y * view.pitch.row + x * view.pitch.pixel
                   : outside;
      }
  }
};

// Transformed blocks of tiles of one thread, and a pixel of zeros.
template <class T>
struct TileScratch {
  T *source, *result, *zero;
};

template <class T>
class WindowProduct {
 public:
  using Scratch = TileScratch<T>;

  // `core` null: nothing is to be computed.
  WindowProduct(const tk_conv2d& g, const T* core, bool transposed)
      : g_(g), transposed_(transposed), active_(core != nullptr) {
    const int64_t taps = g.window[0] * g.window[1];
    const auto& result = transposed ? g.size : g.out_size;
    for (int i = 0; i < 2; ++i) {
      source_size_[i] = transposed ? g.out_size[i] : g.size[i];
      result_size_[i] = result[i];
      padding_[i] = transposed ? g.window[i] - 1 - g.padding[i] : g.padding[i];
      segments_[i] = transposed ? transposed_segments(axis(g, i)) : convolution_segments(axis(g, i));
    }
    tiled_ = active_ && prefer_tiles<T>(g, result);
    // As a convolution, the transpose has its window turned around; the direct plan names taps as the core
    // does.
    const bool turned = transposed && tiled_;
    const T* first = core && turned ? core + taps - 1 : core;
    const int64_t step = turned ? -1 : 1;
    weight_ = transposed ? Weight<T>(first, step, g.r_in * taps, taps, taps, g.r_out, g.r_in)
                         : Weight<T>(first, step, taps, g.r_in * taps, taps, g.r_in, g.r_out);
    weight_.tiled = tiled_;
    if (tiled_) {
      const int64_t pitches = source_pitch() + result_pitch();
      block_ = std::clamp<int64_t>(400 * 1024 / (tile_taps * pitches * sizeof(T)), 16, 64);
      for (int64_t i = 0; i < tile_taps; ++i) tap_numbers_[i] = i;
    }
  }

  bool active() const { return active_; }
  bool tiled() const { return tiled_; }
  int64_t row_multiple() const { return tiled_ ? tile_side : 1; }
  Weight<T>& weight() { return weight_; }

  void carve(Arena<T>& arena) { weight_.args.to = arena.take(weight_.elements()); }

  void carve(Arena<T>& arena, Scratch& s) const {
    if (!tiled_) return;
    s.source = arena.take(tile_taps * tile_step<T>(block_, source_pitch()));
    s.result = arena.take(tile_taps * tile_step<T>(block_, result_pitch()));
    s.zero = arena.take(source_pitch());
  }

  // Rows [rows.begin, rows.end) of `images` images; `source` begins at its row 0, `result` at rows.begin.
  void run(WindowPlan& plan, int64_t images, Range rows, const View<T>& source, const View<T>& result,
           const T* bias, const Scratch& scratch) const {
    const auto& kernels = *simd<T>().tucker_conv;
    if (tiled_) return run_tiles(images, rows, source, result, bias, scratch);
    const auto& jobs =
        plan.build(segments_[0], segments_[1], rows, images, g_.window[1], source.pitch, result.pitch);
    kernels.window({jobs.data(), int64_t(jobs.size()), source.data, weight_.args.to, bias, result.data,
                    weight_.args.taps, weight_.args.k, weight_.args.n, false});
  }

 private:
  static int unit() { return simd<T>().tucker_conv->unit; }
  int64_t source_pitch() const { return pixel_pitch<T>(weight_.args.k); }
  int64_t result_pitch() const { return pixel_pitch<T>(weight_.args.n); }

  void run_tiles(int64_t images, Range rows, const View<T>& source, const View<T>& result, const T* bias,
                 const Scratch& scratch) const {
    const auto& kernels = *simd<T>().tucker_conv;
    const int64_t k = source_pitch(), n = result_pitch(), source_channels = round_up(weight_.args.k, unit()),
                  result_channels = round_up(weight_.args.n, unit());
    const int64_t height = rows.end - rows.begin, down = tiles_of(height), across = tiles_of(result_size_[1]);
    const TileGrid<T> patches{
        source, {source_size_[0], source_size_[1]}, down, across, {rows.begin - padding_[0], -padding_[1]}};
    const TileGrid<T> tiles{result, {height, result_size_[1]}, down, across, {0, 0}};
    const int64_t count = images * down * across, blocks = (count + block_ - 1) / block_;
    std::fill(scratch.zero, scratch.zero + k, T(0));
    T *patch[patch_side * patch_side], *tile[tile_side * tile_side];
    Strip strips[tile_taps];
    WindowJob jobs[tile_taps];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = count * b / blocks, size = count * (b + 1) / blocks - first;
      const int64_t source_step = tile_step<T>(size, k), result_step = tile_step<T>(size, n);
      for (int64_t i = 0; i < size; ++i) {
        patches.template pixels<patch_side>(first + i, scratch.zero, patch);
        kernels.winograd->input(patch, source_channels, scratch.source + i * k, source_step);
      }
      for (int64_t i = 0; i < tile_taps; ++i) {
        strips[i] = {i * source_step, i * result_step, size};
        jobs[i] = {&strips[i], 1, k, n, &tap_numbers_[0], &tap_numbers_[i], 1};
      }
      kernels.window({jobs, tile_taps, scratch.source, weight_.args.to, nullptr, scratch.result, tile_taps,
                      weight_.args.k, weight_.args.n, false});
      for (int64_t i = 0; i < size; ++i) {
        tiles.template pixels<tile_side>(first + i, nullptr, tile);
        kernels.winograd->output(scratch.result + i * n, result_step, result_channels, bias, tile);
      }
    }
  }

  const tk_conv2d& g_;
  const bool transposed_, active_;
  bool tiled_;
  int64_t source_size_[2], result_size_[2], padding_[2], block_ = 0;
  std::vector<Segment> segments_[2];
  Weight<T> weight_;
  int64_t tap_numbers_[tile_taps];
};

}  // namespace tk
