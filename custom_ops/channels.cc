#include "channels.h"

namespace vqonnx {

Windows Channels::At(const Window& w, std::size_t first, std::size_t count) const {
  const std::size_t image_rows = image.size() == 4 ? static_cast<std::size_t>(image[2]) : 1;
  const std::size_t image_cols = static_cast<std::size_t>(image.back());
  return {.x = x + first * image_rows * image_cols,
          .channels = count,
          .image_rows = image_rows,
          .image_cols = image_cols,
          .kernel_rows = w.kernel[0],
          .kernel_cols = w.kernel[1],
          .stride_rows = w.stride[0],
          .stride_cols = w.stride[1],
          .dilation_rows = w.dilation[0],
          .dilation_cols = w.dilation[1],
          .pad_rows = w.begin[0],
          .pad_cols = w.begin[1],
          .out = out + first * out_plane(),
          .out_rows = out_rows,
          .out_cols = out_cols};
}

}  // namespace vqonnx
