// Images whose channels are computed one by one, and how they are dealt out.
#ifndef VQONNX_CHANNELS_H_
#define VQONNX_CHANNELS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels.h"
#include "split.h"
#include "tasks.h"
#include "window.h"

namespace vqonnx {

// x is [n, channels, size..] as `image` says, out [n, channels, out_rows, out_cols].
struct Channels {
  const float* x;
  std::span<const std::int64_t> image;
  float* out;
  std::size_t out_rows, out_cols;

  std::size_t images() const { return static_cast<std::size_t>(image[0]); }
  std::size_t each() const { return static_cast<std::size_t>(image[1]); }  // channels of an image
  std::size_t out_plane() const { return out_rows * out_cols; }

  // Some channels of one image, from `first` on, which is counted over all images.
  Windows At(const Window& window, std::size_t first, std::size_t count) const;

  // Calls run(windows, first) for parts of the channels, each of one image.
  template <class Run>
  void Each(const Window& window, const Tasks& tasks, const Run& run) const {
    constexpr std::size_t kTaskFloats = 32768, kLeastFloats = 8192;  // of the output: enough for a task to be worth it
    const std::size_t all = images() * each();
    const std::size_t parts = std::min(all, PartsOf(all * (out_plane() + 64), kTaskFloats, kLeastFloats, 1));
    tasks.Each(parts, [&](std::size_t index) {
      const Part part = PartOf(all, parts, index);
      for (std::size_t first = part.begin; first < part.begin + part.size;) {
        const std::size_t count = std::min(part.begin + part.size - first, each() - first % each());
        run(At(window, first, count), first);
        first += count;
      }
    });
  }
};

}  // namespace vqonnx

#endif  // VQONNX_CHANNELS_H_
