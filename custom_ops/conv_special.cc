// Convolutions that are something simpler: depthwise ones, and products with a matrix.
#include <algorithm>

#include "depthwise.h"
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
                              .activation = call.activation});
  });
}

// One channel and one output a group: few weights, which are decoded at once.
void Conv::RunDepthwise(const Call& call, std::span<const std::int64_t> shape, const Grid& grid,
                        const Tasks& tasks) const {
  const size_t outputs = weight_.outputs(), depth = weight_.depth();
  Scratch scratch(Use::kRun, Scratch::Room<float>(outputs * depth));
  auto* taps = scratch.Take<float>(outputs * depth);
  if (weight_.by_output()) {
    const size_t piece = weight_.piece();
    for (size_t col = 0; col < depth; col += piece) {
      weight_.Rows({call.codes, nullptr}, 0, outputs, col, std::min(piece, depth - col), taps + col, depth);
    }
  } else {
    weight_.Expand(call.codes, tasks, taps);
  }
  vqonnx::RunDepthwise(*kernels_, window_, grid, taps, call, shape, tasks);
}

}  // namespace vqonnx
