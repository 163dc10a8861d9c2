#include "entries.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "split.h"

namespace vqonnx {

using std::size_t;

namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Lengths of words for which no step of the way leaves float32.
constexpr double kHugeWord = 1e10, kTinyWord = 1e-10;

}  // namespace

Entries::Entries(const Weight& weight, const std::uint8_t* codes, size_t taps, Precision precision,
                 const Kernels& kernels)
    : kernels_(&kernels),
      coded_(weight.coded()),
      taps_(taps),
      inputs_(weight.depth() / taps),
      tap_blocks_(Ceil(inputs_, weight.coded().width)),
      float_cost_(precision == Precision::kEntries ? 0.0 : Products(Entry::kFloat)),
      short_cost_(kInfinite) {
  const bool any_error = precision == Precision::kFast || precision == Precision::kShorts;
  std::vector<double> squares;
  if ((precision != Precision::kAuto && !any_error) || !MeasureWords(squares)) return;
  if (any_error || ShortError(squares, codes) <= kMostError) short_cost_ = Products(Entry::kShort);
  if (precision == Precision::kShorts) short_cost_ = 0.0;
  if (short_cost_ < kInfinite && TakesShortBooks()) RoundWords();
}

// The squares of the lengths of all words [stages, books, words], and the longest words. False: they are not such that
// there can be entries of 16 bits.
bool Entries::MeasureWords(std::vector<double>& squares) {
  const Coded& m = coded_;
  const size_t books = m.stages * m.books;
  squares.assign(books * m.words, 0.0);
  for (size_t i = 0; i < squares.size() * m.width; ++i) {
    squares[i / m.width] += double{m.codebooks[i]} * double{m.codebooks[i]};
  }
  double most = 0.0;
  for (size_t book = 0; book < books; ++book) {
    double square = 0.0;
    for (size_t word = 0; word < m.words; ++word) {
      const double its = squares[book * m.words + word];
      if (!(its < kHugeWord * kHugeWord)) return false;
      square = std::max(square, its);
    }
    most = std::max(most, square);
    longest_.push_back(static_cast<float>(std::max(std::sqrt(square) * 1.0001, kTinyWord)));
  }
  return most > kTinyWord * kTinyWord;
}

// Words in 16 bits, each stage with a scale of its own. Books end with room for as many words as are multiplied at
// once.
void Entries::RoundWords() {
  constexpr size_t kMoreWords = 3;
  const Coded& m = coded_;
  const size_t even = Ceil(m.width, 2) * 2, stage_values = m.books * m.words * m.width;
  for (size_t stage = 0; stage < m.stages; ++stage) {
    const float* values = m.codebooks + stage * stage_values;
    float most = static_cast<float>(kTinyWord);
    for (size_t i = 0; i < stage_values; ++i) most = std::max(most, std::fabs(values[i]));
    word_scales_.push_back(32767.0F / most);
    for (size_t book = 0; book < m.books; ++book) {
      std::vector<std::int16_t>& words = short_books_.emplace_back((m.words + kMoreWords) * even);
      for (size_t i = 0; i < m.words * m.width; ++i) {
        const float value = values[book * m.words * m.width + i] * word_scales_.back();
        words[i / m.width * even + i % m.width] = static_cast<std::int16_t>(std::nearbyint(value));
      }
    }
  }
}

// The relative error of a layer that is to be expected of inputs that are alike: an entry is off by 0.33 of its unit
// (by 0.29 where x and words are not rounded themselves). A unit is that of two blocks of x together, which are
// some 1.1 times as long as most. It is compared with the entries of words as some of the rows use them.
double Entries::ShortError(const std::vector<double>& squares, const std::uint8_t* codes) const {
  constexpr size_t kSampledRows = 64;
  Coded m = coded_;
  m.codes = codes;
  const size_t groups = taps_ * tap_blocks_, step = Ceil(m.rows, kSampledRows);
  std::vector<std::uint8_t> row(Ceil(groups, kOctet) * kOctet), room;
  double used = 0.0, count = 0.0, longest = 0.0;
  for (const float length : longest_) longest += double{length} * length / static_cast<double>(longest_.size());
  for (size_t stage = 0; stage < m.stages; ++stage) {
    for (size_t r = 0; r < m.rows; r += step) {
      kernels_->unpack(RowOfCodes(m, stage, r, room), m.row_bytes, m.bits, groups, row.data());
      for (size_t group = 0; group < groups; ++group) {
        used += squares[(stage * m.books + group % tap_blocks_ % m.books) * m.words + row[group]];
      }
      count += static_cast<double>(groups);
    }
  }
  const double usual = std::sqrt(used / std::max(count, 1.0) / static_cast<double>(m.width));
  return usual > 0.0 ? 0.33 * 2.2 * std::sqrt(longest) / usual / double{kShortSum} : kInfinite;
}

bool Entries::Possible(const Weight& weight, size_t taps) {
  const Coded& m = weight.coded();
  if (!weight.by_output() || m.bits > 8) return false;
  const size_t inputs = weight.depth() / taps;
  if (taps == 1) return true;
  const size_t blocks = inputs / m.width;
  return inputs % m.width == 0 && blocks % m.books == 0 && (m.bits == 8 || blocks % kOctet == 0);
}

// For an input position: words for a table, and lookups of all taps.
double Entries::Products(Entry entry) const {
  // Products are counted in multiplications with a whole vector, of which a processor does two in
  // a cycle; a lookup is a load, an addition, and a bit of reading codes and sums. How codes are
  // stored is left out, so that the same kernels compute a layer by rows and in strips.
  const bool is_float = entry == Entry::kFloat, by_pairs = !is_float && TakesShortBooks();
  const double short_lookup = taps_ > 1 ? 1.6 : 1.35;  // sums of several taps lie further apart
  const double lookup = is_float ? 1.85 : short_lookup, rounding = is_float ? 0.0 : by_pairs ? 0.4 : 0.8;
  const auto outputs = static_cast<double>(strips() * kStripRows), taps = static_cast<double>(taps_);
  const auto words = static_cast<double>(coded_.words);
  const double width = static_cast<double>(coded_.width) * (by_pairs ? 0.5 : 1.0);
  return static_cast<double>(coded_.stages * tap_blocks_) * (words * (width + rounding) + taps * outputs * lookup);
}

size_t Entries::lanes(Entry entry, size_t positions) const {
  return entry == Entry::kFloat && positions <= kernels_->few_row_lanes ? kernels_->few_row_lanes : lanes(entry);
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

size_t Entries::Tables::Bytes(Entry entry, size_t lanes) {
  const size_t values = kMostEntryTables * kTableWords * lanes;
  if (entry == Entry::kFloat) return Scratch::Room<float>(values);
  return Scratch::Room<std::int16_t>(values) + Scratch::Room<float>(lanes);
}

Entries::Tables::Tables(const Entries& entries, Entry entry, size_t lanes, Scratch& scratch)
    : entries_(entries),
      lanes_(lanes),
      floats_(entry == Entry::kFloat ? scratch.Take<float>(kMostEntryTables * kTableWords * lanes) : nullptr),
      shorts_(entry == Entry::kShort ? scratch.Take<std::int16_t>(kMostEntryTables * kTableWords * lanes) : nullptr),
      units_(entry == Entry::kShort ? scratch.Take<float>(lanes) : nullptr) {}

void Entries::Tables::Build(size_t stage, size_t block, size_t blocks, const float* x, size_t x_stride) {
  const Coded& m = entries_.coded_;
  const float* books[kMostEntryTables];
  const std::int16_t* short_books[kMostEntryTables];
  float longest[kMostEntryTables];
  const bool is_rounded = shorts_ != nullptr && !entries_.short_books_.empty();
  for (size_t i = 0; i < blocks; ++i) {
    const size_t book = stage * m.books + (block + i) % m.books;
    books[i] = m.codebooks + book * m.words * m.width;
    if (shorts_ != nullptr) longest[i] = entries_.longest_[book];
    if (is_rounded) short_books[i] = entries_.short_books_[book].data();
  }
  count_ = blocks;
  entries_.kernels_->build_entries({.x = x,
                                    .x_stride = x_stride,
                                    .books = books,
                                    .tables = blocks,
                                    .words = m.words,
                                    .width = m.width,
                                    .cols = std::min(m.width, entries_.inputs_ - (block + blocks - 1) * m.width),
                                    .lanes = lanes_,
                                    .entries = floats_,
                                    .shorts = shorts_,
                                    .longest = longest,
                                    .units = units_,
                                    .short_books = is_rounded ? short_books : nullptr,
                                    .word_scale = is_rounded ? entries_.word_scales_[stage] : 0.0F});
}

void Entries::Tables::Sum(const Lines& lines, size_t first, const Sums& sums) const {
  const std::uint8_t* codes[kMostEntryTables];
  for (size_t i = 0; i < count_; ++i) codes[i] = lines.first + (first + i) * kStripRows;
  entries_.kernels_->sum_entries({.codes = codes,
                                  .strips = sums.strips,
                                  .strip_bytes = lines.strip_bytes,
                                  .entries = floats_,
                                  .shorts = shorts_,
                                  .units = units_,
                                  .tables = count_,
                                  .lanes = lanes_,
                                  .sums = sums.sums,
                                  .pitch = sums.pitch,
                                  .add = sums.add});
}

}  // namespace vqonnx
