#include "scratch.h"

#include <new>

namespace vqonnx {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr std::size_t kKept = std::size_t{16} << 20;

struct Kept {
  ~Kept() { ::operator delete(data, kAlign); }
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
};

thread_local Kept kept[2];

}  // namespace

Scratch::Scratch(Use use, std::size_t bytes) : own_(bytes > kKept) {
  if (own_) {
    begin_ = static_cast<std::uint8_t*>(::operator new(bytes, kAlign));
  } else {
    Kept& mine = kept[use == Use::kRun ? 0 : 1];
    if (mine.bytes < bytes) {
      ::operator delete(mine.data, kAlign);
      mine.data = nullptr;
      mine.bytes = 0;
      mine.data = static_cast<std::uint8_t*>(::operator new(bytes, kAlign));
      mine.bytes = bytes;
    }
    begin_ = mine.data;
  }
  next_ = begin_;
}

Scratch::~Scratch() {
  if (own_) ::operator delete(begin_, kAlign);
}

}  // namespace vqonnx
