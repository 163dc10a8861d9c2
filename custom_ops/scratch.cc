#include "scratch.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vqonnx {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr std::size_t kKept = std::size_t{16} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::align_val_t AlignOf(std::size_t bytes) { return bytes < kHugePage ? kAlign : std::align_val_t{kHugePage}; }

struct Kept {
  ~Kept() { ::operator delete(data, kAlign); }
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
};

thread_local Kept kept[2];

}  // namespace

void* NewOnLine(std::size_t bytes) {
  void* data = ::operator new(bytes, AlignOf(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // The rest stays in small pages, so that no more memory is taken. Where there are no huge pages, all of it does.
  if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return data;
}

void DeleteOnLine(void* data, std::size_t bytes) { ::operator delete(data, AlignOf(bytes)); }

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
  end_ = begin_ + bytes;
}

Scratch::~Scratch() {
  if (own_) ::operator delete(begin_, kAlign);
}

}  // namespace vqonnx
