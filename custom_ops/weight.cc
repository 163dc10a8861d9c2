#include "weight.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace vqonnx {
namespace {

using std::size_t;

// The permutation after which the outputs are the first axis.
std::vector<std::int64_t> OutputsFirst(std::span<const std::int64_t> perm, size_t output_axis) {
  std::vector<std::int64_t> turned(perm.begin(), perm.end());
  if (output_axis < turned.size())
    std::rotate(turned.begin(), turned.begin() + static_cast<std::ptrdiff_t>(output_axis),
                turned.begin() + static_cast<std::ptrdiff_t>(output_axis) + 1);
  return turned;
}

}  // namespace

Weight::Weight(const Inputs& inputs, std::span<const std::int64_t> perm, size_t output_axis, const Kernels& kernels)
    : kernels_(&kernels), decode_(inputs, OutputsFirst(perm, output_axis), kernels), coded_(decode_.View(nullptr)) {
  if (output_axis >= perm.size()) throw Invalid("the weight has " + Text(perm.size()) + " axes");
  const std::vector<std::int64_t> turned = OutputsFirst(perm, output_axis);
  const auto* sizes = static_cast<const std::int64_t*>(inputs.layout.data) + 2;
  for (const std::int64_t axis : perm) shape_.push_back(sizes[axis]);
  outputs_ = static_cast<size_t>(decode_.shape()[0]);
  depth_ = coded_.rows * decode_.cols() / outputs_;

  scales_.resize(coded_.rows);
  for (size_t r = 0; r < coded_.rows; ++r) scales_[r] = FloatAt(inputs.scales, inputs.scales.dims[0] == 1 ? 0 : r);

  // Wider words than this are no use to anyone, and would make the pieces of a row longer than a tile is deep.
  by_output_ = turned[0] == 0 && coded_.rows == outputs_ && kOctet * coded_.width <= kTileDepth;
  const auto tensor_axis = [&](size_t matrix_axis) {
    return static_cast<size_t>(std::find(perm.begin(), perm.end(), static_cast<std::int64_t>(matrix_axis)) -
                               perm.begin());
  };
  if (by_output_) {
    step_ = kOctet * coded_.width;
    for (size_t i = 1; i < perm.size(); ++i) column_axes_.push_back(tensor_axis(i));
  } else {
    for (size_t i = 0; i < perm.size(); ++i) {
      if (i != output_axis) column_axes_.push_back(i);
    }
  }
}

void Weight::Expand(const std::uint8_t* codes, const Tasks& tasks, float* dense) const {
  const Tensor stored = {codes, Type::kUint8, {}};
  const Tensor scales = {scales_.data(), Type::kFloat32, {static_cast<std::int64_t>(scales_.size()), 1}};
  tasks.Each(decode_.tasks(), [&](size_t task) { decode_.Run(stored, scales, task, dense); });
}

void Weight::Rows(const Source& source, size_t output, size_t rows, size_t col, size_t cols, float* out,
                  size_t stride) const {
  if (!by_output_) {
    const float* from = source.dense + output * depth_ + col;
    for (size_t r = 0; r < rows; ++r) std::memcpy(out + r * stride, from + r * depth_, cols * sizeof(float));
    return;
  }
  Coded matrix = coded_;
  matrix.codes = source.codes;
  kernels_->decode_rows(matrix, output, rows, col / coded_.width, cols, scales_.data() + output, out, stride);
}

void Weight::Panel(const Source& source, size_t output, size_t rows, size_t col, size_t cols, float* room,
                   float* out) const {
  if (by_output_ && coded_.width >= 4 && coded_.stages <= 8) {
    Coded matrix = coded_;
    matrix.codes = source.codes;
    return kernels_->decode_panel(matrix, output, rows, col / coded_.width, cols, scales_.data() + output, out);
  }
  const size_t lanes = kernels_->tile_lanes;
  const size_t stride = piece() + 16;  // not a power of two: the rows of a column do not share a cache set
  std::fill(room + rows * stride, room + lanes * stride, 0.0F);
  for (size_t done = 0; done < cols; done += piece()) {
    const size_t now = std::min(piece(), cols - done);
    Rows(source, output, rows, col + done, now, room, stride);
    kernels_->transpose(room, stride, lanes, now, out + done * lanes, lanes);
  }
}

}  // namespace vqonnx
