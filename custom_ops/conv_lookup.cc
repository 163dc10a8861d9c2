// Convolutions by table lookup. The tables of an input position serve all taps that need them: what they yield is added
// to the outputs that lie around it.
#include <algorithm>
#include <array>

#include "linear.h"
#include "scratch.h"

namespace vqonnx {
namespace {

using std::size_t;

// Outputs whose sums stay near (in floats): a band of the image. The tables of the inputs on its border are made twice.
constexpr size_t kBandFloats = 65536;

size_t Ceil(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

void Conv::PlanLookup(const std::uint8_t* codes, Precision precision) {
  const size_t taps = window_.kernel[0] * window_.kernel[1];
  // Input channels must run fastest, and blocks of them may not cross taps.
  if (weight_.column_axes().back() != 1 && taps > 1) return;
  for (size_t i = 0; i + 2 < weight_.column_axes().size(); ++i) {
    if (weight_.column_axes()[i] > weight_.column_axes()[i + 1]) return;  // taps in another order
  }
  if (!Lookup::Possible(weight_, taps, *kernels_)) return;
  std::vector<size_t> tap_class;
  size_t classes = 0;
  std::vector<std::array<size_t, 2>> known;
  for (size_t y = 0; y < window_.kernel[0]; ++y) {
    for (size_t x = 0; x < window_.kernel[1]; ++x) {
      const std::array<size_t, 2> remainders = {y * window_.dilation[0] % window_.stride[0],
                                                x * window_.dilation[1] % window_.stride[1]};
      const auto place = std::find(known.begin(), known.end(), remainders);
      tap_class.push_back(static_cast<size_t>(place - known.begin()));
      if (place == known.end()) known.push_back(remainders);
    }
  }
  classes = known.size();
  tap_remainders_ = std::move(known);
  lookup_.emplace(weight_, codes, tap_class, *kernels_);
  if (!lookup_->Pays(precision == Precision::kFast, static_cast<double>(classes), static_cast<double>(taps))) {
    lookup_.reset();
  }
}

// The sums of some rows of the output, [row][column][padded output], from all inputs that they depend on.
void Conv::SumBand(const float* image, size_t image_rows, size_t image_cols, const Grid& grid, size_t first_row,
                   size_t band_rows, const Lookup::Room& room, float* turned, float* nowhere, float* sums) const {
  const Lookup& lookup = *lookup_;
  const size_t padded = lookup.padded_outputs(), plane = image_rows * image_cols;
  std::fill(sums, sums + band_rows * grid.out_cols * padded, 0.0F);
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
      const size_t row_class = y % window_.stride[0];
      const auto has_row = [&](const std::array<size_t, 2>& remainders) { return remainders[0] == row_class; };
      if (std::none_of(tap_remainders_.begin(), tap_remainders_.end(), has_row)) continue;
      kernels_->transpose(image + first * plane + (y - window_.begin[0]) * image_cols, plane, inputs, image_cols,
                          turned, inputs);
      for (size_t column = 0; column < image_cols; ++column) {
        const size_t x = column + window_.begin[1];
        const std::array<size_t, 2> remainders = {row_class, x % window_.stride[1]};
        const auto its_class = std::find(tap_remainders_.begin(), tap_remainders_.end(), remainders);
        if (its_class == tap_remainders_.end()) continue;
        const Lookup::Class& tap_class = lookup.tap_class(static_cast<size_t>(its_class - tap_remainders_.begin()));
        bool built = false;
        float factor = 0.0F;
        for (size_t t = tap_class.first_tile; t < tap_class.first_tile + tap_class.tiles; ++t) {
          const Lookup::Tile& tile = lookup.tiles()[t];
          float* its_sums[kMostSets];
          bool wanted = false;
          for (size_t i = 0; i < tile.sets; ++i) {
            const Lookup::Set& set = lookup.sets()[tile.first_set + i];
            const size_t up = set.tap / window_.kernel[1] * window_.dilation[0];
            const size_t left = set.tap % window_.kernel[1] * window_.dilation[1];
            const size_t out_row = (y - up) / window_.stride[0] - first_row;  // wraps around where there is none
            const size_t out_col = (x - left) / window_.stride[1];
            const bool inside =
                y >= up + first_row * window_.stride[0] && out_row < band_rows && x >= left && out_col < grid.out_cols;
            its_sums[i] = inside ? sums + (out_row * grid.out_cols + out_col) * padded + set.output : nowhere;
            wanted = wanted || inside;
          }
          if (!wanted) continue;
          if (!built) {
            factor = lookup.Build(chunk, turned + column * inputs, channels_, room);
            built = true;
          }
          lookup.Sum(chunk, tile, room, factor, its_sums, true);
        }
      }
    }
  }
}

void Conv::RunLookup(const Call& call, std::span<const std::int64_t> shape, const Grid& grid,
                     const Tasks& tasks) const {
  const Lookup& lookup = *lookup_;
  const size_t images = static_cast<size_t>(shape[0]);
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  const size_t image_cols = static_cast<size_t>(shape.back());
  const size_t padded = lookup.padded_outputs(), outputs = weight_.outputs();
  // At least two bands where there are rows for it, so that two threads have something to do.
  const size_t bands =
      std::min(grid.out_rows, std::max<size_t>(2, Ceil(grid.out_rows * grid.out_cols * padded, kBandFloats)));
  const size_t most_rows = Ceil(grid.out_rows, bands);
  const size_t sums_floats = (most_rows * grid.out_cols + 8) * padded;  // finish_across may read some rows more
  const size_t turned_floats = image_cols * lookup.chunk_floats();
  tasks.Each(images * bands, [&](size_t task) {
    const size_t image = task / bands, band = task % bands;
    const size_t first = grid.out_rows * band / bands, rows = grid.out_rows * (band + 1) / bands - first;
    LookupScratch own(lookup, sums_floats + turned_floats + kSetRows);
    float* turned = own.sums + sums_floats;
    SumBand(call.x + image * channels_ * image_rows * image_cols, image_rows, image_cols, grid, first, rows, own.room,
            turned, turned + turned_floats, own.sums);
    const size_t place = (image * outputs * grid.out_rows + first) * grid.out_cols;
    kernels_->finish_across({.sums = own.sums,
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
