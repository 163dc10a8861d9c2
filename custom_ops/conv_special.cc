// Convolutions that are something simpler: depthwise ones, and products with a matrix.
#include <algorithm>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {

using std::size_t;

// An image of one value a channel: a product with a matrix.
void Conv::RunOnePosition(const Call& call, size_t images, const Tasks& tasks) const {
  constexpr size_t kOutputs = 64;
  const size_t outputs = weight_.outputs(), depth = weight_.depth();
  Coded matrix = weight_.coded();
  matrix.codes = call.codes;
  const size_t batches = Ceil(images, kMostDots);
  tasks.Each(Ceil(outputs, kOutputs) * batches, [&](size_t task) {
    const size_t first = task / batches * kOutputs, count = std::min(kOutputs, outputs - first);
    const size_t image = task % batches * kMostDots, batch = std::min(kMostDots, images - image);
    alignas(64) float sums[kMostDots * kOutputs];
    kernels_->dot({.matrix = matrix,
                   .row = first,
                   .rows = count,
                   .cols = depth,
                   .x = call.x + image * depth,
                   .x_stride = depth,
                   .batch = batch,
                   .out = sums,
                   .out_stride = kOutputs});
    const size_t place = image * outputs + first;
    kernels_->finish_columns({.sums = sums,
                              .pitch = kOutputs,
                              .count = batch,
                              .lanes = count,
                              .out = call.out + place,
                              .addend = call.addend == nullptr ? nullptr : call.addend + place,
                              .stride = outputs,
                              .scales = weight_.scales().data() + first,
                              .bias = call.bias + first,
                              .low = call.low,
                              .high = call.high});
  });
}

// One output a group: all that one takes is near, so each channel is laid out next to its products.
void Conv::RunDepthwise(const Call& call, std::span<const std::int64_t> shape, const Grid& grid, const float* dense,
                        const std::int32_t* at, const Tasks& tasks) const {
  const size_t lanes = kernels_->single_lanes, depth = weight_.depth();
  const size_t image_plane =
      static_cast<size_t>(shape.back()) * (shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1);
  const size_t outputs = weight_.outputs(), out_plane = grid.out_rows * grid.out_cols;
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols, tiles = Ceil(span, lanes);
  const size_t piece = kTileDepth / weight_.step() * weight_.step();
  const size_t channels = static_cast<size_t>(shape[0]) * outputs;
  const size_t parts = std::min(channels, Ceil(channels * (span + 256), 32768));
  const size_t planes = channels_ * grid.plane + lanes;  // the last tile may read on
  tasks.Each(parts, [&](size_t index) {
    Scratch scratch(Use::kTask, Scratch::Room<float>(planes) + Scratch::Room<float>(kTilePitch) +
                                    Scratch::Room<float>(tiles * lanes) + Scratch::Room<float>(grid.out_rows));
    auto* laid = scratch.Take<float>(planes);
    auto* scalars = scratch.Take<float>(kTilePitch);
    auto* sums = scratch.Take<float>(tiles * lanes);
    auto* bias = scratch.Take<float>(grid.out_rows);
    const Part part = PartOf(channels, parts, index);
    for (size_t n = part.begin; n < part.begin + part.size; ++n) {
      const size_t output = n % outputs;
      for (size_t c = 0; c < channels_; ++c) {
        grid.Lay(call.x + (n * channels_ + c) * image_plane, laid + c * grid.plane);
      }
      for (size_t col = 0; col < depth; col += piece) {
        const size_t cols = std::min(piece, depth - col);
        weight_.Row({call.codes, dense}, output, col, cols, scalars);
        for (size_t t = 0; t < tiles; ++t) {
          kernels_->tile_single({.vectors = laid + t * lanes,
                                 .scalars = scalars,
                                 .at = at + col,
                                 .depth = cols,
                                 .count = 1,
                                 .sums = sums + t * lanes,
                                 .add = col > 0});
        }
      }
      std::fill(bias, bias + grid.out_rows, call.bias[output]);
      kernels_->finish_rows({.sums = sums,
                             .pitch = grid.cols,
                             .count = grid.out_rows,
                             .lanes = grid.out_cols,
                             .out = call.out + n * out_plane,
                             .addend = call.addend == nullptr ? nullptr : call.addend + n * out_plane,
                             .stride = grid.out_cols,
                             .scales = nullptr,
                             .bias = bias,
                             .low = call.low,
                             .high = call.high});
    }
  });
}

}  // namespace vqonnx
