// Checks of the error of tables, and how fast whole layers are.
#include <chrono>
#include <functional>

#include "check_node.h"

namespace vqonnx::check {
namespace {

using Run = std::function<std::vector<float>(Precision, const std::vector<float>&)>;

// Of each kind of tables of 16 bits, against the exact layer.
void CompareKinds(const Kernels& kernels, const Node& node, const std::string& what, const Run& run,
                  const std::vector<float>& x, double bound) {
  const std::vector<float> exact = run(Precision::kExact, x);
  for (const Precision precision : {Precision::kTables, Precision::kShorts}) {
    if (precision == Precision::kTables && kernels.sum_tables == nullptr) continue;
    const double error = RelativeError(run(precision, x), exact);
    const char* kind = precision == Precision::kTables ? "products" : "entries";
    if (!(error <= bound)) {
      Fail(kernels, node.sample, what + " by tables of " + kind + " is off by " + std::to_string(error));
    }
  }
}

void CheckError(const Kernels& kernels, const Node& node, const std::string& what, const Run& run, size_t inputs) {
  Random random(2);
  std::vector<float> x(inputs);
  for (float& value : x) value = Value(random, false);
  CompareKinds(kernels, node, what, run, x, 3e-4);
  x[inputs / 2] = 1000.0F;
  CompareKinds(kernels, node, what + ", with one input of 1000,", run, x, 1e-3);
}

// Of inputs whose squares, some of them, are beyond float.
void CheckMagnitudes(const Kernels& kernels, const Node& node, const std::string& what, const Run& run, size_t inputs) {
  Random random(2);
  std::vector<float> x(inputs);
  for (const float size : {1e-12F, 1e-18F, 1e-21F, 1e-24F, 1e12F}) {
    for (float& value : x) value = size * Value(random, false);
    const std::string with = ", with inputs of 1e" + std::to_string(static_cast<int>(std::log10(size))) + ",";
    CompareKinds(kernels, node, what + with, run, x, 3e-4);
  }
}

}  // namespace

void CheckErrors(const Kernels& kernels) {
  Random random(1);
  struct Form {
    size_t width, bits;
  };
  for (const auto& [width, bits] :
       {Form{4, 8}, {8, 8}, {16, 8}, {1, 8}, {1, 6}, {1, 4}, {4, 4}, {2, 3}, {1, 2}, {1, 1}}) {
    for (const auto& [outputs, inputs] : {std::pair<size_t, size_t>{250, 512}, {128, 2048}, {512, 1024}}) {
      const Node node = Usual(random, outputs, inputs, width,
                              {static_cast<std::int64_t>(outputs), static_cast<std::int64_t>(inputs)}, {0, 1}, bits);
      const std::vector<float> bias(outputs, 0.0F);
      const auto run = [&](Precision precision, const std::vector<float>& x) {
        std::vector<float> out(outputs);
        Call call = {.x = x.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
        call.out = out.data();
        Matrix(node.View(), node.perm, true, precision, kernels).Run(call, 1, Shuffled(1));
        return out;
      };
      CheckError(kernels, node, "Matrix", run, inputs);
      CheckMagnitudes(kernels, node, "Matrix", run, inputs);
    }
    for (const auto& [channels, size] : {std::pair<size_t, size_t>{64, 12}, {128, 6}, {256, 4}}) {
      const auto c = static_cast<std::int64_t>(channels);
      const Node node = Usual(random, channels, channels * 9, width, {c, 3, 3, c}, {0, 3, 1, 2}, bits);
      const std::vector<float> bias(channels, 0.0F);
      const Dims ones = {1, 1}, pads = {1, 1, 1, 1};
      const auto run = [&](Precision precision, const std::vector<float>& x) {  // an image is a square
        std::vector<float> out(x.size());
        const auto s = static_cast<std::int64_t>(std::lround(std::sqrt(x.size() / channels)));
        const Dims shape = {1, c, s, s};
        Call call = {.x = x.data(), .codes = node.sample.View().codes, .bias = bias.data(), .addend = nullptr};
        call.out = out.data();
        Conv(node.View(), node.perm, ones, ones, pads, 1, precision, kernels).Run(call, shape, Shuffled(1));
        return out;
      };
      CheckError(kernels, node, "Conv", run, channels * size * size);
      const size_t few = 256 / channels;  // rows and columns: magnitudes need no large image
      if (channels == 64) CheckMagnitudes(kernels, node, "Conv", run, channels * few * few);
    }
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
  for (const Shape& shape :
       {Shape{1000, 2048, 1}, {1000, 2048, 4}, {1000, 2048, 64}, {4096, 4096, 1}, {4096, 4096, 16}}) {
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
