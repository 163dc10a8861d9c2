#include "window.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>

namespace vqonnx {
namespace {

using std::size_t;

constexpr std::int64_t kMost = std::int64_t{1} << 30;  // sums and products of a few such numbers do not overflow

void CheckValues(const char* name, std::span<const std::int64_t> values, size_t count, std::int64_t least) {
  if (values.size() != count) {
    throw Invalid(std::string(name) + " are " + Text(values) + "; there must be " + Text(count));
  }
  for (const std::int64_t value : values) {
    if (value < least || value > kMost) {
      throw Invalid(std::string(name) + " are " + Text(values) + "; each must be " + Text(least) + " to " +
                    Text(kMost));
    }
  }
}

}  // namespace

std::span<const std::int64_t> KernelSizes(const std::vector<std::int64_t>& weight) {
  if (weight.size() != 3 && weight.size() != 4) {
    throw Invalid("the weight is " + Text(weight) + "; it must have the axes of a 1-D or 2-D convolution");
  }
  return CheckedKernel(std::span(weight).subspan(2));
}

std::span<const std::int64_t> CheckedKernel(std::span<const std::int64_t> sizes) {
  constexpr size_t kMostTaps = size_t{1} << 20;
  if (sizes.size() != 1 && sizes.size() != 2) throw Invalid("a window of " + Text(sizes) + " must have 1 or 2 axes");
  const std::optional<size_t> taps =
      Times(static_cast<size_t>(sizes.front()), sizes.size() == 2 ? static_cast<size_t>(sizes.back()) : 1);
  if (!taps || *taps > kMostTaps) throw Invalid("a window of " + Text(sizes) + " is too large");
  return sizes;
}

Window::Window(std::span<const std::int64_t> sizes, std::span<const std::int64_t> strides,
               std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads) {
  const size_t axes = sizes.size();
  CheckValues("kernel sizes", sizes, axes, 1);
  CheckValues("strides", strides, axes, 1);
  CheckValues("dilations", dilations, axes, 1);
  CheckValues("pads", pads, 2 * axes, 0);
  for (size_t i = 0; i < axes; ++i) {
    const size_t axis = i + 2 - axes;
    kernel[axis] = static_cast<size_t>(sizes[i]);
    stride[axis] = static_cast<size_t>(strides[i]);
    dilation[axis] = static_cast<size_t>(dilations[i]);
    begin[axis] = static_cast<size_t>(pads[i]);
    end[axis] = static_cast<size_t>(pads[axes + i]);
  }
}

size_t Window::Outputs(size_t axis, size_t size) const {
  if (size > static_cast<size_t>(kMost)) throw Invalid("an image axis of " + Text(size) + " is too long");
  const size_t padded = size + begin[axis] + end[axis];
  if (size == 0 || padded < Reach(axis)) {
    throw Invalid("an image axis of " + Text(size) + ", padded to " + Text(padded) + ", is shorter than the window's " +
                  Text(Reach(axis)));
  }
  return (padded - Reach(axis)) / stride[axis] + 1;
}

Grid::Grid(const Window& w, size_t image_rows, size_t image_cols)
    : window_(w), image_rows_(image_rows), image_cols_(image_cols) {
  const std::array<size_t, 2> image = {image_rows, image_cols};
  std::array<size_t, 2> out, size;
  std::array<std::vector<size_t>, 2> remainders;  // which ones the taps need, in the order of the phases
  for (size_t axis = 0; axis < 2; ++axis) {
    out[axis] = w.Outputs(axis, image[axis]);
    size[axis] = out[axis] + (w.Reach(axis) - 1) / w.stride[axis];
    for (size_t k = 0; k < w.Remainders(axis); ++k) remainders[axis].push_back(k * w.dilation[axis] % w.stride[axis]);
  }
  out_rows = out[0];
  out_cols = out[1];
  rows = size[0];
  cols = size[1];
  for (const size_t row : remainders[0]) {
    for (const size_t col : remainders[1]) phases_.push_back({row, col});
  }
  const std::optional<size_t> picture = Times(rows, cols);
  const std::optional<size_t> floats = picture ? Times(*picture, phases_.size()) : picture;
  if (!floats || !Times(*floats, sizeof(float))) throw Invalid("an image plane of this size does not fit in memory");
  plane = *floats;
  PlaceTaps();
  direct_ = phases_.size() == 1 && w.stride[0] == 1 && w.stride[1] == 1 && rows == image_rows && cols == image_cols &&
            w.begin[0] + w.begin[1] == 0;
}

void Grid::PlaceTaps() {
  taps.clear();
  const size_t row_phases = window_.Remainders(0), col_phases = window_.Remainders(1);
  for (size_t y = 0; y < window_.kernel[0]; ++y) {
    for (size_t x = 0; x < window_.kernel[1]; ++x) {
      const size_t row = y * window_.dilation[0], col = x * window_.dilation[1];
      const size_t phase = y % row_phases * col_phases + x % col_phases;
      taps.push_back(phase * rows * cols + row / window_.stride[0] * cols + col / window_.stride[1]);
    }
  }
}

Grid Grid::WithRows(size_t its_rows) const {
  Grid grid = *this;
  grid.plane = plane / rows * its_rows;
  grid.rows = its_rows;
  grid.PlaceTaps();
  return grid;
}

Part Grid::Inside(size_t out_row) const {
  const size_t first = out_row * window_.stride[0], step = window_.dilation[0], pad = window_.begin[0];
  // The smallest k for which first + k * step is at least `edge`, of the kernel's rows.
  const auto reach = [&](size_t edge) {
    return std::min(window_.kernel[0], edge > first ? (edge - first + step - 1) / step : 0);
  };
  const size_t begin = reach(pad);
  return {begin, reach(pad + image_rows_) - begin};
}

void Grid::Lay(const Kernels& kernels, const float* image, size_t first_row, float* out) const {
  for (const Phase& phase : phases_) {
    // Columns [first, last) of the phase are in the image.
    const size_t step = window_.stride[1];
    const size_t pad = window_.begin[1];
    const size_t first = std::min(cols, pad > phase.col ? (pad - phase.col + step - 1) / step : 0);
    const size_t beyond = image_cols_ + pad;
    const size_t last =
        std::max(first, std::min(cols, beyond > phase.col ? (beyond - phase.col + step - 1) / step : 0));
    for (size_t y = 0; y < rows; ++y, out += cols) {
      const size_t padded = (first_row + y) * window_.stride[0] + phase.row;
      const bool inside = padded >= window_.begin[0] && padded - window_.begin[0] < image_rows_;
      if (!inside || first == last) {
        std::fill(out, out + cols, 0.0F);
        continue;
      }
      std::fill(out, out + first, 0.0F);
      std::fill(out + last, out + cols, 0.0F);
      const float* from = image + (padded - window_.begin[0]) * image_cols_ + (first * step + phase.col - pad);
      if (step == 1) {
        std::memcpy(out + first, from, (last - first) * sizeof(float));
      } else if (step == 2) {
        kernels.every_second(from, last - first, out + first);
      } else {
        for (size_t x = first; x < last; ++x) out[x] = from[(x - first) * step];
      }
    }
  }
}

std::vector<std::int64_t> ConvOutputShape(const Window& window, const std::vector<std::int64_t>& weight, size_t groups,
                                          std::span<const std::int64_t> image) {
  const size_t axes = weight.size(), channels = static_cast<size_t>(weight[1]);
  if (image.size() != axes) throw Invalid("X is " + Text(image) + "; it must have " + Text(axes) + " axes");
  if (image[0] < 0 || image[1] < 0 || static_cast<size_t>(image[1]) % groups != 0 ||
      static_cast<size_t>(image[1]) / groups != channels) {
    throw Invalid("X is " + Text(image) + "; the weight wants " + Text(groups) + " groups of " + Text(channels) +
                  " channels");
  }
  const Grid grid(window, axes == 4 ? static_cast<size_t>(image[2]) : 1, static_cast<size_t>(image[axes - 1]));
  std::vector<std::int64_t> shape = {image[0], weight[0]};
  if (axes == 4) shape.push_back(static_cast<std::int64_t>(grid.out_rows));
  shape.push_back(static_cast<std::int64_t>(grid.out_cols));
  const std::optional<size_t> floats = Times(grid.plane, channels);
  if (!floats || *floats > static_cast<size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw Invalid("X is " + Text(image) + ", too large for this kernel");
  }
  return shape;
}

}  // namespace vqonnx
