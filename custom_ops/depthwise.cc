#include "depthwise.h"

#include <algorithm>

#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kTaskFloats = 32768, kLeastFloats = 8192;  // of the output: enough for a task to be worth it

}  // namespace

void RunDepthwise(const Kernels& kernels, const Window& w, const Grid& grid, const float* taps, const Call& call,
                  std::span<const std::int64_t> image, const Tasks& tasks) {
  const size_t image_rows = image.size() == 4 ? static_cast<size_t>(image[2]) : 1;
  const size_t image_cols = static_cast<size_t>(image.back());
  const size_t outputs = static_cast<size_t>(image[1]), channels = static_cast<size_t>(image[0]) * outputs;
  const size_t image_plane = image_rows * image_cols, out_plane = grid.out_rows * grid.out_cols;
  const size_t kernel = w.kernel[0] * w.kernel[1];
  const size_t parts = std::min(channels, PartsOf(channels * (out_plane + 64), kTaskFloats, kLeastFloats, 1));
  tasks.Each(parts, [&](size_t index) {
    const Part part = PartOf(channels, parts, index);
    for (size_t first = part.begin; first < part.begin + part.size;) {
      const size_t output = first % outputs;  // up to the end of its image
      const size_t count = std::min(part.begin + part.size - first, outputs - output);
      kernels.depthwise({.x = call.x + first * image_plane,
                         .channels = count,
                         .image_rows = image_rows,
                         .image_cols = image_cols,
                         .taps = taps + output * kernel,
                         .kernel_rows = w.kernel[0],
                         .kernel_cols = w.kernel[1],
                         .stride_rows = w.stride[0],
                         .stride_cols = w.stride[1],
                         .dilation_rows = w.dilation[0],
                         .dilation_cols = w.dilation[1],
                         .pad_rows = w.begin[0],
                         .pad_cols = w.begin[1],
                         .bias = call.bias + output,
                         .addend = call.addend == nullptr ? nullptr : call.addend + first * out_plane,
                         .activation = call.activation,
                         .out = call.out + first * out_plane,
                         .out_rows = grid.out_rows,
                         .out_cols = grid.out_cols});
      first += count;
    }
  });
}

DepthwiseConv::DepthwiseConv(std::span<const std::int64_t> weight, std::span<const std::int64_t> strides,
                             std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads,
                             std::int64_t group, const Kernels& kernels)
    : kernels_(&kernels),
      weight_(weight.begin(), weight.end()),
      window_(KernelSizes(weight_), strides, dilations, pads) {
  if (weight_[0] < 1 || weight_[0] != group || weight_[1] != 1) {
    throw Invalid("the weight is " + Text(weight_) + " with group " + Text(group) +
                  "; there must be one channel and one output a group");
  }
}

std::vector<std::int64_t> DepthwiseConv::OutputShape(std::span<const std::int64_t> image) const {
  return ConvOutputShape(window_, weight_, outputs(), image);
}

void DepthwiseConv::Run(const Call& call, const float* taps, std::span<const std::int64_t> image,
                        const Tasks& tasks) const {
  if (image[0] == 0) return;
  const Grid grid(window_, image.size() == 4 ? static_cast<size_t>(image[2]) : 1, static_cast<size_t>(image.back()));
  RunDepthwise(*kernels_, window_, grid, taps, call, image, tasks);
}

}  // namespace vqonnx
