// Checks every table of kernels that this processor has against the portable one, and the portable one and the plan of
// Decode against computations that share no code with them. With --bench, times the tables instead.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "decode.h"
#include "kernels.h"

namespace {

using std::size_t;
using vqonnx::Kernels;

using Random = std::mt19937;

size_t Pick(Random& random, size_t low, size_t high) {
  return std::uniform_int_distribution<size_t>(low, high)(random);
}

// A coded matrix with all that it points to.
struct Sample {
  size_t stages, rows, groups, bits, books, words, width, cols;
  unsigned seed;
  std::vector<std::uint8_t> storage;  // `shift` bytes, so that rows are not aligned, then the codes and not a byte more
  size_t shift;
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
            .width = width};
  }

  // Bit by bit, as the format says it.
  size_t CodeAt(size_t stage, size_t row, size_t group) const {
    const std::uint8_t* string = storage.data() + shift + (stage * rows + row) * RowBytes();
    size_t code = 0;
    for (size_t bit = 0; bit < bits; ++bit) {
      const size_t k = group * bits + bit;
      code |= static_cast<size_t>(string[k / 8] >> (k % 8) & 1) << bit;
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
           std::to_string(cols);
  }
};

float Value(Random& random, bool special) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kDenormal = std::numeric_limits<float>::denorm_min();
  const float specials[] = {0.0F, -0.0F, kInfinity, -kInfinity, kDenormal, -3 * kDenormal, std::nanf(""), 3e38F};
  if (special && Pick(random, 0, 9) == 0) return specials[Pick(random, 0, 7)];
  return std::normal_distribution<float>(0.0F, 1.0F)(random);
}

// Codes, codebooks and scales for the sizes that `sample` has.
void Fill(Sample& sample, Random& random, bool special) {
  sample.shift = Pick(random, 0, 7);
  sample.storage.assign(sample.shift + sample.stages * sample.rows * sample.RowBytes(), 0);
  for (size_t line = 0; line < sample.stages * sample.rows; ++line) {
    std::uint8_t* string = sample.storage.data() + sample.shift + line * sample.RowBytes();
    for (size_t group = 0; group < sample.groups; ++group) {
      const size_t code = Pick(random, 0, sample.words - 1);
      for (size_t bit = 0; bit < sample.bits; ++bit) {
        const size_t k = group * sample.bits + bit;
        string[k / 8] = static_cast<std::uint8_t>(string[k / 8] | (code >> bit & 1) << (k % 8));
      }
    }
    const size_t used = sample.groups * sample.bits % 8;  // bits beyond the last code are to be ignored
    if (used != 0) string[sample.RowBytes() - 1] |= static_cast<std::uint8_t>(0xFF << used);
  }
  sample.codebooks.resize(sample.stages * sample.books * sample.words * sample.width);
  for (float& value : sample.codebooks) value = Value(random, special);
  sample.codebooks.resize(sample.codebooks.size() + vqonnx::kPad, std::nanf(""));
  sample.scales.resize(sample.rows);
  for (float& scale : sample.scales) scale = Value(random, special);
}

size_t PickBits(Random& random) { return Pick(random, 0, 2) ? Pick(random, 1, 8) : Pick(random, 9, vqonnx::kMaxBits); }

// As many as the bits reach, but beyond 256 no more than make codebooks of 256 KB.
size_t MostWords(const Sample& sample) {
  constexpr size_t kFloats = 1 << 16;
  const size_t affordable = std::max<size_t>(256, kFloats / (sample.stages * sample.books * sample.width));
  return std::min(size_t{1} << sample.bits, affordable);
}

Sample RandomSample(unsigned seed) {
  Random random(seed);
  Sample sample = {};
  sample.seed = seed;
  sample.bits = PickBits(random);
  sample.stages = Pick(random, 0, 19) == 0 ? Pick(random, 9, 12) : Pick(random, 1, 3);
  sample.width = Pick(random, 1, 20);
  sample.rows = Pick(random, 1, 4);
  sample.groups = Pick(random, 0, 2) ? Pick(random, 1, 40) : Pick(random, 60, 200);
  const size_t books[] = {1, sample.groups, Pick(random, 1, sample.groups)};
  sample.books = books[Pick(random, 0, 2)];
  sample.words = Pick(random, 0, 1) ? MostWords(sample) : Pick(random, 1, MostWords(sample));
  sample.cols = sample.groups * sample.width - Pick(random, 0, sample.width - 1);
  Fill(sample, random, true);
  return sample;
}

bool Same(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
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

int failures = 0;

void Fail(const Kernels& kernels, const Sample& sample, const std::string& what) {
  std::printf("FAILED %s: %s; %s\n", kernels.name, what.c_str(), sample.Text().c_str());
  ++failures;
}

template <class Code>
void CheckUnpack(const Kernels& kernels, const Sample& sample,
                 void (*unpack)(const std::uint8_t*, size_t, size_t, size_t, Code*)) {
  std::vector<Code> codes((sample.groups + 7) / 8 * 8, 0xEE);
  for (size_t line = 0; line < sample.stages * sample.rows; ++line) {
    const std::uint8_t* packed = sample.View().codes + line * sample.RowBytes();
    unpack(packed, sample.RowBytes(), sample.bits, sample.groups, codes.data());
    for (size_t group = 0; group < sample.groups; ++group) {
      if (codes[group] != sample.CodeAt(line / sample.rows, line % sample.rows, group)) {
        return Fail(kernels, sample,
                    "unpack differs at line " + std::to_string(line) + ", group " + std::to_string(group));
      }
    }
  }
}

// Rows at once and in pieces, into buffers that are not aligned; against `Expected(row, col)`.
template <class Expected>
void CheckRows(const Kernels& kernels, const Sample& sample, Expected expected) {
  const vqonnx::Coded view = sample.View();
  const size_t piece = vqonnx::kOctet * sample.width * (1 + sample.seed % 9);
  for (size_t row = 0; row < sample.rows; ++row) {
    for (const size_t step : {sample.cols, piece}) {
      for (size_t col = 0; col < sample.cols; col += step) {
        const size_t cols = std::min(step, sample.cols - col);
        Guarded out(cols, sample.seed % 5);
        kernels.decode_row(view, row, col / sample.width, cols, sample.scales[row], out.data());
        if (!out.Intact()) return Fail(kernels, sample, "decode_row writes beside row " + std::to_string(row));
        for (size_t i = 0; i < cols; ++i) {
          if (Same(out.data()[i], expected(row, col + i))) continue;
          return Fail(kernels, sample,
                      "decode_row differs at row " + std::to_string(row) + ", column " + std::to_string(col + i) +
                          " of the piece at " + std::to_string(col));
        }
      }
    }
  }
}

void CheckTranspose(const Kernels& kernels, const Sample& sample) {
  Random random(sample.seed);
  const size_t rows = Pick(random, 1, 40), cols = Pick(random, 1, 40);
  const size_t from_stride = cols + Pick(random, 0, 9), to_stride = rows + Pick(random, 0, 9);
  std::vector<float> from((rows - 1) * from_stride + cols);  // not a value more than may be read
  for (float& value : from) value = Value(random, false);
  Guarded out((cols - 1) * to_stride + rows, sample.seed % 5);
  std::vector<float> expected(out.data(), out.data() + (cols - 1) * to_stride + rows);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < cols; ++c) expected[c * to_stride + r] = from[r * from_stride + c];
  }
  kernels.transpose(from.data(), from_stride, rows, cols, out.data(), to_stride);
  if (!out.Intact() || !std::equal(expected.begin(), expected.end(), out.data())) {
    Fail(kernels, sample, "transpose of " + std::to_string(rows) + " by " + std::to_string(cols));
  }
}

void CheckKernels(const Kernels& kernels, const Sample& sample) {
  if (sample.bits <= 8) {
    CheckUnpack(kernels, sample, kernels.unpack);
  } else {
    CheckUnpack(kernels, sample, kernels.unpack_wide);
  }
  CheckTranspose(kernels, sample);
  if (&kernels == &vqonnx::kPortable) {
    return CheckRows(kernels, sample, [&](size_t row, size_t col) { return sample.ValueAt(row, col); });
  }
  std::vector<float> matrix(sample.rows * sample.cols);
  for (size_t row = 0; row < sample.rows; ++row) {
    vqonnx::kPortable.decode_row(sample.View(), row, 0, sample.cols, sample.scales[row], &matrix[row * sample.cols]);
  }
  CheckRows(kernels, sample, [&](size_t row, size_t col) { return matrix[row * sample.cols + col]; });
}

// Random axes, sometimes not along the rows, and any order of them: each value must come to its place, whatever the
// order of the tasks.
void CheckPlan(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Sample sample = {};
  sample.seed = seed;
  sample.bits = PickBits(random);
  sample.stages = Pick(random, 1, 2);
  sample.width = Pick(random, 1, 9);
  std::vector<std::int64_t> sizes;
  for (size_t n = Pick(random, 1, 5); n > 0; --n)
    sizes.push_back(static_cast<std::int64_t>(Pick(random, 1, n < 3 ? 40 : 5)));
  const size_t count = std::accumulate(sizes.begin(), sizes.end(), size_t{1},
                                       [](size_t a, std::int64_t b) { return a * static_cast<size_t>(b); });
  sample.rows = 1;
  for (size_t i = 0, n = Pick(random, 0, sizes.size()); i < n; ++i) sample.rows *= static_cast<size_t>(sizes[i]);
  if (Pick(random, 0, 3) == 0) std::shuffle(sizes.begin(), sizes.end(), random);
  sample.cols = count / sample.rows;
  sample.groups = (sample.cols + sample.width - 1) / sample.width;
  sample.books = Pick(random, 0, 1) ? 1 : sample.groups;
  sample.words = Pick(random, 1, MostWords(sample));
  Fill(sample, random, false);
  sample.scales.assign(sample.rows, sample.scales[0]);

  std::vector<std::int64_t> perm(sizes.size());
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), random);
  std::vector<std::int64_t> layout = {static_cast<std::int64_t>(sample.bits), static_cast<std::int64_t>(sample.cols)};
  layout.insert(layout.end(), sizes.begin(), sizes.end());
  const auto dims = [](std::initializer_list<size_t> list) {
    return std::vector<std::int64_t>(list.begin(), list.end());
  };
  const vqonnx::Inputs inputs = {
      .codes = {sample.View().codes, vqonnx::Type::kUint8, dims({sample.stages, sample.rows, sample.RowBytes()})},
      .codebooks = {sample.codebooks.data(), vqonnx::Type::kFloat32,
                    dims({sample.stages, sample.books, sample.words, sample.width})},
      .scales = {sample.scales.data(), vqonnx::Type::kFloat32, dims({Pick(random, 0, 1) ? 1 : sample.rows, 1})},
      .layout = {layout.data(), vqonnx::Type::kInt64, dims({layout.size()})}};
  const vqonnx::Decode decode(inputs, perm, kernels);
  Guarded out(count, 0);
  std::vector<size_t> tasks(decode.tasks());
  std::iota(tasks.begin(), tasks.end(), size_t{0});
  std::shuffle(tasks.begin(), tasks.end(), random);
  for (const size_t task : tasks) decode.Run(inputs.codes, inputs.scales, task, out.data());
  if (!out.Intact()) return Fail(kernels, sample, "Decode writes beside its output");
  for (size_t flat = 0; flat < count; ++flat) {
    std::vector<size_t> index(sizes.size());
    for (size_t i = sizes.size(), rest = flat; i-- > 0; rest /= static_cast<size_t>(sizes[i])) {
      index[i] = rest % static_cast<size_t>(sizes[i]);
    }
    size_t place = 0;
    for (const std::int64_t axis : perm) {
      place = place * static_cast<size_t>(sizes[static_cast<size_t>(axis)]) + index[static_cast<size_t>(axis)];
    }
    if (Same(out.data()[place], sample.ValueAt(flat / sample.cols, flat % sample.cols))) continue;
    return Fail(kernels, sample, "Decode puts a wrong value at " + std::to_string(place));
  }
}

void Bench(const std::vector<const Kernels*>& tables) {
  struct Shape {
    size_t bits, stages, width, groups;
  };
  const Shape shapes[] = {{8, 1, 4, 576},  {8, 1, 8, 288},  {8, 1, 9, 256},  {8, 1, 16, 144}, {6, 1, 4, 576},
                          {5, 1, 9, 256},  {4, 1, 8, 288},  {8, 2, 8, 288},  {6, 3, 9, 256},  {1, 1, 1, 2304},
                          {4, 1, 1, 2304}, {5, 2, 1, 2304}, {8, 1, 1, 2304}, {3, 1, 2, 1152}, {11, 1, 4, 576},
                          {10, 1, 8, 288}, {12, 2, 8, 288}};
  std::printf("GB/s of float32 written (one thread, codes and output in cache)\n%-34s", "");
  for (const Kernels* kernels : tables) std::printf("%10s", kernels->name);
  std::printf("\n");
  for (const Shape& shape : shapes) {
    Sample sample = {.stages = shape.stages,
                     .rows = 64,
                     .groups = shape.groups,
                     .bits = shape.bits,
                     .books = 1,
                     .words = size_t{1} << shape.bits,
                     .width = shape.width,
                     .cols = shape.groups * shape.width,
                     .seed = 1,
                     .storage = {},
                     .shift = 0,
                     .codebooks = {},
                     .scales = {}};
    Random random(sample.seed);
    Fill(sample, random, false);
    std::vector<float> out(sample.cols);
    std::printf("bits %zu, stages %zu, width %2zu          ", shape.bits, shape.stages, shape.width);
    for (const Kernels* kernels : tables) {
      double best = 0;
      for (int repeat = 0; repeat < 20; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int again = 0; again < 4; ++again) {
          for (size_t row = 0; row < sample.rows; ++row) {
            kernels->decode_row(sample.View(), row, 0, sample.cols, sample.scales[row], out.data());
          }
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, 4.0 * static_cast<double>(sample.rows * sample.cols * sizeof(float)) / seconds.count());
      }
      std::printf("%10.1f", best * 1e-9);
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Kernels* usable[vqonnx::kMaxTables];
  const std::vector<const Kernels*> tables(usable, usable + vqonnx::UsableKernels(usable));
  if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
    Bench(tables);
    return 0;
  }
  const unsigned seeds = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 500;
  std::string names;
  for (const Kernels* kernels : tables) {
    names += std::string(" ") + kernels->name;
    for (unsigned seed = 0; seed < seeds && failures < 20; ++seed) {
      CheckKernels(*kernels, RandomSample(seed));
      CheckPlan(*kernels, seed);
    }
  }
  std::printf("kernels_check: %s, %u seeds of%s\n", failures ? "FAILED" : "ok", seeds, names.c_str());
  return failures ? 1 : 0;
}
