// Checks of whole linear layers, against sums in double precision that share no code with them.
#include <algorithm>

#include "check_node.h"

namespace vqonnx::check {
namespace {

void Form(Node& node, Random& random, size_t rows, size_t cols, size_t width) {
  Sample& sample = node.sample;
  sample.bits = PickBits(random);
  sample.stages = Pick(random, 1, 2);
  sample.width = width;
  sample.rows = rows;
  sample.cols = cols;
  sample.groups = (cols + width - 1) / width;
  const size_t books[] = {1, 2, sample.groups};
  sample.books = std::min(sample.groups, books[Pick(random, 0, 2)]);
  sample.words = Pick(random, 1, MostWords(sample));
  Fill(sample, random, false);
  node.layout = {static_cast<std::int64_t>(sample.bits), static_cast<std::int64_t>(cols)};
}

// The dense weight, [rows][cols] of the matrix.
std::vector<float> Dense(const Sample& sample) {
  std::vector<float> dense(sample.rows * sample.cols);
  for (size_t i = 0; i < dense.size(); ++i) dense[i] = sample.ValueAt(i / sample.cols, i % sample.cols);
  return dense;
}

// How far a sum of `blocks` table entries may be off: each by its rounding, and that of x and of the words.
double TableError(const Sample& sample, const std::vector<float>& x, size_t blocks, size_t row) {
  double most_x = 0.0, most_word = 0.0;
  for (const float value : x) most_x = std::max(most_x, std::fabs(double{value}));
  for (size_t i = 0; i + kPad < sample.codebooks.size(); ++i)
    most_word = std::max(most_word, std::fabs(double{sample.codebooks[i]}));
  const double width = static_cast<double>(sample.width);
  return static_cast<double>(blocks * sample.stages) * 2.0 * width * most_x * most_word / 32000.0 *
         std::fabs(double{sample.scales[row]});
}

void Compare(const Kernels& kernels, const Node& node, const char* what, Guarded& out, const std::vector<double>& want,
             const std::vector<double>& bound) {
  if (!out.Intact()) return Fail(kernels, node.sample, std::string(what) + " writes beside its output");
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::fabs(double{out.data()[i]} - want[i]) <= bound[i]) continue;
    return Fail(kernels, node.sample, std::string(what) + " differs at " + std::to_string(i));
  }
}

const char* HowOf(Precision precision) {
  switch (precision) {
    case Precision::kExact:
      return "";
    case Precision::kEntries:
      return " by entries";
    case Precision::kShorts:
      return " by entries of 16 bits";
    default:
      return " by tables";
  }
}

void CheckMatrix(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Node node;
  node.sample.seed = seed;
  const size_t rows = Pick(random, 0, 3) ? Pick(random, 1, 6) : Pick(random, 7, 20);
  const size_t inputs = Pick(random, 0, 3) ? Pick(random, 1, 90) : Pick(random, 500, 800);
  const size_t outputs = Pick(random, 0, 3) ? Pick(random, 1, 80) : kStripRows * Pick(random, 1, 3);
  const bool by_output = Pick(random, 0, 4) != 0, transposed = Pick(random, 0, 1) != 0;
  Form(node, random, by_output ? outputs : inputs, by_output ? inputs : outputs, Pick(random, 1, 20));
  node.layout.insert(node.layout.end(),
                     {static_cast<std::int64_t>(node.sample.rows), static_cast<std::int64_t>(node.sample.cols)});
  node.perm = by_output == transposed ? Dims{0, 1} : Dims{1, 0};
  const std::vector<float> dense = Dense(node.sample);
  std::vector<float> x(rows * inputs), bias(outputs), addend(rows * outputs);
  for (std::vector<float>* values : {&x, &bias, &addend}) {
    for (float& value : *values) value = Value(random, false);
  }
  std::vector<double> sums(rows * outputs), scales(rows * outputs);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t o = 0; o < outputs; ++o) {
      double sum = bias[o], scale = std::fabs(sum);
      for (size_t k = 0; k < inputs; ++k) {
        const double product = double{dense[by_output ? o * inputs + k : k * outputs + o]} * x[r * inputs + k];
        sum += product;
        scale += std::fabs(product);
      }
      sums[r * outputs + o] = sum;
      scales[r * outputs + o] = scale;
    }
  }
  for (const Precision precision : {Precision::kExact, Precision::kEntries, Precision::kShorts, Precision::kTables}) {
    const Matrix matrix(node.View(), node.perm, transposed, precision, kernels);
    const bool is_rounded = precision == Precision::kTables || precision == Precision::kShorts;
    Guarded out(rows * outputs, 0);
    Call call = {.x = x.data(),
                 .codes = node.sample.View().codes,
                 .bias = bias.data(),
                 .addend = seed % 2 ? addend.data() : nullptr};
    if (seed % 3 == 0) call.activation.low = 0.0F;
    call.activation.silu = seed % 5 == 1;
    call.out = out.data();
    const auto run = [&](const Call& its, const Tasks& tasks) { matrix.Run(its, rows, tasks); };
    const std::string what = "Matrix" + std::string(HowOf(precision));
    run(call, Shuffled(seed));
    if (seed % 3 == 0) CheckThreads(kernels, node.sample, what, call, rows * outputs, run);
    std::vector<double> want(rows * outputs), bound(rows * outputs);
    for (size_t i = 0; i < want.size(); ++i) {
      want[i] = Activated(call.addend != nullptr ? sums[i] + addend[i] : sums[i], call.activation);
      bound[i] = kSiluRise * 1e-5 * scales[i] + 1e-6;
      if (is_rounded && by_output) {
        bound[i] += kSiluRise * TableError(node.sample, x, node.sample.groups, i % outputs);
      }
    }
    Compare(kernels, node, what.c_str(), out, want, bound);
  }
}

void CheckConv(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Node node;
  node.sample.seed = seed;
  const size_t groups = Pick(random, 0, 2) ? 1 : Pick(random, 2, 4);
  const size_t few = Pick(random, 0, 5) ? Pick(random, 1, 12) : Pick(random, 30, 70);
  const size_t outputs = groups * (Pick(random, 0, 5) ? few : groups == 1 ? kStripRows * Pick(random, 1, 2) : 32);
  const size_t width = Pick(random, 1, 10);
  const size_t channels = Pick(random, 0, 1) ? width * Pick(random, 1, 2) : Pick(random, 1, 8);  // of a group
  size_t kernel[2], image[2], out_size[2];
  for (size_t axis = 0; axis < 2; ++axis) {
    kernel[axis] = Pick(random, 1, 3);
    node.strides.push_back(static_cast<std::int64_t>(Pick(random, 1, 3)));
    node.dilations.push_back(static_cast<std::int64_t>(Pick(random, 1, 2)));
    image[axis] = Pick(random, 0, 9) ? Pick(random, 5, 12) : Pick(random, 5, 40);
    if (axis == 0 && Pick(random, 0, 9) == 0) image[axis] = Pick(random, 48, 80);  // enough for several bands
  }
  for (size_t i = 0; i < 4; ++i) node.pads.push_back(static_cast<std::int64_t>(Pick(random, 0, 2)));
  if (Pick(random, 0, 9) == 0) {  // rows at the border of many kinds, and more than one piece of columns
    kernel[0] = Pick(random, 4, 25);
    node.dilations[0] = 1;
    node.pads[0] = node.pads[2] = static_cast<std::int64_t>(kernel[0] / 2 + Pick(random, 0, 3));
  }
  for (size_t axis = 0; axis < 2; ++axis) {
    const auto stride = static_cast<size_t>(node.strides[axis]), dilation = static_cast<size_t>(node.dilations[axis]);
    const size_t padded = image[axis] + static_cast<size_t>(node.pads[axis] + node.pads[axis + 2]);
    out_size[axis] = (padded - (kernel[axis] - 1) * dilation - 1) / stride + 1;
  }
  const size_t taps = kernel[0] * kernel[1];
  const size_t order = Pick(random, 0, 3);  // 0, 1: hwi, 2: ihw, 3: ohw
  Form(node, random, order == 3 ? channels : outputs, order == 3 ? outputs * taps : channels * taps, width);
  const auto o = static_cast<std::int64_t>(outputs), c = static_cast<std::int64_t>(channels);
  const auto ky = static_cast<std::int64_t>(kernel[0]), kx = static_cast<std::int64_t>(kernel[1]);
  const Dims sizes = order < 2 ? Dims{o, ky, kx, c} : order == 2 ? Dims{o, c, ky, kx} : Dims{c, o, ky, kx};
  node.layout.insert(node.layout.end(), sizes.begin(), sizes.end());
  node.perm = order < 2 ? Dims{0, 3, 1, 2} : order == 2 ? Dims{0, 1, 2, 3} : Dims{1, 0, 2, 3};
  node.group = static_cast<std::int64_t>(groups);
  const std::vector<float> dense = Dense(node.sample);
  const size_t images = Pick(random, 0, 9) ? Pick(random, 1, 2) : 8;  // many have one band each
  const size_t all_channels = groups * channels, out_plane = out_size[0] * out_size[1];
  std::vector<float> x(images * all_channels * image[0] * image[1]), bias(outputs),
      addend(images * outputs * out_plane);
  for (std::vector<float>* values : {&x, &bias, &addend}) {
    for (float& value : *values) value = Value(random, false);
  }
  const Dims shape = {static_cast<std::int64_t>(images), static_cast<std::int64_t>(all_channels),
                      static_cast<std::int64_t>(image[0]), static_cast<std::int64_t>(image[1])};
  std::vector<double> sums(addend.size()), scales(addend.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t col = i % out_size[1], row = i / out_size[1] % out_size[0];
    const size_t output = i / out_plane % outputs, n = i / out_plane / outputs;
    double sum = bias[output], scale = std::fabs(sum);
    for (size_t channel = 0; channel < channels; ++channel) {
      for (size_t tap = 0; tap < taps; ++tap) {
        const size_t y = row * static_cast<size_t>(node.strides[0]) +
                         tap / kernel[1] * static_cast<size_t>(node.dilations[0]) - static_cast<size_t>(node.pads[0]);
        const size_t z = col * static_cast<size_t>(node.strides[1]) +
                         tap % kernel[1] * static_cast<size_t>(node.dilations[1]) - static_cast<size_t>(node.pads[1]);
        if (y >= image[0] || z >= image[1]) continue;  // before the image it wraps around
        const size_t all = n * all_channels + output / (outputs / groups) * channels + channel;
        const size_t at = order < 2    ? (output * taps + tap) * channels + channel
                          : order == 2 ? (output * channels + channel) * taps + tap
                                       : (channel * outputs + output) * taps + tap;
        const double product = double{dense[at]} * x[(all * image[0] + y) * image[1] + z];
        sum += product;
        scale += std::fabs(product);
      }
    }
    sums[i] = sum;
    scales[i] = scale;
  }
  for (const Precision precision : {Precision::kExact, Precision::kEntries, Precision::kShorts, Precision::kTables}) {
    const Conv conv(node.View(), node.perm, node.strides, node.dilations, node.pads, node.group, precision, kernels);
    const Dims expected = {shape[0], o, static_cast<std::int64_t>(out_size[0]), static_cast<std::int64_t>(out_size[1])};
    if (conv.OutputShape(shape) != expected) return Fail(kernels, node.sample, "Conv has a wrong shape");
    const bool is_rounded = precision == Precision::kTables || precision == Precision::kShorts;
    Guarded out(addend.size(), 0);
    Call call = {.x = x.data(),
                 .codes = node.sample.View().codes,
                 .bias = bias.data(),
                 .addend = seed % 2 ? addend.data() : nullptr};
    if (seed % 3 == 0) call.activation.high = 0.5F;
    call.activation.silu = seed % 5 == 1;
    call.out = out.data();
    const auto run = [&](const Call& its, const Tasks& tasks) { conv.Run(its, shape, tasks); };
    const std::string what = "Conv" + std::string(HowOf(precision));
    run(call, Shuffled(seed));
    if (seed % 3 == 0) CheckThreads(kernels, node.sample, what, call, addend.size(), run);
    std::vector<double> want(addend.size()), bound(addend.size());
    for (size_t i = 0; i < want.size(); ++i) {
      want[i] = Activated(call.addend != nullptr ? sums[i] + addend[i] : sums[i], call.activation);
      bound[i] = kSiluRise * 1e-5 * scales[i] + 1e-6;
      if (is_rounded && order < 3) {
        bound[i] += kSiluRise * TableError(node.sample, x, node.sample.groups, i / out_plane % outputs);
      }
    }
    Compare(kernels, node, what.c_str(), out, want, bound);
  }
}

}  // namespace

void CheckLayers(const Kernels& kernels, unsigned seed) {
  CheckMatrix(kernels, seed);
  CheckConv(kernels, seed);
}

}  // namespace vqonnx::check
