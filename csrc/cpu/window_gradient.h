// The gradient of the core window of a Tucker convolution,
//
//   dcore[a, c, tap] = Σ_q dt[q, a] z[q·stride − padding + tap·dilation, c],
//
// outside a known leading block, as a direct sum over taps or in tiles by Winograd's F(3×3 from 4×4), which
// takes 36 products where the direct sum has 144 (simd/winograd.cpp).
//
// Direct: each thread sums the bands of its own images, and the sums of all threads are added in order.
// Tiles: where the 36 sums are small (≤ 1 MB), each thread has its own and multiplies as many transformed
// tiles as stay in its L2 cache. Where they are large, the sums exist once: the threads transform the tiles
// of their groups of images into one buffer, meet, and multiply their own shares of the result. That is cut
// into blocks, whose 36 sums (≤ 450 kB) stay in the L2 cache until they are transformed back; where there are
// few blocks, threads share their planes. Numerics: sums in T, over pixels or tiles in order within a block
// of tiles or a group of images, those in order: the same for every run with the same number of threads.
#pragma once

#include "cpu/window_product.h"

namespace tk {

template <class T>
class WindowGradient {
 public:
  // `result` null: nothing is to be computed. `known`: leading channels of either side whose block is left
  // zero.
  WindowGradient(const tk_conv2d& g, T* result, const int64_t (&known)[2], int threads)
      : g_(g),
        result_(result),
        threads_(threads),
        taps_(g.window[0] * g.window[1]),
        known_{known[0], known[1]} {
    if (!result) return;
    wide_ = round_up(g.r_in, simd<T>().tucker_conv->unit);
    const int64_t columns = known[1] / simd<T>().tucker_conv->unit * simd<T>().tucker_conv->unit;
    const int64_t rows = columns ? known[0] : 0;
    skipped_ = {rows, std::min(columns, g.r_in)};
    if (rows && columns < g.r_in) wanted_.push_back({0, rows, columns, g.r_in - columns});
    if (rows < g.r_out) wanted_.push_back({rows, g.r_out - rows, 0, g.r_in});
    tiled_ = prefer_tiles();
    if (!tiled_) return;
    for (int i = 0; i < 2; ++i) tiles_[i] = tiles_of(g.out_size[i]);
    source_pitch_ = pixel_pitch<T>(g.r_in), result_pitch_ = pixel_pitch<T>(g.r_out);
    cut();
  }

  bool active() const { return result_ != nullptr; }
  bool tiled() const { return tiled_; }
  // Whether all threads must meet before and after `multiply`.
  bool shared() const { return shared_; }

  // Threads together transform at most `images` images in each of `groups` turns.
  void carve(Arena<T>& arena, int64_t images, int64_t groups) {
    if (!active()) return;
    scratch_.resize(threads_);
    sum_elements_ = 0;
    const int64_t count = shared_ ? images * per_image() : chunk_;
    single_ = shared_ && groups == 1 && parts_ == 1;
    if (single_)  // each block is finished at once
      for (Block& block : blocks_) block.sums = 0, sum_elements_ = std::max(sum_elements_, block.elements());
    else if (tiled_)
      for (Block& block : blocks_)
        block.sums = std::exchange(sum_elements_, sum_elements_ + block.elements());
    else
      sum_elements_ = taps_ * g_.r_out * wide_;
    for (ThreadScratch& s : scratch_) {
      const bool own = !shared_ || &s == &scratch_[0];
      s.sums = own || single_ ? arena.take(sum_elements_) : scratch_[0].sums;
      if (!tiled_) continue;
      s.zero = arena.take(std::max(source_pitch_, result_pitch_));
      s.source = own ? arena.take(tile_taps * tile_step<T>(count, source_pitch_)) : scratch_[0].source;
      s.result = own ? arena.take(tile_taps * tile_step<T>(count, result_pitch_)) : scratch_[0].result;
    }
  }

  void clear(int thread) {
    if (!active()) return;
    ThreadScratch& s = scratch_[thread];
    s.fresh = true;
    if (tiled_)
      std::fill_n(s.zero, std::max(source_pitch_, result_pitch_), T(0));
    else
      std::fill_n(s.sums, sum_elements_, T(0));
  }

  // Direct: adds a band of output rows; `dt` begins at its row 0.
  void add(const Range& rows, int64_t images, const View<T>& z, const View<T>& dt, int thread) const {
    std::vector<PixelRun> runs;
    for (int64_t v = 0; v < g_.window[0]; ++v)
      for (int64_t h = 0; h < g_.window[1]; ++h) {
        const Range in_rows = tap_range(axis(g_, 0), v), columns = tap_range(axis(g_, 1), h);
        runs.clear();
        for (int64_t b = 0; b < images; ++b)
          for (int64_t q = std::max(rows.begin, in_rows.begin); q < std::min(rows.end, in_rows.end); ++q) {
            const int64_t row = q * g_.stride[0] - g_.padding[0] + v * g_.dilation[0];
            const int64_t column = columns.begin * g_.stride[1] - g_.padding[1] + h * g_.dilation[1];
            runs.push_back({b * dt.pitch.image + q * dt.pitch.row + columns.begin * dt.pitch.pixel,
                            b * z.pitch.image + row * z.pitch.row + column * z.pitch.pixel,
                            columns.end - columns.begin});
          }
        T* sums = scratch_[thread].sums + (v * g_.window[1] + h) * g_.r_out * wide_;
        for (const Rectangle& r : wanted_)
          simd<T>().tucker_conv->outer({runs.data(), int64_t(runs.size()), dt.data + r.row, z.data + r.column,
                                        dt.pitch.pixel, g_.stride[1] * z.pitch.pixel, r.rows, r.columns,
                                        sums + r.row * wide_ + r.column, wide_, false, false});
      }
  }

  // Tiles: a thread's share of those of a group of images, the rank-th of `step`. Shared, they are only
  // transformed, and come to lie from image `place` of `all` on.
  void add_tiles(int64_t images, const View<T>& z, const View<T>& dt, int64_t place, int64_t all, int thread,
                 int64_t rank, int64_t step) {
    const int64_t count = images * per_image();
    Range mine{count * rank / step, count * (rank + 1) / step};
    if (shared_)
      return transform(mine, z, dt, scratch_[thread], place * per_image() + mine.begin, all * per_image());
    while (mine.count()) {
      const int64_t size = (mine.count() + chunk_ - 1) / chunk_,
                    end = mine.begin + (mine.count() + size - 1) / size;
      transform({mine.begin, end}, z, dt, scratch_[thread], 0, end - mine.begin);
      multiply(scratch_[thread], end - mine.begin, {0, int64_t(blocks_.size()) * parts_});
      mine.begin = end;
    }
  }

  // Shared: the products of this thread's share with all `images` transformed images.
  void multiply(int64_t images, int thread, int present) {
    const int64_t units = int64_t(blocks_.size()) * parts_;
    multiply(scratch_[thread], images * per_image(),
             {units * thread / present, units * (thread + 1) / present});
  }

  // The result of this thread's share, after all have added theirs and met.
  void finish(int thread, int present) const {
    if (!active()) return;
    const auto share = [&](int64_t n) { return Range{n * thread / present, n * (thread + 1) / present}; };
    if (!tiled_) return add_threads(share(g_.r_out));
    if (!single_)
      for (Range i = share(int64_t(blocks_.size())); i.begin < i.end; ++i.begin) {
        const Block& block = blocks_[i.begin];
        T* sums = nullptr;
        for (const ThreadScratch& s : scratch_)
          if (!sums)
            sums = s.fresh ? nullptr : s.sums + block.sums;
          else if (!s.fresh && !shared_)
            for (int64_t j = 0; j < block.elements(); ++j) sums[j] += s.sums[block.sums + j];
        finish(block, sums);
      }
    for (Range i = share(skipped_.rows); i.begin < i.end; ++i.begin)
      std::fill_n(result_ + i.begin * g_.r_in * taps_, skipped_.columns * taps_, T(0));
  }

 private:
  struct Rectangle {
    int64_t row, rows, column, columns;
  };
  struct Block {
    Rectangle place;
    int64_t sums;  // where its planes of rows × pitch lie
    int64_t pitch() const { return round_up(place.columns, simd<T>().tucker_conv->unit); }
    int64_t plane() const { return place.rows * pitch(); }
    int64_t elements() const { return tile_taps * plane(); }
  };
  struct ThreadScratch {
    T *sums, *source, *result, *zero;
    bool fresh;  // nothing has been added to the sums
  };
  struct Size {
    int64_t rows, columns;
  };

  // Cycles of one thread: a product and, for tiles, both transforms (210 a vector, measured) and the traffic
  // of 36 sums, at about 16 bytes a cycle, for every group of some hundred tiles.
  bool prefer_tiles() const {
    const WindowCost c = window_cost<T>(g_, g_.out_size);
    const double transforms = 210 * double(g_.r_in + g_.r_out) / simd<T>().lanes;
    const double sums = tile_taps * double(g_.r_in) * double(g_.r_out) * sizeof(T) / 8;
    return c.tiles > 0 && c.tiles * (1.1 * tile_taps * c.products + transforms) + (2 + c.tiles / 128) * sums <
                              0.9 * c.direct;
  }

  void cut() {
    const int64_t width = 2 * simd<T>().lanes, most = 450 * 1024 / (tile_taps * int64_t(sizeof(T)));
    for (const Rectangle& r : wanted_) {
      const int64_t across = (r.columns + 127) / 128,
                    columns = round_up((r.columns + across - 1) / across, width);
      const int64_t height = std::max<int64_t>(12, most / columns / 12 * 12),
                    down = (r.rows + height - 1) / height;
      for (int64_t i = 0; i < down; ++i)
        for (int64_t j = 0; j < r.columns; j += columns) {
          const int64_t begin = r.rows * i / down, end = r.rows * (i + 1) / down;
          blocks_.push_back(
              {{r.row + begin, end - begin, r.column + j, std::min(columns, r.columns - j)}, 0});
        }
    }
    shared_ = threads_ > 1 && tile_taps * g_.r_out * wide_ * int64_t(sizeof(T)) > 1 << 20;
    parts_ = shared_ && int64_t(blocks_.size()) < 4 * threads_ ? patch_side : 1;
    chunk_ =
        std::clamp<int64_t>(600 * 1024 / (tile_taps * (source_pitch_ + result_pitch_) * sizeof(T)), 32, 256);
  }

  int64_t per_image() const { return tiles_[0] * tiles_[1]; }

  // Tiles `range` of a group, which come to lie from tile `at` of `all` on.
  void transform(const Range& range, const View<T>& z, const View<T>& dt, const ThreadScratch& s, int64_t at,
                 int64_t all) const {
    const auto& kernels = *simd<T>().tucker_conv->winograd;
    const int64_t source_step = tile_step<T>(all, source_pitch_),
                  result_step = tile_step<T>(all, result_pitch_);
    const int64_t result_channels = round_up(g_.r_out, simd<T>().tucker_conv->unit);
    const TileGrid<T> patches{
        z, {g_.size[0], g_.size[1]}, tiles_[0], tiles_[1], {-g_.padding[0], -g_.padding[1]}};
    const TileGrid<T> tiles{dt, {g_.out_size[0], g_.out_size[1]}, tiles_[0], tiles_[1], {0, 0}};
    T *patch[patch_side * patch_side], *tile[tile_side * tile_side];
    for (int64_t i = range.begin; i < range.end; ++i, ++at) {
      patches.template pixels<patch_side>(i, s.zero, patch);
      kernels.input(patch, wide_, s.source + at * source_pitch_, source_step);
      tiles.template pixels<tile_side>(i, s.zero, tile);
      kernels.output_adjoint(tile, result_channels, s.result + at * result_pitch_, result_step);
    }
  }

  void multiply(ThreadScratch& s, int64_t count, const Range& units) {
    const int64_t source_step = tile_step<T>(count, source_pitch_),
                  result_step = tile_step<T>(count, result_pitch_);
    const PixelRun run{0, 0, count};
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Block& block = blocks_[u / parts_];
      const Rectangle& r = block.place;
      for (int64_t i = u % parts_ * tile_taps / parts_; i < (u % parts_ + 1) * tile_taps / parts_; ++i)
        simd<T>().tucker_conv->outer({&run, 1, s.result + i * result_step + r.row,
                                      s.source + i * source_step + r.column, result_pitch_, source_pitch_,
                                      r.rows, r.columns, s.sums + block.sums + i * block.plane(),
                                      block.pitch(), s.fresh, false});
      if (single_) finish(block, s.sums);
    }
    s.fresh = false;
  }

  // Transforms the sums of a block back, in place, into the result.
  void finish(const Block& block, T* sums) const {
    const Rectangle& r = block.place;
    const int64_t plane = block.plane();
    simd<T>().tucker_conv->winograd->weight_adjoint(sums, plane, plane, sums, plane);
    for (int64_t i = 0; i < r.rows; ++i) put(r.row + i, r.column, r.columns, sums + i * block.pitch(), plane);
  }

  void add_threads(const Range& rows) const {
    const int64_t plane = g_.r_out * wide_;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* sums = scratch_[0].sums + i * wide_;
      for (int64_t tap = 0; tap < taps_; ++tap)
        for (int t = 1; t < threads_; ++t) {
          const T* other = scratch_[t].sums + i * wide_ + tap * plane;
          for (int64_t j = 0; j < g_.r_in; ++j) sums[tap * plane + j] += other[j];
        }
      put(i, 0, g_.r_in, sums, plane);
    }
  }

  // Part of a row of the result, whose taps lie next to each other.
  void put(int64_t row, int64_t column, int64_t columns, const T* from, int64_t tap_step) const {
    T* to = result_ + (row * g_.r_in + column) * taps_;
    int64_t j = 0;
    if (row < known_[0])
      for (; j < columns && column + j < known_[1]; ++j, to += taps_) std::fill_n(to, taps_, T(0));
    simd<T>().transpose(taps_, columns - j, from + j, tap_step, to, taps_);
  }

  const tk_conv2d& g_;
  T* const result_;
  const int threads_;
  const int64_t taps_, known_[2];
  bool tiled_ = false, shared_ = false, single_ = false;
  int64_t wide_ = 0, tiles_[2] = {}, source_pitch_ = 0, result_pitch_ = 0, parts_ = 1, chunk_ = 0,
          sum_elements_ = 0;
  Size skipped_{};  // the leading block of whole units that nothing computes
  std::vector<Rectangle> wanted_;
  std::vector<Block> blocks_;
  std::vector<ThreadScratch> scratch_;
};

}  // namespace tk
