// Depthwise convolutions, channel by channel, over the vocabulary of kernels-inl.h, activation-inl.h and tile-inl.h
// and, from `Wide`:
//
//   Range, RangeOf(begin, end)      lanes begin to end - 1 (begin 0 or more, end at most kLanes)
//   LoadRange(p, range)             these lanes, and zeros in the others
//   SplitPairs(a, b, &even, &odd)   the values of a and then b at even places, and those at odd ones
//
// The image is read where it is: a vector of outputs of one row takes for each tap a vector of the image, without the
// lanes that lie outside of it. Nothing is read or laid out twice, and no pad exists in memory.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

// Of kLanes neighbouring values, the first of which is number `first` of `count`, those that exist.
VQONNX_INLINE Wide::Range Existing(std::ptrdiff_t first, std::size_t count) {
  const auto lanes = static_cast<std::ptrdiff_t>(Wide::kLanes), all = static_cast<std::ptrdiff_t>(count);
  const std::ptrdiff_t begin = first >= 0 ? 0 : -first < lanes ? -first : lanes;
  const std::ptrdiff_t end = all - first >= lanes ? lanes : all - first > begin ? all - first : begin;
  return Wide::RangeOf(static_cast<std::size_t>(begin), static_cast<std::size_t>(end));
}

// What a tap takes for kLanes outputs, from a column on that is counted with the pads.
inline decltype(Wide::Set(0.0F)) LoadTap(const Depthwise& d, const float* row, std::size_t column) {
  if (d.stride_cols == 1) {
    const auto first = static_cast<std::ptrdiff_t>(column - d.pad_cols);
    return Wide::LoadRange(row + first, Existing(first, d.image_cols));
  }
  float values[Wide::kLanes];
  for (std::size_t i = 0; i < Wide::kLanes; ++i) {
    const std::size_t place = column + i * d.stride_cols - d.pad_cols;  // wraps around before the image
    values[i] = place < d.image_cols ? row[place] : 0.0F;
  }
  return Wide::Load(values);
}

// What follows the sums of some outputs of a row, of which there are `left`.
template <bool kSilu>
struct DepthwiseEnd {
  Activate<kSilu> activate;
  const float* last;  // where all lanes can still be written: those beyond the row are written again later
  std::ptrdiff_t addend;
  bool adds;
  VQONNX_INLINE explicit DepthwiseEnd(const Depthwise& d)
      : activate(d.activation),
        last(d.out + static_cast<std::ptrdiff_t>(d.channels * d.out_rows * d.out_cols) -
             static_cast<std::ptrdiff_t>(Wide::kLanes)),
        addend(d.addend == nullptr ? 0 : d.addend - d.out),
        adds(d.addend != nullptr) {}
  VQONNX_INLINE void Store(decltype(Wide::Set(0.0F)) sum, float* out, std::size_t left) const {
    if (adds) {
      sum = Wide::Add(sum, left >= Wide::kLanes ? Wide::Load(out + addend) : Wide::LoadPart(out + addend, left));
    }
    sum = activate(sum);
    if (out <= last) {
      Wide::Store(out, sum);
    } else {
      Wide::StorePart(out, left < Wide::kLanes ? left : Wide::kLanes, sum);
    }
  }
};

// What the taps of one row take for kLanes outputs, kStride columns apart: values from `first` on that exist.
template <std::size_t kSize, std::size_t kStride>
struct TapRow {
  std::ptrdiff_t first;
  Wide::Range ranges[kSize][kStride];  // where the stride is 2, of every other tap
  VQONNX_INLINE TapRow(const Depthwise& d, std::size_t x)
      : first(static_cast<std::ptrdiff_t>(x * kStride) - static_cast<std::ptrdiff_t>(d.pad_cols)) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kSize; j += kStride) {
      VQONNX_UNROLL
      for (std::size_t i = 0; i < kStride; ++i) {
        ranges[j][i] = Existing(first + static_cast<std::ptrdiff_t>(j + i * Wide::kLanes), d.image_cols);
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
  const std::size_t image_rows = d.image_rows, image_cols = d.image_cols, pad_rows = d.pad_rows;
  const std::size_t out_rows = d.out_rows, out_cols = d.out_cols;
  const float* image = d.x + channel * image_rows * image_cols;
  const DepthwiseEnd<kSilu> end(d);
  const V bias = Wide::Set(d.bias[channel]);
  V taps[kSize * kSize];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kSize * kSize; ++i) taps[i] = Wide::Set(d.taps[channel * kSize * kSize + i]);
  for (std::size_t x = (out_cols - 1) / Wide::kLanes * Wide::kLanes;; x -= Wide::kLanes) {
    const TapRow<kSize, kStride> tap_row(d, x);
    const float* from = image;  // the next row
    float* out = d.out + channel * out_rows * out_cols + x;
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
  const std::size_t out_plane = d.out_rows * d.out_cols;
  const float* image = d.x + channel * d.image_rows * d.image_cols;
  const float* taps = d.taps + channel * d.kernel_rows * d.kernel_cols;
  const DepthwiseEnd<kSilu> end(d);
  for (std::size_t y = 0; y < d.out_rows; ++y) {
    for (std::size_t x = 0; x < d.out_cols; x += Wide::kLanes) {
      auto sum = Wide::Set(d.bias[channel]);
      for (std::size_t i = 0; i < d.kernel_rows; ++i) {
        const std::size_t row = y * d.stride_rows + i * d.dilation_rows - d.pad_rows;
        if (row >= d.image_rows) continue;  // it wraps around before the image
        for (std::size_t j = 0; j < d.kernel_cols; ++j) {
          const std::size_t first = x * d.stride_cols + j * d.dilation_cols;
          sum =
              Wide::MulAdd(LoadTap(d, image + row * d.image_cols, first), Wide::Set(taps[i * d.kernel_cols + j]), sum);
        }
      }
      end.Store(sum, d.out + channel * out_plane + y * d.out_cols + x, d.out_cols - x);
    }
  }
}

template <bool kSilu>
void SumChannels(const Depthwise& d) {
  const bool dense = d.kernel_rows == d.kernel_cols && d.dilation_rows == 1 && d.dilation_cols == 1;
  const std::size_t size = dense ? d.kernel_rows : 0;
  const std::size_t stride = d.stride_rows == d.stride_cols ? d.stride_rows : 0;
  const auto sum = size == 3 && stride == 1   ? SumDense<3, 1, kSilu>
                   : size == 5 && stride == 1 ? SumDense<5, 1, kSilu>
                   : size == 3 && stride == 2 ? SumDense<3, 2, kSilu>
                   : size == 5 && stride == 2 ? SumDense<5, 2, kSilu>
                                              : SumWindows<kSilu>;
  for (std::size_t channel = 0; channel < d.channels; ++channel) sum(d, channel);
}

void SumDepthwise(const Depthwise& d) { d.activation.silu ? SumChannels<true>(d) : SumChannels<false>(d); }

}  // namespace
}  // namespace vqonnx
