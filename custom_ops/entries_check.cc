// Checks of the kernels of tables of entries.
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

// Entries of any words, against sums in double precision.
void CheckBuild(const Kernels& kernels, const Sample& sample, size_t lanes, Random& random) {
  const size_t cols = Pick(random, 1, sample.width), stride = lanes + Pick(random, 0, 5);
  const std::vector<float> x = Values(random, (cols - 1) * stride + lanes, sample.seed % 2 == 0);
  const size_t place = Pick(random, 0, sample.stages * sample.books - 1) * sample.words * sample.width;
  Guarded out(sample.words * lanes, sample.seed % 5);
  kernels.build_entries({.x = x.data(),
                         .x_stride = stride,
                         .book = sample.codebooks.data() + place,
                         .words = sample.words,
                         .width = sample.width,
                         .cols = cols,
                         .lanes = lanes,
                         .entries = out.data()});
  if (!out.Intact()) return Fail(kernels, sample, "build_entries writes beside its output");
  for (size_t i = 0; i < sample.words * lanes; ++i) {
    double want = 0.0, scale = 0.0;
    for (size_t k = 0; k < cols; ++k) {
      const double product = double{sample.codebooks[place + i / lanes * sample.width + k]} * x[k * stride + i % lanes];
      want += product;
      scale += std::fabs(product);
    }
    const float got = out.data()[i];
    const bool finite = std::isfinite(want);
    if (finite && scale > 1e37) continue;  // may overflow on the way
    if (finite ? Close(got, want, scale) : !std::isfinite(got)) continue;
    return Fail(kernels, sample, "build_entries differs at word " + std::to_string(i / lanes));
  }
}

// Sums of them, in the order that kernels.h says: the same bits.
void CheckSum(const Kernels& kernels, const Sample& sample, size_t lanes, Random& random) {
  const size_t tables = Pick(random, 1, kMostEntryTables), strips = Pick(random, 1, 3);
  const size_t strip_bytes = kStripRows * Pick(random, 1, 5) + Pick(random, 0, 3), pitch = lanes + Pick(random, 0, 3);
  const size_t outputs = strips * kStripRows;
  const std::vector<float> entries = Values(random, tables * kTableWords * lanes, sample.seed % 2 == 0);
  std::vector<std::vector<std::uint8_t>> codes(tables);
  const std::uint8_t* lines[kMostEntryTables];
  for (size_t t = 0; t < tables; ++t) {
    codes[t].resize((strips - 1) * strip_bytes + kStripRows);
    for (std::uint8_t& code : codes[t]) code = static_cast<std::uint8_t>(Pick(random, 0, kTableWords - 1));
    lines[t] = codes[t].data();
  }
  const bool add = Pick(random, 0, 1) != 0;
  Guarded out((outputs - 1) * pitch + lanes, sample.seed % 5);
  std::vector<float> want((outputs - 1) * pitch + lanes, 0.0F);
  for (size_t i = 0; i < want.size(); ++i) out.data()[i] = want[i] = Value(random, false);
  for (size_t output = 0; output < outputs; ++output) {
    for (size_t lane = 0; lane < lanes; ++lane) {
      float sum = 0.0F;
      for (size_t t = 0; t < tables; ++t) {
        const size_t code = codes[t][output / kStripRows * strip_bytes + output % kStripRows];
        const float entry = entries[(t * kTableWords + code) * lanes + lane];
        sum = t == 0 ? entry : sum + entry;
      }
      float& its = want[output * pitch + lane];
      its = add ? its + sum : sum;
    }
  }
  kernels.sum_entries({.codes = lines,
                       .strips = strips,
                       .strip_bytes = strip_bytes,
                       .entries = entries.data(),
                       .tables = tables,
                       .lanes = lanes,
                       .sums = out.data(),
                       .pitch = pitch,
                       .add = add});
  if (!out.Intact()) return Fail(kernels, sample, "sum_entries writes beside its output");
  for (size_t i = 0; i < want.size(); ++i) {
    if (!Same(out.data()[i], want[i])) return Fail(kernels, sample, "sum_entries differs at " + std::to_string(i));
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
  for (const size_t lanes : {kernels.row_lanes, kernels.few_row_lanes}) {
    CheckBuild(kernels, sample, lanes, random);
    CheckSum(kernels, sample, lanes, random);
  }
  CheckAddTo(kernels, sample, random);
  if (sample.bits <= 8) CheckLines(kernels, sample, random);
}

}  // namespace vqonnx::check
