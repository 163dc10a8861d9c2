// Checks of decoding: each table against the portable one, and the portable one and the plan of Decode against
// computations that share no code with them.
#include <algorithm>
#include <chrono>
#include <numeric>

#include "check.h"

namespace vqonnx::check {
namespace {

template <class Code>
void CheckUnpack(const Kernels& kernels, const Sample& sample,
                 void (*unpack)(const std::uint8_t*, size_t, size_t, size_t, Code*)) {
  std::vector<Code> codes((sample.groups + 7) / 8 * 8, 0xEE);
  for (size_t line = 0; line < sample.stages * sample.rows; ++line) {
    std::vector<std::uint8_t> packed;
    for (size_t byte = 0; byte < sample.RowBytes(); ++byte) {
      packed.push_back(sample.storage[sample.PlaceOf(line / sample.rows, line % sample.rows, byte)]);
    }
    unpack(packed.data(), sample.RowBytes(), sample.bits, sample.groups, codes.data());
    for (size_t group = 0; group < sample.groups; ++group) {
      if (codes[group] != sample.CodeAt(line / sample.rows, line % sample.rows, group)) {
        return Fail(kernels, sample,
                    "unpack differs at line " + std::to_string(line) + ", group " + std::to_string(group));
      }
    }
  }
}

// Rows whole and in pieces, one by one and several at once, into buffers that are not aligned; against `Expected(row,
// col)`.
template <class Expected>
void CheckRows(const Kernels& kernels, const Sample& sample, Expected expected) {
  const Coded view = sample.View();
  const size_t piece = kOctet * sample.width * (1 + sample.seed % 9);
  const size_t several = 2 + sample.seed % 70;
  for (const auto& [most_rows, step] : {std::pair{size_t{1}, sample.cols}, {size_t{1}, piece}, {several, piece}}) {
    for (size_t row = 0; row < sample.rows; row += most_rows) {
      const size_t rows = std::min(most_rows, sample.rows - row);
      for (size_t col = 0; col < sample.cols; col += step) {
        const size_t cols = std::min(step, sample.cols - col), stride = cols + (rows > 1 ? sample.seed % 3 : 0);
        Guarded out((rows - 1) * stride + cols, sample.seed % 5);
        const std::vector<float> before(out.data(), out.data() + (rows - 1) * stride + cols);
        kernels.decode_rows(view, row, rows, col / sample.width, cols, &sample.scales[row], out.data(), stride);
        const auto fail = [&](const char* what, size_t at) {
          Fail(kernels, sample,
               "decode_rows " + std::string(what) + " at row " + std::to_string(row + at / stride) + " of " +
                   std::to_string(rows) + " from " + std::to_string(row) + ", column " + std::to_string(at % stride) +
                   " of the piece at " + std::to_string(col));
        };
        if (!out.Intact()) return fail("writes beside its output", 0);
        for (size_t i = 0; i < before.size(); ++i) {
          const bool is_value = i % stride < cols;
          if (!Same(out.data()[i], is_value ? expected(row + i / stride, col + i % stride) : before[i])) {
            return fail(is_value ? "differs" : "writes between its rows", i);
          }
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

}  // namespace

void CheckKernels(const Kernels& kernels, const Sample& sample) {
  if (sample.bits <= 8) {
    CheckUnpack(kernels, sample, kernels.unpack);
  } else {
    CheckUnpack(kernels, sample, kernels.unpack_wide);
  }
  CheckTranspose(kernels, sample);
  if (&kernels == &kPortable) {
    return CheckRows(kernels, sample, [&](size_t row, size_t col) { return sample.ValueAt(row, col); });
  }
  std::vector<float> matrix(sample.rows * sample.cols);
  kPortable.decode_rows(sample.View(), 0, sample.rows, 0, sample.cols, sample.scales.data(), matrix.data(),
                        sample.cols);
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
  const bool strips = Pick(random, 0, 4) == 0;
  if (strips) sizes.insert(sizes.begin(), 64);
  const size_t count = std::accumulate(sizes.begin(), sizes.end(), size_t{1},
                                       [](size_t a, std::int64_t b) { return a * static_cast<size_t>(b); });
  sample.rows = 1;
  for (size_t i = 0, n = Pick(random, strips ? 1 : 0, sizes.size()); i < n; ++i)
    sample.rows *= static_cast<size_t>(sizes[i]);
  if (Pick(random, 0, 3) == 0) std::shuffle(sizes.begin(), sizes.end(), random);
  sample.cols = count / sample.rows;
  sample.groups = (sample.cols + sample.width - 1) / sample.width;
  sample.books = Pick(random, 0, 1) ? 1 : sample.groups;
  sample.words = Pick(random, 1, MostWords(sample));
  Fill(sample, random, false);
  sample.scales.assign(sample.rows, sample.scales[0]);
  std::vector<std::int8_t> whole;  // a codebook of whole numbers, now and then
  if (Pick(random, 0, 2) == 0) {
    whole.resize(sample.codebooks.size() - vqonnx::kPad);
    for (size_t i = 0; i < whole.size(); ++i) {
      whole[i] = static_cast<std::int8_t>(static_cast<int>(Pick(random, 0, 255)) - 128);
      sample.codebooks[i] = whole[i];
    }
  }
  const void* words = whole.empty() ? static_cast<const void*>(sample.codebooks.data()) : whole.data();

  std::vector<std::int64_t> perm(sizes.size());
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), random);
  std::vector<std::int64_t> layout = {static_cast<std::int64_t>(sample.bits), static_cast<std::int64_t>(sample.cols)};
  layout.insert(layout.end(), sizes.begin(), sizes.end());
  const auto dims = [](std::initializer_list<size_t> list) {
    return std::vector<std::int64_t>(list.begin(), list.end());
  };
  const Inputs inputs = {
      .codes = {sample.View().codes, Type::kUint8, sample.CodesShape()},
      .codebooks = {words, whole.empty() ? Type::kFloat32 : Type::kInt8,
                    dims({sample.stages, sample.books, sample.words, sample.width})},
      .scales = {sample.scales.data(), Type::kFloat32, dims({Pick(random, 0, 1) ? 1 : sample.rows, 1})},
      .layout = {layout.data(), Type::kInt64, dims({layout.size()})}};
  const Decode decode(inputs, perm, kernels);
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
                     .lanes = 1,
                     .codebooks = {},
                     .scales = {}};
    Random random(sample.seed);
    Fill(sample, random, false);
    std::vector<float> out(sample.rows * sample.cols);
    std::printf("bits %zu, stages %zu, width %2zu          ", shape.bits, shape.stages, shape.width);
    for (const Kernels* kernels : tables) {
      double best = 0;
      for (int repeat = 0; repeat < 20; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int again = 0; again < 4; ++again) {
          kernels->decode_rows(sample.View(), 0, sample.rows, 0, sample.cols, sample.scales.data(), out.data(),
                               sample.cols);
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, 4.0 * static_cast<double>(sample.rows * sample.cols * sizeof(float)) / seconds.count());
      }
      std::printf("%10.1f", best * 1e-9);
    }
    std::printf("\n");
  }
}

}  // namespace vqonnx::check
