#include "cpu/window_plan.h"

#include <algorithm>

namespace tk {
namespace {

bool same_taps(const std::vector<AxisTap>& a, const std::vector<AxisTap>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](AxisTap x, AxisTap y) { return x.index == y.index && x.offset == y.offset; });
}

// Appends a position to the last segment if it continues it, else starts a segment.
void append(std::vector<Segment>& segments, size_t first, int64_t target, int64_t source, Segment&& next) {
  if (segments.size() > first) {
    Segment& last = segments.back();
    if (last.target + last.count * last.target_step == target &&
        last.source + last.count * last.source_step == source && same_taps(last.taps, next.taps)) {
      ++last.count;
      return;
    }
  }
  segments.push_back(std::move(next));
}

// How well a tile of rows along a direction of this length fills the registers.
int64_t tile_score(int64_t length) { return std::min<int64_t>(length, 6); }

}  // namespace

std::vector<Segment> convolution_segments(const Axis& g) {
  std::vector<Segment> segments;
  for (int64_t o = 0; o < g.out_size; ++o) {
    const int64_t source = o * g.stride - g.padding;
    Segment next{o, 1, source, g.stride, 1, {}};
    for (int64_t i = 0; i < g.window; ++i)
      if (source + i * g.dilation >= 0 && source + i * g.dilation < g.size)
        next.taps.push_back({i, i * g.dilation});
    append(segments, 0, o, source, std::move(next));
  }
  return segments;
}

std::vector<Segment> transposed_segments(const Axis& g) {
  std::vector<Segment> segments;
  for (int64_t residue = 0; residue < std::min(g.stride, g.size); ++residue) {
    const size_t first = segments.size();
    for (int64_t q = residue; q < g.size; q += g.stride) {
      const int64_t source = q / g.stride;
      Segment next{q, g.stride, source, 1, 1, {}};
      for (int64_t i = 0; i < g.window; ++i) {
        const int64_t scaled = q + g.padding - i * g.dilation;
        if (scaled >= 0 && scaled % g.stride == 0 && scaled / g.stride < g.out_size)
          next.taps.push_back({i, scaled / g.stride - source});
      }
      append(segments, first, q, source, std::move(next));
    }
  }
  return segments;
}

Range tap_range(const Axis& g, int64_t index) {
  const int64_t shift = g.padding - index * g.dilation;  // o·stride ≥ shift and o·stride < size + shift
  const auto ceil_div = [&](int64_t a) { return a <= 0 ? 0 : (a + g.stride - 1) / g.stride; };
  const Range range{ceil_div(shift), std::min(g.out_size, ceil_div(g.size + shift))};
  return range.begin < range.end ? range : Range{0, 0};
}

const std::vector<WindowJob>& WindowPlan::build(const std::vector<Segment>& row_segments,
                                                const std::vector<Segment>& column_segments, Range rows,
                                                int64_t images, int64_t window_columns, Pitch source,
                                                Pitch result) {
  struct Ends {
    size_t strips, taps;
  };
  std::vector<Ends> ends;
  jobs_.clear(), strips_.clear(), source_taps_.clear(), weight_taps_.clear();
  for (const Segment& r : row_segments) {
    const int64_t skipped = std::max<int64_t>(0, (rows.begin - r.target + r.target_step - 1) / r.target_step);
    const int64_t height =
        std::min(r.count, (rows.end - r.target + r.target_step - 1) / r.target_step) - skipped;
    if (height <= 0) continue;
    for (const Segment& c : column_segments) {
      struct Direction {
        int64_t count, source, result;
      };
      Direction directions[3] = {
          {c.count, c.source_step * source.pixel, c.target_step * result.pixel},
          {height, r.source_step * source.row, r.target_step * result.row},
          {images, source.image, result.image},
      };
      // The strips run along the first direction, the longest that matters.
      for (int i = 1; i < 3; ++i)
        if (tile_score(directions[i].count) > tile_score(directions[0].count))
          std::swap(directions[0], directions[i]);
      const auto& [along, second, third] = directions;
      const int64_t source_origin =
          (r.source + skipped * r.source_step) * source.row + c.source * source.pixel;
      const int64_t result_origin =
          (r.target + skipped * r.target_step - rows.begin) * result.row + c.target * result.pixel;
      for (int64_t j = 0; j < third.count; ++j)
        for (int64_t i = 0; i < second.count; ++i)
          strips_.push_back({source_origin + i * second.source + j * third.source,
                             result_origin + i * second.result + j * third.result, along.count});
      for (const AxisTap& v : r.taps)
        for (const AxisTap& h : c.taps) {
          source_taps_.push_back(v.offset * source.row + h.offset * source.pixel);
          weight_taps_.push_back(v.index * window_columns + h.index);
        }
      jobs_.push_back({nullptr, 0, along.source, along.result, nullptr, nullptr, 0});
      ends.push_back({strips_.size(), source_taps_.size()});
    }
  }
  Ends begin{0, 0};
  for (size_t i = 0; i < jobs_.size(); ++i) {
    WindowJob& job = jobs_[i];
    job.strips = strips_.data() + begin.strips;
    job.strip_count = ends[i].strips - begin.strips;
    job.source_tap = source_taps_.data() + begin.taps;
    job.weight_tap = weight_taps_.data() + begin.taps;
    job.tap_count = ends[i].taps - begin.taps;
    begin = ends[i];
  }
  return jobs_;
}

}  // namespace tk
