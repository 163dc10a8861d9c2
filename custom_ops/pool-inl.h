// Largest values of windows, channel by channel, over the vocabulary of windows-inl.h.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

constexpr std::size_t kPoolRoom = 4096;  // floats of rows that are taken at once
constexpr std::size_t kPoolRow = 1024;   // of one of them
constexpr float kLowest = -__builtin_huge_valf();

// The largest of `count` values that are `pitch` apart, for some columns. Writes up to a whole vector, of kLowest.
void MaxOfRows(const float* from, std::size_t count, std::size_t pitch, std::size_t cols, float* out) {
  constexpr std::size_t kVectors = 4;
  std::size_t col = 0;
  for (; col + kVectors * Wide::kLanes <= cols; col += kVectors * Wide::kLanes) {
    decltype(Wide::Set(0.0F)) most[kVectors];
    VQONNX_UNROLL
    for (std::size_t v = 0; v < kVectors; ++v) most[v] = Wide::Load(from + col + v * Wide::kLanes);
    for (std::size_t i = 1; i < count; ++i) {
      VQONNX_UNROLL
      for (std::size_t v = 0; v < kVectors; ++v) {
        most[v] = Wide::Max(most[v], Wide::Load(from + i * pitch + col + v * Wide::kLanes));
      }
    }
    VQONNX_UNROLL
    for (std::size_t v = 0; v < kVectors; ++v) Wide::Store(out + col + v * Wide::kLanes, most[v]);
  }
  for (; col < cols; col += Wide::kLanes) {
    const auto range = Wide::RangeOf(0, cols - col < Wide::kLanes ? cols - col : Wide::kLanes);
    auto most = Wide::Set(kLowest);
    for (std::size_t i = 0; i < count; ++i) {
      most = Wide::Max(most, Wide::LoadRangeOr(from + i * pitch + col, range, Wide::Set(kLowest)));
    }
    Wide::Store(out + col, most);
  }
}

// The largest of `count` neighbours, for kLanes windows that are kStride apart.
template <std::size_t kStride>
VQONNX_INLINE auto MaxOfColumns(const float* from, std::size_t count) {
  auto most = Wide::Set(kLowest);
  for (std::size_t j = 0; j < count; j += kStride) {
    auto value = Wide::Load(from + j);
    if constexpr (kStride == 2) {
      auto odd = value;
      Wide::SplitPairs(value, Wide::Load(from + j + Wide::kLanes), &value, &odd);
      if (j + 1 < count) most = Wide::Max(most, odd);
    }
    most = Wide::Max(most, value);
  }
  return most;
}

// A range of an axis that windows take: `count` places from `begin` on, the first of which has number `before` among
// those that are counted with the pads.
struct PoolRange {
  std::size_t begin, count, before;
  VQONNX_INLINE PoolRange(std::size_t first, std::size_t length, std::size_t pad, std::size_t size)
      : before(first < pad ? pad - first : 0) {
    begin = first + before - pad;
    const std::size_t end = first + length < pad ? 0 : first + length - pad;
    const std::size_t until = end < size ? end : size;
    count = until > begin ? until - begin : 0;
  }
};

// Outputs [x, x + count) of all rows: for some rows of the output at a time first the largest of each column, pads
// included, then that of neighbouring columns. The second step comes so late that what it reads is in the cache.
template <std::size_t kStride>
void PoolPart(const Windows& w, std::size_t x, std::size_t count) {
  const RowEnd end(w);
  const std::size_t span = (count - 1) * kStride + w.kernel_cols;
  const PoolRange cols(x * kStride, span, w.pad_cols, w.image_cols);
  const std::size_t pitch = (span / Wide::kLanes + 3) * Wide::kLanes;
  const std::size_t batch = kPoolRoom / pitch;
  alignas(64) float room[kPoolRoom];
  const auto clear = [](float* from, std::size_t size) {
    for (std::size_t i = 0; i < size; i += Wide::kLanes) Wide::Store(from + i, Wide::Set(kLowest));
  };
  clear(room, kPoolRoom / Wide::kLanes * Wide::kLanes);
  for (std::size_t channel = 0; channel < w.channels; ++channel) {
    const float* image = w.x + channel * w.image_rows * w.image_cols + cols.begin;
    for (std::size_t top = 0; top < w.out_rows; top += batch) {
      const std::size_t rows = w.out_rows - top < batch ? w.out_rows - top : batch;
      for (std::size_t i = 0; i < rows; ++i) {
        const PoolRange range((top + i) * w.stride_rows, w.kernel_rows, w.pad_rows, w.image_rows);
        if (range.count == 0) {
          clear(room + i * pitch, pitch);
        } else {
          MaxOfRows(image + range.begin * w.image_cols, range.count, w.image_cols, cols.count,
                    room + i * pitch + cols.before);
        }
      }
      for (std::size_t i = 0; i < rows; ++i) {
        float* out = w.out + (channel * w.out_rows + top + i) * w.out_cols + x;
        for (std::size_t j = 0; j < count; j += Wide::kLanes) {
          end.Store(MaxOfColumns<kStride>(room + i * pitch + j * kStride, w.kernel_cols), out + j, count - j);
        }
      }
    }
  }
}

// Long rows are cut; their last part comes first, see RowEnd.
template <std::size_t kStride>
void PoolRows(const Windows& w) {
  const std::size_t most = (kPoolRow - w.kernel_cols) / kStride / Wide::kLanes * Wide::kLanes;
  for (std::size_t x = (w.out_cols - 1) / most * most;; x -= most) {
    PoolPart<kStride>(w, x, w.out_cols - x < most ? w.out_cols - x : most);
    if (x == 0) break;
  }
}

// Any window.
void PoolWindows(const Windows& w) {
  const RowEnd end(w);
  for (std::size_t i = 0; i < w.channels * w.out_rows; ++i) {
    const std::size_t channel = i / w.out_rows, y = i % w.out_rows;
    const float* image = w.x + channel * w.image_rows * w.image_cols;
    for (std::size_t x = 0; x < w.out_cols; x += Wide::kLanes) {
      auto most = Wide::Set(kLowest);
      for (std::size_t k = 0; k < w.kernel_rows; ++k) {
        const std::size_t row = y * w.stride_rows + k * w.dilation_rows - w.pad_rows;
        if (row >= w.image_rows) continue;  // it wraps around before the image
        for (std::size_t j = 0; j < w.kernel_cols; ++j) {
          const std::size_t first = x * w.stride_cols + j * w.dilation_cols;
          most = Wide::Max(most, LoadTap(w, image + row * w.image_cols, first, kLowest));
        }
      }
      end.Store(most, w.out + i * w.out_cols + x, w.out_cols - x);
    }
  }
}

void MaxPools(const Windows& w) {
  const bool dense = w.dilation_rows == 1 && w.dilation_cols == 1 && w.kernel_cols <= kPoolRow / 2;
  const std::size_t stride = dense ? w.stride_cols : 0;
  stride == 1 ? PoolRows<1>(w) : stride == 2 ? PoolRows<2>(w) : PoolWindows(w);
}

}  // namespace
}  // namespace vqonnx
