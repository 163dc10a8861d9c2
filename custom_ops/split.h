// Cutting work into parts.
#ifndef VQONNX_SPLIT_H_
#define VQONNX_SPLIT_H_

#include <cstddef>

namespace vqonnx {

constexpr std::size_t Ceil(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

struct Part {
  std::size_t begin, size;
};

// The part `index` of `length` things in `parts` nearly equal parts.
constexpr Part PartOf(std::size_t length, std::size_t parts, std::size_t index) {
  const std::size_t begin = length * index / parts;
  return {begin, length * (index + 1) / parts - begin};
}

}  // namespace vqonnx

#endif  // VQONNX_SPLIT_H_
