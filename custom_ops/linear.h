// Linear layers computed from their coded weights. Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_LINEAR_H_
#define VQONNX_LINEAR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "entries.h"
#include "kernels.h"
#include "lookup.h"
#include "precision.h"
#include "split.h"
#include "tasks.h"
#include "weight.h"
#include "window.h"

namespace vqonnx {

constexpr Activation kNoActivation = {-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity(),
                                      false};

// What one run is given. Sizes have been checked by OutputShape.
struct Call {
  const float* x = nullptr;
  const std::uint8_t* codes = nullptr;
  const float* bias = nullptr;    // one an output
  const float* addend = nullptr;  // like the output, or null
  Activation activation = kNoActivation;
  float* out = nullptr;
};

// Products of numbers that a processor with tables does in a cycle otherwise, about.
constexpr double kProductsInCycle = 29.0;

// y[n, o] = sum over k of x[n, k] * weight[o, k]
class Matrix {
 public:
  // `transposed`: the decoded tensor is [outputs, inputs] rather than [inputs, outputs]. Throws Invalid.
  Matrix(const Inputs& inputs, std::span<const std::int64_t> perm, bool transposed, Precision precision,
         const Kernels& kernels);

  std::size_t outputs() const { return weight_.outputs(); }
  std::size_t inputs() const { return weight_.depth(); }

  void Run(const Call& call, std::size_t rows, const Tasks& tasks) const;

 private:
  // Counted in products of two numbers, like all costs.
  double ExactProducts(std::size_t rows) const;
  double EntriesProducts(Entry entry, std::size_t rows) const;
  bool ByTables(std::size_t rows) const;
  void RunExact(const Call& call, std::size_t rows, const Tasks& tasks) const;
  void RunDots(const Call& call, std::size_t rows, const Tasks& tasks) const;
  void RunOneRow(const Call& call, const Tasks& tasks) const;
  void RunFewRows(const Call& call, std::size_t rows, const Tasks& tasks) const;
  void RunManyRows(const Call& call, std::size_t rows, const Tasks& tasks) const;
  struct Cut;
  void RunEntries(const Call& call, Entry entry, std::size_t rows, const Tasks& tasks) const;
  void SumTiles(const Call& call, std::size_t rows, const Cut& cut, Part tiles, std::size_t piece, std::size_t part,
                float* sums, Scratch& scratch) const;
  void FinishTile(const Call& call, std::size_t rows, const Cut& cut, std::size_t tile, std::size_t output,
                  std::size_t count, const float* sums, float* room) const;
  void FinishRow(const Call& call, std::size_t row, std::size_t output, std::size_t count, const float* sums) const;

  const Kernels* kernels_;
  Weight weight_;
  std::optional<Lookup> lookup_;
  double lookup_products_ = std::numeric_limits<double>::infinity();  // a row, about
  std::optional<Entries> entries_;
};

// A convolution of one or two axes.
class Conv {
 public:
  // The attributes are ONNX's. Throws Invalid.
  Conv(const Inputs& inputs, std::span<const std::int64_t> perm, std::span<const std::int64_t> strides,
       std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads, std::int64_t group,
       Precision precision, const Kernels& kernels);

  std::size_t outputs() const { return weight_.outputs(); }

  // Throws Invalid where an image [n, channels, size..] does not suit the layer.
  std::vector<std::int64_t> OutputShape(std::span<const std::int64_t> image) const;

  void Run(const Call& call, std::span<const std::int64_t> image, const Tasks& tasks) const;

 private:
  struct Image;
  struct Cut;
  class Planes;
  struct Room;
  class Bands;
  void Columns(const Grid& grid, std::int32_t* at, std::int32_t* kernel_rows) const;
  Cut CutPositions(const Grid& grid) const;
  Part RowsOf(const Cut& cut, const Grid& grid, std::size_t block) const;
  Part PositionsOf(const Cut& cut, std::size_t span, std::size_t tile) const;
  void RunWindows(const Call& call, const Image& image, const Cut& cut, const Tasks& tasks) const;
  void RunPositions(const Call& call, const Image& image, const Cut& cut, const Tasks& tasks) const;
  std::size_t KeptColumns() const;
  void RunOnePosition(const Call& call, std::size_t images, const Tasks& tasks) const;
  void RunDepthwise(const Call& call, std::span<const std::int64_t> image, const Grid& grid, const Tasks& tasks) const;
  bool PrefersPositions(const Grid& grid) const;
  struct Line;
  // False: it does not pay, and the output is still to be computed.
  bool RunEntries(const Call& call, std::span<const std::int64_t> image, const Grid& grid, const Tasks& tasks) const;
  Line LineOf(Entry entry, std::span<const std::int64_t> image, const Grid& grid) const;
  bool IsOneTap() const { return entries_->taps() == 1 && !window_.is_padded(); }
  double EntriesProducts(Entry entry, std::span<const std::int64_t> image, const Grid& grid) const;
  void RunLine(const Call& call, std::span<const std::int64_t> image, const Line& line, const Tasks& tasks) const;
  void RunOneTap(const Call& call, Entry entry, std::span<const std::int64_t> image, const Grid& grid,
                 const Tasks& tasks) const;
  void SumLine(const Call& call, const float* image, std::size_t plane, const Line& line, std::size_t band,
               std::size_t piece, std::size_t part, float* out) const;
  void FinishLine(const Call& call, const Line& line, std::size_t image, std::size_t first, std::size_t count,
                  const float* sums) const;
  bool HasTapsOutside() const;
  void PlanEntries(const std::uint8_t* codes, Precision precision);
  void PlanLookup(const std::uint8_t* codes, Precision precision);
  bool ByTables(std::span<const std::int64_t> image, const Grid& grid) const;
  void RunExact(const Call& call, std::span<const std::int64_t> image, const Grid& grid, const Tasks& tasks) const;
  // False: the inputs do not suit lookups, and the output is still to be computed.
  bool RunLookup(const Call& call, std::span<const std::int64_t> image, const Grid& grid, const Tasks& tasks) const;
  float SumBand(const std::uint8_t* codes, const float* image, std::size_t image_rows, std::size_t image_cols,
                const Grid& grid, const Bands& bands, std::size_t band, const Room& room) const;
  void AddPosition(const Lookup::Chunk& chunk, const Lookup::Class& tap_class, std::size_t column, const Grid& grid,
                   std::size_t out_row, std::size_t out_col, std::size_t band_rows, const Room& room) const;

  const Kernels* kernels_;
  Weight weight_;
  Window window_;
  std::size_t groups_ = 1, channels_ = 0;  // channels of one group
  bool is_depthwise_ = false;              // and its taps are in order
  std::optional<Entries> entries_;
  std::optional<Lookup> lookup_;
  double lookup_products_ = 0.0;                            // for an output position, about
  std::vector<std::array<std::size_t, 2>> tap_remainders_;  // of each tap class: those of its taps' rows and columns
  std::vector<std::array<std::size_t, 2>> set_steps_;  // of each set's tap: outputs that it lies behind the first tap
};

}  // namespace vqonnx

#endif  // VQONNX_LINEAR_H_
