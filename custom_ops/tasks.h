// Work that falls into parts, for whoever has threads.
#ifndef VQONNX_TASKS_H_
#define VQONNX_TASKS_H_

#include <atomic>
#include <cstddef>
#include <new>

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

 protected:
  ~Tasks() = default;
};

}  // namespace vqonnx

#endif  // VQONNX_TASKS_H_
