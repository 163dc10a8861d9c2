// Cutting work into parts.
#ifndef VQONNX_SPLIT_H_
#define VQONNX_SPLIT_H_

#include <algorithm>
#include <cstddef>

namespace vqonnx {

constexpr std::size_t Ceil(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// Into how many parts to cut `length` things: none longer than `most`, and where there are few tasks, `others` for each
// part, so many that threads can share them evenly, but with at least `least` things in each.
constexpr std::size_t PartsOf(std::size_t length, std::size_t most, std::size_t least, std::size_t others) {
  constexpr std::size_t kTasks = 12;
  return std::max(Ceil(length, most), std::min(length / least, Ceil(kTasks, std::max<std::size_t>(others, 1))));
}

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
