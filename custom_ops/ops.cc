// The op `vqonnx.Decode`, and the registration of all ops.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decode.h"
#include "fused.h"
#include "kernels.h"
#include "ort_abi.h"
#include "ort_node.h"

#if defined(_WIN32)
#define VQONNX_EXPORT __declspec(dllexport)
#else
#define VQONNX_EXPORT __attribute__((visibility("default")))
#endif

namespace vqonnx {
namespace {

constexpr std::size_t kInputs = 4;  // codes, codebooks, scales, layout

Tensor& InputAt(Inputs& inputs, std::size_t index) {
  const std::array<Tensor*, kInputs> all = {&inputs.codes, &inputs.codebooks, &inputs.scales, &inputs.layout};
  return *all[index];
}

// The kernel of one Decode node. Nothing in it changes after it is made, so concurrent runs need no lock.
class DecodeKernel {
 public:
  DecodeKernel(const OrtApi* api, const Kernels& kernels, const OrtKernelInfo* info, std::string who)
      : api_(api), kernels_(kernels), who_(std::move(who)), perm_(Perm(api, info)) {
    CheckCoding(api, info);
    Inputs inputs;
    for (std::size_t i = 0; i < kInputs; ++i) {
      const std::optional<Tensor> constant = ConstantInput(api, info, i);
      if (!constant) return;  // known only to Compute
      InputAt(inputs, i) = *constant;
    }
    checked_.emplace(inputs, perm_, kernels_);
  }

  OrtStatus* Compute(OrtKernelContext* context) const {
    return Guard(api_, who_, [&] {
      Inputs inputs;
      inputs.codes = InputView(api_, context, 0);
      inputs.scales = InputView(api_, context, 2);
      if (checked_) return Write(*checked_, inputs, context);
      inputs.codebooks = InputView(api_, context, 1);
      inputs.layout = InputView(api_, context, 3);
      Write(Decode(inputs, perm_, kernels_), inputs, context);
    });
  }

 private:
  void Write(const Decode& decode, const Inputs& inputs, OrtKernelContext* context) const {
    float* out = Output(api_, context, decode.shape());
    NodeTasks(api_, context).Each(decode.tasks(), [&](std::size_t task) {
      decode.Run(inputs.codes, inputs.scales, task, out);
    });
  }

  const OrtApi* api_;
  const Kernels& kernels_;
  std::string who_;
  std::vector<std::int64_t> perm_;
  std::optional<Decode> checked_;  // made with the session when all inputs are constants
};

struct DecodeOp : OrtCustomOp {
  explicit DecodeOp(const Kernels* chosen) : OrtCustomOp{}, kernels(chosen) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return "Decode"; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputType = [](const OrtCustomOp*, std::size_t index) {
      return std::array<int, kInputs>{kUint8, kOrtAnyType, kOrtAnyType, kInt64}[index];
    };
    GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return kFloat32; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size_t{1}; };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kOrtRequired; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kOrtRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return kOrtCpuMemory; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = Create;
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<const DecodeKernel*>(kernel)->Compute(context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<DecodeKernel*>(kernel); };
  }

  static OrtStatus* VQONNX_ORT_CALL Create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                                           void** kernel) {
    std::string who;
    return Guard(api, who, [&] {
      who = Who(api, info, "Decode");
      *kernel = new DecodeKernel(api, *static_cast<const DecodeOp*>(op)->kernels, info, who);
    });
  }

  const Kernels* kernels;
};

// The ops and their domain, for one onnxruntime in this process and one table of kernels.
struct Registered {
  Registered(const OrtApi* its_api, const Kernels* kernels) : api(its_api), op(kernels), fused(FusedOps(*kernels)) {
    Check(api, ort::CreateCustomOpDomain(api, "vqonnx", &domain));
    Check(api, ort::CustomOpDomain_Add(api, domain, &op));
    for (const auto& one : fused) Check(api, ort::CustomOpDomain_Add(api, domain, one.get()));
  }

  const OrtApi* api;
  DecodeOp op;
  std::vector<std::shared_ptr<OrtCustomOp>> fused;
  OrtCustomOpDomain* domain = nullptr;
};

void Register(const OrtApi* api, OrtSessionOptions* options) {
  char error[256] = "";
  const Kernels* kernels = ChooseKernels(std::getenv("VQONNX_ISA"), error, sizeof(error));
  if (kernels == nullptr) throw Invalid(Printable(error));
  // Sessions keep pointers to these, and may outlive every static object: so they are never destroyed.
  static std::mutex& mutex = *new std::mutex;
  static auto& all = *new std::vector<std::unique_ptr<Registered>>;
  const std::lock_guard lock(mutex);
  for (const auto& known : all) {
    if (known->api == api && known->op.kernels == kernels) {
      return Check(api, ort::AddCustomOpDomain(api, options, known->domain));
    }
  }
  all.push_back(std::make_unique<Registered>(api, kernels));
  Check(api, ort::AddCustomOpDomain(api, options, all.back()->domain));
}

}  // namespace
}  // namespace vqonnx

extern "C" VQONNX_EXPORT OrtStatus* VQONNX_ORT_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                      const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(vqonnx::kOrtApiVersion);
  if (api == nullptr) {  // the first version has always been able to report an error
    return vqonnx::ort::CreateStatus(base->GetApi(1), vqonnx::kOrtFail,
                                     "vqonnx: this library needs onnxruntime 1.17 or later");
  }
  return vqonnx::Guard(api, "vqonnx", [&] { vqonnx::Register(api, options); });
}
