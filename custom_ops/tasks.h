// Work that falls into parts, for whoever has threads.
#ifndef VQONNX_TASKS_H_
#define VQONNX_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>
#include <vector>

namespace vqonnx {

class Tasks {
 public:
  // Calls task(data, i) for each i < count, in any order and at the same time. `task` throws nothing.
  virtual void Run(std::size_t count, void (*task)(void*, std::size_t), void* data) const = 0;

  // The same for a function object, which may throw std::bad_alloc (and nothing else).
  template <class Body>
  void Each(std::size_t count, const Body& body) const {
    if (count == 1) return body(std::size_t{0});
    struct Job {
      const Body& body;
      std::atomic<bool> out_of_memory = false;
    } job = {body};
    Run(
        count,
        [](void* data, std::size_t index) {
          Job& its = *static_cast<Job*>(data);
          try {
            its.body(index);
          } catch (const std::bad_alloc&) {  // on a thread of a pool it would end the process
            its.out_of_memory = true;
          }
        },
        &job);
    if (job.out_of_memory) throw std::bad_alloc();
  }

  // Shares out `units` things of `parts` parts each, where it saves work to do several parts of the same thing:
  // body(unit, next) does the parts that next() yields, until that is `parts`. A thread goes on with a thing while
  // there are parts of it, and then helps with others, so that few things do for any number of threads.
  template <class Body>
  void Share(std::size_t units, std::size_t parts, const Body& body) const {
    constexpr std::size_t kMostThreads = 64;  // that can take part
    std::vector<std::atomic<std::size_t>> taken(units);
    const std::size_t tasks = std::min(units * parts, kMostThreads);
    Each(tasks, [&](std::size_t task) {
      for (std::size_t i = 0; i < units; ++i) {
        const std::size_t unit = (task * units / tasks + i) % units;
        if (taken[unit].load(std::memory_order_relaxed) >= parts) continue;
        body(unit, [&] { return std::min(parts, taken[unit].fetch_add(1, std::memory_order_relaxed)); });
      }
    });
  }

 protected:
  ~Tasks() = default;
};

}  // namespace vqonnx

#endif  // VQONNX_TASKS_H_
