// Work that falls into parts, for whoever has threads.
#ifndef VQONNX_TASKS_H_
#define VQONNX_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>
#include <vector>

namespace vqonnx {

// What a thread does of things that have parts: the next thing, then its next part, each until there is none.
class Shares {
 public:
  Shares(std::vector<std::atomic<std::size_t>>& taken, std::size_t parts, std::size_t first)
      : taken_(taken), parts_(parts), first_(first) {
    Skip();
  }
  bool empty() const { return seen_ == taken_.size(); }
  bool Next(std::size_t& unit) {
    Skip();
    if (empty()) return false;
    unit = Unit();
    ++seen_;
    return true;
  }
  bool NextPart(std::size_t unit, std::size_t& part) {
    part = taken_[unit].fetch_add(1, std::memory_order_relaxed);
    return part < parts_;
  }

 private:
  std::size_t Unit() const { return (first_ + seen_) % taken_.size(); }
  void Skip() {
    while (!empty() && taken_[Unit()].load(std::memory_order_relaxed) >= parts_) ++seen_;
  }

  std::vector<std::atomic<std::size_t>>& taken_;
  std::size_t parts_, first_, seen_ = 0;
};

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

  // Shares out `units` things of `parts` parts, where it saves work to do several parts of the same thing, and things
  // that are next to each other: body(shares) does what Next yields, on each thread once or more often. A thread begins
  // somewhere of its own and goes on from there, at last with parts of things that others have begun: so few things do
  // for any number of threads.
  template <class Body>
  void Share(std::size_t units, std::size_t parts, const Body& body) const {
    constexpr std::size_t kMostThreads = 64;  // that can take part
    std::vector<std::atomic<std::size_t>> taken(units);
    const std::size_t tasks = std::min(units * parts, kMostThreads);
    Each(tasks, [&](std::size_t task) {
      Shares shares(taken, parts, task * units / tasks);
      if (!shares.empty()) body(shares);
    });
  }

 protected:
  ~Tasks() = default;
};

}  // namespace vqonnx

#endif  // VQONNX_TASKS_H_
