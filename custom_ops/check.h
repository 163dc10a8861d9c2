// What the checks share: random coded matrices with all that they point to, buffers that notice stray writes, failures.
#ifndef VQONNX_CHECK_H_
#define VQONNX_CHECK_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "decode.h"
#include "kernels.h"

namespace vqonnx::check {

using std::size_t;

using Random = std::mt19937;

inline size_t Pick(Random& random, size_t low, size_t high) {
  return std::uniform_int_distribution<size_t>(low, high)(random);
}

// A coded matrix with all that it points to.
struct Sample {
  size_t stages, rows, groups, bits, books, words, width, cols;
  unsigned seed;
  std::vector<std::uint8_t> storage;  // `shift` bytes, so that rows are not aligned, then the codes and not a byte more
  size_t shift;
  size_t lanes = 0;              // 1, or kStripRows in strips; Fill chooses where it is 0
  std::vector<float> codebooks;  // padded as kernels may expect
  std::vector<float> scales;     // one a row

  size_t RowBytes() const { return (groups * bits + 7) / 8; }

  vqonnx::Coded View() const {
    return {.codes = storage.data() + shift,
            .codebooks = codebooks.data(),
            .stages = stages,
            .rows = rows,
            .row_bytes = RowBytes(),
            .bits = bits,
            .books = books,
            .words = words,
            .width = width,
            .lanes = lanes};
  }

  size_t PlaceOf(size_t stage, size_t row, size_t byte) const {
    const size_t first = row / lanes * lanes;
    return shift + (stage * rows + first) * RowBytes() + byte * lanes + row - first;
  }
  std::vector<std::int64_t> CodesShape() const {
    std::vector<std::int64_t> shape;
    for (const size_t size : {stages, rows / lanes, RowBytes(), lanes})
      shape.push_back(static_cast<std::int64_t>(size));
    if (lanes == 1) shape.pop_back();
    return shape;
  }

  // Bit by bit, as the format says it.
  size_t CodeAt(size_t stage, size_t row, size_t group) const {
    size_t code = 0;
    for (size_t bit = 0; bit < bits; ++bit) {
      const size_t k = group * bits + bit;
      code |= static_cast<size_t>(storage[PlaceOf(stage, row, k / 8)] >> (k % 8) & 1) << bit;
    }
    return code;
  }

  float ValueAt(size_t row, size_t col) const {
    float sum = 0;
    for (size_t s = 0; s < stages; ++s) {
      const size_t group = col / width;
      const size_t word = (s * books + group % books) * words + CodeAt(s, row, group);
      const float value = codebooks[word * width + col % width];
      sum = s == 0 ? value : sum + value;
    }
    return sum * scales[row];
  }

  std::string Text() const {
    return "seed " + std::to_string(seed) + ": stages " + std::to_string(stages) + ", rows " + std::to_string(rows) +
           ", groups " + std::to_string(groups) + ", bits " + std::to_string(bits) + ", books " +
           std::to_string(books) + ", words " + std::to_string(words) + ", width " + std::to_string(width) + ", cols " +
           std::to_string(cols) + (lanes > 1 ? ", in strips" : "");
  }
};

inline float Value(Random& random, bool special) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kDenormal = std::numeric_limits<float>::denorm_min();
  const float specials[] = {0.0F, -0.0F, kInfinity, -kInfinity, kDenormal, -3 * kDenormal, std::nanf(""), 3e38F};
  if (special && Pick(random, 0, 9) == 0) return specials[Pick(random, 0, 7)];
  return std::normal_distribution<float>(0.0F, 1.0F)(random);
}

// Codes, codebooks and scales for the sizes that `sample` has.
inline void Fill(Sample& sample, Random& random, bool special) {
  sample.shift = Pick(random, 0, 7);
  if (sample.lanes == 0) sample.lanes = sample.rows % kStripRows == 0 && Pick(random, 0, 3) ? kStripRows : 1;
  sample.storage.assign(sample.shift + sample.stages * sample.rows * sample.RowBytes(), 0);
  for (size_t line = 0; line < sample.stages * sample.rows; ++line) {
    const auto byte = [&](size_t index) -> std::uint8_t& {
      return sample.storage[sample.PlaceOf(line / sample.rows, line % sample.rows, index)];
    };
    for (size_t group = 0; group < sample.groups; ++group) {
      const size_t code = Pick(random, 0, sample.words - 1);
      for (size_t bit = 0; bit < sample.bits; ++bit) {
        const size_t k = group * sample.bits + bit;
        byte(k / 8) = static_cast<std::uint8_t>(byte(k / 8) | (code >> bit & 1) << (k % 8));
      }
    }
    const size_t used = sample.groups * sample.bits % 8;  // bits beyond the last code are to be ignored
    if (used != 0) byte(sample.RowBytes() - 1) |= static_cast<std::uint8_t>(0xFF << used);
  }
  sample.codebooks.resize(sample.stages * sample.books * sample.words * sample.width);
  for (float& value : sample.codebooks) value = Value(random, special);
  sample.codebooks.resize(sample.codebooks.size() + vqonnx::kPad, std::nanf(""));
  sample.scales.resize(sample.rows);
  for (float& scale : sample.scales) scale = Value(random, special);
}

inline size_t PickBits(Random& random) {
  return Pick(random, 0, 2) ? Pick(random, 1, 8) : Pick(random, 9, vqonnx::kMaxBits);
}

// As many as the bits reach, but beyond 256 no more than make codebooks of 256 KB.
inline size_t MostWords(const Sample& sample) {
  constexpr size_t kFloats = 1 << 16;
  const size_t affordable = std::max<size_t>(256, kFloats / (sample.stages * sample.books * sample.width));
  return std::min(size_t{1} << sample.bits, affordable);
}

inline Sample RandomSample(unsigned seed, size_t most_rows = 4) {
  Random random(seed);
  Sample sample = {};
  sample.seed = seed;
  sample.bits = PickBits(random);
  sample.stages = Pick(random, 0, 19) == 0 ? Pick(random, 9, 12) : Pick(random, 1, 3);
  sample.width = Pick(random, 1, 20);
  sample.rows = Pick(random, 0, 14) ? Pick(random, 1, most_rows) : kStripRows * Pick(random, 1, 2);
  sample.groups = Pick(random, 0, 2) ? Pick(random, 1, 40) : Pick(random, 60, 200);
  const size_t books[] = {1, sample.groups, Pick(random, 1, sample.groups)};
  sample.books = books[Pick(random, 0, 2)];
  sample.words = Pick(random, 0, 1) ? MostWords(sample) : Pick(random, 1, MostWords(sample));
  sample.cols = sample.groups * sample.width - Pick(random, 0, sample.width - 1);
  Fill(sample, random, true);
  return sample;
}

inline std::vector<float> Values(Random& random, size_t count, bool special) {
  std::vector<float> values(count);
  for (float& value : values) value = Value(random, special);
  return values;
}

// Whether `got` may be the float32 sum of terms whose sum is `want` and whose magnitudes add up to `scale`.
inline bool Close(float got, double want, double scale) {
  if (!std::isfinite(scale)) return true;  // decided by the order of the sum
  return std::fabs(static_cast<double>(got) - want) <= 1e-5 * scale + 1e-30;
}

inline bool Same(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// In double precision. Errors of `value` grow by less than kSiluRise.
constexpr double kSiluRise = 1.1;
inline double Activated(double value, const Activation& activation) {
  if (activation.silu) return value / (1.0 + std::exp(-value));
  return std::min(std::max(value, double{activation.low}), double{activation.high});
}

// The norm of the difference over that of what is wanted.
inline double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
    norm += double{want[i]} * want[i];
  }
  return std::sqrt(error / norm);
}

// A buffer of floats that notices when something else than its middle is written.
class Guarded {
 public:
  Guarded(size_t size, size_t shift)
      : size_(size), begin_(kZone + shift), all_(kZone + shift + size + kZone, Poison()) {}
  float* data() { return all_.data() + begin_; }
  bool Intact() const {
    for (size_t i = 0; i < all_.size(); ++i) {
      const bool inside = begin_ <= i && i < begin_ + size_;
      if (!inside && std::bit_cast<std::uint32_t>(all_[i]) != kPoison) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kZone = 64;
  static constexpr std::uint32_t kPoison = 0x4B1DF00D;  // a number: arithmetic on it would be seen, too
  static float Poison() { return std::bit_cast<float>(kPoison); }
  size_t size_, begin_;
  std::vector<float> all_;
};

inline int failures = 0;

inline void Fail(const Kernels& kernels, const Sample& sample, const std::string& what) {
  std::printf("FAILED %s: %s; %s\n", kernels.name, what.c_str(), sample.Text().c_str());
  ++failures;
}

// Of one row of a form: all kernels of a table against the portable one, or that against the format.
void CheckKernels(const Kernels& kernels, const Sample& sample);
void CheckPlan(const Kernels& kernels, unsigned seed);
void Bench(const std::vector<const Kernels*>& tables);

// Linear layers: their kernels, whole layers, the error of tables, and nodes that make no sense.
void CheckLayerKernels(const Kernels& kernels, unsigned seed);
void CheckDots(const Kernels& kernels, unsigned seed);
void CheckEntries(const Kernels& kernels, unsigned seed);
void CheckLayers(const Kernels& kernels, unsigned seed);
void CheckErrors(const Kernels& kernels);
void CheckSizes(const Kernels& kernels);
void FuzzLayers(const Kernels& kernels, unsigned seeds);
void BenchLayers(const std::vector<const Kernels*>& tables);
void BenchTables(const std::vector<const Kernels*>& tables);

}  // namespace vqonnx::check

#endif  // VQONNX_CHECK_H_
