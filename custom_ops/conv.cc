// Convolutions in float32: pieces of the weight are decoded next to the products that use them.
#include <algorithm>
#include <array>
#include <cstring>

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

}  // namespace

Conv::Conv(const Inputs& inputs, std::span<const std::int64_t> perm, std::span<const std::int64_t> strides,
           std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads, std::int64_t group,
           Precision precision, const Kernels& kernels)
    : kernels_(&kernels),
      weight_(inputs, perm, 0, kernels),
      window_(KernelSizes(weight_.shape()), strides, dilations, pads) {
  if (group < 1 || static_cast<size_t>(group) > weight_.outputs() || weight_.outputs() % static_cast<size_t>(group)) {
    throw Invalid("group is " + Text(group) + ", which does not divide " + Text(weight_.outputs()) + " outputs");
  }
  groups_ = static_cast<size_t>(group);
  channels_ = static_cast<size_t>(weight_.shape()[1]);
  is_depthwise_ = channels_ == 1 && groups_ == weight_.outputs() &&
                  std::is_sorted(weight_.column_axes().begin() + (weight_.column_axes()[0] == 1 ? 1 : 0),
                                 weight_.column_axes().end() - (weight_.column_axes().back() == 1 ? 1 : 0));
  if (groups_ > 1 || !HasTapsOutside()) return;
  PlanEntries(precision);
  if (precision == Precision::kExact || precision == Precision::kEntries) return;
  PlanLookup(static_cast<const std::uint8_t*>(inputs.codes.data), precision);
}

// Whether input channels run fastest, so that all taps can share what is made of some of them, and taps are in order.
bool Conv::HasTapsOutside() const {
  const std::vector<size_t>& axes = weight_.column_axes();
  if (window_.kernel[0] * window_.kernel[1] > 1 && axes.back() != 1) return false;
  for (size_t i = 0; i + 2 < axes.size(); ++i) {
    if (axes[i] > axes[i + 1]) return false;
  }
  return true;
}

std::vector<std::int64_t> Conv::OutputShape(std::span<const std::int64_t> image) const {
  return ConvOutputShape(window_, weight_.shape(), groups_, image);
}

// One image, all channels, laid out for the window.
struct Conv::Image {
  const Grid& grid;
  const float* planes;  // [groups * channels][plane]
  const std::int32_t* at;
  const Border& border;
  Weight::Source weight;
  size_t index;
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

void Conv::Run(const Call& call, std::span<const std::int64_t> shape, const Tasks& tasks) const {
  if (shape[0] == 0) return;
  const Grid grid(window_, shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1, static_cast<size_t>(shape.back()));
  if (!lookup_ || !RunLookup(call, shape, grid, tasks)) RunExact(call, shape, grid, tasks);
}

void Conv::RunExact(const Call& call, std::span<const std::int64_t> shape, const Grid& grid, const Tasks& tasks) const {
  const size_t images = static_cast<size_t>(shape[0]), channels = groups_ * channels_;
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  const size_t image_cols = static_cast<size_t>(shape.back());
  if (is_depthwise_) return RunDepthwise(call, shape, grid, tasks);
  if (groups_ == 1 && image_rows * image_cols == 1 && grid.direct() && weight_.by_output()) {
    return RunOnePosition(call, images, tasks);
  }
  if (entries_ && RunEntries(call, shape, grid, tasks)) return;
  const bool positions = PrefersPositions(grid);
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
  const bool direct = grid.direct() && (!positions || span >= kernels_->tile_lanes);
  const size_t laid = direct ? 0 : channels * grid.plane + kernels_->tile_lanes;
  Border border(grid, positions ? 0 : weight_.depth(), KeptColumns(), kernels_->tile_lanes);
  Scratch scratch(Use::kRun, Scratch::Room<float>(weight_.dense_size()) + Scratch::Room<float>(laid) +
                                 2 * Scratch::Room<std::int32_t>(weight_.depth()) + border.room());
  auto* dense = scratch.Take<float>(weight_.dense_size());
  auto* planes = scratch.Take<float>(laid);
  auto* at = scratch.Take<std::int32_t>(weight_.depth());
  if (images > 0 && weight_.dense_size() > 0) weight_.Expand(call.codes, tasks, dense);
  auto* kernel_rows = scratch.Take<std::int32_t>(weight_.depth());
  Columns(grid, at, kernel_rows);
  border.Fill(at, kernel_rows, scratch);
  for (size_t n = 0; n < images; ++n) {
    const float* x = call.x + n * channels * image_rows * image_cols;
    if (!direct) {
      const size_t parts = std::min(channels, PartsOf(channels * grid.plane, 16384, 8192, 1));
      tasks.Each(parts, [&](size_t index) {
        const Part part = PartOf(channels, parts, index);
        for (size_t c = part.begin; c < part.begin + part.size; ++c) {
          grid.Lay(*kernels_, x + c * image_rows * image_cols, planes + c * grid.plane);
        }
      });
    }
    const Image image = {grid, direct ? x : planes, at, border, {call.codes, dense}, n};
    if (positions) {
      RunPositions(call, image, tasks);
    } else {
      RunWindows(call, image, tasks);
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

// Columns of a panel that are decoded once and kept, for all positions of a task; a deeper weight is taken piece by
// piece.
size_t Conv::KeptColumns() const {
  constexpr size_t kMostBytes = 262144;
  const size_t depth = weight_.depth();
  return depth * kernels_->tile_lanes * sizeof(float) <= kMostBytes ? depth : weight_.piece();
}

// Vectors of outputs, scalars from the image: any number of positions will do.
void Conv::RunWindows(const Call& call, const Image& image, const Tasks& tasks) const {
  const Grid& grid = image.grid;
  const size_t lanes = kernels_->tile_lanes, count = kernels_->tile_count;
  const size_t outputs = weight_.outputs() / groups_;
  const size_t panels = Ceil(outputs, lanes);
  const bool whole = grid.whole();
  const size_t lines = whole ? 1 : grid.out_rows;
  const size_t line = whole ? grid.out_rows * grid.out_cols : grid.out_cols;
  const size_t line_tiles = Ceil(line, count);
  const size_t depth = weight_.depth(), piece = KeptColumns();
  const bool at_once = depth <= piece;
  // Blocks of positions come one after the other, so that a thread mostly reads what it has laid out or has read
  // before. Where there is one, few panels may be left for many threads: then its parts are shared out.
  const size_t blocks = PartsOf(lines * line, kBlockPositions, kLeastPositions, groups_ * panels);
  const size_t parts = at_once && blocks == 1 ? PartsOf(lines * line, kBlockPositions, count, groups_ * panels) : 1;
  const size_t most_tiles = Ceil(lines * line_tiles, blocks);
  const size_t out_plane = grid.out_rows * grid.out_cols;

  tasks.Share(groups_ * blocks * panels, parts, [&](size_t unit, const auto& next) {
    const size_t panel = unit % panels, block = unit / panels % blocks, group = unit / panels / blocks;
    const Part part = {panel * lanes, std::min(lanes, outputs - panel * lanes)};
    const size_t first = group * outputs + part.begin;
    const size_t tile_floats = Ceil(count, 8) * 8 * lanes;
    const size_t sums_floats = (at_once ? 1 : most_tiles) * tile_floats;
    Scratch scratch(Use::kTask, Scratch::Room<float>(weight_.PanelRoom()) + Scratch::Room<float>(piece * lanes) +
                                    Scratch::Room<float>(sums_floats) + Scratch::Room<float>(lanes));
    auto* room = scratch.Take<float>(weight_.PanelRoom());
    auto* vectors = scratch.Take<float>(piece * lanes);
    auto* sums = scratch.Take<float>(sums_floats);
    auto* bias = scratch.Take<float>(lanes);
    for (size_t i = 0; i < lanes; ++i) bias[i] = i < part.size ? call.bias[first + i] : 0.0F;
    const float* planes = image.planes + group * channels_ * grid.plane;
    const size_t out = (image.index * weight_.outputs() + first) * out_plane;

    bool decoded = false;
    for (size_t place = next(); place < parts; place = next()) {
      const Part tiles = PartOf(lines * line_tiles, blocks * parts, block * parts + place);
      for (size_t col = 0; col < depth; col += piece) {
        const size_t cols = std::min(piece, depth - col);
        if (!decoded) weight_.Panel(image.weight, first, part.size, col, cols, room, vectors);
        decoded = at_once;
        for (size_t t = 0; t < tiles.size; ++t) {
          const size_t row = (tiles.begin + t) / line_tiles;
          const Part columns = PartOf(line, line_tiles, (tiles.begin + t) % line_tiles);
          float* its_sums = sums + (at_once ? 0 : t * tile_floats);
          const Border::Columns needed = image.border.Of(row, col);
          kernels_->tile_windows({.vectors = vectors,
                                  .scalars = planes + row * grid.cols + columns.begin,
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
  });
}

// Vectors of positions, scalars from the weight: nothing is turned around, but where rows of the image are longer than
// those of the output, the values between two rows are computed for nothing.
void Conv::RunPositions(const Call& call, const Image& image, const Tasks& tasks) const {
  const Grid& grid = image.grid;
  const size_t lanes = kernels_->tile_lanes;
  const size_t outputs = weight_.outputs() / groups_;
  const size_t strips = Ceil(outputs, kernels_->tile_count);
  const size_t span = (grid.out_rows - 1) * grid.cols + grid.out_cols;
  const bool whole = grid.whole();
  const size_t tiles = Ceil(span, lanes);
  const size_t blocks = PartsOf(tiles * lanes, kBlockPositions, kLeastPositions, groups_ * strips);
  const size_t most_tiles = Ceil(tiles, blocks);
  const size_t depth = weight_.depth();
  const size_t piece = weight_.piece();
  const size_t out_plane = grid.out_rows * grid.out_cols;

  tasks.Each(groups_ * strips * blocks, [&](size_t task) {
    const size_t strip = task % strips, block = task / strips % blocks, group = task / strips / blocks;
    const Part its_tiles = PartOf(tiles, blocks, block);
    const Part part = PartOf(outputs, strips, strip);
    const size_t first = group * outputs + part.begin;
    const size_t tile_floats = part.size * lanes;
    const bool at_once = depth <= piece;
    const size_t sums_floats = (at_once ? 1 : most_tiles) * tile_floats;
    Scratch scratch(Use::kTask, Scratch::Room<float>(part.size * kTilePitch) + Scratch::Room<float>(sums_floats) +
                                    Scratch::Room<float>(part.size));
    auto* scalars = scratch.Take<float>(part.size * kTilePitch);
    auto* sums = scratch.Take<float>(sums_floats);
    auto* bias = scratch.Take<float>(part.size);
    for (size_t i = 0; i < part.size; ++i) bias[i] = call.bias[first + i];
    const float* planes = image.planes + group * channels_ * grid.plane;
    const size_t out = (image.index * weight_.outputs() + first) * out_plane;

    for (size_t col = 0; col < depth; col += piece) {
      const size_t cols = std::min(piece, depth - col);
      weight_.Rows(image.weight, first, part.size, col, cols, scalars, kTilePitch);
      for (size_t t = 0; t < its_tiles.size; ++t) {
        // The last tile may be of one vector. It is moved back so that it ends with the span, where there is that much.
        const size_t begin = (its_tiles.begin + t) * lanes;
        const size_t size = begin + kernels_->row_lanes >= span ? kernels_->row_lanes : lanes;
        const size_t skip = begin + size > span && span >= size ? begin + size - span : 0;
        const size_t position = begin - skip;
        const size_t out_row = begin / grid.cols, out_col = begin % grid.cols;
        const size_t place = out + (whole ? begin : out_row * grid.out_cols + out_col);
        float* its_sums = sums + (at_once ? 0 : t * tile_floats);
        Finish finish = {.sums = its_sums,
                         .pitch = lanes,
                         .count = part.size,
                         .lanes = std::min(size, span - begin),
                         .out = call.out + place,
                         .addend = call.addend == nullptr ? nullptr : call.addend + place,
                         .stride = out_plane,
                         .scales = nullptr,
                         .bias = bias,
                         .activation = call.activation};
        const bool is_last = col + cols == depth;
        const bool is_apart =
            skip == 0 && (whole || out_col + finish.lanes <= grid.out_cols);  // one part of the output
        const bool at_end = is_last && is_apart && !call.activation.silu;
        kernels_->tile_positions({.vectors = planes + position,
                                  .scalars = scalars,
                                  .at = image.at + col,
                                  .depth = cols,
                                  .count = part.size,
                                  .sums = its_sums,
                                  .add = col > 0,
                                  .lanes = size,
                                  .finish = at_end ? &finish : nullptr});
        if (!is_last || at_end) continue;
        // Row by row of the output, leaving out what lies between, and what the tile before has written.
        for (size_t p = begin; p < std::min(begin + lanes, span);) {
          const size_t row = p / grid.cols, column = p % grid.cols;
          const size_t end = std::min({begin + lanes, span, whole ? span : (row + 1) * grid.cols});
          if (column < grid.out_cols) {
            const size_t its_place = out + row * grid.out_cols + column;
            finish.sums = its_sums + (p - position);
            finish.lanes = whole ? end - p : std::min(end - p, grid.out_cols - column);
            finish.out = call.out + its_place;
            finish.addend = call.addend == nullptr ? nullptr : call.addend + its_place;
            kernels_->finish_rows(finish);
          }
          p = end;
        }
      }
    }
  });
}

}  // namespace vqonnx
