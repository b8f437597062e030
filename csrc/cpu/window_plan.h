// Cuts the pixels of a convolution into rectangles that see the same window taps, and those into strips at a
// uniform distance: what a micro-kernel can run over without asking where the border of the image is.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/tucker_conv.h"

namespace tk {

// A tap of the window along one axis and where its source lies from a segment's first source position.
struct AxisTap {
  int64_t index, offset;
};

// Positions target + m · target_step (0 ≤ m < count) read source + m · source_step + tap.offset.
struct Segment {
  int64_t target, target_step, source, source_step, count;
  std::vector<AxisTap> taps;
};

// One axis of a convolution.
struct Axis {
  int64_t size, out_size, window, stride, padding, dilation;
};

// The output positions of a convolution, in ascending order.
std::vector<Segment> convolution_segments(const Axis& axis);

// The input positions, reading the output: the transposed convolution. One family per residue of the stride.
std::vector<Segment> transposed_segments(const Axis& axis);

// The output positions for which tap `index` lies inside the image: [begin, end).
Range tap_range(const Axis& axis, int64_t index);

// When the core window works in Winograd tiles, measured: cycles per tile, for 36 products of two channels
// and for both transforms of a vector of channels, and for the transform of a vector of weights; and the part
// of the direct sum's cycles that all of these must stay below.
struct TileCosts {
  double products, transforms, weights, gain;
};
constexpr TileCosts tile_costs{1.1 * 36, 420, 250, 0.9};

// Element distances in an image buffer.
struct Pitch {
  int64_t image, row, pixel;
};

// The jobs of one band: target rows [rows.begin, rows.end) of `images` images. The result buffer starts at
// rows.begin, the source buffer at its row 0.
class WindowPlan {
 public:
  const std::vector<WindowJob>& build(const std::vector<Segment>& rows_segments,
                                      const std::vector<Segment>& column_segments, Range rows, int64_t images,
                                      int64_t window_columns, Pitch source, Pitch result);

 private:
  std::vector<WindowJob> jobs_;
  std::vector<Strip> strips_;
  std::vector<int64_t> source_taps_, weight_taps_;
};

}  // namespace tk
