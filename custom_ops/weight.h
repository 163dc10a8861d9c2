// The coded weight of a linear layer, as a matrix of outputs by columns. Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_WEIGHT_H_
#define VQONNX_WEIGHT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "decode.h"
#include "kernels.h"
#include "tasks.h"

namespace vqonnx {

// Immutable, like Decode, which has checked the inputs.
class Weight {
 public:
  // `output_axis` is the axis of the decoded tensor that counts outputs. Throws Invalid.
  Weight(const Inputs& inputs, std::span<const std::int64_t> perm, std::size_t output_axis, const Kernels& kernels);

  // The decoded tensor's.
  const std::vector<std::int64_t>& shape() const { return shape_; }

  std::size_t outputs() const { return outputs_; }
  std::size_t depth() const { return depth_; }  // columns: all axes of the tensor but the one of the outputs

  // The axes that a column is made of, the last one running fastest: each an axis of the decoded tensor.
  const std::vector<std::size_t>& column_axes() const { return column_axes_; }

  // Whether a row of codes is an output, so that outputs can be decoded one by one. If not, `dense_size` floats are
  // needed at each run.
  bool by_output() const { return by_output_; }
  std::size_t dense_size() const { return by_output_ ? 0 : outputs_ * depth_; }

  // What a run reads: the codes, or what Expand made of them.
  struct Source {
    const std::uint8_t* codes;
    const float* dense;
  };
  void Expand(const std::uint8_t* codes, const Tasks& tasks, float* dense) const;

  // Columns of an output, from one that is a multiple of `step` on. `step` is at most kTileDepth.
  std::size_t step() const { return step_; }
  // As many of them as are taken together: a multiple of `step`.
  std::size_t piece() const { return kTileDepth / step_ * step_; }
  void Rows(const Source& source, std::size_t output, std::size_t rows, std::size_t col, std::size_t cols, float* out,
            std::size_t stride) const;

  // The same for `rows` outputs as tile_lanes columns, zeros beyond `rows`: out[col * tile_lanes + output].
  // `room` has PanelRoom() floats.
  void Panel(const Source& source, std::size_t output, std::size_t rows, std::size_t col, std::size_t cols, float* room,
             float* out) const;
  std::size_t PanelRoom() const { return kernels_->tile_lanes * (kTileDepth + 16); }

  const Coded& coded() const { return coded_; }                 // without codes
  const std::vector<float>& scales() const { return scales_; }  // one a row of codes

 private:
  const Kernels* kernels_;
  Decode decode_;
  Coded coded_;
  Tensor scales_tensor_;
  std::vector<float> scales_;
  std::vector<std::int64_t> shape_;
  std::vector<std::size_t> column_axes_;
  std::size_t outputs_ = 0, depth_ = 0, step_ = 1;
  bool by_output_ = false;
};

}  // namespace vqonnx

#endif  // VQONNX_WEIGHT_H_
