// Depthwise convolutions, channel by channel, over the vocabulary of kernels-inl.h and tile-inl.h and, from `Wide`:
//
//   Range, RangeOf(begin, end)      lanes begin to end - 1 (begin 0 or more, end at most kLanes)
//   LoadRange(p, range)             these lanes, and zeros in the others
//   SplitPairs(a, b, &even, &odd)   the values of a and then b at even places, and those at odd ones
//
// The image is read where it is: a vector of outputs of one row takes for each tap a vector of the image, without the
// lanes that lie outside of it. Nothing is read or laid out twice, and no pad exists in memory.
//
// No include guard and no standard library on purpose: see STYLE.md, section 5.

namespace vqonnx {
namespace {

// Of kLanes neighbouring values, the first of which is number `first` of `count`, those that exist.
VQONNX_INLINE Wide::Range Existing(std::ptrdiff_t first, std::size_t count) {
  const auto lanes = static_cast<std::ptrdiff_t>(Wide::kLanes), all = static_cast<std::ptrdiff_t>(count);
  const std::ptrdiff_t begin = first >= 0 ? 0 : -first < lanes ? -first : lanes;
  const std::ptrdiff_t end = all - first >= lanes ? lanes : all - first > begin ? all - first : begin;
  return Wide::RangeOf(static_cast<std::size_t>(begin), static_cast<std::size_t>(end));
}

// Neighbouring values of a row of the image, from number `first` on; zeros where there are none.
template <std::size_t kVectors>
struct Piece {
  std::ptrdiff_t first = 0;
  Wide::Range ranges[kVectors] = {};
  Piece() = default;
  VQONNX_INLINE Piece(std::size_t column, const Depthwise& d)
      : first(static_cast<std::ptrdiff_t>(column - d.pad_cols)) {
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kVectors; ++i) {
      ranges[i] = Existing(first + static_cast<std::ptrdiff_t>(i * Wide::kLanes), d.image_cols);
    }
  }
  VQONNX_INLINE decltype(Wide::Set(0.0F)) Load(const float* row, std::size_t vector) const {
    return Wide::LoadRange(row + first + vector * Wide::kLanes, ranges[vector]);
  }
};

// What a tap takes for kLanes outputs, from a column on that is counted with the pads.
inline decltype(Wide::Set(0.0F)) LoadTap(const Depthwise& d, const float* row, std::size_t column) {
  if (d.stride_cols == 1) return Piece<1>(column, d).Load(row, 0);
  float values[Wide::kLanes];
  for (std::size_t i = 0; i < Wide::kLanes; ++i) {
    const std::size_t place = column + i * d.stride_cols - d.pad_cols;  // wraps around before the image
    values[i] = place < d.image_cols ? row[place] : 0.0F;
  }
  return Wide::Load(values);
}

// One vector of outputs, of which `left` belong to their row and as many as `room` may be written: those beyond the row
// are written again later.
VQONNX_INLINE void StoreOutputs(const Depthwise& d, decltype(Wide::Set(0.0F)) sum, std::size_t at, std::size_t left,
                                std::size_t room) {
  if (d.addend != nullptr) {
    const float* addend = d.addend + at;
    sum = Wide::Add(sum, left >= Wide::kLanes ? Wide::Load(addend) : Wide::LoadPart(addend, left));
  }
  sum = Wide::Min(Wide::Set(d.high), Wide::Max(Wide::Set(d.low), sum));
  if (room >= Wide::kLanes) {
    Wide::Store(d.out + at, sum);
  } else {
    Wide::StorePart(d.out + at, left < Wide::kLanes ? left : Wide::kLanes, sum);
  }
}

// What the taps of one row take for kLanes outputs, kStride columns apart.
template <std::size_t kSize, std::size_t kStride>
struct TapRow {
  Piece<kStride> pieces[kSize];  // where the stride is 2, one for every other tap
  VQONNX_INLINE TapRow(const Depthwise& d, std::size_t x) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kSize; j += kStride) pieces[j] = Piece<kStride>(x * kStride + j, d);
  }
  VQONNX_INLINE void Load(const float* row, decltype(Wide::Set(0.0F)) (&values)[kSize]) const {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kSize; j += kStride) {
      if constexpr (kStride == 1) {
        values[j] = pieces[j].Load(row, 0);
      } else {
        auto odd = Wide::Set(0.0F);
        Wide::SplitPairs(pieces[j].Load(row, 0), pieces[j].Load(row, 1), &values[j], &odd);
        if (j + 1 < kSize) values[j + 1] = odd;
      }
    }
  }
};

// One channel, strip by strip, the last one first: kSize by kSize taps without gaps. Each row of the image is loaded
// once, for all outputs that take it.
template <std::size_t kSize, std::size_t kStride>
void SumDense(const Depthwise& d, std::size_t channel) {
  using V = decltype(Wide::Set(0.0F));
  constexpr std::size_t kSums = (kSize - 1) / kStride + 1;  // outputs that a row may be part of
  const std::size_t out_plane = d.out_rows * d.out_cols;
  const float* image = d.x + channel * d.image_rows * d.image_cols;
  const V bias = Wide::Set(d.bias[channel]);
  V taps[kSize * kSize];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kSize * kSize; ++i) taps[i] = Wide::Set(d.taps[channel * kSize * kSize + i]);
  for (std::size_t x = (d.out_cols - 1) / Wide::kLanes * Wide::kLanes;; x -= Wide::kLanes) {
    const TapRow<kSize, kStride> tap_row(d, x);
    V sums[kSums];  // sums[i] takes the next row as its row i * kStride
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kSums; ++i) sums[i] = bias;
    for (std::size_t y = 0; y < d.out_rows + kSums - 1; ++y) {  // the output whose first row it is
      VQONNX_UNROLL
      for (std::size_t phase = 0; phase < kStride; ++phase) {
        const std::size_t row = y * kStride + phase - d.pad_rows;
        if (row < d.image_rows) {  // it wraps around before the image
          V values[kSize];
          tap_row.Load(image + row * d.image_cols, values);
          VQONNX_UNROLL
          for (std::size_t i = 0; i < kSums; ++i) {
            const std::size_t tap = i * kStride + phase;
            if (tap >= kSize) break;
            VQONNX_UNROLL
            for (std::size_t j = 0; j < kSize; ++j) sums[i] = Wide::MulAdd(values[j], taps[tap * kSize + j], sums[i]);
          }
        }
        if (phase == (kSize - 1) % kStride && y + 1 >= kSums) {
          const std::size_t at = channel * out_plane + (y + 1 - kSums) * d.out_cols + x;
          StoreOutputs(d, sums[kSums - 1], at, d.out_cols - x, d.channels * out_plane - at);
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
void SumWindows(const Depthwise& d, std::size_t channel) {
  const std::size_t out_plane = d.out_rows * d.out_cols;
  const float* image = d.x + channel * d.image_rows * d.image_cols;
  const float* taps = d.taps + channel * d.kernel_rows * d.kernel_cols;
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
      const std::size_t at = channel * out_plane + y * d.out_cols + x;
      StoreOutputs(d, sum, at, d.out_cols - x, d.channels * out_plane - at);
    }
  }
}

void SumDepthwise(const Depthwise& d) {
  const bool dense = d.kernel_rows == d.kernel_cols && d.dilation_rows == 1 && d.dilation_cols == 1;
  const std::size_t size = dense ? d.kernel_rows : 0;
  const std::size_t stride = d.stride_rows == d.stride_cols ? d.stride_rows : 0;
  const auto sum = size == 3 && stride == 1   ? SumDense<3, 1>
                   : size == 5 && stride == 1 ? SumDense<5, 1>
                   : size == 3 && stride == 2 ? SumDense<3, 2>
                   : size == 5 && stride == 2 ? SumDense<5, 2>
                                              : SumWindows;
  for (std::size_t channel = 0; channel < d.channels; ++channel) sum(d, channel);
}

}  // namespace
}  // namespace vqonnx
