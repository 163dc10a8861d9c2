// Convolutions by table lookup. The tables of an input position serve all taps that need them: what they yield is added
// to the outputs that lie around it.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

// Outputs whose sums stay near (in floats): those of a band of the image.
constexpr size_t kBandFloats = 131072;
// Rows of a band where there are enough for more than two bands: where bands meet, some outputs are added up twice.
// Images of a batch beyond which one band each will do.
constexpr size_t kBandRows = 16, kMostBands = 4, kManyImages = 8;

}  // namespace

// How the rows of an image are dealt out. Each row of the inputs, counted with the pads, is in one band. The outputs of
// a band are those that it adds to; where two bands meet, the last rows of the one are the first of the other, and take
// from both. It depends on sizes alone, so that results do not depend on the number of threads.
class Conv::Bands {
 public:
  Bands(const Window& window, size_t image_rows, size_t out_rows, size_t count)
      : window_(window), image_rows_(image_rows), out_rows_(out_rows), count_(std::min(count, image_rows)) {
    while (count_ > 2 && !Apart()) --count_;
  }

  size_t count() const { return count_; }
  size_t InBegin(size_t band) const { return window_.begin[0] + image_rows_ * band / count_; }
  size_t InEnd(size_t band) const { return InBegin(band + 1); }
  size_t OutBegin(size_t band) const {
    const size_t reach = (window_.kernel[0] - 1) * window_.dilation[0], first = InBegin(band);
    return band == 0 || first <= reach ? 0 : std::min(out_rows_, Ceil(first - reach, window_.stride[0]));
  }
  size_t OutEnd(size_t band) const {
    return band + 1 == count_ ? out_rows_ : std::min(out_rows_, Ceil(InEnd(band), window_.stride[0]));
  }

 private:
  // Whether no output takes from three bands.
  bool Apart() const {
    for (size_t band = 2; band < count_; ++band) {
      if (OutBegin(band) < OutEnd(band - 2)) return false;
    }
    return true;
  }

  const Window& window_;
  size_t image_rows_, out_rows_, count_;
};

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
  if (!Lookup::Possible(weight_, taps, *kernels_)) return;
  // Taps whose rows and columns leave the same remainders after division by the strides serve the same inputs.
  const size_t rows = window_.Remainders(0), cols = window_.Remainders(1);
  std::vector<size_t> tap_class;
  for (size_t y = 0; y < window_.kernel[0]; ++y) {
    for (size_t x = 0; x < window_.kernel[1]; ++x) {
      tap_class.push_back(y % rows * cols + x % cols);
      if (y >= rows || x >= cols) continue;
      tap_remainders_.push_back(
          {y * window_.dilation[0] % window_.stride[0], x * window_.dilation[1] % window_.stride[1]});
    }
  }
  const bool always = precision == Precision::kTables;
  const auto products = static_cast<double>(weight_.outputs() * weight_.depth());
  const double cycles =
      Lookup::Cycles(weight_, taps, static_cast<double>(tap_remainders_.size()), static_cast<double>(taps));
  if (!always && cycles >= products / kProductsInCycle) return;
  lookup_products_ = always ? 0.0 : cycles * kProductsInCycle;
  lookup_.emplace(weight_, codes, tap_class, *kernels_);
  if (!always && !lookup_->Allowed(precision == Precision::kFast)) return lookup_.reset();
  for (const Lookup::Set& set : lookup_->sets()) {
    set_steps_.push_back({set.tap / window_.kernel[1] * window_.dilation[0] / window_.stride[0],
                          set.tap % window_.kernel[1] * window_.dilation[1] / window_.stride[1]});
  }
}

// What the inputs of a band add to its rows of the output, [row][column][padded output]. Returns their largest
// magnitude.
float Conv::SumBand(const std::uint8_t* codes, const float* image, size_t image_rows, size_t image_cols,
                    const Grid& grid, const Bands& bands, size_t band, const Room& room) const {
  const Lookup& lookup = *lookup_;
  const size_t padded = lookup.padded_outputs(), plane = image_rows * image_cols;
  const size_t first_row = bands.OutBegin(band), band_rows = bands.OutEnd(band) - first_row;
  float most = 0.0F;
  std::fill(room.sums, room.sums + band_rows * grid.out_cols * padded, 0.0F);
  for (size_t index = 0; index < lookup.chunks(); ++index) {
    const Lookup::Chunk chunk = lookup.At(index, codes);
    const size_t first = chunk.first_block * lookup.width();
    const size_t inputs = std::min(chunk.blocks * lookup.width(), channels_ - first);
    for (size_t y = bands.InBegin(band); y < bands.InEnd(band); ++y) {
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
          const Lookup::Rounded rounded = lookup.Round(chunk, room.turned + column * inputs, channels_,
                                                       room.rounded + column * lookup.chunk_values());
          room.factors[column] = rounded.factor;
          most = std::max(most, rounded.most);
        }
        for (size_t column = skip; column < image_cols; column += stride) {
          const size_t out_row = y / window_.stride[0], out_col = (column + window_.begin[1]) / stride;
          AddPosition(chunk, lookup.tap_class(c), column, grid, out_row - first_row, out_col, band_rows, room);
        }
      }
    }
  }
  return most;
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
    lookup.Sum(chunk, t, room.tables, room.factors[column], its_sums, true, lookup.NextTile(chunk, t));
  }
}

bool Conv::RunLookup(const Call& call, std::span<const std::int64_t> shape, const Grid& grid,
                     const Tasks& tasks) const {
  const Lookup& lookup = *lookup_;
  const size_t images = static_cast<size_t>(shape[0]);
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  const size_t image_cols = static_cast<size_t>(shape.back());
  const size_t padded = lookup.padded_outputs(), outputs = weight_.outputs();
  const size_t row_floats = grid.out_cols * padded;
  const Bands bands(window_, image_rows, grid.out_rows,
                    std::max(images < kManyImages ? std::clamp<size_t>(image_rows / kBandRows, 2, kMostBands) : 1,
                             Ceil(grid.out_rows * row_floats, kBandFloats)));
  size_t most_rows = 0, meeting_rows = 0;
  for (size_t band = 0; band < bands.count(); ++band) {
    most_rows = std::max(most_rows, bands.OutEnd(band) - bands.OutBegin(band));
    if (band > 0) meeting_rows = std::max(meeting_rows, bands.OutEnd(band - 1) - bands.OutBegin(band));
  }
  const size_t sums_floats = most_rows * row_floats + 8 * padded;  // finish_across may read some rows more
  const size_t meeting_floats = meeting_rows * row_floats;
  const size_t values = image_cols * lookup.chunk_values();

  // Where two bands meet: what each of them adds, and how many have come. The second one adds both up.
  const size_t meetings = images * (bands.count() - 1);
  Scratch shared(Use::kRun, Scratch::Room<float>(2 * meetings * meeting_floats));
  auto* parts = shared.Take<float>(2 * meetings * meeting_floats);
  std::vector<std::atomic<int>> arrived(meetings);
  std::atomic<float> most = 0.0F;

  tasks.Each(images * bands.count(), [&](size_t task) {
    const size_t image = task / bands.count(), band = task % bands.count();
    Scratch scratch(Use::kTask, Scratch::Room<float>(sums_floats) + Scratch::Room<float>(kSetRows) +
                                    Scratch::Room<float>(values) + Scratch::Room<std::int16_t>(values) +
                                    Scratch::Room<float>(image_cols) +
                                    Scratch::Room<std::uint8_t>(lookup.table_bytes()));
    const Room room = {.sums = scratch.Take<float>(sums_floats),
                       .nowhere = scratch.Take<float>(kSetRows),
                       .turned = scratch.Take<float>(values),
                       .rounded = scratch.Take<std::int16_t>(values),
                       .factors = scratch.Take<float>(image_cols),
                       .tables = scratch.Take<std::uint8_t>(lookup.table_bytes())};
    const float its_most = SumBand(call.codes, call.x + image * channels_ * image_rows * image_cols, image_rows,
                                   image_cols, grid, bands, band, room);
    for (float seen = most; seen < its_most && !most.compare_exchange_weak(seen, its_most);) continue;
    const size_t first = bands.OutBegin(band);
    const auto finish = [&](size_t begin, size_t end) {  // rows of the output
      if (begin == end) return;
      const size_t place = (image * outputs * grid.out_rows + begin) * grid.out_cols;
      float* its_sums = room.sums + (begin - first) * row_floats;
      lookup.Sort(its_sums, (end - begin) * row_floats / kSetRows);
      kernels_->finish_across({.sums = its_sums,
                               .pitch = padded,
                               .count = (end - begin) * grid.out_cols,
                               .lanes = outputs,
                               .out = call.out + place,
                               .addend = call.addend == nullptr ? nullptr : call.addend + place,
                               .stride = grid.out_rows * grid.out_cols,
                               .scales = lookup.scales(),
                               .bias = call.bias,
                               .activation = call.activation});
    };
    const auto meet = [&](size_t upper) {  // with the band before or after this one
      const size_t begin = bands.OutBegin(upper + 1), end = bands.OutEnd(upper), floats = (end - begin) * row_floats;
      const size_t index = image * (bands.count() - 1) + upper;
      float* both = parts + 2 * index * meeting_floats;
      float* own = room.sums + (begin - first) * row_floats;
      if (floats == 0) return;
      std::memcpy(both + (band == upper ? 0 : floats), own, floats * sizeof(float));
      if (arrived[index].fetch_add(1) == 0) return;
      kernels_->add_up(both, floats, 2, floats, own);
      finish(begin, end);
    };
    const bool is_last = band + 1 == bands.count();
    finish(band == 0 ? 0 : bands.OutEnd(band - 1), is_last ? grid.out_rows : bands.OutBegin(band + 1));
    if (band > 0) meet(band - 1);
    if (!is_last) meet(band);
  });
  return CanRound(most);
}

}  // namespace vqonnx
