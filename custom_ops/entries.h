// Linear layers by tables of entries: for each block of inputs, of as many positions (rows of a matrix) as a vector has
// lanes, their products with all words of the codebook, of which each output adds up those that its codes name. Exact
// as float32 is: a product is computed once for all outputs that share it. Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_ENTRIES_H_
#define VQONNX_ENTRIES_H_

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "weight.h"

namespace vqonnx {

// A column of the weight is a tap and an input, inputs running fastest; all taps of an input share its tables.
class Entries {
 public:
  // Taps must be 1 or such that blocks do not cross them (Possible).
  Entries(const Weight& weight, std::size_t taps, const Kernels& kernels);

  static bool Possible(const Weight& weight, std::size_t taps);

  // What they would take, about, counted in products of two numbers, for a layer that for each output position makes
  // the tables of so many input positions and looks up so many taps.
  static double Products(const Weight& weight, std::size_t taps, double positions, double lookups);

  std::size_t lanes(std::size_t positions) const {
    return positions <= kernels_->few_row_lanes ? kernels_->few_row_lanes : kernels_->row_lanes;
  }
  std::size_t strips() const { return (coded_.rows + kStripRows - 1) / kStripRows; }
  std::size_t taps() const { return taps_; }
  std::size_t blocks() const { return tap_blocks_; }  // of a tap
  std::size_t width() const { return coded_.width; }
  std::size_t stages() const { return coded_.stages; }

  // The codes of up to kLineBlocks blocks, from one that is a multiple of that on: one line a strip and block: lines of
  // blocks follow each other, strips are `strip_bytes` apart.
  static constexpr std::size_t kLineBlocks = 64;
  struct Lines {
    const std::uint8_t* first;
    std::size_t strip_bytes;
  };
  // Of `strips` strips from `strip` on: where they are stored, or brought together in `room`, which has room for
  // LineBytes(strips).
  Lines Read(const std::uint8_t* codes, std::size_t stage, std::size_t tap, std::size_t block, std::size_t strip,
             std::size_t strips, std::uint8_t* room) const;
  static std::size_t LineBytes(std::size_t strips) { return strips * kLineBlocks * kStripRows; }

  static std::size_t TableFloats(std::size_t lanes) { return kMostEntryTables * kTableWords * lanes; }

  // The tables of some blocks, at most kMostEntryTables. `x` has the inputs from the first of them on, x_stride apart.
  void Build(std::size_t stage, std::size_t block, std::size_t blocks, const float* x, std::size_t x_stride,
             std::size_t lanes, float* tables) const;

  // What these tables have for the codes of block `first` of the lines and those that follow.
  struct Sums {
    float* sums;
    std::size_t pitch, strips;
    bool add;
  };
  void Sum(const Lines& lines, std::size_t first, std::size_t blocks, const float* tables, std::size_t lanes,
           const Sums& sums) const;

 private:
  const Kernels* kernels_;
  Coded coded_;  // without codes
  std::size_t taps_;
  std::size_t inputs_, tap_blocks_;  // of a tap
};

}  // namespace vqonnx

#endif  // VQONNX_ENTRIES_H_
