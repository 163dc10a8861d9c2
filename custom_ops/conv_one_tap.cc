// Convolutions of one tap by tables of entries: as products of a matrix, whose rows are positions.
#include <algorithm>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kNearFloats = 131072;  // of sums that a task adds to
constexpr size_t kPieceStrips = 32;     // of outputs that it computes
constexpr size_t kTasks = 4;            // of an image, at least

}  // namespace

void Conv::RunOneTap(const Call& call, Entry entry, std::span<const std::int64_t> shape, const Grid& grid,
                     const Tasks& tasks) const {
  const Entries& entries = *entries_;
  const size_t images = static_cast<size_t>(shape[0]),
               plane = static_cast<size_t>(shape.size() == 4 ? shape[2] * shape[3] : shape[2]);
  const size_t image_cols = static_cast<size_t>(shape.back()), positions = grid.out_rows * grid.out_cols;
  const size_t lanes = entries_->lanes(entry);
  const size_t pieces = Ceil(entries.strips(), kPieceStrips), piece_strips = Ceil(entries.strips(), pieces);
  const size_t slice_floats = piece_strips * kStripRows * lanes;
  const size_t vectors = Ceil(positions, lanes),
               near = std::clamp<size_t>(2 * kNearFloats / (channels_ * lanes), 1, kNearFloats / slice_floats);
  const size_t bands = std::max(Ceil(vectors, near), std::min(vectors, Ceil(kTasks, pieces)));
  tasks.Each(images * bands * pieces, [&](size_t task) {
    const size_t piece = task % pieces, image = task / pieces / bands;
    const Part its = PartOf(vectors, bands, task / pieces % bands);
    const size_t strip = piece * piece_strips, strips = std::min(piece_strips, entries.strips() - strip);
    const size_t begin = its.begin * lanes, length = its.size * lanes, end = std::min(begin + length, positions);
    Scratch scratch(Use::kTask,
                    Scratch::Room<float>(channels_ * length) + Scratch::Room<float>(its.size * slice_floats) +
                        Entries::Tables::Bytes(entry, lanes) + Scratch::Room<std::uint8_t>(Entries::LineBytes(strips)));
    auto* x = scratch.Take<float>(channels_ * length);
    auto* sums = scratch.Take<float>(its.size * slice_floats);
    Entries::Tables tables(entries, entry, lanes, scratch);
    auto* room = scratch.Take<std::uint8_t>(Entries::LineBytes(strips));
    for (size_t c = 0; c < channels_; ++c) {
      const float* from = call.x + (image * channels_ + c) * plane;
      float* to = x + c * length;
      if (grid.direct()) {
        std::copy(from + begin, from + end, to);
      } else {
        for (size_t p = begin; p < end; ++p) {
          to[p - begin] =
              from[p / grid.out_cols * window_.stride[0] * image_cols + p % grid.out_cols * window_.stride[1]];
        }
      }
      std::fill(to + (end - begin), to + length, 0.0F);
    }
    for (size_t first = 0; first < entries.blocks(); first += Entries::kLineBlocks) {
      const size_t blocks = std::min(Entries::kLineBlocks, entries.blocks() - first);
      for (size_t stage = 0; stage < entries.stages(); ++stage) {
        const Entries::Lines lines = entries.Read(call.codes, stage, 0, first, strip, strips, room);
        for (size_t j = 0; j < its.size; ++j) {
          for (size_t i = 0; i < blocks; i += kMostEntryTables) {
            const size_t count = std::min(kMostEntryTables, blocks - i);
            tables.Build(stage, first + i, count, x + (first + i) * entries.width() * length + j * lanes, length);
            tables.Sum(lines, i, {sums + j * slice_floats, lanes, strips, first + stage + i > 0});
          }
        }
      }
    }
    const size_t output = strip * kStripRows, outputs = std::min(strips * kStripRows, weight_.outputs() - output);
    for (size_t j = 0; j < its.size; ++j) {
      const size_t place = (image * weight_.outputs() + output) * positions + begin + j * lanes;
      kernels_->finish_rows({.sums = sums + j * slice_floats,
                             .pitch = lanes,
                             .count = outputs,
                             .lanes = std::min(lanes, end - begin - j * lanes),
                             .out = call.out + place,
                             .addend = call.addend == nullptr ? nullptr : call.addend + place,
                             .stride = positions,
                             .scales = weight_.scales().data() + output,
                             .bias = call.bias + output,
                             .activation = call.activation});
    }
  });
}

}  // namespace vqonnx
