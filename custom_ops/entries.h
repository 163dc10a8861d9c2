// Linear layers by tables of entries: for each block of inputs, of as many positions (rows of a matrix) as a vector has
// lanes, their products with all words of the codebook, of which each output adds up those that its codes name. A
// product is computed once for all outputs that share it. Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_ENTRIES_H_
#define VQONNX_ENTRIES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "precision.h"
#include "scratch.h"
#include "weight.h"

namespace vqonnx {

// What an entry is: in float32 products are as exact as multiplications; in 16 bits they are rounded, but more of them
// stay near.
enum class Entry { kFloat, kShort };

// A column of the weight is a tap and an input, inputs running fastest; all taps of an input share its tables.
class Entries {
 public:
  // Taps must be 1 or such that blocks do not cross them (Possible). Some of the codes are read now, and not kept.
  Entries(const Weight& weight, const std::uint8_t* codes, std::size_t taps, Precision precision,
          const Kernels& kernels);

  static bool Possible(const Weight& weight, std::size_t taps);

  // What they take, about, counted in products of two numbers, for each input position; infinite: they may not be.
  double cost(Entry entry) const { return entry == Entry::kFloat ? float_cost_ : short_cost_; }

  // Positions that tables are for: of some, and of many.
  std::size_t lanes(Entry entry, std::size_t positions) const;
  std::size_t lanes(Entry entry) const { return entry == Entry::kShort ? kernels_->short_lanes : kernels_->row_lanes; }

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

  // The tables of some blocks, in a task's scratch memory.
  class Tables {
   public:
    Tables(const Entries& entries, Entry entry, std::size_t lanes, Scratch& scratch);
    static std::size_t Bytes(Entry entry, std::size_t lanes);

    // Of `blocks` blocks, at most kMostEntryTables. `x` has the inputs from the first of them on, x_stride apart.
    void Build(std::size_t stage, std::size_t block, std::size_t blocks, const float* x, std::size_t x_stride);

    // What they have for the codes of block `first` of the lines and those that follow.
    struct Sums {
      float* sums;
      std::size_t pitch, strips;
      bool add;
    };
    void Sum(const Lines& lines, std::size_t first, const Sums& sums) const;

   private:
    const Entries& entries_;
    std::size_t lanes_, count_ = 0;
    float* floats_;
    std::int16_t* shorts_;  // one of the two is null
    float* units_;
  };

 private:
  bool MeasureWords(std::vector<double>& squares);
  void RoundWords();
  double ShortError(const std::vector<double>& squares, const std::uint8_t* codes) const;
  double Products(Entry entry) const;
  bool TakesShortBooks() const { return kernels_->takes_short_books && coded_.width <= kMostShortWidth; }

  const Kernels* kernels_;
  Coded coded_;  // without codes
  std::size_t taps_;
  std::size_t inputs_, tap_blocks_;  // of a tap
  std::vector<float> longest_;       // the greatest length of each book's words [stages, books]
  double float_cost_, short_cost_;
  std::vector<std::vector<std::int16_t>> short_books_;  // [stages * books], for kernels that want them
  std::vector<float> word_scales_;                      // [stages]
};

}  // namespace vqonnx

#endif  // VQONNX_ENTRIES_H_
