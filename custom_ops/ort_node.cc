#include "ort_node.h"

#include <algorithm>

namespace vqonnx {
namespace {

struct StatusDeleter {
  const OrtApi* api;
  void operator()(OrtStatus* status) const { ort::ReleaseStatus(api, status); }
};

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
  void* data = nullptr;  // strings have none; they are refused by their type
  if (Succeeds(api, ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data))) tensor.data = data;
  return tensor;
}

}  // namespace

void Check(const OrtApi* api, OrtStatus* status) {
  if (status != nullptr) throw Failed{std::shared_ptr<OrtStatus>(status, StatusDeleter{api})};
}

bool Succeeds(const OrtApi* api, OrtStatus* status) {
  if (status != nullptr) ort::ReleaseStatus(api, status);
  return status == nullptr;
}

// Bytes of the UTF-8 character that begins here; 0 where there is none.
std::size_t CharacterBytes(const std::string& text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(i < text.size() ? text[i] : 0); };
  const unsigned char first = byte(at), second = byte(at + 1);
  if (first < 0x80) return 1;
  const std::size_t count = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  for (std::size_t i = 1; i < count; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
  }
  // What a shorter form could say, halves of UTF-16 pairs, and what lies beyond the last character.
  const bool wrong = (first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
                     (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F);
  return wrong ? 0 : count;
}

// Text that anybody can print: UTF-8, whatever the model holds, and not too long.
std::string Printable(const std::string& text) {
  constexpr std::size_t kLongest = 200;
  std::string printable;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t count = CharacterBytes(text, at);
    if (printable.size() + std::max<std::size_t>(count, 1) > kLongest) return printable + "...";
    const auto first = static_cast<unsigned char>(text[at]);
    if (count == 0 || first < 32 || first == 127) {
      printable += '?';
    } else {
      printable.append(text, at, count);
    }
    at += std::max<std::size_t>(count, 1);
  }
  return printable;
}

std::string Who(const OrtApi* api, const OrtKernelInfo* info, const char* op) {
  std::optional<std::string> name =
      ReadString(api, [&](char* out, std::size_t* size) { return ort::KernelInfo_GetNodeName(api, info, out, size); });
  if (!name || name->empty()) {
    name = ReadString(
        api, [&](char* out, std::size_t* size) { return ort::KernelInfo_GetOutputName(api, info, 0, out, size); });
  }
  return std::string("vqonnx.") + op + " '" + Printable(name.value_or("")) + "'";
}

std::optional<std::string> StringAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  return ReadString(api, [&](char* out, std::size_t* size) {
    return ort::KernelInfoGetAttribute_string(api, info, name, out, size);
  });
}

std::optional<std::int64_t> IntAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  std::int64_t value = 0;
  if (!Succeeds(api, ort::KernelInfoGetAttribute_int64(api, info, name, &value))) return std::nullopt;
  return value;
}

std::optional<std::vector<std::int64_t>> IntsAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  std::size_t count = 0;
  if (!Succeeds(api, ort::KernelInfoGetAttributeArray_int64(api, info, name, nullptr, &count))) return std::nullopt;
  std::vector<std::int64_t> values(count);
  if (count > 0) Check(api, ort::KernelInfoGetAttributeArray_int64(api, info, name, values.data(), &count));
  return values;
}

std::optional<std::string> OptionalString(const OrtApi* api, const OrtKernelInfo* info, const char* name,
                                          const char* otherwise) {
  const std::optional<std::string> value = StringAttribute(api, info, name);
  std::size_t count = 0;  // asked for integers, onnxruntime fails only when there is no attribute of that name at all
  if (!value && Succeeds(api, ort::KernelInfoGetAttributeArray_int64(api, info, name, nullptr, &count))) {
    throw Invalid(std::string(name) + " is no string; " + otherwise);
  }
  return value;
}

void CheckCoding(const OrtApi* api, const OrtKernelInfo* info) {
  constexpr const char* kKnown = "version 1 of this op knows only 'fixed'";
  const std::optional<std::string> coding = OptionalString(api, info, "coding", kKnown);
  if (coding && *coding != "fixed") throw Invalid("coding is '" + Printable(*coding) + "'; " + kKnown);
}

std::vector<std::int64_t> Perm(const OrtApi* api, const OrtKernelInfo* info) {
  const std::optional<std::vector<std::int64_t>> perm = IntsAttribute(api, info, "perm");
  if (!perm) throw Invalid("the attribute perm is missing, or is no list of integers");
  return *perm;
}

Tensor InputView(const OrtApi* api, const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = nullptr;
  Check(api, ort::KernelContext_GetInput(api, context, index, &value));
  return View(api, value);
}

const void* InputData(const OrtApi* api, const OrtKernelContext* context, std::size_t index) {
  const OrtValue* value = nullptr;
  void* data = nullptr;
  Check(api, ort::KernelContext_GetInput(api, context, index, &value));
  if (value == nullptr) throw Invalid("an input is missing");
  Check(api, ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
  return data;
}

std::optional<Tensor> ConstantInput(const OrtApi* api, const OrtKernelInfo* info, std::size_t index) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Check(api, ort::KernelInfoGetConstantInput_tensor(api, info, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) return std::nullopt;
  return View(api, value);
}

float* Output(const OrtApi* api, OrtKernelContext* context, const std::vector<std::int64_t>& shape) {
  OrtValue* output = nullptr;
  void* data = nullptr;
  Check(api, ort::KernelContext_GetOutput(api, context, 0, shape.data(), shape.size(), &output));
  Check(api, ort::GetTensorMutableData(api, output, &data));
  return static_cast<float*>(data);
}

void NodeTasks::Run(std::size_t count, void (*task)(void*, std::size_t), void* data) const {
  Check(api_, ort::KernelContext_ParallelFor(api_, context_, task, count, 0, data));
}

}  // namespace vqonnx
