// Memory that a thread uses again and again: fresh pages would cost more than the work on them.
#ifndef VQONNX_SCRATCH_H_
#define VQONNX_SCRATCH_H_

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <new>

namespace vqonnx {

// Memory that starts on a cache line. Large memory is asked for in huge pages: else what comes from far away waits for
// the addresses of its pages.
void* NewOnLine(std::size_t bytes);  // may throw std::bad_alloc
void DeleteOnLine(void* data, std::size_t bytes);

// An allocator for vectors of such memory.
template <class T>
struct OnLine {
  using value_type = T;
  OnLine() = default;
  template <class U>
  OnLine(const OnLine<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(NewOnLine(count * sizeof(T))); }
  void deallocate(T* data, std::size_t count) { DeleteOnLine(data, count * sizeof(T)); }
  bool operator==(const OnLine&) const { return true; }
};

// Room that the thread keeps, apart from requests so large that they are given back. Aligned to 64 bytes, never set.
// At most one of each `kUse` may live at a time in one thread.
enum class Use { kRun, kTask };

class Scratch {
 public:
  Scratch(Use use, std::size_t bytes);  // may throw std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` values of this type.
  template <class T>
  T* Take(std::size_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += Room<T>(count);
    assert(next_ <= end_);
    return taken;
  }
  template <class T>
  static std::size_t Room(std::size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  std::uint8_t* begin_;
  std::uint8_t* next_;
  std::uint8_t* end_;
  bool own_;
};

}  // namespace vqonnx

#endif  // VQONNX_SCRATCH_H_
