// What the forward and the backward pass of the fused Tucker convolution share: who works on which images,
// packed weights, and images that are read and written in another type or with another padding than the
// kernels'.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd/tucker_conv.h"
#include "cpu/window_plan.h"
#include "tucker_kernels.h"

namespace tk {

// bfloat16 in memory; widened to float where it is read, rounded to nearest even where it is written.
struct BFloat16 {
  uint16_t bits;
};

template <class T>
inline T widened(T value) {
  return value;
}
inline float widened(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float value, float* to) { *to = value; }
inline void store(double value, double* to) { *to = value; }
inline void store(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Axis axis(const tk_conv2d& g, int i) {
  return {g.size[i], g.out_size[i], g.window[i], g.stride[i], g.padding[i], g.dilation[i]};
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Images a multiple of 4 kB apart would share the sets of the first cache.
template <class T>
int64_t image_pitch(int64_t elements) {
  return elements * sizeof(T) % 1024 ? elements : elements + 3 * 64 / int64_t(sizeof(T));
}

// Pixels a multiple of 1 kB apart would too.
template <class T>
int64_t pixel_pitch(int64_t channels) {
  const int64_t elements = round_up(channels, simd<T>().tucker_conv->unit);
  return elements * sizeof(T) % 1024 ? elements : elements + 64 / int64_t(sizeof(T));
}

// Threads form teams. Each team takes its own images, a group at a time; the members of a team of several
// threads (when there are few images) share the rows of a group and meet at barriers.
struct Schedule {
  int teams, team_size;
  int64_t group;                         // most images in a group
  std::vector<std::vector<Range>> work;  // per team: groups of images
  int64_t most_groups() const {
    size_t most = 0;
    for (const auto& groups : work) most = std::max(most, groups.size());
    return int64_t(most);
  }
};

// `budget`: bytes of a group's rank-space images, which should stay in the L2 cache.
inline Schedule schedule(int64_t batch, int64_t bytes_per_image, int64_t budget, int threads) {
  Schedule s;
  const bool shared = batch < threads || (batch % threads && batch < 4 * threads);
  s.teams = shared ? 1 : threads;
  s.team_size = shared ? threads : 1;
  s.group = 1;
  s.work.resize(s.teams);
  for (int team = 0; team < s.teams; ++team) {
    const int64_t first = batch * team / s.teams, count = batch * (team + 1) / s.teams - first;
    const int64_t most = std::max<int64_t>(1, budget * s.team_size / std::max<int64_t>(bytes_per_image, 1));
    const int64_t groups = (count + most - 1) / most;
    for (int64_t i = 0; i < groups; ++i) {
      s.work[team].push_back({first + count * i / groups, first + count * (i + 1) / groups});
      s.group = std::max(s.group, s.work[team].back().end - s.work[team].back().begin);
    }
  }
  return s;
}

// A thread's place: where it starts and how far it steps when the rows of a group are shared. The plan holds
// when the run-time gives fewer threads than asked for.
struct Member {
  int thread, present, team, rank, step;
  const bool shared;
  explicit Member(const Schedule& s)
      : thread(omp_get_thread_num()),
        present(omp_get_num_threads()),
        team(s.teams > 1 ? thread : 0),
        rank(s.teams > 1 ? 0 : thread),
        step(s.teams > 1 ? 1 : present),
        shared(step > 1) {}
  void next() { team += present, thread += present; }
  void meet() const {
    if (shared) {
#pragma omp barrier
    }
  }
};

// What is worked on together of a group of images, about `pixels` pixels: whole images, or rows of one, so
// that images are read and written from one end to the other.
struct Band {
  Range images, rows;
};
class Bands {
 public:
  // Every band begins at a multiple of `multiple` rows.
  Bands(int64_t rows, int64_t columns, int64_t group, int64_t pixels, int team_size, int64_t multiple)
      : rows_(rows), multiple_(multiple), units_((rows + multiple - 1) / multiple) {
    const int64_t each = (group + team_size - 1) / team_size,
                  fit = pixels / std::max<int64_t>(rows * columns, 1);
    images_ = std::max<int64_t>(1, std::min(fit, each));
    const int64_t most = std::max<int64_t>(1, pixels / std::max<int64_t>(columns * multiple, 1));
    const int64_t least = std::min<int64_t>((team_size + group - 1) / group, units_);
    parts_ = images_ > 1 ? 1 : std::max((units_ + most - 1) / most, least);
  }
  int64_t count(const Range& group) const { return (group.count() + images_ - 1) / images_ * parts_; }
  Band at(const Range& group, int64_t i) const {
    const int64_t first = group.begin + i / parts_ * images_, part = i % parts_;
    return {{first, std::min(first + images_, group.end)},
            {units_ * part / parts_ * multiple_, std::min(rows_, units_ * (part + 1) / parts_ * multiple_)}};
  }
  int64_t images() const { return images_; }  // at most, as are the rows
  int64_t height() const { return (units_ + parts_ - 1) / parts_ * multiple_; }

 private:
  int64_t rows_, multiple_, units_, images_, parts_;
};

// A channels-last image tensor of the caller: batch × rows × columns × channels, dense.
template <class S>
struct Image {
  S* data;
  int64_t rows, columns, channels;
  S* at(int64_t image, int64_t row) const { return data + (image * rows + row) * columns * channels; }
};

// A band of it as the kernels read it: in their type, with padded pixels. Converted into `scratch` unless it
// can be used as it is.
template <class T>
struct View {
  T* data;
  Pitch pitch;
};

// Of the view of a group's images: from the first of `some` of them on, and from row rows.begin on.
template <class T>
View<T> band_of(const View<T>& group, const Range& images, const Range& some, Range rows = {0, 0}) {
  const int64_t skipped = (some.begin - images.begin) * group.pitch.image + rows.begin * group.pitch.row;
  return {group.data + skipped, group.pitch};
}

template <class T, class S>
bool direct(int64_t channels, int unit) {
  return sizeof(T) == sizeof(S) && channels % unit == 0;
}

template <class T, class S>
View<T> band_view(const Image<S>& image, int64_t first, Range rows, int unit, T* scratch) {
  const int64_t pitch = round_up(image.channels, unit), row = image.columns * pitch;
  if constexpr (sizeof(T) == sizeof(S))
    if (direct<T, S>(image.channels, unit))
      return {const_cast<T*>(reinterpret_cast<const T*>(image.at(first, rows.begin))),
              {image.rows * row, row, pitch}};
  return {scratch, {rows.count() * row, row, pitch}};
}

template <class T, class S>
void read_pixels(const S* from, int64_t pixels, int64_t channels, int64_t pitch, T* to) {
  for (int64_t p = 0; p < pixels; ++p, from += channels, to += pitch) {
    for (int64_t c = 0; c < channels; ++c) to[c] = widened(from[c]);
    for (int64_t c = channels; c < pitch; ++c) to[c] = T(0);
  }
}

template <class T, class S>
void write_pixels(const T* from, int64_t pixels, int64_t channels, int64_t pitch, S* to) {
  for (int64_t p = 0; p < pixels; ++p, from += pitch, to += channels)
    for (int64_t c = 0; c < channels; ++c) store(from[c], to + c);
}

// Fills or empties a buffer with pitch `v.pitch` from or to rows of the caller's images.
template <class T, class S>
void read_band(const Image<S>& image, Range images, Range rows, const View<T>& v) {
  for (int64_t b = images.begin; b < images.end; ++b)
    read_pixels(image.at(b, rows.begin), (rows.end - rows.begin) * image.columns, image.channels,
                v.pitch.pixel, v.data + (b - images.begin) * v.pitch.image);
}

template <class T, class S>
void write_band(const View<T>& v, Range images, Range rows, const Image<S>& image) {
  for (int64_t b = images.begin; b < images.end; ++b)
    write_pixels(v.data + (b - images.begin) * v.pitch.image, (rows.end - rows.begin) * image.columns,
                 image.channels, v.pitch.pixel, image.at(b, rows.begin));
}

// Winograd's tiles of the result, the patches of the source they see, and the products that take the place of
// taps.
constexpr int64_t tile_side = 4, patch_side = 6, tile_taps = patch_side * patch_side;

// A matrix or core, packed for window products; null `from` packs nothing. `tiled`: as tiles want it, G g Gᵀ.
template <class T>
struct Weight {
  PackArgs<T> args{};
  int64_t panels = 0;
  bool tiled = false;

  Weight() = default;
  Weight(const T* from, int64_t tap_step, int64_t k_step, int64_t n_step, int64_t taps, int64_t k, int64_t n)
      : args{from, tap_step, k_step, n_step, taps, k, n, nullptr} {
    if (from) panels = simd<T>().tucker_conv->panel_count(taps, k, n);
  }
  int64_t elements() const {
    const int64_t taps = tiled ? tile_taps : args.taps;
    return panels ? taps * args.k * round_up(args.n, simd<T>().tucker_conv->unit) : 0;
  }
  void pack(int64_t panel) const {
    if (tiled)
      transform(panel);
    else
      simd<T>().tucker_conv->pack(args, panel);
  }

 private:
  // A few rows of k at a time, so that the window itself stays in the first cache.
  void transform(int64_t panel) const {
    const auto& kernels = *simd<T>().tucker_conv;
    constexpr int64_t most = 16, widest = 128 / sizeof(T);
    alignas(64) T window[9 * most * widest];
    const int64_t k = args.k, start = kernels.panel_start(9, k, args.n, panel),
                  width = kernels.panel_start(9, k, args.n, panel + 1) - start;
    for (int64_t k0 = 0; k0 < k; k0 += most) {
      const int64_t rows = std::min(most, k - k0), live = std::min(width, args.n - start);
      const T* from = args.from + k0 * args.k_step + start * args.n_step;
      kernels.pack({from, args.tap_step, args.k_step, args.n_step, 9, rows, live, window}, 0);
      kernels.winograd->weight(window, rows * width, rows * width,
                               args.to + tile_taps * k * start + k0 * width, k * width);
    }
  }
};

// Inside a parallel region: the threads share the panels and meet when all are packed.
template <class T>
void pack_weights(std::initializer_list<Weight<T>*> weights) {
  for (const Weight<T>* w : weights) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < w->panels; ++panel) w->pack(panel);
  }
#pragma omp barrier
}

tk_status check_conv2d(const tk_conv2d& conv);

// Product of every pixel of a band with a packed matrix. `streams`: the source comes from memory.
template <class T>
void pointwise(const Weight<T>& weight, const View<const T>& source, int64_t images, int64_t pixels,
               const T* bias, const View<T>& result, bool streams) {
  static const int64_t zero = 0;
  std::vector<Strip> strips;
  for (int64_t b = 0; b < images; ++b)
    strips.push_back({b * source.pitch.image, b * result.pitch.image, pixels});
  const WindowJob job{strips.data(), images, source.pitch.pixel, result.pitch.pixel, &zero, &zero, 1};
  simd<T>().tucker_conv->window(
      {&job, 1, source.data, weight.args.to, bias, result.data, 1, weight.args.k, weight.args.n, streams});
}

// Hands out 64-byte aligned pieces of one allocation: first asked for in counting mode (null base), then
// again.
template <class T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t elements) {
    T* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(elements, 64 / sizeof(T));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

}  // namespace tk
