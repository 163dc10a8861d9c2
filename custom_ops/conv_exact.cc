// Exact convolutions: pieces of the weight are decoded next to the products that use them, and each thread lays out
// what it needs of the image, so that nothing is read that another thread has just written.
#include <algorithm>
#include <array>
#include <limits>

#include "border.h"
#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

// Positions that share a decoded piece of the weight: enough to make the decoding cheap, few enough for their sums to
// stay near. All outputs of a block come one after the other, so that its part of the image stays near as well.
constexpr size_t kBlockPositions = 1024, kLeastPositions = 128;

constexpr size_t kNone = std::numeric_limits<size_t>::max();

}  // namespace

// How the positions of an image are cut: into tiles, and tiles into blocks, which may have parts.
struct Conv::Cut {
  bool positions;     // vectors of positions, else of outputs
  size_t line_tiles;  // of vectors of outputs: so many tiles a row of the output, or of all of it, if `line` is all
  size_t line;
  size_t tiles, blocks, parts;
  size_t band_rows;  // of the output, that a block takes at most
  size_t piece;      // columns of the weight that are decoded at once

  Part Tiles(size_t block, size_t part) const { return PartOf(tiles, blocks * parts, block * parts + part); }
};

// One image, and how its values are found.
struct Conv::Image {
  const Grid& grid;
  const Grid& band;  // of as many rows as a block takes; `grid` itself where the image is read where it is
  const float* x;    // [groups * channels][plane of the image]
  size_t x_plane, index;
  bool direct;
  Weight::Source weight;
};

// What one thread has before it of an image.
class Conv::Planes {
 public:
  Planes(const Image& image, size_t channels, const Kernels& kernels)
      : image_(image), channels_(channels), kernels_(kernels) {}

  // Floats that a worker keeps.
  size_t room() const {
    if (image_.direct) return 0;
    return channels_ * image_.band.plane + kernels_.tile_lanes + (image_.band.cols - image_.band.out_cols);
  }

  // The planes of a group for a block, in `room`, whose first row of the output is `row`.
  void Take(size_t group, size_t row, float* room) {
    const float* from = image_.x + group * channels_ * image_.x_plane;
    if (image_.direct) {
      planes_ = from;
      return;
    }
    if (group == group_ && row == row_) return;
    group_ = group;
    row_ = row;
    planes_ = room;
    for (size_t c = 0; c < channels_; ++c) {
      image_.band.Lay(kernels_, from + c * image_.x_plane, row, room + c * image_.band.plane);
    }
  }

  // What lies at a column of a row of the output, which the block has.
  const float* At(size_t row, size_t col) const {
    return planes_ + (image_.direct ? row : row - row_) * image_.band.cols + col;
  }

 private:
  const Image& image_;
  size_t channels_;
  const Kernels& kernels_;
  const float* planes_ = nullptr;
  size_t group_ = kNone, row_ = kNone;
};

// Where each column of the weight finds its values in the planes of its group, and its row of the kernel.
void Conv::Columns(const Grid& grid, std::int32_t* at, std::int32_t* kernel_rows) const {
  struct Axis {
    size_t size, channel, tap, row;
  };
  std::array<Axis, 3> axes = {{{1, 0, 0, 0}, {1, 0, 0, 0}, {1, 0, 0, 0}}};
  const std::vector<std::int64_t>& shape = weight_.shape();
  for (size_t i = 0; i < weight_.column_axes().size(); ++i) {
    const size_t axis = weight_.column_axes()[i];
    const size_t tap = axis == 1 ? 0 : axis + 1 == shape.size() ? 1 : window_.kernel[1];
    const size_t row = axis == 2 && shape.size() == 4 ? 1 : 0;
    axes[i] = {static_cast<size_t>(shape[axis]), axis == 1 ? size_t{1} : 0, tap, row};
  }
  for (size_t a = 0; a < axes[0].size; ++a) {
    for (size_t b = 0; b < axes[1].size; ++b) {
      const size_t channel = a * axes[0].channel + b * axes[1].channel;
      const size_t tap = a * axes[0].tap + b * axes[1].tap;
      const size_t row = a * axes[0].row + b * axes[1].row;
      for (size_t c = 0; c < axes[2].size; ++c) {
        *at++ =
            static_cast<std::int32_t>((channel + c * axes[2].channel) * grid.plane + grid.taps[tap + c * axes[2].tap]);
        *kernel_rows++ = static_cast<std::int32_t>(row + c * axes[2].row);
      }
    }
  }
}

// Columns of a panel that are decoded once and kept, for all positions of a task; a deeper weight is taken piece by
// piece.
size_t Conv::KeptColumns() const {
  constexpr size_t kMostBytes = 262144;
  const size_t depth = weight_.depth();
  return depth * kernels_->tile_lanes * sizeof(float) <= kMostBytes ? depth : weight_.piece();
}

Conv::Cut Conv::CutPositions(const Grid& grid) const {
  const size_t lanes = kernels_->tile_lanes, count = kernels_->tile_count;
  const size_t outputs = weight_.outputs() / groups_;
  Cut cut = {};
  cut.positions = PrefersPositions(grid);
  if (cut.positions) {
    const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
    cut.tiles = Ceil(span, lanes);
    cut.blocks = PartsOf(cut.tiles * lanes, kBlockPositions, kLeastPositions, groups_ * Ceil(outputs, count));
    cut.parts = 1;
    cut.piece = weight_.piece();
  } else {
    const size_t lines = grid.whole() ? 1 : grid.out_rows;
    cut.line = grid.whole() ? grid.out_rows * grid.out_cols : grid.out_cols;
    cut.line_tiles = Ceil(cut.line, count);
    cut.tiles = lines * cut.line_tiles;
    cut.piece = KeptColumns();
    // Where there is one block, few panels may be left for many threads: then its parts are shared out.
    const size_t panels = groups_ * Ceil(outputs, lanes);
    cut.blocks = PartsOf(lines * cut.line, kBlockPositions, kLeastPositions, panels);
    const bool shared = cut.blocks == 1 && weight_.depth() <= cut.piece;
    cut.parts = shared ? PartsOf(lines * cut.line, kBlockPositions, count, panels) : 1;
  }
  for (size_t block = 0; block < cut.blocks; ++block) {
    cut.band_rows = std::max(cut.band_rows, RowsOf(cut, grid, block).size);
  }
  return cut;
}

// Which rows of the output a block takes.
Part Conv::RowsOf(const Cut& cut, const Grid& grid, size_t block) const {
  const Part tiles = PartOf(cut.tiles, cut.blocks, block);
  size_t first, last;  // positions
  if (cut.positions) {
    const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
    first = tiles.begin * kernels_->tile_lanes / grid.cols;  // a tile that is moved back has others before it
    last = (std::min(span, (tiles.begin + tiles.size) * kernels_->tile_lanes) - 1) / grid.cols;
  } else if (grid.whole()) {
    const Part end = PartOf(cut.line, cut.line_tiles, tiles.begin + tiles.size - 1);
    first = PartOf(cut.line, cut.line_tiles, tiles.begin).begin / grid.out_cols;
    last = (end.begin + end.size - 1) / grid.out_cols;
  } else {
    first = tiles.begin / cut.line_tiles;
    last = (tiles.begin + tiles.size - 1) / cut.line_tiles;
  }
  return {first, last + 1 - first};
}

// The positions of a vector tile, of rows as long as those of the grid. The last tile may be of one vector, and is
// moved back so that it ends with the span, where there is that much.
Part Conv::PositionsOf(const Cut& cut, size_t span, size_t tile) const {
  const size_t begin = tile * kernels_->tile_lanes;
  if (tile + 1 < cut.tiles) return {begin, kernels_->tile_lanes};
  const size_t size = begin + kernels_->row_lanes >= span ? kernels_->row_lanes : kernels_->tile_lanes;
  return {span >= size ? span - size : begin, size};
}

void Conv::RunExact(const Call& call, std::span<const std::int64_t> shape, const Grid& grid, const Tasks& tasks) const {
  const size_t images = static_cast<size_t>(shape[0]), channels = groups_ * channels_;
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  const size_t image_plane = image_rows * static_cast<size_t>(shape.back());
  if (is_depthwise_) return RunDepthwise(call, shape, grid, tasks);
  if (groups_ == 1 && image_plane == 1 && grid.direct() && weight_.by_output()) {
    return RunOnePosition(call, images, tasks);
  }
  if (entries_ && RunEntries(call, shape, grid, tasks)) return;
  const Cut cut = CutPositions(grid);
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
  const bool direct = grid.direct() && (!cut.positions || span >= kernels_->tile_lanes);
  const Grid band = grid.WithRows(direct ? grid.rows : cut.band_rows + grid.rows - grid.out_rows);
  Scratch scratch(Use::kRun, Scratch::Room<float>(weight_.dense_size()));
  auto* dense = scratch.Take<float>(weight_.dense_size());
  if (weight_.dense_size() > 0) weight_.Expand(call.codes, tasks, dense);
  for (size_t n = 0; n < images; ++n) {
    const Image image = {.grid = grid,
                         .band = band,
                         .x = call.x + n * channels * image_plane,
                         .x_plane = image_plane,
                         .index = n,
                         .direct = direct,
                         .weight = {call.codes, dense}};
    if (cut.positions) {
      RunPositions(call, image, cut, tasks);
    } else {
      RunWindows(call, image, cut, tasks);
    }
  }
}

// Which of the two needs fewer steps: a step multiplies all lanes of a tile's row, used or not.
bool Conv::PrefersPositions(const Grid& grid) const {
  const size_t lanes = kernels_->tile_lanes, count = kernels_->tile_count;
  const size_t outputs = weight_.outputs() / groups_;
  const auto steps = [&](size_t length) {  // rows of tiles: a low tile waits for its own sums
    const size_t tiles = Ceil(length, count);
    return static_cast<double>(std::max(length, tiles * std::min<size_t>(4, count)));
  };
  const auto depth = static_cast<double>(weight_.depth());
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
  const size_t lines = grid.whole() ? 1 : grid.out_rows;
  const size_t line = grid.whole() ? span : grid.out_cols;
  const double needed = depth * Border::Share(grid);
  // The last terms: turning the sums around, and decoding for vectors.
  const double turn = 2.0 * static_cast<double>(lanes * 8) / 32;
  const double windows =
      static_cast<double>(Ceil(outputs, lanes)) *
      (static_cast<double>(lines) * (steps(line) * needed + turn * static_cast<double>(Ceil(line, count)) * 8) +
       static_cast<double>(lanes) * 0.3 * depth);
  const size_t rest = span % lanes;
  const double vectors = static_cast<double>(span / lanes) + (rest == 0                     ? 0.0
                                                              : rest <= kernels_->row_lanes ? 0.55
                                                                                            : 1.0);
  const double positions = vectors * (steps(outputs) * depth + 2 * static_cast<double>(outputs));
  return positions < windows;
}

// Vectors of outputs, scalars from the image: any number of positions will do.
void Conv::RunWindows(const Call& call, const Image& image, const Cut& cut, const Tasks& tasks) const {
  const Grid& grid = image.grid;
  const size_t lanes = kernels_->tile_lanes;
  const size_t outputs = weight_.outputs() / groups_;
  const size_t panels = Ceil(outputs, lanes);
  const size_t depth = weight_.depth();
  const bool at_once = depth <= cut.piece;
  const size_t most_tiles = Ceil(cut.tiles, cut.blocks);
  const size_t tile_floats = Ceil(kernels_->tile_count, 8) * 8 * lanes;
  const size_t sums_floats = (at_once ? 1 : most_tiles) * tile_floats;
  const size_t out_plane = grid.out_rows * grid.out_cols;

  // Panels of a block come one after the other: a thread lays it out once.
  tasks.Share(groups_ * cut.blocks * panels, cut.parts, [&](Shares& shares) {
    Planes planes(image, channels_, *kernels_);
    Border border(grid, depth, cut.piece, lanes);
    Scratch scratch(Use::kTask, Scratch::Room<float>(weight_.PanelRoom()) + Scratch::Room<float>(cut.piece * lanes) +
                                    Scratch::Room<float>(sums_floats) + Scratch::Room<float>(lanes) +
                                    Scratch::Room<float>(planes.room()) + 2 * Scratch::Room<std::int32_t>(depth) +
                                    border.room());
    auto* room = scratch.Take<float>(weight_.PanelRoom());
    auto* vectors = scratch.Take<float>(cut.piece * lanes);
    auto* sums = scratch.Take<float>(sums_floats);
    auto* bias = scratch.Take<float>(lanes);
    auto* laid = scratch.Take<float>(planes.room());
    auto* at = scratch.Take<std::int32_t>(depth);
    auto* kernel_rows = scratch.Take<std::int32_t>(depth);
    Columns(image.band, at, kernel_rows);
    border.Fill(at, kernel_rows, scratch);

    for (size_t unit; shares.Next(unit);) {
      const size_t panel = unit % panels, block = unit / panels % cut.blocks, group = unit / panels / cut.blocks;
      const Part part = {panel * lanes, std::min(lanes, outputs - panel * lanes)};
      const size_t first = group * outputs + part.begin;
      for (size_t i = 0; i < lanes; ++i) bias[i] = i < part.size ? call.bias[first + i] : 0.0F;
      const size_t out = (image.index * weight_.outputs() + first) * out_plane;
      bool decoded = false;
      for (size_t place; shares.NextPart(unit, place);) {
        planes.Take(group, RowsOf(cut, grid, block).begin, laid);
        const Part tiles = cut.Tiles(block, place);
        for (size_t col = 0; col < depth; col += cut.piece) {
          const size_t cols = std::min(cut.piece, depth - col);
          if (!decoded) weight_.Panel(image.weight, first, part.size, col, cols, room, vectors);
          decoded = at_once;
          for (size_t t = 0; t < tiles.size; ++t) {
            const size_t row = (tiles.begin + t) / cut.line_tiles;
            const Part columns = PartOf(cut.line, cut.line_tiles, (tiles.begin + t) % cut.line_tiles);
            float* its_sums = sums + (at_once ? 0 : t * tile_floats);
            const Border::Columns needed = border.Of(row, col);
            kernels_->tile_windows({.vectors = vectors,
                                    .scalars = planes.At(row, columns.begin),
                                    .at = needed.at,
                                    .depth = needed.count,
                                    .count = columns.size,
                                    .sums = its_sums,
                                    .add = col > 0,
                                    .from = needed.from});
            if (col + cols < depth) continue;
            const size_t to = out + row * grid.out_cols + columns.begin;
            kernels_->finish_across({.sums = its_sums,
                                     .pitch = lanes,
                                     .count = columns.size,
                                     .lanes = part.size,
                                     .out = call.out + to,
                                     .addend = call.addend == nullptr ? nullptr : call.addend + to,
                                     .stride = out_plane,
                                     .scales = nullptr,
                                     .bias = bias,
                                     .activation = call.activation});
          }
        }
      }
    }
  });
}

// Vectors of positions, scalars from the weight: nothing is turned around, but where rows of the image are longer than
// those of the output, the values between two rows are computed for nothing.
void Conv::RunPositions(const Call& call, const Image& image, const Cut& cut, const Tasks& tasks) const {
  const Grid& grid = image.grid;
  const size_t lanes = kernels_->tile_lanes;
  const size_t outputs = weight_.outputs() / groups_;
  const size_t strips = Ceil(outputs, kernels_->tile_count);
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
  const bool whole = grid.whole();
  const size_t depth = weight_.depth();
  const bool at_once = depth <= cut.piece;
  const size_t most_strip = Ceil(outputs, strips);
  const size_t sums_floats = (at_once ? 1 : Ceil(cut.tiles, cut.blocks)) * most_strip * lanes;
  const size_t out_plane = grid.out_rows * grid.out_cols;

  tasks.Share(groups_ * cut.blocks * strips, cut.parts, [&](Shares& shares) {
    Planes planes(image, channels_, *kernels_);
    Scratch scratch(Use::kTask, Scratch::Room<float>(most_strip * kTilePitch) + Scratch::Room<float>(sums_floats) +
                                    Scratch::Room<float>(most_strip) + Scratch::Room<float>(planes.room()) +
                                    2 * Scratch::Room<std::int32_t>(depth));
    auto* scalars = scratch.Take<float>(most_strip * kTilePitch);
    auto* sums = scratch.Take<float>(sums_floats);
    auto* bias = scratch.Take<float>(most_strip);
    auto* laid = scratch.Take<float>(planes.room());
    auto* at = scratch.Take<std::int32_t>(depth);
    Columns(image.band, at, scratch.Take<std::int32_t>(depth));

    for (size_t unit, place; shares.Next(unit);) {
      if (!shares.NextPart(unit, place)) continue;
      const size_t strip = unit % strips, block = unit / strips % cut.blocks, group = unit / strips / cut.blocks;
      const Part tiles = cut.Tiles(block, place);
      const Part part = PartOf(outputs, strips, strip);
      const size_t first = group * outputs + part.begin;
      const size_t tile_floats = part.size * lanes;
      for (size_t i = 0; i < part.size; ++i) bias[i] = call.bias[first + i];
      planes.Take(group, RowsOf(cut, grid, block).begin, laid);
      const size_t out = (image.index * weight_.outputs() + first) * out_plane;

      for (size_t col = 0; col < depth; col += cut.piece) {
        const size_t cols = std::min(cut.piece, depth - col);
        weight_.Rows(image.weight, first, part.size, col, cols, scalars, kTilePitch);
        for (size_t t = 0; t < tiles.size; ++t) {
          const size_t begin = (tiles.begin + t) * lanes;
          const Part positions = PositionsOf(cut, span, tiles.begin + t);
          const size_t out_row = begin / grid.cols, out_col = begin % grid.cols;
          const size_t to = out + (whole ? begin : out_row * grid.out_cols + out_col);
          float* its_sums = sums + (at_once ? 0 : t * tile_floats);
          Finish finish = {.sums = its_sums,
                           .pitch = lanes,
                           .count = part.size,
                           .lanes = std::min(positions.size, span - begin),
                           .out = call.out + to,
                           .addend = call.addend == nullptr ? nullptr : call.addend + to,
                           .stride = out_plane,
                           .scales = nullptr,
                           .bias = bias,
                           .activation = call.activation};
          const bool is_last = col + cols == depth;
          // What comes to one place of the output, one after the other, is finished in registers.
          const bool is_one = positions.begin == begin && (whole || out_col + finish.lanes <= grid.out_cols);
          const bool at_end = is_last && is_one && !call.activation.silu;
          kernels_->tile_positions({.vectors = planes.At(positions.begin / grid.cols, positions.begin % grid.cols),
                                    .scalars = scalars,
                                    .at = at + col,
                                    .depth = cols,
                                    .count = part.size,
                                    .sums = its_sums,
                                    .add = col > 0,
                                    .lanes = positions.size,
                                    .finish = at_end ? &finish : nullptr});
          if (!is_last || at_end) continue;
          // Row by row of the output, leaving out what lies between, and what the tile before has written.
          const size_t last = std::min(begin + positions.size, span);
          for (size_t p = begin; p < last;) {
            const size_t row = p / grid.cols, column = p % grid.cols;
            const size_t end = whole ? last : std::min(last, (row + 1) * grid.cols);
            if (column < grid.out_cols) {
              const size_t its_place = out + row * grid.out_cols + column;
              finish.sums = its_sums + (p - positions.begin);
              finish.lanes = whole ? end - p : std::min(end - p, grid.out_cols - column);
              finish.out = call.out + its_place;
              finish.addend = call.addend == nullptr ? nullptr : call.addend + its_place;
              kernels_->finish_rows(finish);
            }
            p = end;
          }
        }
      }
    }
  });
}

}  // namespace vqonnx
