// Depthwise convolutions in float32: one output and one channel a group.
#ifndef VQONNX_DEPTHWISE_H_
#define VQONNX_DEPTHWISE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "tasks.h"
#include "window.h"

namespace vqonnx {

// Images [n, channels, size..] with taps [channels, kernel..].
void RunDepthwise(const Kernels& kernels, const Window& window, const Grid& grid, const float* taps, const Call& call,
                  std::span<const std::int64_t> image, const Tasks& tasks);

// A depthwise convolution whose weight is stored as it is.
class DepthwiseConv {
 public:
  // `weight` is the shape of the weight, the attributes are ONNX's. Throws Invalid.
  DepthwiseConv(std::span<const std::int64_t> weight, std::span<const std::int64_t> strides,
                std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads, std::int64_t group,
                const Kernels& kernels);

  std::size_t outputs() const { return static_cast<std::size_t>(weight_[0]); }
  const std::vector<std::int64_t>& weight() const { return weight_; }

  // Throws Invalid where an image [n, channels, size..] does not suit the layer.
  std::vector<std::int64_t> OutputShape(std::span<const std::int64_t> image) const;

  void Run(const Call& call, const float* taps, std::span<const std::int64_t> image, const Tasks& tasks) const;

 private:
  const Kernels* kernels_;
  std::vector<std::int64_t> weight_;
  Window window_;
};

}  // namespace vqonnx

#endif  // VQONNX_DEPTHWISE_H_
