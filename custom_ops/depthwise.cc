#include "depthwise.h"

#include "channels.h"

namespace vqonnx {

using std::size_t;

void RunDepthwise(const Kernels& kernels, const Window& window, const Grid& grid, const float* taps, const Call& call,
                  std::span<const std::int64_t> image, const Tasks& tasks) {
  const Channels channels = {call.x, image, call.out, grid.out_rows, grid.out_cols};
  const size_t kernel = window.kernel[0] * window.kernel[1];
  channels.Each(window, tasks, [&](const Windows& windows, size_t first) {
    const size_t output = first % channels.each();
    kernels.depthwise({.windows = windows,
                       .taps = taps + output * kernel,
                       .bias = call.bias + output,
                       .addend = call.addend == nullptr ? nullptr : call.addend + first * channels.out_plane(),
                       .activation = call.activation});
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
