// What a convolution's window does to an image: sizes, and the image laid out so that the outputs of a row take
// neighbouring values, whatever the strides, dilations and pads.
#ifndef VQONNX_WINDOW_H_
#define VQONNX_WINDOW_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "kernels.h"
#include "split.h"
#include "tensor.h"

namespace vqonnx {

// Sizes of a kernel of one or two axes, which must not have too many taps. Throws Invalid.
std::span<const std::int64_t> CheckedKernel(std::span<const std::int64_t> sizes);

// The sizes of the kernel of a weight [outputs, channels, kernel..] with one or two axes. Throws Invalid.
std::span<const std::int64_t> KernelSizes(const std::vector<std::int64_t>& weight);

// Along rows, then along columns; a 1-D convolution is one of a single row.
struct Window {
  std::array<std::size_t, 2> kernel = {1, 1}, stride = {1, 1}, dilation = {1, 1}, begin = {0, 0}, end = {0, 0};

  // From attributes, which have one value (pads: two) for each of `kernel`'s one or two axes. Throws Invalid.
  Window(std::span<const std::int64_t> kernel, std::span<const std::int64_t> strides,
         std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads);

  bool is_padded() const { return begin[0] + begin[1] + end[0] + end[1] > 0; }
  std::size_t Reach(std::size_t axis) const { return (kernel[axis] - 1) * dilation[axis] + 1; }

  // How many different remainders the taps of an axis leave after division by the stride: those of so many first taps,
  // which then come again.
  std::size_t Remainders(std::size_t axis) const {
    return std::min(kernel[axis], stride[axis] / std::gcd(stride[axis], dilation[axis]));
  }

  // How many fit on an axis of an image, rounded down. Throws Invalid: the axis is too short or too long.
  std::size_t Outputs(std::size_t axis, std::size_t size) const;
};

// The window over images of one size.
//
// A channel's plane is cut into phases: the padded image's values whose row and column leave the same remainders after
// division by the strides, each phase a picture of `rows` by `cols`. The output at (y, x) takes for tap t the value
// `taps[t]` behind y * cols + x of the channel's plane.
class Grid {
 public:
  Grid(const Window& window, std::size_t image_rows, std::size_t image_cols);  // throws Invalid: the image is too small

  std::size_t out_rows, out_cols;
  std::size_t rows, cols;  // of each phase
  std::size_t plane;       // floats of a channel, all phases together
  std::vector<std::size_t> taps;

  // Whether the image is its own only phase, so that it can be read where it is.
  bool direct() const { return direct_; }

  // Whether rows of outputs follow each other in a plane like their values, without anything in between.
  bool whole() const { return cols == out_cols; }

  std::size_t kernel_rows() const { return window_.kernel[0]; }

  // The rows of the kernel that lie on the image, and not on its pads, for a row of the output; in order of the
  // dilation.
  Part Inside(std::size_t out_row) const;

  // The same for some rows of the output only, so many that their planes have `rows` rows.
  Grid WithRows(std::size_t rows) const;

  // One channel's plane from its image, from row `first` of the output on.
  void Lay(const Kernels& kernels, const float* image, std::size_t first, float* plane) const;

 private:
  struct Phase {
    std::size_t row, col;
  };
  Window window_;
  std::size_t image_rows_, image_cols_;
  std::vector<Phase> phases_;
  bool direct_;
  void PlaceTaps();
};

// Of a convolution with such a weight. Throws Invalid where an image [n, channels, size..] does not suit it.
std::vector<std::int64_t> ConvOutputShape(const Window& window, const std::vector<std::int64_t>& weight,
                                          std::size_t groups, std::span<const std::int64_t> image);

}  // namespace vqonnx

#endif  // VQONNX_WINDOW_H_
