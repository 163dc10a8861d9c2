// The onnxruntime side of the ops: attributes, constants, outputs, splitting work over onnxruntime's threads.
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decode.h"
#include "kernels.h"
#include "ort_abi.h"

#if defined(_WIN32)
#define VQONNX_EXPORT __declspec(dllexport)
#else
#define VQONNX_EXPORT __attribute__((visibility("default")))
#endif

namespace vqonnx {
namespace {

constexpr std::size_t kInputs = 4;  // codes, codebooks, scales, layout
constexpr int kUint8 = static_cast<int>(Type::kUint8);
constexpr int kInt64 = static_cast<int>(Type::kInt64);
constexpr int kFloat32 = static_cast<int>(Type::kFloat32);

struct StatusDeleter {
  const OrtApi* api;
  void operator()(OrtStatus* status) const { ort::ReleaseStatus(api, status); }
};

// A failed call of onnxruntime, on its way to the nearest C boundary.
struct Failed {
  std::shared_ptr<OrtStatus> status;
};

void Check(const OrtApi* api, OrtStatus* status) {
  if (status != nullptr) throw Failed{std::shared_ptr<OrtStatus>(status, StatusDeleter{api})};
}

bool Succeeds(const OrtApi* api, OrtStatus* status) {
  if (status != nullptr) ort::ReleaseStatus(api, status);
  return status == nullptr;
}

// One line: names come from the model and may hold anything.
std::string Printable(std::string text) {
  constexpr std::size_t kLongest = 200;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = '?';
  }
  return text;
}

// Runs the body of a C callback. No exception gets out; every one becomes a status that starts with `who`.
template <class Body>
OrtStatus* Guard(const OrtApi* api, const std::string& who, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Invalid& error) {
      return ort::CreateStatus(api, kOrtInvalidArgument, (who + ": " + error.what()).c_str());
    } catch (const Failed& error) {
      const std::string text = who + ": " + ort::GetErrorMessage(api, error.status.get());
      return ort::CreateStatus(api, kOrtFail, Printable(text).c_str());
    }
  } catch (const std::bad_alloc&) {
    return ort::CreateStatus(api, kOrtFail, "vqonnx: out of memory");
  } catch (...) {
    return ort::CreateStatus(api, kOrtFail, "vqonnx: internal error");
  }
}

std::vector<std::int64_t> Dims(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  std::size_t count = 0;
  Check(api, ort::GetDimensionsCount(api, info, &count));
  std::vector<std::int64_t> dims(count);
  Check(api, ort::GetDimensions(api, info, dims.data(), count));
  return dims;
}

Tensor View(const OrtApi* api, const OrtValue* value) {
  if (value == nullptr) throw Invalid("an input is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, ort::GetTensorTypeAndShape(api, value, &info));
  const auto release = [api](OrtTensorTypeAndShapeInfo* i) { ort::ReleaseTensorTypeAndShapeInfo(api, i); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  int type = 0;
  Check(api, ort::GetTensorElementType(api, info, &type));
  Tensor tensor = {nullptr, static_cast<Type>(type), Dims(api, info)};
  void* data = nullptr;  // strings have none; Decode refuses them by their type
  if (Succeeds(api, ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data))) tensor.data = data;
  return tensor;
}

Tensor InputView(const OrtApi* api, const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = nullptr;
  Check(api, ort::KernelContext_GetInput(api, context, index, &value));
  return View(api, value);
}

Tensor& InputAt(Inputs& inputs, std::size_t index) {
  const std::array<Tensor*, kInputs> all = {&inputs.codes, &inputs.codebooks, &inputs.scales, &inputs.layout};
  return *all[index];
}

// The string that `get(out, &size)` yields, or nothing when it fails.
template <class Get>
std::optional<std::string> ReadString(const OrtApi* api, Get get) {
  std::size_t size = 0;
  if (!Succeeds(api, get(nullptr, &size))) return std::nullopt;
  std::string text(size, '\0');
  if (!Succeeds(api, get(text.data(), &size))) return std::nullopt;
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

// How errors call a node. It is named after its weight; where a tool dropped the name, the output has it.
std::string Who(const OrtApi* api, const OrtKernelInfo* info) {
  std::optional<std::string> name =
      ReadString(api, [&](char* out, std::size_t* size) { return ort::KernelInfo_GetNodeName(api, info, out, size); });
  if (!name || name->empty()) {
    name = ReadString(
        api, [&](char* out, std::size_t* size) { return ort::KernelInfo_GetOutputName(api, info, 0, out, size); });
  }
  return "vqonnx.Decode '" + Printable(name.value_or("")) + "'";
}

void CheckCoding(const OrtApi* api, const OrtKernelInfo* info) {
  const std::optional<std::string> coding = ReadString(api, [&](char* out, std::size_t* size) {
    return ort::KernelInfoGetAttribute_string(api, info, "coding", out, size);
  });
  if (coding && *coding != "fixed") {
    throw Invalid("coding is '" + Printable(*coding) + "'; version 1 of this op knows only 'fixed'");
  }
  std::size_t count = 0;  // asked for integers, onnxruntime fails only when there is no attribute of that name at all
  if (!coding && Succeeds(api, ort::KernelInfoGetAttributeArray_int64(api, info, "coding", nullptr, &count))) {
    throw Invalid("coding is no string; version 1 of this op knows only 'fixed'");
  }
}

std::vector<std::int64_t> Perm(const OrtApi* api, const OrtKernelInfo* info) {
  std::size_t count = 0;
  if (!Succeeds(api, ort::KernelInfoGetAttributeArray_int64(api, info, "perm", nullptr, &count))) {
    throw Invalid("the attribute perm is missing, or is no list of integers");
  }
  std::vector<std::int64_t> perm(count);
  if (count > 0) Check(api, ort::KernelInfoGetAttributeArray_int64(api, info, "perm", perm.data(), &count));
  return perm;
}

// The kernel of one Decode node. Nothing in it changes after it is made, so concurrent runs need no lock.
class DecodeKernel {
 public:
  DecodeKernel(const OrtApi* api, const Kernels& kernels, const OrtKernelInfo* info, std::string who)
      : api_(api), kernels_(kernels), who_(std::move(who)), perm_(Perm(api, info)) {
    CheckCoding(api, info);
    Inputs inputs;
    for (std::size_t i = 0; i < kInputs; ++i) {
      int is_constant = 0;
      const OrtValue* value = nullptr;
      Check(api, ort::KernelInfoGetConstantInput_tensor(api, info, i, &is_constant, &value));
      if (is_constant == 0 || value == nullptr) return;  // known only to Compute
      InputAt(inputs, i) = View(api, value);
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
  struct Job {
    const Decode& decode;
    const Inputs& inputs;
    float* out;
    std::atomic<bool> out_of_memory = false;
  };

  void Write(const Decode& decode, const Inputs& inputs, OrtKernelContext* context) const {
    OrtValue* output = nullptr;
    void* data = nullptr;
    const std::vector<std::int64_t>& shape = decode.shape();
    Check(api_, ort::KernelContext_GetOutput(api_, context, 0, shape.data(), shape.size(), &output));
    Check(api_, ort::GetTensorMutableData(api_, output, &data));
    Job job = {decode, inputs, static_cast<float*>(data)};
    if (decode.tasks() == 1) {
      RunTask(&job, 0);
    } else {
      Check(api_, ort::KernelContext_ParallelFor(api_, context, RunTask, decode.tasks(), 0, &job));
    }
    if (job.out_of_memory) throw std::bad_alloc();
  }

  // Called on onnxruntime's threads, where an exception would end the process.
  static void RunTask(void* data, std::size_t task) {
    Job& job = *static_cast<Job*>(data);
    try {
      job.decode.Run(job.inputs.codes, job.inputs.scales, task, job.out);
    } catch (const std::bad_alloc&) {
      job.out_of_memory = true;
    }
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
      who = Who(api, info);
      *kernel = new DecodeKernel(api, *static_cast<const DecodeOp*>(op)->kernels, info, who);
    });
  }

  const Kernels* kernels;
};

// The op and its domain, for one onnxruntime in this process and one table of kernels.
struct Registered {
  Registered(const OrtApi* its_api, const Kernels* kernels) : api(its_api), op(kernels) {
    Check(api, ort::CreateCustomOpDomain(api, "vqonnx", &domain));
    Check(api, ort::CustomOpDomain_Add(api, domain, &op));
  }

  const OrtApi* api;
  DecodeOp op;
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
