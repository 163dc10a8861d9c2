#include "fused.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "depthwise.h"
#include "linear.h"
#include "ort_node.h"
#include "pool.h"

namespace vqonnx {
namespace {

enum class Layer { kConv, kDepthwise, kGemm, kMatMul, kMaxPool };
enum class After { kNothing, kRelu, kClip, kAdd, kAddRelu, kSilu };

struct Kind {
  const char* name;
  Layer layer;
  After after;

  bool adds() const { return after == After::kAdd || after == After::kAddRelu; }
  bool coded() const { return layer != Layer::kDepthwise && layer != Layer::kMaxPool; }
  bool has_bias() const { return layer != Layer::kMatMul && layer != Layer::kMaxPool; }
  static constexpr std::size_t kX = 0, kWeight = 1, kCodes = 1, kCodebooks = 2, kScales = 3, kLayout = 4;
  std::size_t bias() const { return coded() ? kLayout + 1 : layer == Layer::kDepthwise ? kWeight + 1 : kX + 1; }
  std::size_t next() const { return bias() + (has_bias() ? 1 : 0); }
  std::size_t inputs() const { return next() + (after == After::kClip ? 2 : 0) + (adds() ? 1 : 0); }
};

constexpr Kind kKinds[] = {{"Conv", Layer::kConv, After::kNothing},
                           {"ConvRelu", Layer::kConv, After::kRelu},
                           {"ConvClip", Layer::kConv, After::kClip},
                           {"ConvAdd", Layer::kConv, After::kAdd},
                           {"ConvAddRelu", Layer::kConv, After::kAddRelu},
                           {"ConvSilu", Layer::kConv, After::kSilu},
                           {"DepthwiseConv", Layer::kDepthwise, After::kNothing},
                           {"DepthwiseConvRelu", Layer::kDepthwise, After::kRelu},
                           {"DepthwiseConvClip", Layer::kDepthwise, After::kClip},
                           {"DepthwiseConvSilu", Layer::kDepthwise, After::kSilu},
                           {"Gemm", Layer::kGemm, After::kNothing},
                           {"GemmRelu", Layer::kGemm, After::kRelu},
                           {"MatMul", Layer::kMatMul, After::kNothing},
                           {"MaxPool", Layer::kMaxPool, After::kNothing}};

void CheckFloat32(const char* name, const Tensor& tensor) {
  if (tensor.type != Type::kFloat32) throw Invalid(std::string(name) + " is " + Text(tensor.type) + ", not float32");
}

Precision ParsePrecision(const std::string& text, const char* name) {
  if (text.empty() || text == "auto") return Precision::kAuto;
  if (text == "exact") return Precision::kExact;
  if (text == "fast") return Precision::kFast;
  throw Invalid(std::string(name) + " is '" + Printable(text) + "'; known are auto, exact and fast");
}

// The node's attribute, and where that leaves the choice, the environment's.
Precision ChosenPrecision(const OrtApi* api, const OrtKernelInfo* info) {
  const std::optional<std::string> own = OptionalString(api, info, "precision", "known are auto, exact and fast");
  const char* all = std::getenv("VQONNX_PRECISION");
  const Precision otherwise = ParsePrecision(all == nullptr ? "" : all, "VQONNX_PRECISION");
  const Precision chosen = ParsePrecision(own.value_or(""), "precision");
  return chosen == Precision::kAuto ? otherwise : chosen;
}

std::size_t Count(std::span<const std::int64_t> dims) {
  std::size_t count = 1;
  for (const std::int64_t size : dims) count *= static_cast<std::size_t>(size);  // of a tensor that exists
  return count;
}

// One node. Nothing in it changes after it is made, so concurrent runs need no lock.
class FusedKernel {
 public:
  FusedKernel(const OrtApi* api, const Kernels& kernels, const OrtKernelInfo* info, const Kind& kind, std::string who)
      : api_(api), who_(std::move(who)), kind_(kind) {
    const auto ints = [&](const char* name) {
      std::optional<std::vector<std::int64_t>> values = IntsAttribute(api, info, name);
      if (!values) throw Invalid(std::string("the attribute ") + name + " is missing, or is no list of integers");
      return *values;
    };
    if (kind.layer == Layer::kMaxPool) {
      layer_.emplace<MaxPool>(ints("kernel_shape"), ints("strides"), ints("pads"), kernels);
      return;
    }
    if (kind.layer == Layer::kDepthwise) {
      const Tensor weight = Constant(info, Kind::kWeight, "W");
      CheckFloat32("W", weight);
      layer_.emplace<DepthwiseConv>(weight.dims, ints("strides"), ints("dilations"), ints("pads"), Int(info, "group"),
                                    kernels);
    } else {
      MakeCoded(info, kernels, ints);
    }
    outputs_ = std::visit([](const auto& layer) { return Outputs(layer); }, layer_);
    if (kind.has_bias()) {
      if (const std::optional<Tensor> bias = ConstantInput(api, info, kind.bias())) CheckBias(*bias);
    }
    if (kind.layer == Layer::kMatMul) no_bias_.assign(outputs_, 0.0F);
    if (kind.after == After::kRelu || kind.after == After::kAddRelu) activation_.low = 0.0F;
    if (kind.after == After::kClip) {
      activation_.low = Bound(info, kind.next(), "min");
      activation_.high = Bound(info, kind.next() + 1, "max");
    }
    activation_.silu = kind.after == After::kSilu;
  }

  OrtStatus* Compute(OrtKernelContext* context) const {
    return Guard(api_, who_, [&] {
      const Tensor x = InputView(api_, context, Kind::kX);
      CheckFloat32("X", x);
      const NodeTasks tasks(api_, context);
      if (const MaxPool* pool = std::get_if<MaxPool>(&layer_)) {
        float* out = Output(api_, context, pool->OutputShape(x.dims));
        return pool->Run(static_cast<const float*>(x.data), out, x.dims, tasks);
      }
      Call call = {.x = static_cast<const float*>(x.data),
                   .codes = nullptr,
                   .bias = no_bias_.data(),
                   .addend = nullptr,
                   .activation = activation_,
                   .out = nullptr};
      Tensor bias;
      if (kind_.has_bias()) {
        bias = InputView(api_, context, kind_.bias());
        CheckBias(bias);
        call.bias = static_cast<const float*>(bias.data);
      }
      const std::vector<std::int64_t> shape = OutputShape(x.dims);
      if (kind_.adds()) {
        const Tensor addend = InputView(api_, context, kind_.next());
        CheckFloat32("Z", addend);
        if (addend.dims != shape) throw Invalid("Z is " + Text(addend.dims) + ", but the output " + Text(shape));
        call.addend = static_cast<const float*>(addend.data);
      }
      call.out = Output(api_, context, shape);
      const void* weight = InputData(api_, context, Kind::kWeight);
      if (kind_.coded()) call.codes = static_cast<const std::uint8_t*>(weight);
      if (const DepthwiseConv* depthwise = std::get_if<DepthwiseConv>(&layer_)) {
        depthwise->Run(call, static_cast<const float*>(weight), x.dims, tasks);
      } else if (const Conv* conv = std::get_if<Conv>(&layer_)) {
        conv->Run(call, x.dims, tasks);
      } else {
        const auto& matrix = std::get<Matrix>(layer_);
        matrix.Run(call, Count(std::span(x.dims).first(x.dims.size() - 1)), tasks);
      }
    });
  }

 private:
  // The layer whose weight is in codes.
  template <class ReadInts>
  void MakeCoded(const OrtKernelInfo* info, const Kernels& kernels, const ReadInts& ints) {
    CheckCoding(api_, info);
    const Inputs inputs = {Constant(info, Kind::kCodes, "codes"), Constant(info, Kind::kCodebooks, "codebooks"),
                           Constant(info, Kind::kScales, "scales"), Constant(info, Kind::kLayout, "layout")};
    const std::vector<std::int64_t> perm = Perm(api_, info);
    const Precision precision = ChosenPrecision(api_, info);
    if (kind_.layer == Layer::kConv) {
      layer_.emplace<Conv>(inputs, perm, ints("strides"), ints("dilations"), ints("pads"), Int(info, "group"),
                           precision, kernels);
      return;
    }
    const std::int64_t transposed = kind_.layer == Layer::kGemm ? Int(info, "transB") : 0;
    if (transposed != 0 && transposed != 1) throw Invalid("transB is " + Text(transposed) + "; it must be 0 or 1");
    layer_.emplace<Matrix>(inputs, perm, transposed == 1, precision, kernels);
  }

  static std::size_t Outputs(const std::monostate&) { return 0; }
  static std::size_t Outputs(const MaxPool&) { return 0; }
  static std::size_t Outputs(const Conv& layer) { return layer.outputs(); }
  static std::size_t Outputs(const DepthwiseConv& layer) { return layer.outputs(); }
  static std::size_t Outputs(const Matrix& layer) { return layer.outputs(); }

  Tensor Constant(const OrtKernelInfo* info, std::size_t index, const char* name) const {
    const std::optional<Tensor> constant = ConstantInput(api_, info, index);
    if (!constant) throw Invalid(std::string(name) + " is no constant initializer");
    return *constant;
  }

  std::int64_t Int(const OrtKernelInfo* info, const char* name) const {
    const std::optional<std::int64_t> value = IntAttribute(api_, info, name);
    if (!value) throw Invalid(std::string("the attribute ") + name + " is missing, or is no integer");
    return *value;
  }

  float Bound(const OrtKernelInfo* info, std::size_t index, const char* name) const {
    const Tensor bound = Constant(info, index, name);
    CheckFloat32(name, bound);
    if (bound.dims.size() > 1 || (bound.dims.size() == 1 && bound.dims[0] != 1)) {
      throw Invalid(std::string(name) + " is " + Text(bound.dims) + ", not one number");
    }
    return FloatAt(bound, 0);
  }

  void CheckBias(const Tensor& bias) const {
    CheckFloat32("B", bias);
    if (bias.dims.size() != 1 || static_cast<std::size_t>(bias.dims[0]) != outputs_) {
      throw Invalid("B is " + Text(bias.dims) + "; it must be [" + Text(outputs_) + "]");
    }
  }

  std::vector<std::int64_t> OutputShape(std::span<const std::int64_t> x) const {
    if (const Conv* conv = std::get_if<Conv>(&layer_)) return conv->OutputShape(x);
    if (const DepthwiseConv* depthwise = std::get_if<DepthwiseConv>(&layer_)) return depthwise->OutputShape(x);
    const auto& matrix = std::get<Matrix>(layer_);
    const bool rank_fits = kind_.layer == Layer::kGemm ? x.size() == 2 : !x.empty();
    if (!rank_fits || static_cast<std::size_t>(x.back()) != matrix.inputs()) {
      throw Invalid("X is " + Text(x) + "; its last axis must be " + Text(matrix.inputs()) +
                    (kind_.layer == Layer::kGemm ? ", of 2" : ""));
    }
    std::vector<std::int64_t> shape(x.begin(), x.end() - 1);
    shape.push_back(static_cast<std::int64_t>(outputs_));
    return shape;
  }

  const OrtApi* api_;
  std::string who_;
  const Kind& kind_;
  std::variant<std::monostate, Conv, DepthwiseConv, Matrix, MaxPool> layer_;
  std::size_t outputs_ = 0;
  std::vector<float> no_bias_;  // for an operator that has none
  Activation activation_ = kNoActivation;
};

struct FusedOp : OrtCustomOp {
  FusedOp(const Kernels* chosen, const Kind* its_kind) : OrtCustomOp{}, kernels(chosen), kind(its_kind) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp* op) { return Of(op).kind->name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputType = [](const OrtCustomOp* op, std::size_t index) {
      if (!Of(op).kind->coded()) return kFloat32;
      switch (index) {
        case Kind::kCodes:
          return kUint8;
        case Kind::kLayout:
          return kInt64;
        case Kind::kCodebooks:
        case Kind::kScales:
          return kOrtAnyType;
        default:
          return kFloat32;
      }
    };
    GetInputTypeCount = [](const OrtCustomOp* op) { return Of(op).kind->inputs(); };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return kFloat32; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size_t{1}; };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kOrtRequired; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kOrtRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return kOrtCpuMemory; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = Create;
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<const FusedKernel*>(kernel)->Compute(context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<FusedKernel*>(kernel); };
  }

  static const FusedOp& Of(const OrtCustomOp* op) { return *static_cast<const FusedOp*>(op); }

  static OrtStatus* VQONNX_ORT_CALL Create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                                           void** kernel) {
    std::string who;
    return Guard(api, who, [&] {
      const FusedOp& its = Of(op);
      who = Who(api, info, its.kind->name);
      *kernel = new FusedKernel(api, *its.kernels, info, *its.kind, who);
    });
  }

  const Kernels* kernels;
  const Kind* kind;
};

}  // namespace

std::vector<std::shared_ptr<OrtCustomOp>> FusedOps(const Kernels& kernels) {
  std::vector<std::shared_ptr<OrtCustomOp>> ops;
  for (const Kind& kind : kKinds) ops.push_back(std::make_shared<FusedOp>(&kernels, &kind));
  return ops;
}

}  // namespace vqonnx
