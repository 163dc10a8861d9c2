// Products of many rows with a coded matrix by tables of entries.
#include <algorithm>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kTasks = 4;           // at least, so that there is something for each thread
constexpr size_t kPieceStrips = 64;    // of outputs, whose sums stay near
constexpr size_t kNearFloats = 65536;  // of sums, for which codes are brought in order once
constexpr size_t kFinishStrips = 16;

}  // namespace

// How the work is cut. A tile is as many rows as a vector has lanes. It depends on sizes alone, so that results do not
// depend on the number of threads.
struct Matrix::Cut {
  Cut(const Entries& entries, Entry kind, size_t rows)
      : entry(kind),
        lanes(entries.lanes(kind, rows)),
        tiles(Ceil(rows, lanes)),
        pieces(Ceil(entries.strips(), kPieceStrips)),
        piece_strips(Ceil(entries.strips(), pieces)),
        sums_floats(piece_strips * kStripRows * lanes),
        batches(Ceil(tiles, std::max<size_t>(1, kNearFloats / sums_floats))),
        batch(Ceil(tiles, batches)),
        parts(std::clamp<size_t>(Ceil(kTasks, batches * pieces), 1, Ceil(entries.blocks(), Entries::kLineBlocks))) {}

  Entry entry;
  size_t lanes, tiles;
  size_t pieces, piece_strips;  // of outputs
  size_t sums_floats;           // of a tile and piece
  size_t batches, batch;        // of tiles that a task takes together: most in one
  size_t parts;                 // of the inputs
};

// A batch of tiles, one piece of the outputs and one part of the inputs: sums [tile][output][lane].
void Matrix::SumTiles(const Call& call, size_t rows, const Cut& cut, Part tiles, size_t piece, size_t part, float* sums,
                      Scratch& scratch) const {
  const Entries& entries = *entries_;
  const size_t depth = weight_.depth(), lanes = cut.lanes, width = entries.width();
  const size_t strip = piece * cut.piece_strips, strips = std::min(cut.piece_strips, entries.strips() - strip);
  auto* turned = scratch.Take<float>(Entries::kLineBlocks * width * lanes);
  Entries::Tables tables(entries, cut.entry, lanes, scratch);
  auto* room = scratch.Take<std::uint8_t>(Entries::LineBytes(strips));
  const Part chunks = PartOf(Ceil(entries.blocks(), Entries::kLineBlocks), cut.parts, part);
  for (size_t chunk = chunks.begin; chunk < chunks.begin + chunks.size; ++chunk) {
    const size_t block = chunk * Entries::kLineBlocks,
                 blocks = std::min(Entries::kLineBlocks, entries.blocks() - block);
    const size_t col = block * width, cols = std::min(blocks * width, depth - col);
    for (size_t stage = 0; stage < entries.stages(); ++stage) {
      const Entries::Lines lines = entries.Read(call.codes, stage, 0, block, strip, strips, room);
      for (size_t t = 0; t < tiles.size; ++t) {
        const size_t row = (tiles.begin + t) * lanes, its_rows = std::min(lanes, rows - row);
        if (its_rows < lanes) std::fill_n(turned, cols * lanes, 0.0F);
        kernels_->transpose(call.x + row * depth + col, depth, its_rows, cols, turned, lanes);
        for (size_t i = 0; i < blocks; i += kMostEntryTables) {
          const size_t count = std::min(kMostEntryTables, blocks - i);
          tables.Build(stage, block + i, count, turned + i * width * lanes, lanes);
          const bool add = chunk > chunks.begin || stage > 0 || i > 0;
          tables.Sum(lines, i, {sums + t * cut.sums_floats, lanes, strips, add});
        }
      }
    }
  }
}

// Sums [output][lane] of the outputs from `output` on, to rows of the output. `room` has as many floats.
void Matrix::FinishTile(const Call& call, size_t rows, const Cut& cut, size_t tile, size_t output, size_t count,
                        const float* sums, float* room) const {
  const size_t first = tile * cut.lanes;
  kernels_->transpose(sums, cut.lanes, count, cut.lanes, room, count);
  for (size_t i = 0; i < std::min(cut.lanes, rows - first); ++i) {
    FinishRow(call, first + i, output, count, room + i * count);
  }
}

void Matrix::RunEntries(const Call& call, Entry entry, size_t rows, const Tasks& tasks) const {
  if (rows == 0) return;
  const Entries& entries = *entries_;
  const Cut cut(entries, entry, rows);
  const size_t piece_outputs = cut.piece_strips * kStripRows;
  const size_t task_bytes = Scratch::Room<float>(Entries::kLineBlocks * entries.width() * cut.lanes) +
                            Entries::Tables::Bytes(entry, cut.lanes) +
                            Scratch::Room<std::uint8_t>(Entries::LineBytes(cut.piece_strips));
  const size_t batch_floats = cut.batch * cut.sums_floats;
  if (cut.parts == 1) {
    tasks.Each(cut.batches * cut.pieces, [&](size_t task) {
      const Part its = PartOf(cut.tiles, cut.batches, task / cut.pieces);
      const size_t piece = task % cut.pieces;
      Scratch scratch(Use::kTask,
                      task_bytes + Scratch::Room<float>(batch_floats) + Scratch::Room<float>(cut.sums_floats));
      auto* sums = scratch.Take<float>(batch_floats);
      auto* room = scratch.Take<float>(cut.sums_floats);
      SumTiles(call, rows, cut, its, piece, 0, sums, scratch);
      const size_t output = piece * piece_outputs, count = std::min(piece_outputs, outputs() - output);
      for (size_t t = 0; t < its.size; ++t) {
        FinishTile(call, rows, cut, its.begin + t, output, count, sums + t * cut.sums_floats, room);
      }
    });
    return;
  }
  Scratch all(Use::kRun, Scratch::Room<float>(cut.batches * cut.pieces * cut.parts * batch_floats));
  auto* sums = all.Take<float>(cut.batches * cut.pieces * cut.parts * batch_floats);
  tasks.Each(cut.batches * cut.pieces * cut.parts, [&](size_t task) {
    const size_t part = task % cut.parts, piece = task / cut.parts % cut.pieces;
    const Part its = PartOf(cut.tiles, cut.batches, task / cut.parts / cut.pieces);
    Scratch scratch(Use::kTask, task_bytes);
    SumTiles(call, rows, cut, its, piece, part, sums + task * batch_floats, scratch);
  });
  const size_t finishes = Ceil(cut.piece_strips, kFinishStrips);
  tasks.Each(cut.batches * cut.pieces * finishes, [&](size_t task) {
    const size_t piece = task / finishes % cut.pieces, skip = task % finishes * kFinishStrips * kStripRows;
    const Part its = PartOf(cut.tiles, cut.batches, task / finishes / cut.pieces);
    const size_t output = piece * piece_outputs + skip, end = std::min((piece + 1) * piece_outputs, outputs());
    if (output >= end) return;
    const size_t count = std::min(end - output, kFinishStrips * kStripRows), floats = count * cut.lanes;
    Scratch scratch(Use::kTask, 2 * Scratch::Room<float>(floats));
    auto* total = scratch.Take<float>(floats);
    auto* room = scratch.Take<float>(floats);
    for (size_t t = 0; t < its.size; ++t) {
      kernels_->add_up(sums + task / finishes * cut.parts * batch_floats + t * cut.sums_floats + skip * cut.lanes,
                       batch_floats, cut.parts, floats, total);
      FinishTile(call, rows, cut, its.begin + t, output, count, total, room);
    }
  });
}

}  // namespace vqonnx
