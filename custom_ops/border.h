// Columns of a convolution's weight that some rows of the output need not see: for those rows their taps lie on the
// pads above or below the image, where every value is zero.
#ifndef VQONNX_BORDER_H_
#define VQONNX_BORDER_H_

#include <cstddef>
#include <cstdint>

#include "scratch.h"
#include "split.h"
#include "window.h"

namespace vqonnx {

// For rows at the border of the image, the columns that are left, piece by piece of the weight's columns. Rows beyond
// the first few kinds are taken for rows of the inside: that costs time and no more.
class Border {
 public:
  // `columns` of the weight, `piece` at a time, of vectors of `lanes`.
  Border(const Grid& grid, std::size_t columns, std::size_t piece, std::size_t lanes);

  // Bytes that Fill takes from a scratch.
  std::size_t room() const;

  // `at`: where each column finds its values in the image; `kernel_rows`: its row of the kernel. Both stay the
  // caller's.
  void Fill(const std::int32_t* at, const std::int32_t* kernel_rows, Scratch& scratch);

  struct Columns {
    const std::int32_t* from;  // where the vectors of each are in the piece; null: one after the other
    const std::int32_t* at;
    std::size_t count;
  };
  // What an output row takes of the piece that begins at column `begin`. After Fill.
  Columns Of(std::size_t out_row, std::size_t begin) const;

  // Which share of the products is left, over all rows of the output: 0 to 1.
  static double Share(const Grid& grid);

 private:
  static constexpr std::size_t kMostKinds = 8;
  struct Kind {
    Part rows;  // of the kernel
    std::int32_t *from, *at, *begins;
  };
  const Kind* KindOf(std::size_t out_row) const;

  const Grid& grid_;
  std::size_t columns_, piece_, lanes_;
  const std::int32_t* at_ = nullptr;
  Kind kinds_[kMostKinds];
  std::size_t count_ = 0;
};

}  // namespace vqonnx

#endif  // VQONNX_BORDER_H_
