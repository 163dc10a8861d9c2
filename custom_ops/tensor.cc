#include "tensor.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

namespace vqonnx {
namespace {

using std::size_t;

float Widen(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t exponent = half >> 10 & 31U;
  const std::uint32_t fraction = half & 1023U;
  if (exponent == 0) {  // zero or subnormal: an exact product
    const float value = static_cast<float>(fraction) * 0x1p-24F;
    return sign ? -value : value;
  }
  const std::uint32_t widened = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

}  // namespace

std::string Text(std::int64_t value) { return std::to_string(value); }
std::string Text(size_t value) { return std::to_string(value); }

std::string Text(Type type) {
  constexpr std::array kNames = {"undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
                                 "int32",     "int64",   "string",    "bool",       "float16", "float64",
                                 "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  const auto number = static_cast<size_t>(type);
  return number < kNames.size() ? kNames[number] : "type " + Text(number);
}

std::string Text(std::span<const std::int64_t> dims) {
  constexpr size_t kShown = 16;
  std::string text = "[";
  for (size_t i = 0; i < dims.size() && i < kShown; ++i) text += (i ? ", " : "") + Text(dims[i]);
  return text + (dims.size() > kShown ? ", ...]" : "]");
}

// Nothing when the product does not fit.
std::optional<size_t> Times(size_t a, size_t b) {
  if (b != 0 && a > std::numeric_limits<size_t>::max() / b) return std::nullopt;
  return a * b;
}

float FloatAt(const Tensor& tensor, size_t index) {
  if (tensor.type == Type::kFloat32) return static_cast<const float*>(tensor.data)[index];
  if (tensor.type == Type::kInt8) return static_cast<float>(static_cast<const std::int8_t*>(tensor.data)[index]);
  return Widen(static_cast<const std::uint16_t*>(tensor.data)[index]);
}

void CheckTensor(const char* name, const Tensor& tensor, const char* meaning, size_t axes) {
  if (tensor.dims.size() != axes) {
    throw Invalid(std::string(name) + " have " + Text(tensor.dims.size()) + " axes " + Text(tensor.dims) + ", not " +
                  Text(axes) + " " + meaning);
  }
  for (const std::int64_t size : tensor.dims) {
    if (size < 1) throw Invalid(std::string(name) + " are " + Text(tensor.dims) + "; every size must be at least 1");
  }
}

void CheckType(const char* name, const Tensor& tensor, std::span<const Type> allowed, const char* wanted) {
  if (std::find(allowed.begin(), allowed.end(), tensor.type) == allowed.end()) {
    throw Invalid(std::string(name) + " are " + Text(tensor.type) + Text(tensor.dims) + "; they must be " + wanted);
  }
}

void CheckFloats(const char* name, const Tensor& tensor) {
  CheckType(name, tensor, std::array{Type::kFloat32, Type::kFloat16}, "float16 or float32");
}

void CheckWords(const char* name, const Tensor& tensor) {
  CheckType(name, tensor, std::array{Type::kFloat32, Type::kFloat16, Type::kInt8}, "int8, float16 or float32");
}

}  // namespace vqonnx
