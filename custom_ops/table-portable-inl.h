// Products by table lookup, written to be read: the specification of the fast ones, which yield the same integers.

#include <cmath>

namespace vqonnx {
namespace {

Extent Measure(const float* x, std::size_t blocks, std::size_t width) {
  Extent extent = {0.0F, 0.0F, true};
  for (std::size_t block = 0; block < blocks; ++block) {
    float square = 0.0F;
    for (std::size_t i = 0; i < width; ++i) {
      const float value = x[block * width + i];
      extent.finite = extent.finite && std::isfinite(value);
      extent.most = std::fmax(extent.most, std::fabs(value));
      square += value * value;
    }
    extent.square = std::fmax(extent.square, square);
  }
  return extent;
}

void Quantise(const float* x, std::size_t count, float scale, std::int16_t* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<std::int16_t>(std::nearbyint(x[i] * scale));
}

void BuildTable(const BuildTables& b) {
  for (std::size_t block = 0; block < b.blocks; ++block) {
    const std::int16_t* x = b.x + block * b.pairs * 2;
    std::uint8_t* table = b.tables + block * kTableBytes;
    for (std::size_t word = 0; word < kTableWords; ++word) {
      std::uint32_t sum = 0x80008000U;  // wraps around: what is negative is below 2^31
      for (std::size_t pair = 0; pair < b.pairs; ++pair) {
        const std::int16_t* values = b.books[block] + (pair * kTableWords + word) * 2;
        sum += static_cast<std::uint32_t>(x[pair * 2] * values[0]) +
               static_cast<std::uint32_t>(x[pair * 2 + 1] * values[1]);
      }
      table[word] = static_cast<std::uint8_t>(sum >> 16);
      table[kTableWords + word] = static_cast<std::uint8_t>(sum >> 24);
    }
  }
}

void UnpackSetOfRows(const std::uint8_t* strip, std::size_t row_bytes, std::size_t bits, std::size_t group,
                     std::size_t count, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; ++i, out += kStripRows) {
    const std::size_t start = (group + i) * bits;
    for (std::size_t row = 0; row < kStripRows; ++row) {
      const std::uint8_t* byte = strip + start / 8 * kStripRows + row;
      const unsigned next = start / 8 + 1 < row_bytes ? byte[kStripRows] : 0;
      out[row] = static_cast<std::uint8_t>((*byte | next << 8) >> start % 8 & ((1U << bits) - 1));
    }
  }
}

void SortRows(float* sums, std::size_t sets) {
  for (std::size_t set = 0; set < sets; ++set, sums += kSetRows) {
    float sorted[kSetRows];
    for (std::size_t row = 0; row < kSetRows; ++row) sorted[row] = sums[StripPlace(row)];
    for (std::size_t row = 0; row < kSetRows; ++row) sums[row] = sorted[row];
  }
}

void SumTable(const SumTables& s) {
  for (std::size_t set = 0; set < s.sets; ++set) {
    for (std::size_t row = 0; row < kSetRows; ++row) {
      std::int32_t sum = 0;
      for (std::size_t block = 0; block < s.blocks; ++block) {
        const std::uint8_t code = s.strips != nullptr ? s.strips[set][block * kSetRows + row]
                                                      : s.codes[(block * s.sets + set) * kSetRows + SetPlace(row)];
        const std::uint8_t* table = s.tables + block * kTableBytes;
        sum += table[code] + 256 * table[kTableWords + code] - 32768;
      }
      float& out = s.sums[set][s.strips != nullptr ? StripPlace(row) : row];
      out = (s.add ? out : 0.0F) + static_cast<float>(sum) * s.factor;
    }
  }
}

}  // namespace
}  // namespace vqonnx
