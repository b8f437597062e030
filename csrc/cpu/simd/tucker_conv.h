// What the fused Tucker convolution needs from each instruction set: packed weights, window products, and
// outer products over pixels. Images are channels-last; a pixel's channels start at a multiple of its pitch.
//
// Channel counts are padded to a multiple of `unit` lanes inside: packed weights are zero there, results are
// stored there, and operands read as vectors must be readable there.
#pragma once

#include <cstdint>

namespace tk {

// `count` pixels at one distance in the source and one in the result; offsets in elements of the first.
struct Strip {
  int64_t source, result, count;
};

// Pixels that see the same window taps. source_tap[i] is the offset of tap i from a strip's source pixel, and
// weight_tap[i] its place in the packed weights.
struct WindowJob {
  const Strip* strips;
  int64_t strip_count, source_step, result_step;
  const int64_t *source_tap, *weight_tap;
  int64_t tap_count;
};

// result[p, n] = bias[n] + Σ_tap Σ_k source[p + tap, k] weight[tap, k, n]
template <class T>
struct WindowArgs {
  const WindowJob* jobs;
  int64_t job_count;
  const T* source;
  const T* weight;  // packed
  const T* bias;    // padded, or null
  T* result;
  int64_t taps, k, n;  // of the packed weights
  bool streams;        // the source's pixels are dense and come from memory: fetch them ahead
};

// weight[tap, k, n] = from[tap · tap_step + k · k_step + n · n_step]
template <class T>
struct PackArgs {
  const T* from;
  int64_t tap_step, k_step, n_step, taps, k, n;
  T* to;
};

// `count` pixels in a row; offsets in elements of the first in either operand.
struct PixelRun {
  int64_t a, b, count;
};

// c[i, j] += Σ_pixels a[pixel, i] b[pixel, j]; `fresh`: = instead of +=
template <class T>
struct OuterArgs {
  const PixelRun* runs;
  int64_t run_count;
  const T *a, *b;
  int64_t a_step, b_step, m, n;
  T* c;
  int64_t c_row;
  bool fresh;
  bool streams;  // b comes from memory: fetch it ahead
};

// Winograd's F(4×4, 3×3); channels are padded, and transformed element ξ of channel c lies at ξ · step + c.
template <class T>
struct WinogradKernels {
  void (*input)(const T* const* pixels, int64_t channels, T* out, int64_t step);  // Bᵀ d B of 6×6 pixels
  void (*output_adjoint)(const T* const* pixels, int64_t channels, T* out, int64_t step);  // A dY Aᵀ of 4×4
  // Aᵀ m A + bias to 4×4 pixels; null ones are outside the image.
  void (*output)(const T* in, int64_t step, int64_t channels, const T* bias, T* const* pixels);
  void (*weight)(const T* in, int64_t in_step, int64_t count, T* out, int64_t out_step);          // G g Gᵀ
  void (*weight_adjoint)(const T* in, int64_t in_step, int64_t count, T* out, int64_t out_step);  // Gᵀ u G
};

template <class T>
struct TuckerConvKernels {
  int unit;
  int64_t (*panel_count)(int64_t taps, int64_t k, int64_t n);  // packing work is shared by panels
  // Its first channel; the last panel's end.
  int64_t (*panel_start)(int64_t taps, int64_t k, int64_t n, int64_t panel);
  void (*pack)(const PackArgs<T>& args, int64_t panel);  // fills one panel of to[taps · k · padded n]
  void (*window)(const WindowArgs<T>& args);
  void (*outer)(const OuterArgs<T>& args);
  const WinogradKernels<T>* winograd;
};

}  // namespace tk

#if defined(TK_ISA)
namespace tk::TK_ISA {
extern const WinogradKernels<float> winograd_f32;
extern const WinogradKernels<double> winograd_f64;
extern const TuckerConvKernels<float> tucker_conv_f32;
extern const TuckerConvKernels<double> tucker_conv_f64;
}  // namespace tk::TK_ISA
#endif
