// Fused Tucker convolution on the host, forward: 1×1 → core window → 1×1 in one pass over X and Y.
//
//   z[b,i,p] = Σ_c U_in[c,i] x[b,c,p]
//   t[b,o,q] = Σ_i Σ_tap core[o,i,tap] z[b,i, q·stride − padding + tap·dilation]
//   y[b,n,q] = Σ_o U_out[n,o] t[b,o,q] + bias[n]
//
// Layout: images channels-last and dense, U_in (n_in, r_in), core (r_out, r_in, window), U_out (n_out,
// r_out). A missing factor is the identity. One-dimensional convolutions are images of one row. Blocking: a
// team of threads takes a group of images whose z stays in the L2 cache (≤ 384 kB), projects it band by band
// (about 192 kB of X), then takes about 512 output pixels at a time through the core and the expansion, so
// that t lives in the L1/L2 cache only. Taps outside the image are not computed: pixels are cut into
// rectangles with one set of taps (window_plan.h). z and t are written to memory only when they are to be
// saved, and then, where their pixels lie well there, made in that place. Numerics: sums in float (double for
// double) with fused multiply-add, taps in window order; bfloat16 is widened on reading and rounded once on
// writing, and the z and t of this pass are never rounded. The result does not depend on the number of
// threads.
#include "cpu/tucker_conv.h"

#include "cpu/window_product.h"

namespace tk {
namespace {

template <class T, class S>
class Forward {
 public:
  Forward(const tk_conv2d& g, const S* x, const T* core, const T* out_factor, const T* in_factor,
          const T* bias, S* y, S* z, S* t, int threads)
      : g_(g),
        unit_(simd<T>().tucker_conv->unit),
        core_(g, core, false),
        z_row_(g.size[1] * pixel_pitch<T>(g.r_in)),
        z_image_(image_pitch<T>(g.size[0] * z_row_)),
        t_row_(g.out_size[1] * pixel_pitch<T>(g.r_out)),
        schedule_(schedule(g.batch, z_image_ * sizeof(T), group_bytes, threads)),
        in_bands_(g.size[0], g.size[1], schedule_.group, input_bytes / (g.n_in * sizeof(T)),
                  schedule_.team_size, 1),
        out_bands_(g.out_size[0], g.out_size[1], schedule_.group, output_pixels, schedule_.team_size,
                   core_.row_multiple()),
        t_image_(image_pitch<T>(out_bands_.height() * t_row_)),
        in_factor_(in_factor, 0, g.r_in, 1, 1, g.n_in, g.r_in),
        out_factor_(out_factor, 0, 1, g.r_out, 1, g.r_out, g.n_out),
        x_{const_cast<S*>(x), g.size[0], g.size[1], g.n_in},
        y_{y, g.out_size[0], g.out_size[1], g.n_out},
        z_{z, g.size[0], g.size[1], g.r_in},
        t_{t, g.out_size[0], g.out_size[1], g.r_out},
        bias_(bias) {}

  tk_status run() {
    Scratch<T> memory(carve(nullptr));
    if (!memory) return TK_OUT_OF_MEMORY;
    carve(memory.data());
    if (bias_) read_pixels(bias_, 1, g_.n_out, round_up(g_.n_out, unit_), padded_bias_);
    [[maybe_unused]] const int threads = schedule_.teams * schedule_.team_size;
#pragma omp parallel num_threads(threads)
    {
      pack_weights({&in_factor_, &core_.weight(), &out_factor_});
      for (Member me(schedule_); me.team < schedule_.teams; me.next())
        for (const Range& images : schedule_.work[me.team]) {
          project(images, me);
          me.meet();
          expand(images, me);
          me.meet();
        }
    }
    return TK_OK;
  }

 private:
  static constexpr int64_t group_bytes = 384 * 1024, input_bytes = 192 * 1024, output_pixels = 512;

  struct ThreadScratch {
    T *x, *t, *y;
    typename WindowProduct<T>::Scratch window;
  };

  // Where everything lies; returns the elements needed.
  int64_t carve(T* base) {
    Arena<T> arena(base);
    for (Weight<T>* w : {&in_factor_, &out_factor_}) w->args.to = arena.take(w->elements());
    core_.carve(arena);
    padded_bias_ = bias_ ? arena.take(round_up(g_.n_out, unit_)) : nullptr;
    buffers_.resize(schedule_.teams), scratch_.resize(schedule_.teams * schedule_.team_size);
    for (T*& z : buffers_) z = z_is_x() || z_in_place() ? nullptr : arena.take(schedule_.group * z_image_);
    const int64_t in = in_bands_.images() * in_bands_.height() * g_.size[1] * round_up(g_.n_in, unit_);
    const int64_t out =
        out_bands_.images() * out_bands_.height() * g_.out_size[1] * round_up(g_.n_out, unit_);
    for (ThreadScratch& s : scratch_) {
      core_.carve(arena, s.window);
      s.x = direct<T, S>(g_.n_in, unit_) ? nullptr : arena.take(in);
      s.t = out_factor_.panels && !t_in_place() ? arena.take(out_bands_.images() * t_image_) : nullptr;
      s.y = direct<T, S>(g_.n_out, unit_) ? nullptr : arena.take(out);
    }
    return arena.used();
  }

  bool z_is_x() const { return !in_factor_.panels && direct<T, S>(g_.n_in, unit_); }
  // Whether what is saved can be made there: in the kernels' type and with their distance between pixels.
  static bool in_place(const Image<S>& saved) {
    return saved.data && sizeof(T) == sizeof(S) && pixel_pitch<T>(saved.channels) == saved.channels;
  }
  bool z_in_place() const { return in_factor_.panels && in_place(z_); }
  bool t_in_place() const { return out_factor_.panels && in_place(t_); }

  View<T> group_z(const Range& images, T* buffer) const {
    if (z_is_x()) return band_view<T>(x_, images.begin, {0, g_.size[0]}, unit_, buffer);
    if (z_in_place()) return band_view<T>(z_, images.begin, {0, g_.size[0]}, unit_, buffer);
    return {buffer, {z_image_, z_row_, pixel_pitch<T>(g_.r_in)}};
  }

  void project(const Range& images, const Member& me) {
    if (z_is_x()) return;
    const ThreadScratch& scratch = scratch_[me.thread];
    const View<T> group = group_z(images, buffers_[me.team]);
    for (int64_t i = me.rank; i < in_bands_.count(images); i += me.step) {
      const auto [some, rows] = in_bands_.at(images, i);
      const View<T> z = band_of(group, images, some, rows);
      if (!in_factor_.panels) {
        read_band(x_, some, rows, z);
        continue;
      }
      const View<T> x = band_view<T>(x_, some.begin, rows, unit_, scratch.x);
      if (x.data == scratch.x) read_band(x_, some, rows, x);
      pointwise<T>(in_factor_, {x.data, x.pitch}, some.count(), rows.count() * g_.size[1], nullptr, z,
                   direct<T, S>(g_.n_in, unit_));
      if (z_.data && !z_in_place()) write_band(z, some, rows, z_);
    }
  }

  void expand(const Range& images, const Member& me) {
    const ThreadScratch& scratch = scratch_[me.thread];
    const View<T> z = group_z(images, buffers_[me.team]);
    const bool last = !out_factor_.panels;
    WindowPlan plan;
    for (int64_t i = me.rank; i < out_bands_.count(images); i += me.step) {
      const auto [some, rows] = out_bands_.at(images, i);
      const View<T> y = band_view<T>(y_, some.begin, rows, unit_, scratch.y);
      const View<T> t = last           ? y
                        : t_in_place() ? band_view<T>(t_, some.begin, rows, unit_, scratch.t)
                                       : View<T>{scratch.t, {t_image_, t_row_, pixel_pitch<T>(g_.r_out)}};
      core_.run(plan, some.count(), rows, band_of(z, images, some), t, last ? padded_bias_ : nullptr,
                scratch.window);
      if (!last) {
        if (t_.data && !t_in_place()) write_band(t, some, rows, t_);
        pointwise<T>(out_factor_, {t.data, t.pitch}, some.count(), rows.count() * g_.out_size[1],
                     padded_bias_, y, false);
      }
      if (y.data == scratch.y) write_band(y, some, rows, y_);
    }
  }

  const tk_conv2d& g_;
  const int unit_;
  WindowProduct<T> core_;
  const int64_t z_row_, z_image_, t_row_;
  const Schedule schedule_;
  const Bands in_bands_, out_bands_;
  const int64_t t_image_;
  Weight<T> in_factor_, out_factor_;
  const Image<S> x_, y_, z_, t_;
  const T* bias_;
  T* padded_bias_ = nullptr;
  std::vector<T*> buffers_;
  std::vector<ThreadScratch> scratch_;
};

template <class T, class S>
tk_status forward(const tk_conv2d& g, const void* x, const void* core, const void* out_factor,
                  const void* in_factor, const void* bias, void* y, void* z, void* t, int threads) {
  return Forward<T, S>(g, static_cast<const S*>(x), static_cast<const T*>(core),
                       static_cast<const T*>(out_factor), static_cast<const T*>(in_factor),
                       static_cast<const T*>(bias), static_cast<S*>(y), static_cast<S*>(z),
                       static_cast<S*>(t), threads)
      .run();
}

}  // namespace

tk_status check_conv2d(const tk_conv2d& g) {
  if (g.batch < 0 || g.n_in < 1 || g.n_out < 1 || g.r_in < 1 || g.r_out < 1) return TK_INVALID_ARGUMENT;
  for (int i = 0; i < 2; ++i) {
    if (g.size[i] < 1 || g.window[i] < 1 || g.stride[i] < 1 || g.padding[i] < 0 || g.dilation[i] < 1)
      return TK_INVALID_ARGUMENT;
    const int64_t room = g.size[i] + 2 * g.padding[i] - g.dilation[i] * (g.window[i] - 1) - 1;
    if (room < 0 || g.out_size[i] != room / g.stride[i] + 1) return TK_INVALID_ARGUMENT;
  }
  return TK_OK;
}

}  // namespace tk

int tk_tile_costs_cpu(double costs[4]) {
  const tk::TileCosts& c = tk::tile_costs;
  costs[0] = c.products, costs[1] = c.transforms, costs[2] = c.weights, costs[3] = c.gain;
  return tk::winograd_allowed();
}

tk_status tk_tucker_conv_forward_cpu(tk_dtype dtype, const tk_conv2d* conv, const void* x, const void* core,
                                     const void* out_factor, const void* in_factor, const void* bias, void* y,
                                     void* z, void* t, int threads) {
  if (!conv || threads < 1 || tk::check_conv2d(*conv) != TK_OK) return TK_INVALID_ARGUMENT;
  if ((!in_factor && conv->n_in != conv->r_in) || (!out_factor && conv->n_out != conv->r_out))
    return TK_INVALID_ARGUMENT;
  if (conv->batch == 0) return TK_OK;
  switch (dtype) {
    case TK_FLOAT32:
      return tk::forward<float, float>(*conv, x, core, out_factor, in_factor, bias, y, z, t, threads);
    case TK_FLOAT64:
      return tk::forward<double, double>(*conv, x, core, out_factor, in_factor, bias, y, z, t, threads);
    case TK_BFLOAT16:
      return tk::forward<float, tk::BFloat16>(*conv, x, core, out_factor, in_factor, bias, y, z, t, threads);
  }
  return TK_UNSUPPORTED;
}
