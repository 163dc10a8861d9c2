// What the kernels share that go by the windows of an image, over the vocabulary of kernels-inl.h and tile-inl.h and,
// from `Wide`:
//
//   Range, RangeOf(begin, end)      lanes begin to end - 1 (begin 0 or more, end at most kLanes)
//   LoadRange(p, range)             these lanes, and zeros in the others
//   LoadRangeOr(p, range, other)    the same with the lanes of `other`
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

// What a tap takes for kLanes outputs, from a column on that is counted with the pads; there is `pad` in those.
inline decltype(Wide::Set(0.0F)) LoadTap(const Windows& w, const float* row, std::size_t column, float pad) {
  if (w.stride_cols == 1) {
    const auto first = static_cast<std::ptrdiff_t>(column - w.pad_cols);
    return Wide::LoadRangeOr(row + first, Existing(first, w.image_cols), Wide::Set(pad));
  }
  float values[Wide::kLanes];
  for (std::size_t i = 0; i < Wide::kLanes; ++i) {
    const std::size_t place = column + i * w.stride_cols - w.pad_cols;  // wraps around before the image
    values[i] = place < w.image_cols ? row[place] : pad;
  }
  return Wide::Load(values);
}

// Writes some outputs of a row, of which there are `left`. Rows must come first to last, and so must channels.
struct RowEnd {
  const float* last;  // where all lanes can still be written: those beyond the row are written again later
  VQONNX_INLINE explicit RowEnd(const Windows& w)
      : last(w.out + static_cast<std::ptrdiff_t>(w.channels * w.out_rows * w.out_cols) -
             static_cast<std::ptrdiff_t>(Wide::kLanes)) {}
  VQONNX_INLINE void Store(decltype(Wide::Set(0.0F)) value, float* out, std::size_t left) const {
    if (out <= last) {
      Wide::Store(out, value);
    } else {
      Wide::StorePart(out, left < Wide::kLanes ? left : Wide::kLanes, value);
    }
  }
};

void EverySecond(const float* from, std::size_t count, float* to) {
  const auto split = [&](std::size_t i, std::size_t size) {  // of that many values
    const std::size_t below = size < Wide::kLanes ? size : Wide::kLanes;
    auto even = Wide::LoadRange(from + i * 2, Wide::RangeOf(0, below)), odd = even;
    const auto second = Wide::LoadRange(from + i * 2 + below, Wide::RangeOf(0, size - below));
    Wide::SplitPairs(even, second, &even, &odd);
    return even;
  };
  std::size_t i = 0;
  for (; i + Wide::kLanes <= count; i += Wide::kLanes) Wide::Store(to + i, split(i, 2 * Wide::kLanes - 1));
  if (i < count) Wide::StorePart(to + i, count - i, split(i, 2 * (count - i) - 1));
}

}  // namespace
}  // namespace vqonnx
