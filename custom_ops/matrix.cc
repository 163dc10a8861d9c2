// Products with a coded matrix in float32.
#include <algorithm>
#include <cmath>
#include <limits>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kBlockRows = 1024;  // rows of x that share a decoded piece of the weight

constexpr size_t kFewRows = 8;  // that share each chunk of codes while it is near, whoever has it
constexpr size_t kDotOutputs = 64;
constexpr size_t kTableOutputs = 512;  // where a task makes tables of products; half of it if there are few outputs

}  // namespace

Matrix::Matrix(const Inputs& inputs, std::span<const std::int64_t> perm, bool transposed, Precision precision,
               const Kernels& kernels)
    : kernels_(&kernels), weight_(inputs, perm, transposed ? 0 : 1, kernels) {
  if (weight_.shape().size() != 2) throw Invalid("the weight is " + Text(weight_.shape()) + "; it must have 2 axes");
  if (Entries::Possible(weight_, 1)) {
    entries_.emplace(weight_, static_cast<const std::uint8_t*>(inputs.codes.data), 1, precision, kernels);
  }
  if (precision == Precision::kExact || precision == Precision::kEntries || precision == Precision::kShorts) return;
  if (!Lookup::Possible(weight_, 1, kernels)) return;
  const bool always = precision == Precision::kTables;
  lookup_products_ = always ? 0.0 : Lookup::Cycles(weight_, 1, 1.0, 1.0) * kProductsInCycle;
  if (!ByTables(1) && !ByTables(kFewRows + 1)) return;
  lookup_.emplace(weight_, static_cast<const std::uint8_t*>(inputs.codes.data), std::vector<size_t>{0}, kernels);
  if (!always && !lookup_->Allowed(precision == Precision::kFast)) lookup_.reset();
}

// What the kernels that multiply would take. Up to kMostDots rows are multiplied by words where these stand.
double Matrix::ExactProducts(size_t rows) const {
  constexpr double kFewWordsCode = 0.15, kCode = 0.6;  // cycles that a dot product takes for each code
  const Coded& m = weight_.coded();
  const auto outputs = static_cast<double>(weight_.outputs()), depth = static_cast<double>(weight_.depth());
  const double codes = outputs * std::ceil(depth / static_cast<double>(m.width)) * static_cast<double>(m.stages);
  if (rows > kMostDots || !weight_.by_output()) return static_cast<double>(rows) * outputs * depth;
  return static_cast<double>(rows) * codes * (kernels_->dot_has_tables(m) ? kFewWordsCode : kCode) * kProductsInCycle;
}

// What tables of entries would take: for all lanes, used or not.
double Matrix::EntriesProducts(Entry entry, size_t rows) const {
  if (!entries_) return std::numeric_limits<double>::infinity();
  const size_t lanes = entries_->lanes(entry, rows);
  return entries_->cost(entry) * static_cast<double>(Ceil(rows, lanes) * lanes);
}

// Against vectors of many lanes: on some processors those of few take as long.
bool Matrix::ByTables(size_t rows) const {
  const size_t many = std::max(rows, kernels_->few_row_lanes + 1);
  const double entries = std::min(EntriesProducts(Entry::kFloat, many), EntriesProducts(Entry::kShort, many));
  return static_cast<double>(rows) * lookup_products_ < std::min(ExactProducts(rows), entries);
}

void Matrix::Run(const Call& call, size_t rows, const Tasks& tasks) const {
  const auto can_round = [&] { return CanRound(kernels_->largest(call.x, rows * weight_.depth())); };
  if (lookup_ && ByTables(rows) && can_round()) {
    if (rows == 1 && lookup_->in_strips()) return RunOneRow(call, tasks);
    return rows <= kFewRows ? RunFewRows(call, rows, tasks) : RunManyRows(call, rows, tasks);
  }
  const double exact = ExactProducts(rows), floats = EntriesProducts(Entry::kFloat, rows);
  if (EntriesProducts(Entry::kShort, rows) < std::min(exact, floats) && can_round()) {
    return RunEntries(call, Entry::kShort, rows, tasks);
  }
  floats < exact ? RunEntries(call, Entry::kFloat, rows, tasks) : RunExact(call, rows, tasks);
}

void Matrix::FinishRow(const Call& call, size_t row, size_t output, size_t count, const float* sums) const {
  const size_t place = row * weight_.outputs() + output;
  kernels_->finish_columns({.sums = sums,
                            .pitch = 0,
                            .count = 1,
                            .lanes = count,
                            .out = call.out + place,
                            .addend = call.addend == nullptr ? nullptr : call.addend + place,
                            .stride = 0,
                            .scales = weight_.scales().data() + output,
                            .bias = call.bias + output,
                            .activation = call.activation});
}

// Words are multiplied where they stand.
void Matrix::RunDots(const Call& call, size_t rows, const Tasks& tasks) const {
  Coded matrix = weight_.coded();
  matrix.codes = call.codes;
  const size_t table_outputs = outputs() < 4 * kTableOutputs ? kTableOutputs / 2 : kTableOutputs;
  const size_t most = kernels_->dot_has_tables(weight_.coded()) ? table_outputs : kDotOutputs;
  tasks.Each(Ceil(outputs(), most), [&](size_t task) {
    const size_t first = task * most, count = std::min(most, outputs() - first);
    alignas(64) float sums[kMostDots * kTableOutputs];
    kernels_->dot({.matrix = matrix,
                   .row = first,
                   .rows = count,
                   .cols = weight_.depth(),
                   .x = call.x,
                   .x_stride = weight_.depth(),
                   .batch = rows,
                   .out = sums,
                   .out_stride = most});
    for (size_t row = 0; row < rows; ++row) FinishRow(call, row, first, count, sums + row * most);
  });
}

void Matrix::RunExact(const Call& call, size_t rows, const Tasks& tasks) const {
  if (rows == 0) return;
  if (rows <= kMostDots && weight_.by_output()) return RunDots(call, rows, tasks);
  const size_t lanes = kernels_->tile_lanes;
  const size_t depth = weight_.depth(), outputs = weight_.outputs();
  const size_t tiles = Ceil(rows, kernels_->tile_count), count = Ceil(rows, tiles), panels = Ceil(outputs, lanes);
  // x as tiles of columns of `count` neighbouring values; rows beyond the last hold anything.
  Scratch scratch(Use::kRun, Scratch::Room<float>(weight_.dense_size()) + Scratch::Room<float>(tiles * count * depth) +
                                 Scratch::Room<std::int32_t>(kTileDepth));
  auto* dense = scratch.Take<float>(weight_.dense_size());
  auto* turned = scratch.Take<float>(tiles * count * depth);
  auto* at = scratch.Take<std::int32_t>(kTileDepth);
  if (weight_.dense_size() > 0) weight_.Expand(call.codes, tasks, dense);
  for (size_t k = 0; k < kTileDepth; ++k) at[k] = static_cast<std::int32_t>(k * count);
  tasks.Each(tiles, [&](size_t tile) {
    const size_t height = std::min(count, rows - tile * count);
    kernels_->transpose(call.x + tile * count * depth, depth, height, depth, turned + tile * count * depth, count);
  });

  const Weight::Source source = {call.codes, dense};
  const size_t blocks = Ceil(rows, kBlockRows);
  const size_t piece = weight_.piece();
  const size_t tile_floats = count * lanes;
  const size_t most_tiles = Ceil(tiles, blocks);
  tasks.Each(panels * blocks, [&](size_t task) {
    const size_t panel = task / blocks, first = panel * lanes;
    const size_t begin = tiles * (task % blocks) / blocks, end = tiles * (task % blocks + 1) / blocks;
    const size_t its_outputs = std::min(lanes, outputs - first);
    Scratch own(Use::kTask, Scratch::Room<float>(weight_.PanelRoom()) + Scratch::Room<float>(piece * lanes) +
                                Scratch::Room<float>(most_tiles * tile_floats) + Scratch::Room<float>(lanes));
    auto* room = own.Take<float>(weight_.PanelRoom());
    auto* vectors = own.Take<float>(piece * lanes);
    auto* sums = own.Take<float>(most_tiles * tile_floats);
    auto* bias = own.Take<float>(lanes);
    for (size_t i = 0; i < lanes; ++i) bias[i] = i < its_outputs ? call.bias[first + i] : 0.0F;
    for (size_t col = 0; col < depth; col += piece) {
      const size_t cols = std::min(piece, depth - col);
      weight_.Panel(source, first, its_outputs, col, cols, room, vectors);
      for (size_t tile = begin; tile < end; ++tile) {
        const size_t height = std::min(count, rows - tile * count);
        float* its_sums = sums + (tile - begin) * tile_floats;
        kernels_->tile_windows({.vectors = vectors,
                                .scalars = turned + (tile * depth + col) * count,
                                .at = at,
                                .depth = cols,
                                .count = height,
                                .sums = its_sums,
                                .add = col > 0});
        if (col + cols < depth) continue;
        const size_t place = tile * count * outputs + first;
        kernels_->finish_columns({.sums = its_sums,
                                  .pitch = lanes,
                                  .count = height,
                                  .lanes = its_outputs,
                                  .out = call.out + place,
                                  .addend = call.addend == nullptr ? nullptr : call.addend + place,
                                  .stride = outputs,
                                  .scales = nullptr,
                                  .bias = bias,
                                  .activation = call.activation});
      }
    }
  });
}

}  // namespace vqonnx
