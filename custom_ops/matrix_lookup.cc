// Products with a coded matrix by tables of products.
#include <algorithm>

#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kMostBytes = 262144;  // of tables that are made at once: so that they stay in the second cache
constexpr size_t kParts = 8;           // of the inputs: a fixed number, so that sums never depend on threads
constexpr size_t kPieceRows = 4;       // that a task takes where there are many
constexpr size_t kPieceOutputs = 1024;

// What a task needs for lookups, and `floats` more.
struct Room {
  Room(const Lookup& lookup, size_t floats)
      : scratch(Use::kTask, Scratch::Room<std::uint8_t>(lookup.table_bytes()) +
                                Scratch::Room<std::int16_t>(lookup.chunk_values()) + Scratch::Room<float>(floats)),
        tables(scratch.Take<std::uint8_t>(lookup.table_bytes())),
        rounded(scratch.Take<std::int16_t>(lookup.chunk_values())),
        sums(scratch.Take<float>(floats)) {}
  Scratch scratch;
  std::uint8_t* tables;
  std::int16_t* rounded;
  float* sums;
};

void SumRow(const Lookup& lookup, const Lookup::Chunk& chunk, const float* x, size_t inputs, const Room& room,
            float* sums, bool add) {
  const float factor = lookup.Round(chunk, x + chunk.first_block * lookup.width(), inputs, room.rounded).factor;
  lookup.Build(chunk, room.rounded, room.tables);
  for (size_t index = 0; index < lookup.tiles().size(); ++index) {
    const Lookup::Tile& tile = lookup.tiles()[index];
    float* its_sums[kMostSets];
    for (size_t i = 0; i < tile.sets; ++i) its_sums[i] = sums + lookup.sets()[tile.first_set + i].output;
    lookup.Sum(chunk, index, room.tables, factor, its_sums, add, lookup.NextTile(chunk, index));
  }
}

}  // namespace

// One row: tables first, of as many inputs as will do, and then all of their codes of one tile of outputs after the
// other. So codes come from memory in the order in which they are stored. Each thread has tables of its own.
void Matrix::RunOneRow(const Call& call, const Tasks& tasks) const {
  const Lookup& lookup = *lookup_;
  const size_t at_once = std::max<size_t>(1, kMostBytes / lookup.table_bytes());
  const size_t parts = Ceil(lookup.chunks(), at_once);
  Scratch scratch(Use::kRun, Scratch::Room<float>(lookup.padded_outputs()));
  auto* sums = scratch.Take<float>(lookup.padded_outputs());
  for (size_t part = 0; part < parts; ++part) {
    const Part chunks = PartOf(lookup.chunks(), parts, part);
    tasks.Share(lookup.tiles().size(), 1, [&](Shares& shares) {
      size_t index, only;
      const auto next_tile = [&] {
        while (shares.Next(index)) {
          if (shares.NextPart(index, only)) return true;
        }
        return false;
      };
      if (!next_tile()) return;
      Scratch own(Use::kTask, Scratch::Room<std::uint8_t>(chunks.size * lookup.table_bytes()) +
                                  Scratch::Room<float>(chunks.size) +
                                  Scratch::Room<std::int16_t>(lookup.chunk_values()));
      auto* tables = own.Take<std::uint8_t>(chunks.size * lookup.table_bytes());
      auto* factors = own.Take<float>(chunks.size);
      auto* rounded = own.Take<std::int16_t>(lookup.chunk_values());
      for (size_t i = 0; i < chunks.size; ++i) {
        const Lookup::Chunk chunk = lookup.At(chunks.begin + i, call.codes);
        const float* x = call.x + chunk.first_block * lookup.width();
        lookup.Fetch(chunk, index);
        factors[i] = lookup.Round(chunk, x, weight_.depth(), rounded).factor;
        lookup.Build(chunk, rounded, tables + i * lookup.table_bytes());
      }
      do {
        const Lookup::Tile& tile = lookup.tiles()[index];
        const size_t output = lookup.sets()[tile.first_set].output, later = (index + 1) % lookup.tiles().size();
        float* its_sums[kMostSets];
        for (size_t i = 0; i < tile.sets; ++i) its_sums[i] = sums + lookup.sets()[tile.first_set + i].output;
        for (size_t i = 0; i < chunks.size; ++i) {
          const Lookup::Chunk chunk = lookup.At(chunks.begin + i, call.codes);
          const Lookup::Next next = i + 1 < chunks.size
                                        ? Lookup::Next{index, chunk.first_block + chunk.blocks}
                                        : Lookup::Next{later, lookup.At(chunks.begin, call.codes).first_block};
          lookup.Sum(chunk, index, tables + i * lookup.table_bytes(), factors[i], its_sums, part + i > 0, next);
        }
        if (part + 1 < parts) continue;
        lookup.Sort(sums + output, tile.sets);
        FinishRow(call, 0, output, std::min(tile.sets * kSetRows, weight_.outputs() - output), sums + output);
      } while (next_tile());
    });
  }
}

// The chunks of inputs are dealt out, each part of them to sums of its own, which are added up at last.
void Matrix::RunFewRows(const Call& call, size_t rows, const Tasks& tasks) const {
  if (rows == 0) return;
  const Lookup& lookup = *lookup_;
  const size_t depth = weight_.depth(), outputs = weight_.outputs(), padded = lookup.padded_outputs();
  const size_t parts = std::min(lookup.chunks(), kParts);
  Scratch scratch(Use::kRun, Scratch::Room<float>(parts * rows * padded));
  auto* sums = scratch.Take<float>(parts * rows * padded);
  tasks.Each(parts, [&](size_t part) {
    const Room own(lookup, 0);
    const size_t begin = lookup.chunks() * part / parts, end = lookup.chunks() * (part + 1) / parts;
    for (size_t index = begin; index < end; ++index) {
      const Lookup::Chunk chunk = lookup.At(index, call.codes);
      for (size_t row = 0; row < rows; ++row) {
        SumRow(lookup, chunk, call.x + row * depth, depth, own, sums + (part * rows + row) * padded, index > begin);
      }
    }
  });
  const size_t pieces = Ceil(outputs, kPieceOutputs);
  tasks.Each(rows * pieces, [&](size_t task) {
    const size_t row = task / pieces, first = task % pieces * kPieceOutputs;
    const size_t count = std::min(kPieceOutputs, outputs - first);
    alignas(64) float total[kPieceOutputs];
    kernels_->add_up(sums + row * padded + first, rows * padded, parts, count, total);
    lookup.Sort(total, count / kSetRows);
    FinishRow(call, row, first, count, total);
  });
}

// Rows are dealt out. Each chunk of codes is read again for each row of a piece, but from a near cache.
void Matrix::RunManyRows(const Call& call, size_t rows, const Tasks& tasks) const {
  const Lookup& lookup = *lookup_;
  const size_t depth = weight_.depth(), padded = lookup.padded_outputs();
  tasks.Each(Ceil(rows, kPieceRows), [&](size_t piece) {
    const size_t first = piece * kPieceRows, count = std::min(kPieceRows, rows - first);
    const Room own(lookup, count * padded);
    for (size_t index = 0; index < lookup.chunks(); ++index) {
      const Lookup::Chunk chunk = lookup.At(index, call.codes);
      for (size_t row = 0; row < count; ++row) {
        SumRow(lookup, chunk, call.x + (first + row) * depth, depth, own, own.sums + row * padded, index > 0);
      }
    }
    lookup.Sort(own.sums, count * padded / kSetRows);
    for (size_t row = 0; row < count; ++row) {
      FinishRow(call, first + row, 0, weight_.outputs(), own.sums + row * padded);
    }
  });
}

}  // namespace vqonnx
