#include "entries.h"

#include <algorithm>

#include "split.h"

namespace vqonnx {

using std::size_t;

Entries::Entries(const Weight& weight, size_t taps, const Kernels& kernels)
    : kernels_(&kernels),
      coded_(weight.coded()),
      taps_(taps),
      inputs_(weight.depth() / taps),
      tap_blocks_(Ceil(inputs_, weight.coded().width)) {}

bool Entries::Possible(const Weight& weight, size_t taps) {
  const Coded& m = weight.coded();
  if (!weight.by_output() || m.bits > 8) return false;
  const size_t inputs = weight.depth() / taps;
  if (taps == 1) return true;
  const size_t blocks = inputs / m.width;
  return inputs % m.width == 0 && blocks % m.books == 0 && (m.bits == 8 || blocks % kOctet == 0);
}

double Entries::Products(const Weight& weight, size_t taps, double positions, double lookups) {
  // Products are counted in multiplications with a whole vector, of which a processor does two in a cycle; a lookup is
  // a load, an addition, and a bit of reading codes and sums. How codes are stored is left out, so that the same
  // kernels compute a layer by rows and in strips.
  constexpr double kLookup = 1.85;
  const Coded& m = weight.coded();
  const auto outputs = static_cast<double>(Ceil(weight.outputs(), kStripRows) * kStripRows);
  const auto words = static_cast<double>(m.words), width = static_cast<double>(m.width);
  const auto blocks = static_cast<double>(m.stages * Ceil(weight.depth() / taps, m.width));
  return blocks * (positions * words * width + lookups * outputs * kLookup);
}

Entries::Lines Entries::Read(const std::uint8_t* codes, size_t stage, size_t tap, size_t block, size_t strip,
                             size_t strips, std::uint8_t* room) const {
  Coded m = coded_;
  m.codes = codes;
  const size_t group = tap * tap_blocks_ + block, strip_bytes = kStripRows * m.row_bytes;
  if (m.lanes > 1 && m.bits == 8) {
    return {codes + (stage * m.rows / kStripRows + strip) * strip_bytes + group * kStripRows, strip_bytes};
  }
  const size_t count = std::min(kLineBlocks, tap_blocks_ - block);
  for (size_t i = 0; i < strips; ++i) {
    kernels_->code_lines(m, stage, (strip + i) * kStripRows, group, count, room + i * LineBytes(1));
  }
  return {room, LineBytes(1)};
}

void Entries::Build(size_t stage, size_t block, size_t blocks, const float* x, size_t x_stride, size_t lanes,
                    float* tables) const {
  const Coded& m = coded_;
  for (size_t i = 0; i < blocks; ++i) {
    kernels_->build_entries({.x = x + i * m.width * x_stride,
                             .x_stride = x_stride,
                             .book = m.codebooks + (stage * m.books + (block + i) % m.books) * m.words * m.width,
                             .words = m.words,
                             .width = m.width,
                             .cols = std::min(m.width, inputs_ - (block + i) * m.width),
                             .lanes = lanes,
                             .entries = tables + i * kTableWords * lanes});
  }
}

void Entries::Sum(const Lines& lines, size_t first, size_t blocks, const float* tables, size_t lanes,
                  const Sums& sums) const {
  const std::uint8_t* codes[kMostEntryTables];
  for (size_t i = 0; i < blocks; ++i) codes[i] = lines.first + (first + i) * kStripRows;
  kernels_->sum_entries({.codes = codes,
                         .strips = sums.strips,
                         .strip_bytes = lines.strip_bytes,
                         .entries = tables,
                         .tables = blocks,
                         .lanes = lanes,
                         .sums = sums.sums,
                         .pitch = sums.pitch,
                         .add = sums.add});
}

}  // namespace vqonnx
