// Checks of the kernels of tables of entries.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace vqonnx::check {
namespace {

// Lines of codes, against the format.
void CheckLines(const Kernels& kernels, const Sample& sample, Random& random) {
  const size_t stage = Pick(random, 0, sample.stages - 1);
  const size_t row = Pick(random, 0, (sample.rows - 1) / kStripRows) * kStripRows;
  const size_t group = Pick(random, 0, (sample.groups - 1) / kOctet) * kOctet;
  const size_t count = Pick(random, 1, sample.groups - group), room = (count + kOctet - 1) / kOctet * kOctet;
  constexpr std::uint8_t kUntouched = 0xA5;
  std::vector<std::uint8_t> out(room * kStripRows + 64, kUntouched);
  kernels.code_lines(sample.View(), stage, row, group, count, out.data());
  for (size_t i = 0; i < count * kStripRows; ++i) {
    const size_t its_row = row + i % kStripRows,
                 want = its_row < sample.rows ? sample.CodeAt(stage, its_row, group + i / kStripRows) : 0;
    if (out[i] != want) return Fail(kernels, sample, "code_lines differs at " + std::to_string(i));
  }
  for (size_t i = room * kStripRows; i < out.size(); ++i) {
    if (out[i] != kUntouched) return Fail(kernels, sample, "code_lines writes beyond its output");
  }
}

// Tables of any words.
struct Build {
  Build(const Sample& of, size_t its_lanes, Random& random) : sample(of), lanes(its_lanes) {
    tables = Pick(random, 1, kMostEntryTables);
    cols = Pick(random, 1, sample.width);
    stride = lanes + Pick(random, 0, 5);
    x = Values(random, ((tables - 1) * sample.width + cols - 1) * stride + lanes, sample.seed % 2 == 0);
    for (size_t t = 0; t < tables; ++t) {
      places.push_back(Pick(random, 0, sample.stages * sample.books - 1) * sample.words * sample.width);
      books.push_back(sample.codebooks.data() + places.back());
    }
  }

  BuildEntries View() const {
    return {.x = x.data(),
            .x_stride = stride,
            .books = books.data(),
            .tables = tables,
            .words = sample.words,
            .width = sample.width,
            .cols = cols,
            .lanes = lanes,
            .entries = nullptr,
            .shorts = nullptr,
            .longest = nullptr,
            .units = nullptr,
            .short_books = nullptr,
            .word_scale = 0.0F};
  }

  size_t Cols(size_t table) const { return table + 1 < tables ? sample.width : cols; }

  // A product, and the sum of the magnitudes of what it is made of.
  struct Product {
    double value, scale;
  };
  Product At(size_t table, size_t word, size_t lane) const {
    Product sum = {0.0, 0.0};
    for (size_t k = 0; k < Cols(table); ++k) {
      const double product = double{sample.codebooks[places[table] + word * sample.width + k]} *
                             x[(table * sample.width + k) * stride + lane];
      sum.value += product;
      sum.scale += std::fabs(product);
    }
    return sum;
  }

  const Sample& sample;
  size_t lanes, tables, cols, stride;
  std::vector<float> x;
  std::vector<size_t> places;
  std::vector<const float*> books;
};

// Entries in float32, against sums in double precision.
void CheckBuild(const Kernels& kernels, const Sample& sample, size_t lanes, Random& random) {
  const Build build(sample, lanes, random);
  Guarded out(build.tables * kTableWords * lanes, sample.seed % 5);
  BuildEntries view = build.View();
  view.entries = out.data();
  kernels.build_entries(view);
  if (!out.Intact()) return Fail(kernels, sample, "build_entries writes beside its output");
  for (size_t i = 0; i < build.tables * sample.words * lanes; ++i) {
    const size_t table = i / sample.words / lanes, word = i / lanes % sample.words, lane = i % lanes;
    const auto [want, scale] = build.At(table, word, lane);
    const float got = out.data()[(table * kTableWords + word) * lanes + lane];
    const bool finite = std::isfinite(want);
    if (finite && scale > 1e37) continue;  // may overflow on the way
    if (finite ? Close(got, want, scale) : !std::isfinite(got)) continue;
    return Fail(kernels, sample, "build_entries differs at word " + std::to_string(word));
  }
}

// What a table of entries in 16 bits has, [words][lanes]: its sums for all words in units of 1. The lanes of an entry
// are in an order of the kernels' own.
std::vector<float> ReadShorts(const Kernels& kernels, const std::int16_t* table) {
  std::vector<std::uint8_t> words(kTableWords);
  for (size_t i = 0; i < kTableWords; ++i) words[i] = static_cast<std::uint8_t>(i);
  const std::uint8_t* lines[] = {words.data()};
  const std::vector<float> units(kernels.short_lanes, 1.0F);
  std::vector<float> sums(kTableWords * kernels.short_lanes);
  kernels.sum_entries({.codes = lines,
                       .strips = kTableWords / kStripRows,
                       .strip_bytes = kStripRows,
                       .entries = nullptr,
                       .shorts = table,
                       .units = units.data(),
                       .tables = 1,
                       .lanes = kernels.short_lanes,
                       .sums = sums.data(),
                       .pitch = kernels.short_lanes,
                       .add = false});
  return sums;
}

// Entries in 16 bits: units as they are defined, entries within half of one (and what rounding x and words adds), and
// sums that cannot overflow.
void CheckBuildShorts(const Kernels& kernels, const Sample& sample, bool by_books, Random& random) {
  const size_t lanes = kernels.short_lanes;
  Build build(sample, lanes, random);
  for (float& value : build.x) value = Value(random, false);
  if (sample.seed % 3 == 0) build.x[Pick(random, 0, build.x.size() - 1)] = 1e12F;
  if (sample.seed % 4 == 0) {  // nothing at all, or next to it, in some lane
    const size_t lane = Pick(random, 0, lanes - 1);
    for (size_t i = lane; i < build.x.size(); i += build.stride) build.x[i] = sample.seed % 8 == 0 ? 0.0F : 1e-30F;
  }
  std::vector<float> longest(build.tables);
  double most_word = 1e-10;
  for (size_t t = 0; t < build.tables; ++t) {
    double length = 0.0;
    for (size_t word = 0; word < sample.words; ++word) {
      double square = 0.0;
      for (size_t k = 0; k < sample.width; ++k) {
        const double value = std::fabs(build.books[t][word * sample.width + k]);
        if (!(value < 1e10)) return;  // such words have no shorts
        square += value * value;
        most_word = std::max(most_word, value);
      }
      length = std::max(length, std::sqrt(square));
    }
    longest[t] = static_cast<float>(std::max(length * 1.0001, 1e-10));
  }
  const float word_scale = 32767.0F / static_cast<float>(most_word);
  const size_t even = (sample.width + 1) / 2 * 2;
  std::vector<std::vector<std::int16_t>> words(build.tables, std::vector<std::int16_t>((sample.words + 3) * even));
  std::vector<const std::int16_t*> short_books;
  for (size_t t = 0; t < build.tables; ++t) {
    for (size_t i = 0; i < sample.words * sample.width; ++i) {
      const float value = std::nearbyint(build.books[t][i] * word_scale);
      words[t][i / sample.width * even + i % sample.width] = static_cast<std::int16_t>(value);
    }
    short_books.push_back(words[t].data());
  }
  // Shorts between guards, units as well.
  Guarded out(build.tables * kTableWords * lanes / 2 + 1, sample.seed % 5), units(lanes, sample.seed % 3);
  auto* shorts = reinterpret_cast<std::int16_t*>(out.data());
  BuildEntries view = build.View();
  view.shorts = shorts;
  view.longest = longest.data();
  view.units = units.data();
  if (by_books) view.short_books = short_books.data();
  view.word_scale = word_scale;
  kernels.build_entries(view);
  if (!out.Intact() || !units.Intact()) return Fail(kernels, sample, "build_entries writes beside its shorts");
  std::vector<std::vector<float>> entries;
  for (size_t t = 0; t < build.tables; ++t) {
    entries.push_back(ReadShorts(kernels, shorts + t * kTableWords * lanes));
  }
  for (size_t lane = 0; lane < lanes; ++lane) {
    double unit = 0.0, most_x = 0.0, two[kMostEntryTables / 2] = {};
    for (size_t t = 0; t < build.tables; ++t) {
      double square = 0.0;
      for (size_t k = 0; k < build.Cols(t); ++k) {
        const double value = std::fabs(build.x[(t * sample.width + k) * build.stride + lane]);
        square += value * value;
        most_x = std::max(most_x, value);
      }
      two[t / 2] += std::max(std::sqrt(square), double{kShortInput}) * longest[t] / double{kShortSum};
      unit = std::max(unit, two[t / 2]);
    }
    if (by_books) unit = std::max(unit, 2.001 * most_x / word_scale);
    if (!(std::fabs(double{units.data()[lane]} - unit) <= 1e-5 * unit)) {
      return Fail(kernels, sample, "build_entries has a wrong unit");
    }
    double most[kMostEntryTables / 2] = {};
    for (size_t t = 0; t < build.tables; ++t) {
      double largest = 0.0;
      for (size_t word = 0; word < sample.words; ++word) {
        const double got = entries[t][word * lanes + lane];
        const auto [want, scale] = build.At(t, word, lane);
        double bound = 0.5 + 1e-5 * scale / unit;
        for (size_t k = 0; by_books && k < build.Cols(t); ++k) {
          const double x_scale = 65536.0 / word_scale / unit;
          const double x = std::fabs(build.x[(t * sample.width + k) * build.stride + lane]) * x_scale;
          const double its = std::fabs(build.books[t][word * sample.width + k]) * word_scale;
          bound += (0.51 * x + 0.51 * its + 0.5) / 65536.0;
        }
        if (!(std::fabs(got - want / unit) <= bound)) {
          return Fail(kernels, sample, "build_entries has a wrong short at word " + std::to_string(word));
        }
        largest = std::max(largest, std::fabs(got));
      }
      most[t / 2] += largest;
    }
    if (std::max(most[0], most[1]) > 32767.0) return Fail(kernels, sample, "sums of shorts may overflow");
  }
}

// Lines of any codes for some tables.
struct LinesOfCodes {
  explicit LinesOfCodes(Random& random) {
    tables = Pick(random, 1, kMostEntryTables);
    strips = Pick(random, 1, 3);
    strip_bytes = kStripRows * Pick(random, 1, 5) + Pick(random, 0, 3);
    codes.resize(tables);
    for (size_t t = 0; t < tables; ++t) {
      codes[t].resize((strips - 1) * strip_bytes + kStripRows);
      for (std::uint8_t& code : codes[t]) code = static_cast<std::uint8_t>(Pick(random, 0, kTableWords - 1));
      lines[t] = codes[t].data();
    }
  }
  size_t At(size_t table, size_t output) const {
    return codes[table][output / kStripRows * strip_bytes + output % kStripRows];
  }
  size_t tables, strips, strip_bytes;
  std::vector<std::vector<std::uint8_t>> codes;
  const std::uint8_t* lines[kMostEntryTables];
};

// Runs sum_entries and compares with what value(output, lane, what was there before) should come out.
template <class Value>
void CompareSums(const Kernels& kernels, const Sample& sample, const LinesOfCodes& codes, SumEntries sum,
                 const Value& value, Random& random) {
  const size_t outputs = codes.strips * kStripRows, pitch = sum.lanes + Pick(random, 0, 3);
  Guarded out((outputs - 1) * pitch + sum.lanes, sample.seed % 5);
  std::vector<float> want((outputs - 1) * pitch + sum.lanes);
  for (size_t i = 0; i < want.size(); ++i) out.data()[i] = want[i] = check::Value(random, false);
  sum.add = Pick(random, 0, 1) != 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (i % pitch < sum.lanes) want[i] = value(i / pitch, i % pitch, sum.add ? &want[i] : nullptr);
  }
  sum.codes = codes.lines;
  sum.strips = codes.strips;
  sum.strip_bytes = codes.strip_bytes;
  sum.tables = codes.tables;
  sum.sums = out.data();
  sum.pitch = pitch;
  kernels.sum_entries(sum);
  if (!out.Intact()) return Fail(kernels, sample, "sum_entries writes beside its output");
  for (size_t i = 0; i < want.size(); ++i) {
    // A product that is added may be rounded before or not.
    const bool is_right = sum.shorts == nullptr
                              ? Same(out.data()[i], want[i])
                              : std::fabs(out.data()[i] - want[i]) <= 1e-6F * std::fabs(want[i]) + 1e-5F;
    if (!is_right) return Fail(kernels, sample, "sum_entries differs at " + std::to_string(i));
  }
}

// In the order that kernels.h says: the same bits.
void CheckSum(const Kernels& kernels, const Sample& sample, size_t lanes, Random& random) {
  const LinesOfCodes codes(random);
  const std::vector<float> entries = Values(random, codes.tables * kTableWords * lanes, sample.seed % 2 == 0);
  SumEntries sum = {};
  sum.entries = entries.data();
  sum.lanes = lanes;
  const auto value = [&](size_t output, size_t lane, const float* before) {
    float its = 0.0F;
    for (size_t t = 0; t < codes.tables; ++t) {
      const float entry = entries[(t * kTableWords + codes.At(t, output)) * lanes + lane];
      its = t == 0 ? entry : its + entry;
    }
    return before != nullptr ? *before + its : its;
  };
  CompareSums(kernels, sample, codes, sum, value, random);
}

// Sums of shorts are exact, of two in 16 bits.
void CheckSumShorts(const Kernels& kernels, const Sample& sample, Random& random) {
  const LinesOfCodes codes(random);
  const size_t lanes = kernels.short_lanes;
  const size_t most = codes.tables == 1 ? 32767 : 16383;
  std::vector<std::int16_t> shorts(codes.tables * kTableWords * lanes);
  for (std::int16_t& entry : shorts) {
    const auto size = static_cast<int>(Pick(random, 0, 3) != 0 ? Pick(random, 0, most) : most);
    entry = static_cast<std::int16_t>(Pick(random, 0, 1) != 0 ? size : -size);
  }
  std::vector<std::vector<float>> entries;
  for (size_t t = 0; t < codes.tables; ++t) {
    entries.push_back(ReadShorts(kernels, shorts.data() + t * kTableWords * lanes));
  }
  std::vector<float> units(lanes);
  for (float& unit : units) unit = std::fabs(Value(random, false)) * 1e-3F;
  SumEntries sum = {};
  sum.shorts = shorts.data();
  sum.units = units.data();
  sum.lanes = lanes;
  const auto value = [&](size_t output, size_t lane, const float* before) {
    double its = 0.0;
    for (size_t t = 0; t < codes.tables; ++t) its += double{entries[t][codes.At(t, output) * lanes + lane]};
    return static_cast<float>(double{units[lane]} * its + (before != nullptr ? double{*before} : 0.0));
  };
  CompareSums(kernels, sample, codes, sum, value, random);
}

void CheckLargest(const Kernels& kernels, const Sample& sample, Random& random) {
  const size_t size = Pick(random, 0, 200);
  std::vector<float> x = Values(random, size, false);
  float want = 0.0F;
  for (const float value : x) want = std::max(want, std::fabs(value));
  if (kernels.largest(x.data(), size) != want) Fail(kernels, sample, "largest differs");
  if (size == 0) return;
  for (const float odd : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> other = x;
    other[Pick(random, 0, size - 1)] = odd;
    if (std::isfinite(kernels.largest(other.data(), size))) Fail(kernels, sample, "largest misses what is no number");
  }
}

void CheckAddTo(const Kernels& kernels, const Sample& sample, Random& random) {
  const size_t size = Pick(random, 0, 70);
  const std::vector<float> from = Values(random, size, true);
  Guarded to(size, sample.seed % 5);
  std::vector<float> want(size);
  for (size_t i = 0; i < size; ++i) {
    to.data()[i] = Value(random, true);
    want[i] = to.data()[i] + from[i];
  }
  kernels.add_to(from.data(), size, to.data());
  bool is_right = to.Intact();
  for (size_t i = 0; i < size; ++i) is_right = is_right && Same(to.data()[i], want[i]);
  if (!is_right) Fail(kernels, sample, "add_to differs");
}

}  // namespace

void CheckEntries(const Kernels& kernels, unsigned seed) {
  Random random(seed + 7);  // other numbers than those of the samples
  const Sample sample = RandomSample(seed, 150);
  for (const size_t lanes : {kernels.row_lanes, kernels.few_row_lanes}) CheckSum(kernels, sample, lanes, random);
  CheckSumShorts(kernels, sample, random);
  CheckLargest(kernels, sample, random);
  CheckAddTo(kernels, sample, random);
  if (sample.bits > 8) return;
  CheckLines(kernels, sample, random);
  for (const size_t lanes : {kernels.row_lanes, kernels.few_row_lanes}) CheckBuild(kernels, sample, lanes, random);
  CheckBuildShorts(kernels, sample, false, random);
  if (kernels.takes_short_books && sample.width <= kMostShortWidth) CheckBuildShorts(kernels, sample, true, random);
}

}  // namespace vqonnx::check
