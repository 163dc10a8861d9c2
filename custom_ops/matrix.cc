// Products with a coded matrix in float32.
#include <algorithm>

#include "linear.h"
#include "scratch.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kBlockRows = 1024;  // rows of x that share a decoded piece of the weight

size_t Ceil(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

Matrix::Matrix(const Inputs& inputs, std::span<const std::int64_t> perm, bool transposed, const Kernels& kernels)
    : kernels_(&kernels), weight_(inputs, perm, transposed ? 0 : 1, kernels) {
  if (weight_.shape().size() != 2) throw Invalid("the weight is " + Text(weight_.shape()) + "; it must have 2 axes");
}

void Matrix::Run(const Call& call, size_t rows, const Tasks& tasks) const {
  const size_t lanes = kernels_->tile_lanes, count = kernels_->tile_count;
  const size_t depth = weight_.depth(), outputs = weight_.outputs();
  const size_t tiles = Ceil(rows, count), panels = Ceil(outputs, lanes);
  if (rows == 0) return;
  // x as tiles of columns of `count` neighbouring values; rows beyond the last hold anything.
  Scratch scratch(Use::kRun, Scratch::Room<float>(weight_.dense_size()) + Scratch::Room<float>(tiles * count * depth) +
                                 Scratch::Room<std::int32_t>(kTileDepth));
  auto* dense = scratch.Take<float>(weight_.dense_size());
  auto* turned = scratch.Take<float>(tiles * count * depth);
  auto* at = scratch.Take<std::int32_t>(kTileDepth);
  if (weight_.dense_size() > 0) weight_.Expand(call.codes, tasks, dense);
  for (size_t k = 0; k < kTileDepth; ++k) at[k] = static_cast<std::int32_t>(k * count);
  tasks.Each(tiles, [&](size_t tile) {
    const size_t height = std::min(count, rows - tile * count);
    kernels_->transpose(call.x + tile * count * depth, depth, height, depth, turned + tile * count * depth, count);
  });

  const Weight::Source source = {call.codes, dense};
  const size_t blocks = Ceil(rows, kBlockRows);
  const size_t piece = kTileDepth / weight_.step() * weight_.step();
  const size_t tile_floats = count * lanes;
  const size_t most_tiles = Ceil(tiles, blocks);
  tasks.Each(panels * blocks, [&](size_t task) {
    const size_t panel = task / blocks, first = panel * lanes;
    const size_t begin = tiles * (task % blocks) / blocks, end = tiles * (task % blocks + 1) / blocks;
    const size_t its_outputs = std::min(lanes, outputs - first);
    Scratch own(Use::kTask, Scratch::Room<float>(weight_.PanelRoom()) + Scratch::Room<float>(piece * lanes) +
                                Scratch::Room<float>(most_tiles * tile_floats) + Scratch::Room<float>(lanes));
    auto* room = own.Take<float>(weight_.PanelRoom());
    auto* vectors = own.Take<float>(piece * lanes);
    auto* sums = own.Take<float>(most_tiles * tile_floats);
    auto* bias = own.Take<float>(lanes);
    for (size_t i = 0; i < lanes; ++i) bias[i] = call.bias != nullptr && i < its_outputs ? call.bias[first + i] : 0.0F;
    for (size_t col = 0; col < depth; col += piece) {
      const size_t cols = std::min(piece, depth - col);
      weight_.Panel(source, first, its_outputs, col, cols, room, vectors);
      for (size_t tile = begin; tile < end; ++tile) {
        const size_t height = std::min(count, rows - tile * count);
        float* its_sums = sums + (tile - begin) * tile_floats;
        kernels_->tile_windows({.vectors = vectors,
                                .scalars = turned + (tile * depth + col) * count,
                                .at = at,
                                .depth = cols,
                                .count = height,
                                .sums = its_sums,
                                .add = col > 0});
        if (col + cols < depth) continue;
        const size_t place = tile * count * outputs + first;
        kernels_->finish_columns({.sums = its_sums,
                                  .count = height,
                                  .lanes = its_outputs,
                                  .out = call.out + place,
                                  .addend = call.addend == nullptr ? nullptr : call.addend + place,
                                  .stride = outputs,
                                  .bias = bias,
                                  .low = call.low,
                                  .high = call.high});
      }
    }
  });
}

}  // namespace vqonnx
