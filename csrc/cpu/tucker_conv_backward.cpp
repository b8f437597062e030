// Backward pass of the fused Tucker convolution on the host; notation and layouts as in tucker_conv.cpp.
//
//   dt = U_outᵀ dy     dU_out[n,o] = Σ_q dy[n,q] t[o,q]     dbias[n] = Σ_q dy[n,q]
//   dz = coreᵀ ∗ dt    dcore[o,i,tap] = Σ_q dt[o,q] z[i, q·stride − padding + tap·dilation]
//   dx = U_in dz       dU_in[c,i] = Σ_p x[c,p] dz[i,p]
//
// Blocking: a team takes a group of images whose z, dt stay near the L2 cache. Bands of output images, or of
// their rows: t (saved, or computed again from z), dy and dt of one band serve dU_out, dbias and dcore while
// they are in cache; then bands of input images: dz serves dU_in and dx and is never stored. Gradients of
// weights are accumulated per thread, dU transposed so that vectors run along the channels; dcore:
// window_gradient.h. Numerics: as forward; gradients of weights are summed per band, over bands in order,
// then over threads in order: the same for every run with the same number of threads, not the same between
// numbers of threads.
#include "cpu/window_gradient.h"
#include "cpu/window_product.h"

namespace tk {
namespace {

template <class T, class S>
struct BackwardOperands {
  const S *dy, *x, *z, *t;
  const T *core, *out_factor, *in_factor;
  S* dx;
  T *d_core, *d_out, *d_in, *d_bias;
  int64_t known[2];  // leading channels of d_core that are not computed, but zero
};

template <class T, class S>
class Backward {
 public:
  Backward(const tk_conv2d& g, const BackwardOperands<T, S>& o, int threads)
      : g_(g),
        o_(o),
        unit_(simd<T>().tucker_conv->unit),
        taps_(g.window[0] * g.window[1]),
        again_t_(o.d_out && !o.t),
        need_z_(o.d_core || again_t_),
        need_dz_(o.dx || o.d_in),
        core_(g, again_t_ ? o.core : nullptr, false),
        core_back_(g, need_dz_ ? o.core : nullptr, true),
        gradient_(g, o.d_core, o.known, threads),
        z_pitch_(pitch(g.size, g.r_in)),
        dt_pitch_(pitch(g.out_size, g.r_out)),
        schedule_(schedule(g.batch, (z_pitch_.image + dt_pitch_.image) * sizeof(T),
                           gradient_.tiled() ? 4 * group_bytes : group_bytes, threads)),
        groups_(schedule_.most_groups()),
        in_bands_(g.size[0], g.size[1], schedule_.group, band_pixels(g.n_in), schedule_.team_size,
                  core_back_.row_multiple()),
        out_bands_(g.out_size[0], g.out_size[1], schedule_.group, band_pixels(g.n_out), schedule_.team_size,
                   core_.row_multiple()),
        dz_pitch_(band_pitch(z_pitch_, in_bands_)),
        t_pitch_(band_pitch(dt_pitch_, out_bands_)),
        reduce_in_(need_z_ && !o.z ? o.in_factor : nullptr, 0, g.r_in, 1, 1, g.n_in, g.r_in),
        reduce_out_(o.out_factor, 0, g.r_out, 1, 1, g.n_out, g.r_out),
        expand_in_(o.dx ? o.in_factor : nullptr, 0, 1, g.r_in, 1, g.r_in, g.n_in),
        x_{const_cast<S*>(o.x), g.size[0], g.size[1], g.n_in},
        dx_{o.dx, g.size[0], g.size[1], g.n_in},
        dy_{const_cast<S*>(o.dy), g.out_size[0], g.out_size[1], g.n_out},
        z_{const_cast<S*>(o.z), g.size[0], g.size[1], g.r_in},
        t_{const_cast<S*>(o.t), g.out_size[0], g.out_size[1], g.r_out} {}

  tk_status run() {
    Scratch<T> memory(carve(nullptr));
    if (!memory) return TK_OUT_OF_MEMORY;
    carve(memory.data());
    const int threads = schedule_.teams * schedule_.team_size;
#pragma omp parallel num_threads(threads)
    {
      pack_weights({&reduce_in_, &core_.weight(), &reduce_out_, &core_back_.weight(), &expand_in_});
      const int thread = omp_get_thread_num(), present = omp_get_num_threads();
      for (int i = thread; i < threads; i += present) {
        std::fill(scratch_[i].sums, scratch_[i].sums + sum_elements(), T(0));
        gradient_.clear(i);
      }
      // All teams take their groups together, because they share the tiles of the core's gradient.
      for (int64_t group = 0; group < groups_; ++group) {
        for (Member me(schedule_); me.team < schedule_.teams; me.next()) {
          if (group >= int64_t(schedule_.work[me.team].size())) continue;
          const Range& images = schedule_.work[me.team][group];
          if (need_z_) project(images, me);
          me.meet();
          output_side(images, me);
          me.meet();
          if (gradient_.tiled()) add_tiles(images, group, me);
          if (need_dz_) input_side(images, me);
          me.meet();
        }
        if (!gradient_.shared()) continue;
#pragma omp barrier
        gradient_.multiply(images_before(group, schedule_.teams), thread, present);
#pragma omp barrier
      }
#pragma omp barrier
      gradient_.finish(thread, present);
      reduce(thread, present);
    }
    return TK_OK;
  }

 private:
  struct Buffers {
    T *z, *dt;
  };
  struct ThreadScratch {
    T *x, *dy, *dx, *t, *dz, *sums, *d_out, *d_in, *d_bias;
    TileScratch<T> again, back;
  };

  static constexpr int64_t group_bytes = 384 * 1024;

  static int64_t band_pixels(int64_t channels) {
    return std::min<int64_t>(384, std::max<int64_t>(64, 192 * 1024 / (channels * sizeof(T))));
  }
  Pitch pitch(const int64_t (&size)[2], int64_t channels) const {
    const int64_t pixel = pixel_pitch<T>(channels);
    return {image_pitch<T>(size[0] * size[1] * pixel), size[1] * pixel, pixel};
  }
  static Pitch band_pitch(Pitch of, const Bands& bands) {
    return {image_pitch<T>(bands.height() * of.row), of.row, of.pixel};
  }
  int64_t wide(int64_t channels) const { return round_up(channels, unit_); }
  int64_t out_sum() const { return o_.d_out ? g_.r_out * wide(g_.n_out) : 0; }
  int64_t in_sum() const { return o_.d_in ? g_.r_in * wide(g_.n_in) : 0; }
  int64_t bias_sum() const { return o_.d_bias ? wide(g_.n_out) : 0; }
  int64_t sum_elements() const { return out_sum() + in_sum() + bias_sum(); }

  bool z_direct() const {
    return (o_.z || !o_.in_factor) && direct<T, S>(o_.in_factor ? g_.r_in : g_.n_in, unit_);
  }
  bool dt_direct() const { return !o_.out_factor && direct<T, S>(g_.n_out, unit_); }

  int64_t carve(T* base) {
    Arena<T> arena(base);
    for (Weight<T>* w : {&reduce_in_, &reduce_out_, &expand_in_}) w->args.to = arena.take(w->elements());
    core_.carve(arena);
    core_back_.carve(arena);
    gradient_.carve(arena, schedule_.group * schedule_.teams, groups_);
    buffers_.resize(schedule_.teams), scratch_.resize(schedule_.teams * schedule_.team_size);
    for (Buffers& b : buffers_) {
      b.z = need_z_ && !z_direct() ? arena.take(schedule_.group * z_pitch_.image) : nullptr;
      b.dt = dt_direct() ? nullptr : arena.take(schedule_.group * dt_pitch_.image);
    }
    const int64_t in = in_bands_.images() * in_bands_.height() * g_.size[1];
    const int64_t out = out_bands_.images() * out_bands_.height() * g_.out_size[1];
    for (ThreadScratch& s : scratch_) {
      core_.carve(arena, s.again);
      core_back_.carve(arena, s.back);
      s.x = direct<T, S>(g_.n_in, unit_) ? nullptr : arena.take(in * wide(g_.n_in));
      s.dx = !o_.dx || direct<T, S>(g_.n_in, unit_) ? nullptr : arena.take(in * wide(g_.n_in));
      s.dy = direct<T, S>(g_.n_out, unit_) ? nullptr : arena.take(out * wide(g_.n_out));
      s.t = o_.d_out ? arena.take(out_bands_.images() * t_pitch_.image) : nullptr;
      s.dz = need_dz_ ? arena.take(in_bands_.images() * dz_pitch_.image) : nullptr;
      s.sums = arena.take(sum_elements());
      s.d_out = s.sums;
      s.d_in = s.d_out + out_sum();
      s.d_bias = s.d_in + in_sum();
    }
    return arena.used();
  }

  // The group's z: computed from x, or read from what the forward pass saved.
  void project(const Range& images, const Member& me) {
    if (z_direct()) return;
    const Buffers& buffers = buffers_[me.team];
    const ThreadScratch& scratch = scratch_[me.thread];
    for (int64_t i = me.rank; i < in_bands_.count(images); i += me.step) {
      const auto [some, rows] = in_bands_.at(images, i);
      const View<T> z = band_of(View<T>{buffers.z, z_pitch_}, images, some, rows);
      if (!reduce_in_.panels) {
        read_band(o_.in_factor ? z_ : x_, some, rows, z);
        continue;
      }
      const View<T> x = view(x_, some, rows, scratch.x);
      pointwise<T>(reduce_in_, {x.data, x.pitch}, some.count(), rows.count() * g_.size[1], nullptr, z,
                   direct<T, S>(g_.n_in, unit_));
    }
  }

  // The caller's rows as they are, or converted into `scratch`.
  View<T> view(const Image<S>& image, const Range& images, const Range& rows, T* scratch) const {
    const View<T> v = band_view<T>(image, images.begin, rows, unit_, scratch);
    if (v.data == scratch) read_band(image, images, rows, v);
    return v;
  }

  View<T> group_z(const Range& images, const Buffers& buffers) const {
    if (!z_direct()) return {buffers.z, z_pitch_};
    return band_view<T>(o_.in_factor ? z_ : x_, images.begin, {0, g_.size[0]}, unit_, buffers.z);
  }

  View<T> group_dt(const Range& images, const Buffers& buffers) const {
    if (!dt_direct()) return {buffers.dt, dt_pitch_};
    return band_view<T>(dy_, images.begin, {0, g_.out_size[0]}, unit_, buffers.dt);
  }

  // c += Σ over the pixels of a band of a ⊗ b. `streams`: b comes from memory.
  void accumulate(const View<T>& a, int64_t m, const View<T>& b, int64_t n, int64_t images, int64_t pixels,
                  T* c, bool streams) const {
    std::vector<PixelRun> runs;
    for (int64_t i = 0; i < images; ++i) runs.push_back({i * a.pitch.image, i * b.pitch.image, pixels});
    simd<T>().tucker_conv->outer({runs.data(), images, a.data, b.data, a.pitch.pixel, b.pitch.pixel, m, n, c,
                                  wide(n), false, streams});
  }

  void output_side(const Range& images, const Member& me) {
    const Buffers& buffers = buffers_[me.team];
    const ThreadScratch& scratch = scratch_[me.thread];
    const View<T> z = need_z_ ? group_z(images, buffers) : View<T>{}, dt = group_dt(images, buffers);
    WindowPlan plan;
    for (int64_t i = me.rank; i < out_bands_.count(images); i += me.step) {
      const auto [some, rows] = out_bands_.at(images, i);
      const int64_t count = some.count(), pixels = rows.count() * g_.out_size[1];
      const View<T> dt_band = band_of(dt, images, some, rows), z_some = band_of(z, images, some);
      const View<T> dy = view(dy_, some, rows, scratch.dy);
      if (o_.out_factor)
        pointwise<T>(reduce_out_, {dy.data, dy.pitch}, count, pixels, nullptr, dt_band,
                     direct<T, S>(g_.n_out, unit_));
      else if (!dt_direct())
        read_band(dy_, some, rows, dt_band);
      if (o_.d_bias) {
        static const T one = 1;
        accumulate({const_cast<T*>(&one), {0, 0, 0}}, 1, dy, g_.n_out, count, pixels, scratch.d_bias, false);
      }
      if (o_.d_out) {
        View<T> t{scratch.t, t_pitch_};
        if (again_t_) {
          core_.run(plan, count, rows, z_some, t, nullptr, scratch.again);
        } else {
          t = view(t_, some, rows, scratch.t);
        }
        accumulate(t, g_.r_out, dy, g_.n_out, count, pixels, scratch.d_out, false);
      }
      if (gradient_.active() && !gradient_.tiled())
        gradient_.add(rows, count, z_some, band_of(dt, images, some), me.thread);
    }
  }

  // Images of the group-th groups of the first `teams` teams.
  int64_t images_before(int64_t group, int teams) const {
    int64_t images = 0;
    for (int team = 0; team < teams; ++team)
      if (group < int64_t(schedule_.work[team].size())) images += schedule_.work[team][group].count();
    return images;
  }

  void add_tiles(const Range& images, int64_t group, const Member& me) {
    const Buffers& buffers = buffers_[me.team];
    gradient_.add_tiles(images.count(), group_z(images, buffers), group_dt(images, buffers),
                        images_before(group, me.team), images_before(group, schedule_.teams), me.thread,
                        me.rank, me.step);
  }

  void input_side(const Range& images, const Member& me) {
    const Buffers& buffers = buffers_[me.team];
    const ThreadScratch& scratch = scratch_[me.thread];
    const View<T> dt = group_dt(images, buffers);
    WindowPlan plan;
    for (int64_t i = me.rank; i < in_bands_.count(images); i += me.step) {
      const auto [some, rows] = in_bands_.at(images, i);
      const int64_t count = some.count(), pixels = rows.count() * g_.size[1];
      const View<T> dx = band_view<T>(dx_, some.begin, rows, unit_, scratch.dx);
      const View<T> dz = o_.in_factor ? View<T>{scratch.dz, dz_pitch_} : dx;
      core_back_.run(plan, count, rows, band_of(dt, images, some), dz, nullptr, scratch.back);
      if (o_.d_in)
        accumulate(dz, g_.r_in, view(x_, some, rows, scratch.x), g_.n_in, count, pixels, scratch.d_in,
                   direct<T, S>(g_.n_in, unit_));
      if (o_.dx && o_.in_factor)
        pointwise<T>(expand_in_, {dz.data, dz.pitch}, count, pixels, nullptr, dx, false);
      if (o_.dx && dx.data == scratch.dx) write_band(dx, some, rows, dx_);
    }
  }

  T total(int64_t offset) const {
    T sum = 0;
    for (const ThreadScratch& s : scratch_) sum += s.sums[offset];
    return sum;
  }

  // Sums over threads, in order, and puts the gradients into the layout of their weights.
  void reduce(int thread, int threads) const {
    const auto share = [&](int64_t n) { return Range{n * thread / threads, n * (thread + 1) / threads}; };
    const auto factor = [&](T* result, int64_t n, int64_t r, int64_t offset) {
      if (!result) return;
      const Range part = share(n);
      for (int64_t i = part.begin; i < part.end; ++i)
        for (int64_t j = 0; j < r; ++j) result[i * r + j] = total(offset + j * wide(n) + i);
    };
    factor(o_.d_out, g_.n_out, g_.r_out, 0);
    factor(o_.d_in, g_.n_in, g_.r_in, out_sum());
    factor(o_.d_bias, g_.n_out, 1, out_sum() + in_sum());
  }

  const tk_conv2d& g_;
  const BackwardOperands<T, S>& o_;
  const int unit_;
  const int64_t taps_;
  const bool again_t_, need_z_, need_dz_;
  WindowProduct<T> core_, core_back_;
  WindowGradient<T> gradient_;
  const Pitch z_pitch_, dt_pitch_;
  const Schedule schedule_;
  const int64_t groups_;  // of the team that has most
  const Bands in_bands_, out_bands_;
  const Pitch dz_pitch_, t_pitch_;  // of bands
  Weight<T> reduce_in_, reduce_out_, expand_in_;
  const Image<S> x_, dx_, dy_, z_, t_;
  std::vector<Buffers> buffers_;
  std::vector<ThreadScratch> scratch_;
};

template <class T, class S>
tk_status backward(const tk_conv2d& g, const tk_conv2d_gradients& d, const void* dy, const void* x,
                   const void* z, const void* t, const void* core, const void* out_factor,
                   const void* in_factor, int threads) {
  const BackwardOperands<T, S> operands{
      static_cast<const S*>(dy),        static_cast<const S*>(x),     static_cast<const S*>(z),
      static_cast<const S*>(t),         static_cast<const T*>(core),  static_cast<const T*>(out_factor),
      static_cast<const T*>(in_factor), static_cast<S*>(d.input),     static_cast<T*>(d.core),
      static_cast<T*>(d.out_factor),    static_cast<T*>(d.in_factor), static_cast<T*>(d.bias),
      {d.known[0], d.known[1]}};
  return Backward<T, S>(g, operands, threads).run();
}

}  // namespace
}  // namespace tk

tk_status tk_tucker_conv_backward_cpu(tk_dtype dtype, const tk_conv2d* conv, const void* grad, const void* x,
                                      const void* z, const void* t, const void* core, const void* out_factor,
                                      const void* in_factor, const tk_conv2d_gradients* gradients,
                                      int threads) {
  if (!conv || !gradients || threads < 1 || tk::check_conv2d(*conv) != TK_OK) return TK_INVALID_ARGUMENT;
  if ((!in_factor && (conv->n_in != conv->r_in || gradients->in_factor)) ||
      (!out_factor && (conv->n_out != conv->r_out || gradients->out_factor)))
    return TK_INVALID_ARGUMENT;
  if (gradients->known[0] < 0 || gradients->known[0] > conv->r_out || gradients->known[1] < 0 ||
      gradients->known[1] > conv->r_in)
    return TK_INVALID_ARGUMENT;
  if (!core && (gradients->input || gradients->in_factor || (gradients->out_factor && !t)))
    return TK_INVALID_ARGUMENT;
  switch (dtype) {
    case TK_FLOAT32:
      return tk::backward<float, float>(*conv, *gradients, grad, x, z, t, core, out_factor, in_factor,
                                        threads);
    case TK_FLOAT64:
      return tk::backward<double, double>(*conv, *gradients, grad, x, z, t, core, out_factor, in_factor,
                                          threads);
    case TK_BFLOAT16:
      return tk::backward<float, tk::BFloat16>(*conv, *gradients, grad, x, z, t, core, out_factor, in_factor,
                                               threads);
  }
  return TK_UNSUPPORTED;
}
