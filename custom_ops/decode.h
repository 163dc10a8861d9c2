// What `vqonnx.Decode` means (docs/format.md): checks of its inputs, and the way from rows to the transposed tensor.
// Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_DECODE_H_
#define VQONNX_DECODE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace vqonnx {

struct Inputs {
  Tensor codes, codebooks, scales, layout;
};

// The bytes of a row: where they are, or, out of a strip, brought together in `room`.
const std::uint8_t* RowOfCodes(const Coded& matrix, std::size_t stage, std::size_t row,
                               std::vector<std::uint8_t>& room);

// Inputs that have been checked, and the plan of the work. Immutable, so any number of threads may run tasks of it.
// Holds no pointer to the inputs: only sizes, and the codebooks in float32.
class Decode {
 public:
  // Throws Invalid. The codes are read to see that each is smaller than `words`.
  Decode(const Inputs& inputs, std::span<const std::int64_t> perm, const Kernels& kernels);

  const std::vector<std::int64_t>& shape() const { return shape_; }

  // The matrix behind the tensor, for those who compute with it instead.
  std::size_t cols() const { return cols_; }
  Coded View(const void* codes) const;

  // The output falls into this many parts, which can be written in any order and at the same time.
  std::size_t tasks() const { return row_blocks_ * col_blocks_; }

  // Writes one part. `codes` and `scales` are inputs like those that were checked. May throw std::bad_alloc.
  void Run(const Tensor& codes, const Tensor& scales, std::size_t task, float* out) const;

 private:
  // One loop over the matrix: `size` steps that are `from` apart there and `to` apart in the output.
  struct Axis {
    std::size_t size, from, to;
  };
  enum class Path {
    kStraight,  // the output is the matrix: rows are decoded in place
    kBlocked,   // rows end where an axis ends: a block is decoded, then its axes are walked in the order of the output
    kScattered  // anything else: each value finds its own place
  };

  template <class Code>
  void CheckCodes(const Coded& matrix,
                  void (*unpack)(const std::uint8_t*, std::size_t, std::size_t, std::size_t, Code*)) const;
  void PlanAxes(std::span<const std::int64_t> sizes, std::span<const std::int64_t> perm);
  void PlanBlocks();
  std::size_t ColumnStep(std::size_t target) const;
  std::size_t Offset(std::size_t index, std::size_t first_axis, std::size_t last_axis) const;
  void Copy(const Axis* axis, const Axis* end, const float* from, float* to) const;

  Coded matrix_ = {};  // its pointers are set by Run
  std::size_t cols_ = 0;
  std::vector<float> codebooks_;  // padded by kPad
  std::vector<std::int64_t> shape_;

  const Kernels* kernels_;
  Path path_ = Path::kStraight;
  std::vector<Axis> axes_;  // in the order of the matrix; those before `split_` make its rows
  std::size_t split_ = 0;   // kBlocked only
  std::size_t run_ = 0;     // rows that a block may share: those of the last row axis
  std::size_t block_rows_ = 0, block_cols_ = 0;
  std::size_t row_blocks_ = 0, col_blocks_ = 0;
};

}  // namespace vqonnx

#endif  // VQONNX_DECODE_H_
