// Winograd's minimal filtering F(4×4, 3×3) for the core window: its transforms, vectorised over channels.
//
//   Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A,    dg = Gᵀ [ (A dY Aᵀ) ⊙ (Bᵀ d B) ] G
//
// d is a 6×6 patch, g the 3×3 window, Y a 4×4 tile: 36 products per input and output channel and tile where
// the direct sum has 144. Points 0, ±1, ±2, ∞. The products themselves are window products over "taps" ξ = 0
// … 35. Layout: transformed element ξ of channel c lies at ξ · step + c. Registers: a patch of one vector of
// channels is transformed column by column through 36 vectors on the stack (2.3 kB). Numerics: the transforms
// lose about one digit against the direct sum (Lavin & Gray 2016, table 4).
#include "cpu/simd/tucker_conv.h"
#include "cpu/simd/vector.h"

namespace tk::TK_ISA {
namespace {

// Each applies a small matrix to a column of vectors, in[i · stride].
struct InputMatrix {  // Bᵀ
  static constexpr int from = 6, to = 6;
  template <class V>
  static void apply(const V (&d)[6], V (&t)[6]) {
    const V a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = a + b, t[2] = a - b;
    t[3] = c + e, t[4] = c - e;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
  }
};

struct OutputMatrix {  // Aᵀ
  static constexpr int from = 6, to = 4;
  template <class V>
  static void apply(const V (&m)[6], V (&y)[4]) {
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = d1 + 2 * d2;
    y[2] = s1 + 4 * s2;
    y[3] = d1 + 8 * d2 + m[5];
  }
};

struct OutputAdjoint {  // A
  static constexpr int from = 4, to = 6;
  template <class V>
  static void apply(const V (&y)[4], V (&m)[6]) {
    const V s = y[0] + y[2], d = y[1] + y[3], p = y[0] + 4 * y[2], q = 2 * y[1] + 8 * y[3];
    m[0] = y[0];
    m[1] = s + d, m[2] = s - d;
    m[3] = p + q, m[4] = p - q;
    m[5] = y[3];
  }
};

struct WeightMatrix {  // G
  static constexpr int from = 3, to = 6;
  template <class V>
  static void apply(const V (&g)[3], V (&u)[6]) {
    using S = decltype(+V{}[0]);
    const V s = (g[0] + g[2]) * S(-1.0 / 6), d = g[1] * S(1.0 / 6);
    const V p = g[0] * S(1.0 / 24) + g[2] * S(1.0 / 6), q = g[1] * S(1.0 / 12);
    u[0] = g[0] * S(0.25);
    u[1] = s - d, u[2] = s + d;
    u[3] = p + q, u[4] = p - q;
    u[5] = g[2];
  }
};

struct WeightAdjoint {  // Gᵀ
  static constexpr int from = 6, to = 3;
  template <class V>
  static void apply(const V (&u)[6], V (&g)[3]) {
    using S = decltype(+V{}[0]);
    const V s = u[1] + u[2], d = u[2] - u[1], p = u[3] + u[4], q = u[3] - u[4];
    g[0] = u[0] * S(0.25) - s * S(1.0 / 6) + p * S(1.0 / 24);
    g[1] = d * S(1.0 / 6) + q * S(1.0 / 12);
    g[2] = p * S(1.0 / 6) - s * S(1.0 / 6) + u[5];
  }
};

// M X Mᵀ for a square of vectors: load(i, j) reads X, store(i, j, v) writes.
template <class M, class V, class Load, class Store>
inline void transform(const Load& load, const Store& store) {
  V half[M::to][M::from];
#pragma GCC unroll 6
  for (int j = 0; j < M::from; ++j) {
    V in[M::from], out[M::to];
#pragma GCC unroll 6
    for (int i = 0; i < M::from; ++i) in[i] = load(i, j);
    M::template apply<V>(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < M::to; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < M::to; ++i) {
    V out[M::to];
    M::template apply<V>(half[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < M::to; ++j) store(i, j, out[j]);
  }
}

// Runs f over channels, in full vectors and then half ones.
template <class T, class F>
inline void over_channels(int64_t channels, const F& f) {
  constexpr int full = Vector<T>::lanes, half = vector_bytes > 16 ? full / 2 : full;
  int64_t c = 0;
  for (; c + full <= channels; c += full) f(c, Lanes<T, full>{});
  for (; c < channels; c += half) f(c, Lanes<T, half>{});
}

template <class M, class T>
void from_pixels(const T* const* pixels, int64_t channels, T* out, int64_t step) {
  over_channels<T>(channels, [&](int64_t c, auto lanes) {
    using L = decltype(lanes);
    using V = typename L::Type;
    transform<M, V>([&](int i, int j) { return L::load(pixels[i * M::from + j] + c); },
                    [&](int i, int j, V v) { L::store(out + (i * M::to + j) * step + c, v); });
  });
}

template <class T>
void to_pixels(const T* in, int64_t step, int64_t channels, const T* bias, T* const* pixels) {
  over_channels<T>(channels, [&](int64_t c, auto lanes) {
    using L = decltype(lanes);
    using V = typename L::Type;
    const V b = bias ? L::load(bias + c) : V{};
    transform<OutputMatrix, V>([&](int i, int j) { return L::load(in + (i * 6 + j) * step + c); },
                               [&](int i, int j, V v) {
                                 if (pixels[i * 4 + j]) L::store(pixels[i * 4 + j] + c, v + b);
                               });
  });
}

template <class M, class T>
void between_planes(const T* in, int64_t in_step, int64_t count, T* out, int64_t out_step) {
  over_channels<T>(count, [&](int64_t c, auto lanes) {
    using L = decltype(lanes);
    using V = typename L::Type;
    transform<M, V>([&](int i, int j) { return L::load(in + (i * M::from + j) * in_step + c); },
                    [&](int i, int j, V v) { L::store(out + (i * M::to + j) * out_step + c, v); });
  });
}

}  // namespace

extern const WinogradKernels<float> winograd_f32 = {
    from_pixels<InputMatrix, float>, from_pixels<OutputAdjoint, float>, to_pixels<float>,
    between_planes<WeightMatrix, float>, between_planes<WeightAdjoint, float>};
extern const WinogradKernels<double> winograd_f64 = {
    from_pixels<InputMatrix, double>, from_pixels<OutputAdjoint, double>, to_pixels<double>,
    between_planes<WeightMatrix, double>, between_planes<WeightAdjoint, double>};

}  // namespace tk::TK_ISA
