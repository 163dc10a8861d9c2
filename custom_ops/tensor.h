// Arrays that come from outside, what may be wrong with them, and the words that errors use.
#ifndef VQONNX_TENSOR_H_
#define VQONNX_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace vqonnx {

// Inputs that do not fit together. The text is one line and lacks only the name of the weight.
class Invalid : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// ONNX's own numbers (TensorProto.DataType); every other number is a type that no input may have.
enum class Type : int { kUndefined = 0, kFloat32 = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };

struct Tensor {
  const void* data = nullptr;
  Type type = Type::kUndefined;
  std::vector<std::int64_t> dims;
};

std::string Text(std::int64_t value);
std::string Text(std::size_t value);
std::string Text(Type type);
std::string Text(std::span<const std::int64_t> dims);

// Nothing when the product does not fit.
std::optional<std::size_t> Times(std::size_t a, std::size_t b);

// A value of an int8, float16 or float32 tensor.
float FloatAt(const Tensor& tensor, std::size_t index);

// Throw Invalid. `name` is a plural, `meaning` the axes and `wanted` the types in words.
void CheckTensor(const char* name, const Tensor& tensor, const char* meaning, std::size_t axes);
void CheckType(const char* name, const Tensor& tensor, std::span<const Type> allowed, const char* wanted);
void CheckFloats(const char* name, const Tensor& tensor);
void CheckWords(const char* name, const Tensor& tensor);  // floats or int8

}  // namespace vqonnx

#endif  // VQONNX_TENSOR_H_
