// Convolutions by table lookup. The tables of an input position serve all taps that need them: what they yield is added
// to the outputs that lie around it.
#include <algorithm>
#include <array>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

// Outputs whose sums stay near (in floats): a band of the image. The tables of the inputs on its border are made twice.
constexpr size_t kBandFloats = 131072;

}  // namespace

// What a band needs.
struct Conv::Room {
  float* sums;            // [band's rows][columns][padded output]
  float* nowhere;         // sums that nobody wants
  float* turned;          // a row of the image: [column][inputs of a chunk]
  std::int16_t* rounded;  // the same
  float* factors;         // [column]
  std::uint8_t* tables;
};

void Conv::PlanLookup(const std::uint8_t* codes, Precision precision) {
  const size_t taps = window_.kernel[0] * window_.kernel[1];
  // Input channels must run fastest, and blocks of them may not cross taps.
  if (weight_.column_axes().back() != 1 && taps > 1) return;
  for (size_t i = 0; i + 2 < weight_.column_axes().size(); ++i) {
    if (weight_.column_axes()[i] > weight_.column_axes()[i + 1]) return;  // taps in another order
  }
  if (!Lookup::Possible(weight_, taps, *kernels_)) return;
  // Taps whose rows and columns leave the same remainders after division by the strides serve the same inputs.
  std::vector<size_t> tap_class;
  for (size_t y = 0; y < window_.kernel[0]; ++y) {
    for (size_t x = 0; x < window_.kernel[1]; ++x) {
      const std::array<size_t, 2> remainders = {y * window_.dilation[0] % window_.stride[0],
                                                x * window_.dilation[1] % window_.stride[1]};
      const auto place = std::find(tap_remainders_.begin(), tap_remainders_.end(), remainders);
      tap_class.push_back(static_cast<size_t>(place - tap_remainders_.begin()));
      if (place == tap_remainders_.end()) tap_remainders_.push_back(remainders);
    }
  }
  lookup_.emplace(weight_, codes, tap_class, *kernels_);
  if (precision != Precision::kTables &&
      !lookup_->Pays(precision == Precision::kFast, static_cast<double>(tap_remainders_.size()),
                     static_cast<double>(taps))) {
    lookup_.reset();
    return;
  }
  for (const Lookup::Set& set : lookup_->sets()) {
    set_steps_.push_back({set.tap / window_.kernel[1] * window_.dilation[0] / window_.stride[0],
                          set.tap % window_.kernel[1] * window_.dilation[1] / window_.stride[1]});
  }
}

// The sums of some rows of the output, [row][column][padded output], from all inputs that they depend on.
void Conv::SumBand(const float* image, size_t image_rows, size_t image_cols, const Grid& grid, size_t first_row,
                   size_t band_rows, const Room& room) const {
  const Lookup& lookup = *lookup_;
  const size_t padded = lookup.padded_outputs(), plane = image_rows * image_cols;
  std::fill(room.sums, room.sums + band_rows * grid.out_cols * padded, 0.0F);
  // Input rows, counted with the pads.
  const size_t begin = std::max(window_.begin[0], first_row * window_.stride[0]);
  const size_t reach = (window_.kernel[0] - 1) * window_.dilation[0];
  const size_t end =
      std::min(window_.begin[0] + image_rows, (first_row + band_rows - 1) * window_.stride[0] + reach + 1);
  for (size_t index = 0; index < lookup.chunks(); ++index) {
    const Lookup::Chunk chunk = lookup.At(index);
    const size_t first = chunk.first_block * lookup.width();
    const size_t inputs = std::min(chunk.blocks * lookup.width(), channels_ - first);
    for (size_t y = begin; y < end; ++y) {
      const float* row = image + first * plane + (y - window_.begin[0]) * image_cols;
      bool is_turned = false;
      for (size_t c = 0; c < tap_remainders_.size(); ++c) {
        const auto [row_remainder, col_remainder] = tap_remainders_[c];
        if (y % window_.stride[0] != row_remainder) continue;
        if (!is_turned) kernels_->transpose(row, plane, inputs, image_cols, room.turned, inputs);
        is_turned = true;
        // Columns with the class's remainder, counted with the pads. All are rounded first: each waits for its scale.
        const size_t stride = window_.stride[1];
        const size_t skip = (col_remainder + stride - window_.begin[1] % stride) % stride;
        for (size_t column = skip; column < image_cols; column += stride) {
          room.factors[column] = lookup.Round(chunk, room.turned + column * inputs, channels_,
                                              room.rounded + column * lookup.chunk_values());
        }
        for (size_t column = skip; column < image_cols; column += stride) {
          const size_t out_row = y / window_.stride[0], out_col = (column + window_.begin[1]) / stride;
          AddPosition(chunk, lookup.tap_class(c), column, grid, out_row - first_row, out_col, band_rows, room);
        }
      }
    }
  }
}

// What one input yields is added to the outputs that take it: the one at this row and column through the first tap, and
// those a few steps before through others. Rows and columns may lie outside of the band, before it by wrapping around.
void Conv::AddPosition(const Lookup::Chunk& chunk, const Lookup::Class& tap_class, size_t column, const Grid& grid,
                       size_t out_row, size_t out_col, size_t band_rows, const Room& room) const {
  const Lookup& lookup = *lookup_;
  bool is_built = false;
  for (size_t t = tap_class.first_tile; t < tap_class.first_tile + tap_class.tiles; ++t) {
    const Lookup::Tile& tile = lookup.tiles()[t];
    float* its_sums[kMostSets];
    bool wanted = false;
    for (size_t i = 0; i < tile.sets; ++i) {
      const auto [up, left] = set_steps_[tile.first_set + i];
      const bool inside = out_row - up < band_rows && out_col - left < grid.out_cols;
      its_sums[i] = inside ? room.sums + ((out_row - up) * grid.out_cols + out_col - left) * lookup.padded_outputs() +
                                 lookup.sets()[tile.first_set + i].output
                           : room.nowhere;
      wanted = wanted || inside;
    }
    if (!wanted) continue;
    if (!is_built) lookup.Build(chunk, room.rounded + column * lookup.chunk_values(), room.tables);
    is_built = true;
    lookup.Sum(chunk, tile, room.tables, room.factors[column], its_sums, true);
  }
}

void Conv::RunLookup(const Call& call, std::span<const std::int64_t> shape, const Grid& grid,
                     const Tasks& tasks) const {
  const Lookup& lookup = *lookup_;
  const size_t images = static_cast<size_t>(shape[0]);
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  const size_t image_cols = static_cast<size_t>(shape.back());
  const size_t padded = lookup.padded_outputs(), outputs = weight_.outputs();
  // At least two bands where there are rows for it, if there are two threads.
  const size_t bands =
      std::min(grid.out_rows,
               std::max<size_t>(tasks.Alone() ? 1 : 2, Ceil(grid.out_rows * grid.out_cols * padded, kBandFloats)));
  const size_t most_rows = Ceil(grid.out_rows, bands);
  const size_t sums_floats = (most_rows * grid.out_cols + 8) * padded;  // finish_across may read some rows more
  const size_t values = image_cols * lookup.chunk_values();
  tasks.Each(images * bands, [&](size_t task) {
    const size_t image = task / bands, band = task % bands;
    const size_t first = grid.out_rows * band / bands, rows = grid.out_rows * (band + 1) / bands - first;
    Scratch scratch(Use::kTask, Scratch::Room<float>(sums_floats) + Scratch::Room<float>(kSetRows) +
                                    Scratch::Room<float>(values) + Scratch::Room<std::int16_t>(values) +
                                    Scratch::Room<float>(image_cols) +
                                    Scratch::Room<std::uint8_t>(Lookup::TableBytes()));
    const Room room = {.sums = scratch.Take<float>(sums_floats),
                       .nowhere = scratch.Take<float>(kSetRows),
                       .turned = scratch.Take<float>(values),
                       .rounded = scratch.Take<std::int16_t>(values),
                       .factors = scratch.Take<float>(image_cols),
                       .tables = scratch.Take<std::uint8_t>(Lookup::TableBytes())};
    SumBand(call.x + image * channels_ * image_rows * image_cols, image_rows, image_cols, grid, first, rows, room);
    const size_t place = (image * outputs * grid.out_rows + first) * grid.out_cols;
    kernels_->finish_across({.sums = room.sums,
                             .pitch = padded,
                             .count = rows * grid.out_cols,
                             .lanes = outputs,
                             .out = call.out + place,
                             .addend = call.addend == nullptr ? nullptr : call.addend + place,
                             .stride = grid.out_rows * grid.out_cols,
                             .scales = lookup.scales(),
                             .bias = call.bias,
                             .low = call.low,
                             .high = call.high});
  });
}

}  // namespace vqonnx
