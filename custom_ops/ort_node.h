// What the ops share on the side of onnxruntime: errors, attributes and tensors of a node, work for its threads.
#ifndef VQONNX_ORT_NODE_H_
#define VQONNX_ORT_NODE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "tasks.h"
#include "tensor.h"

namespace vqonnx {

constexpr int kUint8 = static_cast<int>(Type::kUint8);
constexpr int kInt64 = static_cast<int>(Type::kInt64);
constexpr int kFloat32 = static_cast<int>(Type::kFloat32);

// A failed call of onnxruntime, on its way to the nearest C boundary.
struct Failed {
  std::shared_ptr<OrtStatus> status;
};

void Check(const OrtApi* api, OrtStatus* status);     // throws Failed
bool Succeeds(const OrtApi* api, OrtStatus* status);  // forgets the error

// One line: names come from the model and may hold anything.
std::string Printable(const std::string& text);

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

// How errors call a node. It is named after its weight; where a tool dropped the name, the output has it.
std::string Who(const OrtApi* api, const OrtKernelInfo* info, const char* op);

// Attributes; nothing where there is none of that name and type.
std::optional<std::string> StringAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name);
std::optional<std::int64_t> IntAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name);
std::optional<std::vector<std::int64_t>> IntsAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name);

// Throws Invalid when the node has `name`, but not as a string.
std::optional<std::string> OptionalString(const OrtApi* api, const OrtKernelInfo* info, const char* name,
                                          const char* otherwise);

// The attributes that every op has.
void CheckCoding(const OrtApi* api, const OrtKernelInfo* info);
std::vector<std::int64_t> Perm(const OrtApi* api, const OrtKernelInfo* info);

// Inputs. A constant is there when the session is made, and its data stays where it is for as long as the session does.
Tensor InputView(const OrtApi* api, const OrtKernelContext* context, std::size_t index);
const void* InputData(const OrtApi* api, const OrtKernelContext* context, std::size_t index);
std::optional<Tensor> ConstantInput(const OrtApi* api, const OrtKernelInfo* info, std::size_t index);

float* Output(const OrtApi* api, OrtKernelContext* context, const std::vector<std::int64_t>& shape);

// onnxruntime's threads.
class NodeTasks : public Tasks {
 public:
  NodeTasks(const OrtApi* api, const OrtKernelContext* context) : api_(api), context_(context) {}
  void Run(std::size_t count, void (*task)(void*, std::size_t), void* data) const override;

 private:
  const OrtApi* api_;
  const OrtKernelContext* context_;
};

}  // namespace vqonnx

#endif  // VQONNX_ORT_NODE_H_
