// Largest values of windows, channel by channel, over the vocabulary of windows-inl.h.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

constexpr std::size_t kMostPool = 16;  // rows and columns of a window whose rows are taken once for all outputs
constexpr float kLowest = -__builtin_huge_valf();

// The largest values of one row of the image for kLanes windows, kStride columns apart; `ranges` are those of a tap's
// vectors that exist, and where the stride is 2, of every other tap's.
template <std::size_t kStride>
VQONNX_INLINE auto MaxOfRow(const float* from, const Wide::Range (&ranges)[kMostPool][kStride], std::size_t taps) {
  const auto lowest = Wide::Set(kLowest);
  auto most = lowest;
  for (std::size_t j = 0; j < taps; j += kStride) {
    auto value = Wide::LoadRangeOr(from + j, ranges[j][0], lowest), odd = lowest;
    if constexpr (kStride == 2) {
      Wide::SplitPairs(value, Wide::LoadRangeOr(from + j + Wide::kLanes, ranges[j][1], lowest), &value, &odd);
      if (j + 1 < taps) most = Wide::Max(most, odd);
    }
    most = Wide::Max(most, value);
  }
  return most;
}

// One channel, strip by strip, the last one first. What a row of the image yields is kept for all outputs that take it.
template <std::size_t kStride>
void PoolStrips(const Windows& w, std::size_t channel) {
  const float* image = w.x + channel * w.image_rows * w.image_cols;
  const RowEnd end(w);
  for (std::size_t x = (w.out_cols - 1) / Wide::kLanes * Wide::kLanes;; x -= Wide::kLanes) {
    const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(x * kStride) - static_cast<std::ptrdiff_t>(w.pad_cols);
    Wide::Range ranges[kMostPool][kStride];
    for (std::size_t j = 0; j < w.kernel_cols; j += kStride) {
      for (std::size_t i = 0; i < kStride; ++i) {
        ranges[j][i] = Existing(first + static_cast<std::ptrdiff_t>(j + i * Wide::kLanes), w.image_cols);
      }
    }
    alignas(64) float rows[kMostPool][Wide::kLanes];  // of row r in place r % kMostPool
    std::size_t next = 0;                             // the first row that was not taken yet
    for (std::size_t y = 0; y < w.out_rows; ++y) {
      const std::size_t top = y * w.stride_rows, bottom = top + w.kernel_rows;  // counted with the pads
      const std::size_t begin = top < w.pad_rows ? 0 : top - w.pad_rows;
      const std::size_t beyond = bottom < w.pad_rows ? 0 : bottom - w.pad_rows;
      const std::size_t until = beyond < w.image_rows ? beyond : w.image_rows;
      for (next = next < begin ? begin : next; next < until; ++next) {
        Wide::Store(rows[next % kMostPool],
                    MaxOfRow<kStride>(image + next * w.image_cols + first, ranges, w.kernel_cols));
      }
      auto most = Wide::Set(kLowest);
      for (std::size_t row = begin; row < until; ++row) most = Wide::Max(most, Wide::Load(rows[row % kMostPool]));
      end.Store(most, w.out + (channel * w.out_rows + y) * w.out_cols + x, w.out_cols - x);
    }
    if (x == 0) break;
  }
}

// Any window.
void PoolWindows(const Windows& w, std::size_t channel) {
  const float* image = w.x + channel * w.image_rows * w.image_cols;
  const RowEnd end(w);
  for (std::size_t y = 0; y < w.out_rows; ++y) {
    for (std::size_t x = 0; x < w.out_cols; x += Wide::kLanes) {
      auto most = Wide::Set(kLowest);
      for (std::size_t i = 0; i < w.kernel_rows; ++i) {
        const std::size_t row = y * w.stride_rows + i * w.dilation_rows - w.pad_rows;
        if (row >= w.image_rows) continue;  // it wraps around before the image
        for (std::size_t j = 0; j < w.kernel_cols; ++j) {
          const std::size_t first = x * w.stride_cols + j * w.dilation_cols;
          most = Wide::Max(most, LoadTap(w, image + row * w.image_cols, first, kLowest));
        }
      }
      end.Store(most, w.out + (channel * w.out_rows + y) * w.out_cols + x, w.out_cols - x);
    }
  }
}

void MaxPools(const Windows& w) {
  const bool small = w.kernel_rows <= kMostPool && w.kernel_cols <= kMostPool;
  const std::size_t stride = small && w.dilation_rows == 1 && w.dilation_cols == 1 ? w.stride_cols : 0;
  const auto pool = stride == 1 ? PoolStrips<1> : stride == 2 ? PoolStrips<2> : PoolWindows;
  for (std::size_t channel = 0; channel < w.channels; ++channel) pool(w, channel);
}

}  // namespace
}  // namespace vqonnx
