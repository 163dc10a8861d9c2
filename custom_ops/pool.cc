#include "pool.h"

#include "channels.h"

namespace vqonnx {

using std::size_t;

MaxPool::MaxPool(std::span<const std::int64_t> kernel, std::span<const std::int64_t> strides,
                 std::span<const std::int64_t> pads, const Kernels& kernels)
    : kernels_(&kernels),
      axes_(kernel.size()),
      window_(CheckedKernel(kernel), strides, std::vector<std::int64_t>(kernel.size(), 1), pads) {
  for (size_t axis = 0; axis < 2; ++axis) {  // otherwise some windows might have nothing of the image
    if (std::max(window_.begin[axis], window_.end[axis]) >= window_.kernel[axis]) {
      throw Invalid("pads are " + Text(pads) + "; each must be less than the window " + Text(kernel));
    }
  }
}

std::vector<std::int64_t> MaxPool::OutputShape(std::span<const std::int64_t> image) const {
  if (image.size() != axes_ + 2 || image[0] < 0 || image[1] < 0) {
    throw Invalid("X is " + Text(image) + "; it must have " + Text(axes_ + 2) + " axes");
  }
  std::vector<std::int64_t> shape(image.begin(), image.begin() + 2);
  for (size_t i = 2; i < image.size(); ++i) {
    shape.push_back(static_cast<std::int64_t>(window_.Outputs(i - axes_, static_cast<size_t>(image[i]))));
  }
  return shape;
}

void MaxPool::Run(const float* x, float* out, std::span<const std::int64_t> image, const Tasks& tasks) const {
  const size_t rows = axes_ == 2 ? window_.Outputs(0, static_cast<size_t>(image[2])) : 1;
  const Channels channels = {x, image, out, rows, window_.Outputs(1, static_cast<size_t>(image.back()))};
  if (channels.images() * channels.each() == 0) return;
  channels.Each(window_, tasks, [&](const Windows& windows, size_t) { kernels_->max_pool(windows); });
}

}  // namespace vqonnx
