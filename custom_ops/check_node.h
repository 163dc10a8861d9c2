// What the checks of whole layers share: tasks in some order, and nodes with random codes.
#ifndef VQONNX_CHECK_NODE_H_
#define VQONNX_CHECK_NODE_H_

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "linear.h"

namespace vqonnx::check {

using Dims = std::vector<std::int64_t>;

// Every task, in some order.
class Shuffled : public Tasks {
 public:
  explicit Shuffled(unsigned seed) : seed_(seed) {}
  void Run(size_t count, void (*task)(void*, size_t), void* data) const override {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    Random random(seed_);
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t index : order) task(data, index);
  }

 private:
  unsigned seed_;
};

// Every task once, by some threads at the same time.
class Threads : public Tasks {
 public:
  void Run(size_t count, void (*task)(void*, size_t), void* data) const override {
    std::atomic<size_t> next = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&] {
        for (size_t index = next++; index < count; index = next++) task(data, index);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

// run(call, tasks) has written `size` values, which must have the same bits from threads.
template <class Run>
void CheckThreads(const Kernels& kernels, const Sample& sample, const std::string& what, Call call, size_t size,
                  const Run& run) {
  const float* want = call.out;
  std::vector<float> again(size);
  call.out = again.data();
  run(call, Threads());
  if (!std::equal(again.begin(), again.end(), want, Same)) Fail(kernels, sample, what + " depends on threads");
}

struct Node {
  Sample sample;
  Dims layout, perm;
  Dims strides, dilations, pads;
  std::int64_t group = 1;

  Inputs View() const {
    const auto dims = [](std::initializer_list<size_t> list) { return Dims(list.begin(), list.end()); };
    return {.codes = {sample.View().codes, Type::kUint8, sample.CodesShape()},
            .codebooks = {sample.codebooks.data(), Type::kFloat32,
                          dims({sample.stages, sample.books, sample.words, sample.width})},
            .scales = {sample.scales.data(), Type::kFloat32, dims({sample.rows, 1})},
            .layout = {layout.data(), Type::kInt64, dims({layout.size()})}};
  }
};

// A layer with one codebook of as many words as codes of `bits` bits can name.
inline Node Usual(Random& random, size_t rows, size_t cols, size_t width, const Dims& sizes, const Dims& perm,
                  size_t bits = 8, size_t lanes = 1) {
  Node node;
  node.sample.seed = 1;
  node.sample = {.stages = 1,
                 .rows = rows,
                 .groups = cols / width,
                 .bits = bits,
                 .books = 1,
                 .words = size_t{1} << bits,
                 .width = width,
                 .cols = cols,
                 .seed = 1,
                 .storage = {},
                 .shift = 0,
                 .lanes = lanes,
                 .codebooks = {},
                 .scales = {}};
  Fill(node.sample, random, false);
  node.layout = {static_cast<std::int64_t>(bits), static_cast<std::int64_t>(cols)};
  node.layout.insert(node.layout.end(), sizes.begin(), sizes.end());
  node.perm = perm;
  return node;
}

}  // namespace vqonnx::check

#endif  // VQONNX_CHECK_NODE_H_
