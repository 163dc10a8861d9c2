// Checks of whole linear layers: against sums in double precision that share no code with them, the error of tables,
// and nodes that make no sense.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>

#include "check.h"
#include "linear.h"

namespace vqonnx::check {
namespace {

using Dims = std::vector<std::int64_t>;

// Every task, in some order.
class Shuffled : public Tasks {
 public:
  explicit Shuffled(unsigned seed) : seed_(seed) {}
  void Run(size_t count, void (*task)(void*, size_t), void* data) const override {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    Random random(seed_);
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t index : order) task(data, index);
  }
  bool Alone() const override { return seed_ % 2 != 0; }

 private:
  unsigned seed_;
};

struct Node {
  Sample sample;
  Dims layout, perm;
  Dims strides, dilations, pads;
  std::int64_t group = 1;

  Inputs View() const {
    const auto dims = [](std::initializer_list<size_t> list) { return Dims(list.begin(), list.end()); };
    return {.codes = {sample.View().codes, Type::kUint8, dims({sample.stages, sample.rows, sample.RowBytes()})},
            .codebooks = {sample.codebooks.data(), Type::kFloat32,
                          dims({sample.stages, sample.books, sample.words, sample.width})},
            .scales = {sample.scales.data(), Type::kFloat32, dims({sample.rows, 1})},
            .layout = {layout.data(), Type::kInt64, dims({layout.size()})}};
  }
};

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

float Clamp(double value, const Call& call) {
  return static_cast<float>(std::min(std::max(value, double{call.low}), double{call.high}));
}

void CheckMatrix(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Node node;
  node.sample.seed = seed;
  const size_t rows = Pick(random, 0, 3) ? Pick(random, 1, 6) : Pick(random, 7, 20);
  const size_t inputs = Pick(random, 0, 3) ? Pick(random, 1, 90) : Pick(random, 500, 800);
  const size_t outputs = Pick(random, 1, 80);
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
  for (const Precision precision : {Precision::kExact, Precision::kTables}) {
    const Matrix matrix(node.View(), node.perm, transposed, precision, kernels);
    Guarded out(rows * outputs, 0);
    Call call = {.x = x.data(),
                 .codes = node.sample.View().codes,
                 .bias = bias.data(),
                 .addend = seed % 2 ? addend.data() : nullptr};
    if (seed % 3 == 0) call.low = 0.0F;
    call.out = out.data();
    matrix.Run(call, rows, Shuffled(seed));
    std::vector<double> want(rows * outputs), bound(rows * outputs);
    for (size_t i = 0; i < want.size(); ++i) {
      want[i] = Clamp(call.addend != nullptr ? sums[i] + addend[i] : sums[i], call);
      bound[i] = 1e-5 * scales[i] + 1e-6;
      if (precision == Precision::kTables && by_output) {
        bound[i] += TableError(node.sample, x, node.sample.groups, i % outputs);
      }
    }
    Compare(kernels, node, precision == Precision::kExact ? "Matrix" : "Matrix by tables", out, want, bound);
  }
}

void CheckConv(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Node node;
  node.sample.seed = seed;
  const size_t groups = Pick(random, 0, 2) ? 1 : Pick(random, 2, 4);
  const size_t outputs = groups * (Pick(random, 0, 5) ? Pick(random, 1, 12) : Pick(random, 30, 70));
  const size_t width = Pick(random, 1, 10);
  const size_t channels = Pick(random, 0, 1) ? width * Pick(random, 1, 2) : Pick(random, 1, 8);  // of a group
  size_t kernel[2], image[2], out_size[2];
  for (size_t axis = 0; axis < 2; ++axis) {
    kernel[axis] = Pick(random, 1, 3);
    node.strides.push_back(static_cast<std::int64_t>(Pick(random, 1, 3)));
    node.dilations.push_back(static_cast<std::int64_t>(Pick(random, 1, 2)));
    image[axis] = Pick(random, 0, 9) ? Pick(random, 5, 12) : Pick(random, 5, 40);
  }
  for (size_t i = 0; i < 4; ++i) node.pads.push_back(static_cast<std::int64_t>(Pick(random, 0, 2)));
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
  const size_t images = Pick(random, 1, 2), all_channels = groups * channels, out_plane = out_size[0] * out_size[1];
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
  for (const Precision precision : {Precision::kExact, Precision::kTables}) {
    const Conv conv(node.View(), node.perm, node.strides, node.dilations, node.pads, node.group, precision, kernels);
    const Dims expected = {shape[0], o, static_cast<std::int64_t>(out_size[0]), static_cast<std::int64_t>(out_size[1])};
    if (conv.OutputShape(shape) != expected) return Fail(kernels, node.sample, "Conv has a wrong shape");
    Guarded out(addend.size(), 0);
    Call call = {.x = x.data(),
                 .codes = node.sample.View().codes,
                 .bias = bias.data(),
                 .addend = seed % 2 ? addend.data() : nullptr};
    if (seed % 3 == 0) call.high = 0.5F;
    call.out = out.data();
    conv.Run(call, shape, Shuffled(seed));
    std::vector<double> want(addend.size()), bound(addend.size());
    for (size_t i = 0; i < want.size(); ++i) {
      want[i] = Clamp(call.addend != nullptr ? sums[i] + addend[i] : sums[i], call);
      bound[i] = 1e-5 * scales[i] + 1e-6;
      if (precision == Precision::kTables && order < 3) {
        bound[i] += TableError(node.sample, x, node.sample.groups, i / out_plane % outputs);
      }
    }
    Compare(kernels, node, precision == Precision::kExact ? "Conv" : "Conv by tables", out, want, bound);
  }
}

double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
    norm += double{want[i]} * want[i];
  }
  return std::sqrt(error / norm);
}

// A layer with one codebook of 256 words.
Node Usual(Random& random, size_t rows, size_t cols, size_t width, const Dims& sizes, const Dims& perm) {
  Node node;
  node.sample.seed = 1;
  node.sample = {.stages = 1,
                 .rows = rows,
                 .groups = cols / width,
                 .bits = 8,
                 .books = 1,
                 .words = 256,
                 .width = width,
                 .cols = cols,
                 .seed = 1,
                 .storage = {},
                 .shift = 0,
                 .codebooks = {},
                 .scales = {}};
  Fill(node.sample, random, false);
  node.layout = {8, static_cast<std::int64_t>(cols)};
  node.layout.insert(node.layout.end(), sizes.begin(), sizes.end());
  node.perm = perm;
  return node;
}

void CheckError(const Kernels& kernels, const Node& node, const std::string& what,
                const std::function<std::vector<float>(Precision, const std::vector<float>&)>& run, size_t inputs) {
  Random random(2);
  std::vector<float> x(inputs);
  for (float& value : x) value = Value(random, false);
  double error = RelativeError(run(Precision::kTables, x), run(Precision::kExact, x));
  if (!(error <= 3e-4)) Fail(kernels, node.sample, what + " by tables is off by " + std::to_string(error));
  x[inputs / 2] = 1000.0F;
  error = RelativeError(run(Precision::kTables, x), run(Precision::kExact, x));
  if (!(error <= 1e-3))
    Fail(kernels, node.sample, what + " by tables, with one input of 1000, is off by " + std::to_string(error));
}

}  // namespace

void CheckLayers(const Kernels& kernels, unsigned seed) {
  CheckMatrix(kernels, seed);
  CheckConv(kernels, seed);
}

void CheckErrors(const Kernels& kernels) {
  if (kernels.sum_tables == nullptr) return;
  Random random(1);
  for (const size_t width : {4, 8, 16}) {
    for (const auto& [outputs, inputs] : {std::pair<size_t, size_t>{250, 512}, {128, 2048}, {512, 1024}}) {
      const Node node = Usual(random, outputs, inputs, width,
                              {static_cast<std::int64_t>(outputs), static_cast<std::int64_t>(inputs)}, {0, 1});
      const std::vector<float> bias(outputs, 0.0F);
      const auto run = [&](Precision precision, const std::vector<float>& x) {
        std::vector<float> out(outputs);
        Call call = {.x = x.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
        call.out = out.data();
        Matrix(node.View(), node.perm, true, precision, kernels).Run(call, 1, Shuffled(1));
        return out;
      };
      CheckError(kernels, node, "Matrix", run, inputs);
    }
    for (const auto& [channels, size] : {std::pair<size_t, size_t>{64, 12}, {128, 6}, {256, 4}}) {
      const auto c = static_cast<std::int64_t>(channels), s = static_cast<std::int64_t>(size);
      const Node node = Usual(random, channels, channels * 9, width, {c, 3, 3, c}, {0, 3, 1, 2});
      const std::vector<float> bias(channels, 0.0F);
      const Dims ones = {1, 1}, pads = {1, 1, 1, 1}, shape = {1, c, s, s};
      const auto run = [&](Precision precision, const std::vector<float>& x) {
        std::vector<float> out(channels * size * size);
        Call call = {.x = x.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
        call.out = out.data();
        Conv(node.View(), node.perm, ones, ones, pads, 1, precision, kernels).Run(call, shape, Shuffled(1));
        return out;
      };
      CheckError(kernels, node, "Conv", run, channels * size * size);
    }
  }
}

void FuzzLayers(const Kernels& kernels, unsigned seeds) {
  unsigned made = 0, refused = 0;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    Random random(seed);
    const bool is_conv = Pick(random, 0, 3) != 0;
    const std::int64_t huge[] = {0,
                                 -1,
                                 1,
                                 2,
                                 3,
                                 7,
                                 8,
                                 9,
                                 64,
                                 255,
                                 1 << 20,
                                 std::int64_t{1} << 31,
                                 std::int64_t{1} << 32,
                                 std::int64_t{1} << 62,
                                 std::numeric_limits<std::int64_t>::max(),
                                 std::numeric_limits<std::int64_t>::min()};
    const auto any = [&] { return huge[Pick(random, 0, std::size(huge) - 1)]; };
    Node node =
        is_conv ? Usual(random, 6, 36, 4, {6, 3, 3, 4}, {0, 3, 1, 2}) : Usual(random, 6, 36, 4, {6, 36}, {0, 1});
    node.strides = {1, 2};
    node.dilations = {1, 1};
    node.pads = {1, 0, 1, 1};
    Dims shape = {2, 4, 5, 6};
    // Tensors are as large as they say, since onnxruntime made them; everything else may be anything.
    Dims codes = {1, 6, 9}, codebooks = {1, 1, 256, 4}, scales = {6, 1};
    for (size_t n = Pick(random, 1, 3); n > 0; --n) {
      const auto mutate = [&](Dims& values) {
        switch (Pick(random, 0, 4)) {
          case 0:
            values.push_back(any());
            break;
          case 1:
            if (!values.empty()) values.pop_back();
            break;
          default:
            if (!values.empty())
              values[Pick(random, 0, values.size() - 1)] =
                  Pick(random, 0, 1) ? any() : static_cast<std::int64_t>(Pick(random, 0, 12));
        }
      };
      Dims* all[] = {&node.layout, &node.layout, &node.perm, &node.strides, &node.dilations,
                     &node.pads,   &shape,       &codes,     &codebooks,    &scales};
      const size_t which = Pick(random, 0, std::size(all));
      if (which == std::size(all)) {
        node.group = any();
      } else {
        mutate(*all[which]);
      }
    }
    const auto bytes = [](const Dims& dims, size_t size) {  // or nothing, when it is more than a test wants
      for (const std::int64_t dim : dims) {
        if (dim < 0 || (dim > 0 && size > (size_t{1} << 20) / static_cast<size_t>(dim))) return size_t{0};
        size *= static_cast<size_t>(dim);
      }
      return size;
    };
    const auto backed = [&](const Dims& dims, size_t size) {
      return std::find(dims.begin(), dims.end(), 0) != dims.end() || bytes(dims, size) > 0;
    };
    if (!backed(codes, 1) || !backed(codebooks, 4) || !backed(scales, 4)) continue;
    std::vector<std::uint8_t> code_bytes(bytes(codes, 1));
    for (std::uint8_t& code : code_bytes) code = static_cast<std::uint8_t>(Pick(random, 0, 255));
    const std::vector<float> words(bytes(codebooks, 4) / 4, 0.5F), factors(bytes(scales, 4) / 4, 2.0F);
    const Inputs inputs = {
        .codes = {code_bytes.data(), Type::kUint8, codes},
        .codebooks = {words.data(), Pick(random, 0, 40) ? Type::kFloat32 : Type::kUndefined, codebooks},
        .scales = {factors.data(), Type::kFloat32, scales},
        .layout = {node.layout.data(), Type::kInt64, {static_cast<std::int64_t>(node.layout.size())}}};
    const Precision precision = seed % 2 ? Precision::kTables : Precision::kExact;
    try {
      Call call = {.x = nullptr, .codes = code_bytes.data(), .bias = nullptr, .addend = nullptr};
      if (is_conv) {
        const Conv conv(inputs, node.perm, node.strides, node.dilations, node.pads, node.group, precision, kernels);
        const Dims out_shape = conv.OutputShape(shape);
        const size_t in = bytes(shape, 4), out = bytes(out_shape, 4);
        if (in == 0 || out == 0) continue;
        const std::vector<float> x(in / 4, 1.0F), bias(conv.outputs(), 0.0F);
        std::vector<float> y(out / 4);
        call.x = x.data();
        call.bias = bias.data();
        call.out = y.data();
        conv.Run(call, shape, Shuffled(seed));
      } else {
        const Matrix matrix(inputs, node.perm, Pick(random, 0, 1) != 0, precision, kernels);
        if (matrix.inputs() > 1 << 18 || matrix.outputs() > 1 << 18) continue;
        const std::vector<float> x(3 * matrix.inputs(), 1.0F), bias(matrix.outputs(), 0.0F);
        std::vector<float> y(3 * matrix.outputs());
        call.x = x.data();
        call.bias = bias.data();
        call.out = y.data();
        matrix.Run(call, 3, Shuffled(seed));
      }
      ++made;
    } catch (const Invalid& error) {
      ++refused;
      if (std::strchr(error.what(), '\n') != nullptr) Fail(kernels, node.sample, "an error has several lines");
    } catch (const std::bad_alloc&) {
      ++refused;
    }
  }
  if (seeds >= 1000 && (made < seeds / 50 || refused < seeds / 2)) {
    Fail(kernels, Sample{},
         "of the nodes " + std::to_string(made) + " ran and " + std::to_string(refused) + " were refused");
  }
}

void BenchLayers(const std::vector<const Kernels*>& tables) {
  Random random(1);
  struct Shape {
    size_t outputs, inputs, rows;
  };
  std::printf("\nGMAC/s of a matrix of width 8 (one thread), exact and by tables\n%-34s", "");
  for (const Kernels* kernels : tables) std::printf("%10s", kernels->name);
  std::printf("\n");
  for (const Shape& shape : {Shape{1000, 2048, 1}, {1000, 2048, 4}, {1000, 2048, 64}, {4096, 4096, 1}}) {
    const Node node =
        Usual(random, shape.outputs, shape.inputs, 8,
              {static_cast<std::int64_t>(shape.outputs), static_cast<std::int64_t>(shape.inputs)}, {0, 1});
    const std::vector<float> x(shape.rows * shape.inputs, 1.0F), bias(shape.outputs, 0.0F);
    std::vector<float> out(shape.rows * shape.outputs);
    for (const Precision precision : {Precision::kExact, Precision::kFast}) {
      std::printf("%4zu x %4zu, batch %2zu, %-12s", shape.outputs, shape.inputs, shape.rows,
                  precision == Precision::kExact ? "exact" : "fast");
      for (const Kernels* kernels : tables) {
        const Matrix matrix(node.View(), node.perm, true, precision, *kernels);
        Call call = {.x = x.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
        call.out = out.data();
        double best = 0.0;
        for (int repeat = 0; repeat < 7; ++repeat) {
          const auto start = std::chrono::steady_clock::now();
          matrix.Run(call, shape.rows, Shuffled(1));
          const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
          best = std::max(best, static_cast<double>(shape.outputs * shape.inputs * shape.rows) / seconds.count());
        }
        std::printf("%10.1f", best * 1e-9);
      }
      std::printf("\n");
    }
  }
}

}  // namespace vqonnx::check
