// Largest values of windows in float32.
#ifndef VQONNX_POOL_H_
#define VQONNX_POOL_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels.h"
#include "tasks.h"
#include "window.h"

namespace vqonnx {

// A MaxPool of one or two axes, without dilations; the number of its outputs is rounded down.
class MaxPool {
 public:
  // The attributes are ONNX's. Throws Invalid.
  MaxPool(std::span<const std::int64_t> kernel, std::span<const std::int64_t> strides,
          std::span<const std::int64_t> pads, const Kernels& kernels);

  // Throws Invalid where an image [n, channels, size..] does not suit the windows.
  std::vector<std::int64_t> OutputShape(std::span<const std::int64_t> image) const;

  void Run(const float* x, float* out, std::span<const std::int64_t> image, const Tasks& tasks) const;

 private:
  const Kernels* kernels_;
  std::size_t axes_;
  Window window_;
};

}  // namespace vqonnx

#endif  // VQONNX_POOL_H_
