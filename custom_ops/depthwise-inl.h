// Depthwise convolutions, channel by channel, over the vocabulary of windows-inl.h.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

// What follows the sums of some outputs of a row, of which there are `left`.
template <bool kSilu>
struct DepthwiseEnd {
  Activate<kSilu> activate;
  RowEnd row_end;
  std::ptrdiff_t addend;
  bool adds;
  VQONNX_INLINE explicit DepthwiseEnd(const Depthwise& d)
      : activate(d.activation),
        row_end(d.windows),
        addend(d.addend == nullptr ? 0 : d.addend - d.windows.out),
        adds(d.addend != nullptr) {}
  VQONNX_INLINE void Store(decltype(Wide::Set(0.0F)) sum, float* out, std::size_t left) const {
    if (adds) {
      sum = Wide::Add(sum, left >= Wide::kLanes ? Wide::Load(out + addend) : Wide::LoadPart(out + addend, left));
    }
    row_end.Store(activate(sum), out, left);
  }
};

// What the taps of one row take for kLanes outputs, kStride columns apart: values from `first` on that exist.
template <std::size_t kSize, std::size_t kStride>
struct TapRow {
  std::ptrdiff_t first;
  Wide::Range ranges[kSize][kStride];  // where the stride is 2, of every other tap
  VQONNX_INLINE TapRow(const Windows& w, std::size_t x)
      : first(static_cast<std::ptrdiff_t>(x * kStride) - static_cast<std::ptrdiff_t>(w.pad_cols)) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kSize; j += kStride) {
      VQONNX_UNROLL
      for (std::size_t i = 0; i < kStride; ++i) {
        ranges[j][i] = Existing(first + static_cast<std::ptrdiff_t>(j + i * Wide::kLanes), w.image_cols);
      }
    }
  }
  VQONNX_INLINE void Load(const float* row, decltype(Wide::Set(0.0F)) (&values)[kSize]) const {
    const float* from = row + first;
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kSize; j += kStride) {
      values[j] = Wide::LoadRange(from + j, ranges[j][0]);
      if constexpr (kStride == 2) {
        auto odd = values[j];
        Wide::SplitPairs(values[j], Wide::LoadRange(from + j + Wide::kLanes, ranges[j][1]), &values[j], &odd);
        if (j + 1 < kSize) values[j + 1] = odd;
      }
    }
  }
};

// One channel, strip by strip, the last one first: kSize by kSize taps without gaps. Each row of the image is loaded
// once, for all outputs that take it.
template <std::size_t kSize, std::size_t kStride, bool kSilu>
void SumDense(const Depthwise& d, std::size_t channel) {
  using V = decltype(Wide::Set(0.0F));
  constexpr std::size_t kSums = (kSize - 1) / kStride + 1;  // outputs that a row may be part of
  constexpr std::size_t kAhead = 8;                         // rows of the image that are fetched early
  const Windows& w = d.windows;
  const std::size_t image_rows = w.image_rows, image_cols = w.image_cols, pad_rows = w.pad_rows;
  const std::size_t out_rows = w.out_rows, out_cols = w.out_cols;
  const float* image = w.x + channel * image_rows * image_cols;
  const DepthwiseEnd<kSilu> end(d);
  const V bias = Wide::Set(d.bias[channel]);
  V taps[kSize * kSize];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kSize * kSize; ++i) taps[i] = Wide::Set(d.taps[channel * kSize * kSize + i]);
  for (std::size_t x = (out_cols - 1) / Wide::kLanes * Wide::kLanes;; x -= Wide::kLanes) {
    const TapRow<kSize, kStride> tap_row(w, x);
    const float* from = image;  // the next row
    float* out = w.out + channel * out_rows * out_cols + x;
    V sums[kSums];  // sums[i] takes the next row as its row i * kStride
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kSums; ++i) sums[i] = bias;
    for (std::size_t y = 0; y < out_rows + kSums - 1; ++y) {  // the output whose first row it is
      VQONNX_UNROLL
      for (std::size_t phase = 0; phase < kStride; ++phase) {
        if (y * kStride + phase - pad_rows < image_rows) {  // wraps around before the image
          V values[kSize];
          tap_row.Load(from, values);
          VQONNX_FETCH(from + x * kStride + kAhead * image_cols);
          if (kStride == 2) VQONNX_FETCH(from + x * kStride + Wide::kLanes + kAhead * image_cols);
          from += image_cols;
          VQONNX_UNROLL
          for (std::size_t i = 0; i < kSums; ++i) {
            const std::size_t tap = i * kStride + phase;
            if (tap >= kSize) break;
            VQONNX_UNROLL
            for (std::size_t j = 0; j < kSize; ++j) sums[i] = Wide::MulAdd(values[j], taps[tap * kSize + j], sums[i]);
          }
        }
        if (phase == (kSize - 1) % kStride && y + 1 >= kSums) {
          end.Store(sums[kSums - 1], out, out_cols - x);
          out += out_cols;
        }
      }
      VQONNX_UNROLL
      for (std::size_t i = kSums - 1; i > 0; --i) sums[i] = sums[i - 1];
      sums[0] = bias;
    }
    if (x == 0) break;
  }
}

// Any window.
template <bool kSilu>
void SumWindows(const Depthwise& d, std::size_t channel) {
  const Windows& w = d.windows;
  const std::size_t out_plane = w.out_rows * w.out_cols;
  const float* image = w.x + channel * w.image_rows * w.image_cols;
  const float* taps = d.taps + channel * w.kernel_rows * w.kernel_cols;
  const DepthwiseEnd<kSilu> end(d);
  for (std::size_t y = 0; y < w.out_rows; ++y) {
    for (std::size_t x = 0; x < w.out_cols; x += Wide::kLanes) {
      auto sum = Wide::Set(d.bias[channel]);
      for (std::size_t i = 0; i < w.kernel_rows; ++i) {
        const std::size_t row = y * w.stride_rows + i * w.dilation_rows - w.pad_rows;
        if (row >= w.image_rows) continue;  // it wraps around before the image
        for (std::size_t j = 0; j < w.kernel_cols; ++j) {
          const std::size_t first = x * w.stride_cols + j * w.dilation_cols;
          sum = Wide::MulAdd(LoadTap(w, image + row * w.image_cols, first, 0.0F),
                             Wide::Set(taps[i * w.kernel_cols + j]), sum);
        }
      }
      end.Store(sum, w.out + channel * out_plane + y * w.out_cols + x, w.out_cols - x);
    }
  }
}

template <bool kSilu>
void SumChannels(const Depthwise& d) {
  const Windows& w = d.windows;
  const bool dense = w.kernel_rows == w.kernel_cols && w.dilation_rows == 1 && w.dilation_cols == 1;
  const std::size_t size = dense ? w.kernel_rows : 0;
  const std::size_t stride = w.stride_rows == w.stride_cols ? w.stride_rows : 0;
  const auto sum = size == 3 && stride == 1   ? SumDense<3, 1, kSilu>
                   : size == 5 && stride == 1 ? SumDense<5, 1, kSilu>
                   : size == 3 && stride == 2 ? SumDense<3, 2, kSilu>
                   : size == 5 && stride == 2 ? SumDense<5, 2, kSilu>
                                              : SumWindows<kSilu>;
  for (std::size_t channel = 0; channel < w.channels; ++channel) sum(d, channel);
}

void SumDepthwise(const Depthwise& d) { d.activation.silu ? SumChannels<true>(d) : SumChannels<false>(d); }

}  // namespace
}  // namespace vqonnx
