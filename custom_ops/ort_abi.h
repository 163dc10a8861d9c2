// The few entries of the onnxruntime C ABI that this library uses. The ABI only ever grows at its end, so positions are
// all there is to know: entry n of OrtApi is the n-th function pointer of a table.
#ifndef VQONNX_ORT_ABI_H_
#define VQONNX_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define VQONNX_ORT_CALL __stdcall
#else
#define VQONNX_ORT_CALL
#endif

extern "C" {

// Opaque.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApi {
  void(VQONNX_ORT_CALL* entries[1])();  // as many as the version has; see OrtEntry
};

struct OrtApiBase {
  const OrtApi*(VQONNX_ORT_CALL* GetApi)(std::uint32_t version);  // null: this onnxruntime is older than that
  const char*(VQONNX_ORT_CALL* GetVersionString)();
};

// What onnxruntime asks about an op. Members after GetEndVersion are read only from ops that say version 18 or later.
struct OrtCustomOp {
  std::uint32_t version;
  void*(VQONNX_ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(VQONNX_ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(VQONNX_ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetInputType)(const OrtCustomOp*, std::size_t index);
  std::size_t(VQONNX_ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetOutputType)(const OrtCustomOp*, std::size_t index);
  std::size_t(VQONNX_ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(VQONNX_ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
  void(VQONNX_ORT_CALL* KernelDestroy)(void* kernel);
  int(VQONNX_ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, std::size_t index);
  int(VQONNX_ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, std::size_t index);
  int(VQONNX_ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, std::size_t index);
  int(VQONNX_ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(VQONNX_ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(VQONNX_ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(VQONNX_ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(VQONNX_ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(VQONNX_ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  std::size_t(VQONNX_ORT_CALL* GetMayInplace)(int** inputs, int** outputs);
  void(VQONNX_ORT_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  std::size_t(VQONNX_ORT_CALL* GetAliasMap)(int** inputs, int** outputs);
  void(VQONNX_ORT_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, CreateKernelV2) == 136);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetEndVersion) == 168);

namespace vqonnx {

// The version that is asked for: the first with ParallelFor, so that onnxruntime 1.17 and all later ones will do.
constexpr std::uint32_t kOrtApiVersion = 17;

// Status codes, tensor element types (ONNX's numbers), characteristics and memory types.
constexpr int kOrtFail = 1;
constexpr int kOrtInvalidArgument = 2;
constexpr int kOrtAnyType = 0;
constexpr int kOrtRequired = 0;
constexpr int kOrtCpuMemory = 0;

// One entry of the table, called like a function with the table as its first argument.
template <class Signature>
struct OrtEntry;

template <class Result, class... Args>
struct OrtEntry<Result(Args...)> {
  std::size_t position;

  Result operator()(const OrtApi* api, Args... args) const {
    // Through a pointer, since the array is longer than the type says.
    void(VQONNX_ORT_CALL* const* entries)() = api->entries;
    return reinterpret_cast<Result(VQONNX_ORT_CALL*)(Args...)>(entries[position])(args...);
  }
};

// Functions that return an OrtStatus* return null on success; a status belongs to whoever receives it.
namespace ort {

constexpr OrtEntry<OrtStatus*(int code, const char* message)> CreateStatus{0};
constexpr OrtEntry<const char*(const OrtStatus*)> GetErrorMessage{2};
constexpr OrtEntry<void(OrtStatus*)> ReleaseStatus{93};

constexpr OrtEntry<OrtStatus*(const char* name, OrtCustomOpDomain**)> CreateCustomOpDomain{26};
constexpr OrtEntry<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add{27};
constexpr OrtEntry<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain{28};

constexpr OrtEntry<OrtStatus*(OrtValue*, void** data)> GetTensorMutableData{51};
constexpr OrtEntry<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> GetTensorTypeAndShape{65};
constexpr OrtEntry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int* type)> GetTensorElementType{60};
constexpr OrtEntry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::size_t* count)> GetDimensionsCount{61};
constexpr OrtEntry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::int64_t* dims, std::size_t count)> GetDimensions{
    62};
constexpr OrtEntry<void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo{99};

// Strings and arrays: with a null `out` these give only the size (a string's includes the final zero).
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, const char* name, float* out)> KernelInfoGetAttribute_float{85};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out)> KernelInfoGetAttribute_int64{
    86};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, const char* name, char* out, std::size_t* size)>
    KernelInfoGetAttribute_string{87};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out, std::size_t* size)>
    KernelInfoGetAttributeArray_int64{163};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, std::size_t index, char* out, std::size_t* size)>
    KernelInfo_GetOutputName{233};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, char* out, std::size_t* size)> KernelInfo_GetNodeName{244};
constexpr OrtEntry<OrtStatus*(const OrtKernelInfo*, std::size_t index, int* is_constant, const OrtValue** value)>
    KernelInfoGetConstantInput_tensor{249};

constexpr OrtEntry<OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue**)> KernelContext_GetInput{90};
constexpr OrtEntry<OrtStatus*(OrtKernelContext*, std::size_t index, const std::int64_t* dims, std::size_t count,
                              OrtValue**)>
    KernelContext_GetOutput{91};
constexpr OrtEntry<OrtStatus*(const OrtKernelContext*, void (*)(void* data, std::size_t index), std::size_t total,
                              std::size_t num_batch, void* data)>
    KernelContext_ParallelFor{274};

}  // namespace ort
}  // namespace vqonnx

#endif  // VQONNX_ORT_ABI_H_
