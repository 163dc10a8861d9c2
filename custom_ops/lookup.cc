#include "lookup.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "precision.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr double kMostInt16 = 32767.0;
constexpr float kMostRounded = 32766.9F;  // so that a product with a rounded quotient stays below
// Dot products stay so far below 2^31 that rounding cannot carry them over it.
constexpr double kMostProduct = 2147483648.0 - 8388608.0;
// Inputs that share a scale, and so feel the largest of them.
constexpr size_t kChunkInputs = 512;
constexpr size_t kFetchedEarly = 16384;
// Codes of more bytes come from far, and tables must leave room for them in the nearest cache while they do.
constexpr size_t kNear = size_t{1} << 20;

// The blocks of a chunk, of a layer with so many codes in all its stages.
size_t MostBlocks(const Coded& m, size_t codes, bool unpacked) {
  const size_t near = codes > kNear || unpacked ? kTableBlocks / 2 : kTableBlocks;
  const size_t most = std::max<size_t>(1, std::min(near / m.stages, kChunkInputs / m.width));
  return unpacked ? most / kOctet * kOctet : most;
}

// Whether strips are looked up as they are stored, or as they are unpacked: octets of codes at a time.
bool ReadsStrips(const Coded& m, size_t taps) {
  return m.lanes > 1 && (m.bits == kOctet || (taps == 1 && MostBlocks(m, 0, true) > 0));
}

constexpr size_t kMostWidth = kTileDepth / kOctet;

// How many neighbouring codes are taken as one, of as many bits together: then fewer are looked up.
size_t JoinedCodes(const Weight& weight, size_t taps) {
  const Coded& m = weight.coded();
  if (m.books != 1 || m.bits > 4) return 1;
  const size_t count = 8 / m.bits, width = count * m.width;
  return width <= kMostWidth && (taps == 1 || weight.depth() / taps % width == 0) ? count : 1;
}

}  // namespace

// The weight's codes as lookups take them: words are all that joined words can make, one after the other.
struct Lookup::Form {
  Form(const Weight& weight, size_t taps) : coded(weight.coded()) {
    const size_t joined = JoinedCodes(weight, taps);
    if (joined == 1) return;
    const Coded& m = weight.coded();
    coded.bits = joined * m.bits;
    coded.words = size_t{1} << coded.bits;
    coded.width = joined * m.width;
    words.assign(m.stages * coded.words * coded.width, 0.0F);
    for (size_t i = 0; i < m.stages * coded.words * joined; ++i) {
      const size_t part = i % joined, code = i / joined % coded.words, stage = i / joined / coded.words;
      const size_t word = code >> (part * m.bits) & ((size_t{1} << m.bits) - 1);
      if (word >= m.words) continue;  // only beyond the last code of a row
      std::copy_n(m.codebooks + (stage * m.words + word) * m.width, m.width, words.data() + i * m.width);
    }
    coded.codebooks = words.data();
  }

  Coded coded;
  std::vector<float> words;
};

bool Lookup::Possible(const Weight& weight, size_t taps, const Kernels& kernels) {
  const Coded& m = weight.coded();
  if (kernels.sum_tables == nullptr || !weight.by_output() || m.bits > 8 || m.stages > kTableBlocks) return false;
  if (m.width > kMostWidth) return false;
  const size_t inputs = weight.depth() / taps;
  if (taps > 1 && (inputs % m.width != 0 || (inputs / m.width) % m.books != 0)) return false;
  const float* end = m.codebooks + m.stages * m.books * m.words * m.width;
  const float most = *std::max_element(m.codebooks, end, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  return std::all_of(m.codebooks, end, [](float word) { return std::isfinite(word); }) && std::fabs(most) < kHuge &&
         std::fabs(most) > 1.0F / kHuge;
}

Lookup::Lookup(const Weight& weight, const std::uint8_t* codes, const std::vector<size_t>& tap_class,
               const Kernels& kernels)
    : Lookup(weight, Form(weight, tap_class.size()), codes, tap_class, kernels) {}

Lookup::Lookup(const Weight& weight, const Form& form, const std::uint8_t* codes, const std::vector<size_t>& tap_class,
               const Kernels& kernels)
    : kernels_(&kernels),
      stages_(form.coded.stages),
      books_(form.coded.books),
      width_(form.coded.width),
      even_width_(width_ + width_ % 2),
      outputs_(weight.outputs()),
      padded_outputs_(Ceil(outputs_, kSetRows) * kSetRows),
      tap_blocks_(Ceil(weight.depth() / tap_class.size(), width_)),
      bits_(form.coded.bits),
      strip_bytes_(ReadsStrips(form.coded, tap_class.size()) ? form.coded.row_bytes * kSetRows : 0),
      chunk_blocks_(
          std::min(tap_blocks_, MostBlocks(form.coded, stages_ * padded_outputs_ * Ceil(weight.depth(), width_),
                                           strip_bytes_ > 0 && bits_ < kOctet))),
      scales_(weight.scales().data()) {
  const size_t class_count = *std::max_element(tap_class.begin(), tap_class.end()) + 1;
  for (size_t index = 0; index < class_count; ++index) {
    const size_t first_set = sets_.size(), first_tile = tiles_.size();
    for (size_t tap = 0; tap < tap_class.size(); ++tap) {
      if (tap_class[tap] != index) continue;
      for (size_t output = 0; output < outputs_; output += kSetRows) sets_.push_back({tap, output});
    }
    const size_t count = sets_.size() - first_set, tiles = Ceil(count, kMostSets);
    for (size_t i = 0; i < tiles; ++i) {
      const size_t begin = count * i / tiles;
      tiles_.push_back({first_set + begin, count * (i + 1) / tiles - begin});
    }
    classes_.push_back({first_tile, tiles});
  }
  PackCodebooks(form.coded);
  Coded stored = form.coded;
  stored.codes = codes;
  PackCodes(stored, Ceil(weight.depth(), width_));
}

void Lookup::PackCodebooks(const Coded& m) {
  const size_t count = stages_ * books_;
  float most = 0.0F;
  for (size_t i = 0; i < count * m.words * width_; ++i) most = std::max(most, std::fabs(m.codebooks[i]));
  word_scale_ = kMostInt16 / static_cast<double>(most);
  words_.resize(count);
  for (auto& book : words_) book.assign(even_width_ * kTableWords, 0);
  for (size_t book = 0; book < count; ++book) {
    for (size_t word = 0; word < m.words; ++word) {
      double square = 0.0;
      for (size_t i = 0; i < width_; ++i) {
        const double value =
            std::nearbyint(static_cast<double>(m.codebooks[(book * m.words + word) * width_ + i]) * word_scale_);
        words_[book][(i / 2 * kTableWords + word) * 2 + i % 2] = static_cast<std::int16_t>(value);
        square += value * value;
      }
      longest_word_ = std::max(longest_word_, std::sqrt(square));
    }
  }
  most_length_ = static_cast<float>(kMostProduct / longest_word_ * 0.99999);
  worth_ = static_cast<float>(65536.0 / word_scale_);
  for (size_t stage = 0; stage < stages_; ++stage) {
    for (size_t block = 0; block < tap_blocks_; ++block) {
      block_words_.push_back(words_[stage * books_ + block % books_].data());
    }
  }
}

template <class Use>
void Lookup::CopyCodes(const Coded& m, size_t groups, Use use) {
  const size_t taps = sets_.size() / Ceil(outputs_, kSetRows);
  codes_.assign(stages_ * tap_blocks_ * sets_.size() * kSetRows + kFetchedEarly, 0);
  const size_t row_room = Ceil(groups, kOctet) * kOctet;
  std::vector<std::uint8_t> rows(kSetRows * row_room), room;
  std::vector<size_t> set_place(taps);                        // the number of a tap's set for the outputs at hand
  std::vector<std::array<size_t, 2>> set_tile(sets_.size());  // where its tile starts, and how many sets that has
  for (const Tile& tile : tiles_) {
    for (size_t i = 0; i < tile.sets; ++i) set_tile[tile.first_set + i] = {tile.first_set, tile.sets};
  }
  for (size_t output = 0; output < outputs_; output += kSetRows) {
    const size_t count = std::min(kSetRows, outputs_ - output);
    for (size_t set = 0; set < sets_.size(); ++set) {
      if (sets_[set].output == output) set_place[sets_[set].tap] = set;
    }
    for (size_t stage = 0; stage < stages_; ++stage) {
      for (size_t i = 0; i < count; ++i) {
        kernels_->unpack(RowOfCodes(m, stage, output + i, room), m.row_bytes, m.bits, groups,
                         rows.data() + i * row_room);
      }
      for (size_t group = 0; group < groups; ++group) {
        const size_t tap = group / tap_blocks_, block = group % tap_blocks_;
        const size_t chunk = block / chunk_blocks_, first = chunk * chunk_blocks_;
        const size_t blocks = std::min(chunk_blocks_, tap_blocks_ - first);
        const auto [tile_set, tile_sets] = set_tile[set_place[tap]];
        const size_t in_chunk =
            stages_ * blocks * tile_set + (stage * blocks + block - first) * tile_sets + (set_place[tap] - tile_set);
        std::uint8_t* to = codes_.data() + (stages_ * first * sets_.size() + in_chunk) * kSetRows;
        for (size_t i = 0; i < count; ++i) {
          const std::uint8_t code = rows[i * row_room + group];
          to[SetPlace(i)] = code;
          use(stage, block, code);
        }
      }
    }
  }
}

// Also counts how often words are used.
void Lookup::PackCodes(const Coded& m, size_t groups) {
  std::vector<double> uses(stages_ * books_ * kTableWords, 0.0);
  const auto count_use = [&](size_t stage, size_t block, std::uint8_t code) {
    uses[(stage * books_ + block % books_) * kTableWords + code] += 1.0;
  };
  if (strip_bytes_ > 0) {
    std::array<std::uint8_t, kSetRows * kOctet> unpacked;
    for (size_t strip = 0; strip < stages_ * outputs_ / kSetRows; ++strip) {
      for (size_t group = 0; group < groups; ++group) {
        const std::uint8_t* codes = m.codes + strip * strip_bytes_ + group * kSetRows;
        if (bits_ < kOctet) {
          codes = unpacked.data() + group % kOctet * kSetRows;
          if (group % kOctet == 0) {
            kernels_->unpack_strip(m.codes + strip * strip_bytes_, m.row_bytes, bits_, group,
                                   std::min(kOctet, groups - group), unpacked.data());
          }
        }
        for (size_t i = 0; i < kSetRows; ++i) {
          count_use(strip / (outputs_ / kSetRows), group % tap_blocks_, codes[i]);
        }
      }
    }
  } else {
    CopyCodes(m, groups, count_use);
  }
  // Each entry is off by 0.35 of its unit: its own rounding, and that of x and of the words. It is compared with the
  // entries of words as they are used, blocks of x being at most twice as long as most of them are.
  double squares = 0.0, total = 0.0;
  for (size_t book = 0; book < stages_ * books_; ++book) {
    for (size_t word = 0; word < kTableWords; ++word) {
      double square = 0.0;
      for (size_t i = 0; i < even_width_; ++i) {
        const double value = words_[book][(i / 2 * kTableWords + word) * 2 + i % 2];
        square += value * value;
      }
      squares += square * uses[book * kTableWords + word];
      total += uses[book * kTableWords + word];
    }
  }
  const double usual = std::sqrt(squares / std::max(total, 1.0) / static_cast<double>(width_));
  error_ = usual > 0.0 ? 0.35 * 2.0 * longest_word_ / usual / kMostInt16 : 1.0;
}

Lookup::Chunk Lookup::At(size_t chunk, const std::uint8_t* stored) const {
  const size_t first = chunk * chunk_blocks_;
  return {first, std::min(chunk_blocks_, tap_blocks_ - first),
          strip_bytes_ > 0 ? stored : codes_.data() + stages_ * first * sets_.size() * kSetRows};
}

Lookup::Rounded Lookup::Round(const Chunk& chunk, const float* x, size_t inputs, std::int16_t* rounded) const {
  const size_t floats = std::min(chunk.blocks * width_, inputs - chunk.first_block * width_);
  float padded[kTableBlocks * (kTileDepth / kOctet + 1)];
  if (even_width_ != width_ || floats < chunk.blocks * width_) {
    std::fill(padded, padded + chunk.blocks * even_width_, 0.0F);
    for (size_t done = 0; done < floats; done += width_) {
      std::memcpy(padded + done / width_ * even_width_, x + done, std::min(width_, floats - done) * sizeof(float));
    }
    x = padded;
  }
  const Extent extent = kernels_->measure(x, chunk.blocks, even_width_);
  if (!extent.finite || !(extent.most > kTiny && extent.most < kHuge)) {  // nothing, beside what else there is
    std::fill(rounded, rounded + chunk.blocks * even_width_, std::int16_t{0});
    return {0.0F, extent.finite ? extent.most : std::numeric_limits<float>::infinity()};
  }
  const float by_length = most_length_ / std::sqrt(extent.square), by_value = kMostRounded / extent.most;
  const float scale = std::min(by_length, by_value);
  kernels_->quantise(x, chunk.blocks * even_width_, scale, rounded);
  return {worth_ / scale, extent.most};
}

void Lookup::Build(const Chunk& chunk, const std::int16_t* rounded, std::uint8_t* tables) const {
  for (size_t stage = 0; stage < stages_; ++stage) {
    kernels_->build_tables({.x = rounded,
                            .books = block_words_.data() + stage * tap_blocks_ + chunk.first_block,
                            .blocks = chunk.blocks,
                            .pairs = even_width_ / 2,
                            .tables = tables + stage * chunk.blocks * kTableBytes});
  }
}

void Lookup::Sum(const Chunk& chunk, size_t tile, const std::uint8_t* tables, float factor, float* const* sums,
                 bool add, const Next& next) const {
  if (strip_bytes_ > 0) return SumStrips(chunk, tile, tables, factor, sums, add, next);
  kernels_->sum_tables({.codes = chunk.codes + stages_ * chunk.blocks * tiles_[tile].first_set * kSetRows,
                        .strips = nullptr,
                        .next = nullptr,
                        .tables = tables,
                        .blocks = stages_ * chunk.blocks,
                        .sets = tiles_[tile].sets,
                        .factor = factor,
                        .sums = sums,
                        .add = add});
}

const std::uint8_t* Lookup::Strip(const std::uint8_t* stored, size_t stage, size_t set) const {
  return stored + (stage * (outputs_ / kSetRows) + sets_[set].output / kSetRows) * strip_bytes_;
}

size_t Lookup::Line(size_t set, size_t block) const {
  return (sets_[set].tap * tap_blocks_ + block) * bits_ / kOctet * kSetRows;
}

void Lookup::Fetch(const Chunk& chunk, size_t tile) const {
  if (strip_bytes_ == 0) return;
  for (size_t stage = 0; stage < stages_; ++stage) {
    for (size_t set = tiles_[tile].first_set; set < tiles_[tile].first_set + tiles_[tile].sets; ++set) {
      const std::uint8_t* strip = Strip(chunk.codes, stage, set);
      const size_t end = Line(set, chunk.first_block + chunk.blocks);
      for (size_t place = Line(set, chunk.first_block); place < end; place += kSetRows) {
        VQONNX_FETCH_LATER(strip + place);
      }
    }
  }
}

void Lookup::SumStrips(const Chunk& chunk, size_t tile, const std::uint8_t* tables, float factor, float* const* sums,
                       bool add, const Next& next) const {
  const Tile& its = tiles_[tile];
  alignas(64) std::uint8_t unpacked[kMostSets][kTableBlocks / 2 * kSetRows];
  for (size_t stage = 0; stage < stages_; ++stage) {
    const std::uint8_t *strips[kMostSets], *later[kMostSets];
    for (size_t i = 0; i < its.sets; ++i) {
      const size_t set = its.first_set + i, next_set = (tiles_[next.tile].first_set + i) % sets_.size();
      later[i] = Strip(chunk.codes, stage, next_set) + Line(next_set, next.first_block);
      strips[i] = Strip(chunk.codes, stage, set) + Line(set, chunk.first_block);
      if (bits_ == kOctet) continue;
      kernels_->unpack_strip(Strip(chunk.codes, stage, set), strip_bytes_ / kSetRows, bits_,
                             sets_[set].tap * tap_blocks_ + chunk.first_block, chunk.blocks, unpacked[i]);
      strips[i] = unpacked[i];
    }
    kernels_->sum_tables({.codes = nullptr,
                          .strips = strips,
                          .next = later,
                          .tables = tables + stage * chunk.blocks * kTableBytes,
                          .blocks = chunk.blocks,
                          .sets = its.sets,
                          .factor = factor,
                          .sums = sums,
                          .add = add || stage > 0});
  }
}

bool Lookup::Allowed(bool any_error) const { return any_error || (kernels_->tables_pay && error_ <= kMostError); }

double Lookup::Cycles(const Weight& weight, size_t taps, double positions, double lookups) {
  const size_t width = JoinedCodes(weight, taps) * weight.coded().width;
  const auto pairs = static_cast<double>(Ceil(width, 2)),
             blocks = static_cast<double>(Ceil(weight.depth() / taps, width));
  const auto tables = static_cast<double>(weight.coded().stages) * blocks;
  const auto sets = static_cast<double>(Ceil(weight.outputs(), kSetRows));
  const double build = 30.0 + 8.0 * blocks + tables * (12.0 + 8.5 * pairs);
  const double sum = sets * (tables * 4.4 + 14.0);
  return positions * build + lookups * sum;
}

}  // namespace vqonnx
