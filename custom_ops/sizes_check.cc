// Checks of whole layers of sizes that random ones do not have, and of inputs that tables cannot do.
#include "check_node.h"

namespace vqonnx::check {
namespace {

constexpr double kExactly = 1e-5, kByTables = 1e-3;

void Compare(const Kernels& kernels, const Sample& sample, const char* what, const std::vector<float>& got,
             const std::vector<float>& want, double bound) {
  const double error = RelativeError(got, want);
  if (!(error <= bound)) Fail(kernels, sample, std::string(what) + " is off by " + std::to_string(error));
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), Same);
}

// A layer by tables against the exact one: near it, but not it, which would mean that there were no tables; and the
// same bits where an input is no number, infinite, or so large that products of others with it are lost.
template <class Run>
void CheckTables(const Kernels& kernels, const Sample& sample, const std::vector<float>& x, const Run& run) {
  std::vector<Precision> kinds = {Precision::kShorts};
  if (kernels.sum_tables != nullptr) kinds.push_back(Precision::kTables);
  const std::vector<float> exact = run(Precision::kExact, x);
  for (const Precision kind : kinds) {
    const std::vector<float> by_tables = run(kind, x);
    Compare(kernels, sample, "a layer by tables", by_tables, exact, kByTables);
    if (SameBits(by_tables, exact)) Fail(kernels, sample, "a layer that should have tables has none");
  }
  // Entries ask for all inputs before anything else, so that one place for each value will do.
  size_t asked = 0;
  for (const float value : {std::nanf(""), HUGE_VALF, -HUGE_VALF, 3e38F}) {
    const size_t places[] = {0, x.size() / 2, x.size() - 1}, one = places[asked++ % 3];
    for (const size_t place : places) {
      if (place != one && kernels.sum_tables == nullptr) continue;
      std::vector<float> odd = x;
      odd[place] = value;
      const std::vector<float> want = run(Precision::kExact, odd);
      for (const Precision kind : kinds) {
        if (kind == Precision::kShorts && place != one) continue;
        if (SameBits(run(kind, odd), want)) continue;
        Fail(kernels, sample,
             "a layer takes tables though input " + std::to_string(place) + " is " + std::to_string(value));
      }
    }
  }
}

struct MatrixSizes {
  size_t rows, inputs, outputs, width, bits, lanes = 1;
};

void CheckMatrix(const Kernels& kernels, const MatrixSizes& sizes) {
  Random random(3);
  const auto& [rows, inputs, outputs, width, bits, lanes] = sizes;
  const Node node = Usual(random, outputs, inputs, width,
                          {static_cast<std::int64_t>(outputs), static_cast<std::int64_t>(inputs)}, {0, 1}, bits, lanes);
  const std::vector<float> x = Values(random, rows * inputs, false), bias = Values(random, outputs, false);
  const auto run = [&](Precision precision, const std::vector<float>& values) {
    std::vector<float> out(rows * outputs);
    Call call = {.x = values.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
    call.out = out.data();
    const Matrix matrix(node.View(), node.perm, true, precision, kernels);
    const auto by = [&](const Call& its, const Tasks& tasks) { matrix.Run(its, rows, tasks); };
    by(call, Shuffled(3));
    CheckThreads(kernels, node.sample, "a matrix", call, out.size(), by);
    return out;
  };
  std::vector<float> want(rows * outputs);
  for (size_t output = 0; output < outputs; ++output) {
    for (size_t row = 0; row < rows; ++row) {
      double sum = bias[output];
      for (size_t k = 0; k < inputs; ++k) sum += double{node.sample.ValueAt(output, k)} * x[row * inputs + k];
      want[row * outputs + output] = static_cast<float>(sum);
    }
  }
  Compare(kernels, node.sample, "an exact matrix", run(Precision::kExact, x), want, kExactly);
  Compare(kernels, node.sample, "a matrix by entries", run(Precision::kEntries, x), want, kExactly);
  CheckTables(kernels, node.sample, x, run);
}

struct ConvSizes {
  size_t channels, outputs, kernel, dilation, pad, image_rows, lanes = 1;
};

// With input channels innermost, against the products of Matrix with the rows of the unfolded image.
void CheckConv(const Kernels& kernels, size_t images, const ConvSizes& sizes) {
  Random random(4);
  const auto& [channels, outputs, kernel, dilation, pad, rows, lanes] = sizes;
  const size_t cols = rows == 1 ? 1 : 5, width = 8, reach = (kernel - 1) * dilation;
  const size_t out_rows = rows + 2 * pad - reach, depth = channels * kernel;
  const auto as_dim = [](size_t size) { return static_cast<std::int64_t>(size); };
  const Dims shape = {as_dim(images), as_dim(channels), as_dim(rows), as_dim(cols)};
  const Node node = Usual(random, outputs, depth, width, {as_dim(outputs), as_dim(kernel), 1, as_dim(channels)},
                          {0, 3, 1, 2}, 8, lanes);
  Node flat = node;
  flat.layout = {8, as_dim(depth), as_dim(outputs), as_dim(depth)};
  flat.perm = {0, 1};
  const std::vector<float> x = Values(random, images * channels * rows * cols, false);
  const std::vector<float> bias = Values(random, outputs, false);
  const size_t places = out_rows * cols;
  const auto run = [&](Precision precision, const std::vector<float>& values) {
    std::vector<float> out(images * outputs * places);
    Call call = {.x = values.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
    call.out = out.data();
    const Conv conv(node.View(), node.perm, Dims{1, 1}, Dims{as_dim(dilation), 1}, Dims{as_dim(pad), 0, as_dim(pad), 0},
                    1, precision, kernels);
    const auto by = [&](const Call& its, const Tasks& tasks) { conv.Run(its, shape, tasks); };
    by(call, Shuffled(4));
    CheckThreads(kernels, node.sample, "a convolution", call, out.size(), by);
    return out;
  };
  std::vector<float> unfolded(images * places * depth, 0.0F), products(images * places * outputs), want;
  for (size_t i = 0; i < unfolded.size(); ++i) {
    const size_t channel = i % channels, tap = i / channels % kernel, place = i / depth % places;
    const size_t row = place / cols + tap * dilation - pad;  // before the image it wraps around
    if (row >= rows) continue;
    unfolded[i] = x[((i / depth / places * channels + channel) * rows + row) * cols + place % cols];
  }
  Call call = {.x = unfolded.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
  call.out = products.data();
  Matrix(flat.View(), flat.perm, true, Precision::kExact, kernels).Run(call, images * places, Shuffled(4));
  for (size_t image = 0; image < images; ++image) {
    for (size_t output = 0; output < outputs; ++output) {
      for (size_t at = 0; at < places; ++at) want.push_back(products[(image * places + at) * outputs + output]);
    }
  }
  Compare(kernels, node.sample, "an exact convolution", run(Precision::kExact, x), want, kExactly);
  Compare(kernels, node.sample, "a convolution by entries", run(Precision::kEntries, x), want, kExactly);
  if (rows > 1) CheckTables(kernels, node.sample, x, run);
}

}  // namespace

void CheckSizes(const Kernels& kernels) {
  for (const MatrixSizes& sizes : {MatrixSizes{1, 48, 2100, 4, 4},  // tasks of 512 outputs
                                   {3, 64, 1100, 8, 8},             // more than one piece of outputs
                                   {1, 8192, 577, 4, 8},            // more than 1 MB of codes, which come from far
                                   {1, 64, 70, 16, 4},              // joined words of 32 values
                                   {1, 45, 300, 5, 8},              // an odd number of inputs
                                   {2, 96, 33, 8, 8},
                                   {4, 2048, 17, 8, 8},
                                   {9, 80, 40, 8, 8},
                                   {18, 24, 4200, 8, 8},   // two pieces of outputs
                                   {5, 600, 1100, 4, 8},   // parts of the inputs
                                   {300, 24, 65, 8, 8},    // many batches of tiles
                                   {33, 1040, 130, 2, 5},  // both
                                   {1, 8192, 576, 4, 8, kStripRows},
                                   {3, 96, 1152, 8, 8, kStripRows},
                                   {1, 96, 320, 4, 4, kStripRows},
                                   {9, 104, 128, 8, 8, kStripRows},
                                   {1, 93, 128, 3, 3, kStripRows},
                                   {2, 200, 64, 1, 6, kStripRows},
                                   {9, 100, 192, 2, 5, kStripRows}}) {
    CheckMatrix(kernels, sizes);
  }
  CheckConv(kernels, 1, {16, 64, 3, 1, 1, 100});   // four bands
  CheckConv(kernels, 1, {16, 64, 3, 40, 40, 96});  // whose taps reach beyond the next one, so that there are fewer
  CheckConv(kernels, 9, {16, 24, 3, 1, 1, 70});    // many images
  CheckConv(kernels, 1, {16, 128, 3, 1, 1, 60, kStripRows});
  CheckConv(kernels, 2, {528, 64, 1, 1, 0, 5, kStripRows});
  CheckConv(kernels, 2, {136, 40, 3, 2, 2, 9});    // parts of the inputs
  CheckConv(kernels, 1, {16, 2112, 3, 1, 0, 8});   // two pieces of outputs
  CheckConv(kernels, 40, {8, 130, 3, 1, 1, 40});   // more images than are computed together
  CheckConv(kernels, 1, {8, 64, 3, 1, 1, 1500});   // many bands
  CheckConv(kernels, 3, {24, 2112, 1, 1, 0, 70});  // pieces and bands of one tap
  CheckConv(kernels, 11, {64, 70, 1, 1, 0, 1});    // images of one position, in three batches
}

}  // namespace vqonnx::check
