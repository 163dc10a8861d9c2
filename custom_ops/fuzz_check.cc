// Nodes that make no sense: they are refused, or computed without a look at what is not theirs.
#include <cstring>

#include "check_node.h"
#include "depthwise.h"
#include "pool.h"

namespace vqonnx::check {

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
    const bool strips = Pick(random, 0, 2) == 0;
    const size_t rows = strips ? kStripRows : 6;
    const auto outputs = static_cast<std::int64_t>(rows);
    Node node = is_conv ? Usual(random, rows, 36, 4, {outputs, 3, 3, 4}, {0, 3, 1, 2})
                        : Usual(random, rows, 36, 4, {outputs, 36}, {0, 1});
    node.strides = {1, 2};
    node.dilations = {1, 1};
    node.pads = {1, 0, 1, 1};
    Dims shape = {2, 4, 5, 6};  // of the image, or of a depthwise weight
    if (!is_conv) shape = {5, 1, 3, 4}, node.group = 5;
    // Tensors are as large as they say, since onnxruntime made them; everything else may be anything.
    Dims codes = {1, outputs, 9}, codebooks = {1, 1, 256, 4}, scales = {outputs, 1};
    if (strips) codes = {1, 1, 9, outputs};
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
    const Type kind = Pick(random, 0, 3) == 0 ? Type::kInt8 : Type::kFloat32;
    const Inputs inputs = {
        .codes = {code_bytes.data(), Type::kUint8, codes},
        .codebooks = {words.data(), Pick(random, 0, 40) ? kind : Type::kUndefined, codebooks},
        .scales = {factors.data(), Type::kFloat32, scales},
        .layout = {node.layout.data(), Type::kInt64, {static_cast<std::int64_t>(node.layout.size())}}};
    constexpr Precision kEach[] = {Precision::kTables, Precision::kExact, Precision::kEntries};
    const Precision precision = kEach[seed % 3];
    try {
      Call call = {.x = nullptr, .codes = code_bytes.data(), .bias = nullptr, .addend = nullptr};
      call.activation.silu = seed % 3 == 0;
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
      } else if (Pick(random, 0, 1) != 0) {
        const DepthwiseConv conv(shape, node.strides, node.dilations, node.pads, node.group, kernels);
        const Dims image = {1, shape[0], Pick(random, 0, 3) ? 9 : any(), Pick(random, 0, 3) ? 11 : any()};
        const size_t in = bytes(image, 4), out = bytes(conv.OutputShape(image), 4);
        if (in == 0 || out == 0) continue;
        const std::vector<float> x(in / 4, 1.0F), bias(conv.outputs(), 0.0F), taps(bytes(shape, 4) / 4, 1.0F);
        std::vector<float> y(out / 4);
        call.x = x.data();
        call.bias = bias.data();
        call.out = y.data();
        conv.Run(call, taps.data(), image, Shuffled(seed));
      } else if (Pick(random, 0, 1) != 0) {
        const Dims kernel(shape.end() - std::min<std::ptrdiff_t>(2, std::ssize(shape)), shape.end());
        const MaxPool pool(kernel, node.strides, node.pads, kernels);
        const Dims image = {2, Pick(random, 0, 3) ? 5 : any(), Pick(random, 0, 3) ? 9 : any(), 11};
        const size_t in = bytes(image, 4), out = bytes(pool.OutputShape(image), 4);
        if (in == 0 || out == 0) continue;
        const std::vector<float> x(in / 4, 1.0F);
        std::vector<float> y(out / 4);
        pool.Run(x.data(), y.data(), image, Shuffled(seed));
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

}  // namespace vqonnx::check
