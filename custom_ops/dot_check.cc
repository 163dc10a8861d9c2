// Checks of products of a few vectors with rows of a coded matrix.
#include <cmath>

#include "check.h"

namespace vqonnx::check {
namespace {

// Any rows of a matrix of any form, whose words may be anything.
void CheckDot(const Kernels& kernels, Sample sample, Random& random) {
  const size_t first = Pick(random, 0, sample.rows - 1), rows = Pick(random, 1, sample.rows - first);
  const size_t batch = Pick(random, 1, kMostDots), stride = sample.cols + Pick(random, 0, 3);
  std::vector<float> x = Values(random, (batch - 1) * stride + sample.cols, false);
  Guarded out(batch * rows, sample.seed % 5);
  kernels.dot({.matrix = sample.View(),
               .row = first,
               .rows = rows,
               .cols = sample.cols,
               .x = x.data(),
               .x_stride = stride,
               .batch = batch,
               .out = out.data(),
               .out_stride = rows});
  if (!out.Intact()) return Fail(kernels, sample, "dot writes beside its output");
  sample.scales.assign(sample.rows, 1.0F);
  for (size_t b = 0; b < batch; ++b) {
    for (size_t row = 0; row < rows; ++row) {
      double want = 0.0, scale = 0.0;
      bool overflows = false;  // a value whose words are finite
      for (size_t col = 0; col < sample.cols; ++col) {
        bool finite = true;
        for (size_t s = 0; s < sample.stages; ++s) {  // one by one: they may cancel each other
          const size_t place = (s * sample.books + col / sample.width % sample.books) * sample.words +
                               sample.CodeAt(s, first + row, col / sample.width);
          const float word = sample.codebooks[place * sample.width + col % sample.width];
          const double product = double{word} * x[b * stride + col];
          finite = finite && std::isfinite(word);
          want += product;
          scale += std::fabs(product);
        }
        overflows = overflows || (finite && !std::isfinite(sample.ValueAt(first + row, col)));
      }
      const float got = out.data()[b * rows + row];
      // What overflows on the way depends on the order; nothing else may come out without a word that is not finite.
      const bool may_overflow = std::isfinite(scale) && (overflows || scale > 1e37);
      if (!std::isfinite(got) ? may_overflow || !std::isfinite(want) : std::isfinite(want) && Close(got, want, scale)) {
        continue;
      }
      return Fail(kernels, sample, "dot differs at row " + std::to_string(row) + ", vector " + std::to_string(b));
    }
  }
}

// A matrix of many rows, with so few words that tables are made of them.
Sample WithFewWords(unsigned seed) {
  Random random(seed);
  Sample sample = {};
  sample.seed = seed;
  sample.bits = Pick(random, 1, 8);
  sample.stages = Pick(random, 1, 3);
  sample.width = Pick(random, 1, 12);
  sample.rows = Pick(random, 0, 7) == 0 ? Pick(random, 500, 700) : Pick(random, 60, 260);
  if (Pick(random, 0, 2) == 0) sample.rows = (sample.rows - 1) / kStripRows * kStripRows + kStripRows;
  sample.groups = Pick(random, 0, 2) ? Pick(random, 1, 40) : Pick(random, 60, 600);
  sample.books = 1;
  sample.words = Pick(random, 1, std::min<size_t>(size_t{1} << sample.bits, 16));
  sample.cols = sample.groups * sample.width - Pick(random, 0, sample.width - 1);
  Fill(sample, random, seed % 3 == 0);
  return sample;
}

}  // namespace

void CheckDots(const Kernels& kernels, unsigned seed) {
  Random random(~seed);  // other numbers than those of the samples
  CheckDot(kernels, RandomSample(seed), random);
  CheckDot(kernels, WithFewWords(seed), random);
}

}  // namespace vqonnx::check
