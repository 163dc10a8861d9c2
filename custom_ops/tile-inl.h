// Products of matrices in tiles that fit in registers, over the vocabulary of kernels-inl.h and, from `Wide`:
//
//   MulAdd(a, b, c)                 a * b + c
//   Max(a, b), Min(a, b)            b where one of them is NaN
//   LoadPart(p, n), StorePart(p, n, a)   the first n < kLanes lanes
//   kTileVectors, kTileCount        the tile: so many vectors wide, so many rows high
//
// No include guard and no standard library on purpose: see STYLE.md, section 5.

#if defined(__GNUC__)
#define VQONNX_UNROLL _Pragma("GCC unroll 32")
#else
#define VQONNX_UNROLL
#endif

namespace vqonnx {
namespace {

constexpr std::size_t kTileLanes = kTileVectors * Wide::kLanes;
static_assert(kTileCount * kTileLanes <= kMaxTileFloats);

// One load for each scalar and vector, and kCount * kVectors multiplications: as long as all sums stay in registers,
// the multiplications are what it costs.
template <bool kWindows, std::size_t kVectors, std::size_t kCount>
void MultiplyTile(const Tile& tile) {
  using V = decltype(Wide::Set(0.0F));
  V sums[kCount][kVectors];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kCount; ++i) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) {
      sums[i][j] = tile.add ? Wide::Load(tile.sums + i * kTileLanes + j * Wide::kLanes) : Wide::Set(0.0F);
    }
  }
  for (std::size_t k = 0; k < tile.depth; ++k) {
    const float* vectors = tile.vectors + (kWindows ? static_cast<std::ptrdiff_t>(k * kTileLanes) : tile.at[k]);
    const float* scalars = tile.scalars + (kWindows ? tile.at[k] : static_cast<std::ptrdiff_t>(k));
    V vector[kVectors];
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) vector[j] = Wide::Load(vectors + j * Wide::kLanes);
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kCount; ++i) {
      const V scalar = Wide::Set(scalars[i * (kWindows ? 1 : kTilePitch)]);
      VQONNX_UNROLL
      for (std::size_t j = 0; j < kVectors; ++j) sums[i][j] = Wide::MulAdd(vector[j], scalar, sums[i][j]);
    }
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kCount; ++i) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) {
      Wide::Store(tile.sums + i * kTileLanes + j * Wide::kLanes, sums[i][j]);
    }
  }
}

template <bool kWindows, std::size_t kCount>
void ChooseTile(const Tile& tile) {
  if constexpr (kCount > 1) {
    if (tile.count < kCount) return ChooseTile<kWindows, kCount - 1>(tile);
  }
  MultiplyTile<kWindows, kTileVectors, kCount>(tile);
}

void TileWindows(const Tile& tile) { ChooseTile<true, kTileCount>(tile); }
void TilePositions(const Tile& tile) { ChooseTile<false, kTileCount>(tile); }

// One row of the output, with one scale and bias for all of it, or one for each value.
template <bool kOne>
void FinishRow(const Finish& f, const float* sums, std::size_t lanes, const float* scales, const float* bias,
               std::size_t at) {
  const auto low = Wide::Set(f.low), high = Wide::Set(f.high);
  const auto one_scale = Wide::Set(kOne && scales != nullptr ? *scales : 1.0F),
             one_bias = Wide::Set(kOne ? *bias : 0.0F);
  std::size_t j = 0;
  for (; j + Wide::kLanes <= lanes; j += Wide::kLanes) {
    auto value = Wide::Load(sums + j);
    if (scales != nullptr) value = Wide::Mul(value, kOne ? one_scale : Wide::Load(scales + j));
    value = Wide::Add(value, kOne ? one_bias : Wide::Load(bias + j));
    if (f.addend != nullptr) value = Wide::Add(value, Wide::Load(f.addend + at + j));
    Wide::Store(f.out + at + j, Wide::Min(high, Wide::Max(low, value)));
  }
  if (j == lanes) return;
  const std::size_t rest = lanes - j;
  auto value = Wide::LoadPart(sums + j, rest);
  if (scales != nullptr) value = Wide::Mul(value, kOne ? one_scale : Wide::LoadPart(scales + j, rest));
  value = Wide::Add(value, kOne ? one_bias : Wide::LoadPart(bias + j, rest));
  if (f.addend != nullptr) value = Wide::Add(value, Wide::LoadPart(f.addend + at + j, rest));
  Wide::StorePart(f.out + at + j, rest, Wide::Min(high, Wide::Max(low, value)));
}

inline const float* Behind(const float* values, std::size_t i) { return values == nullptr ? nullptr : values + i; }

void FinishRows(const Finish& f) {
  for (std::size_t i = 0; i < f.count; ++i) {
    FinishRow<true>(f, f.sums + i * f.pitch, f.lanes, Behind(f.scales, i), f.bias + i, i * f.stride);
  }
}

void FinishColumns(const Finish& f) {
  for (std::size_t i = 0; i < f.count; ++i) {
    FinishRow<false>(f, f.sums + i * f.pitch, f.lanes, f.scales, f.bias, i * f.stride);
  }
}

void FinishAcross(const Finish& f) {
  constexpr std::size_t kRows = 2 * Wide::kLanes;  // a multiple of kTile
  alignas(64) float turned[kTile * kRows];
  for (std::size_t first = 0; first < f.count; first += kRows) {
    const std::size_t count = f.count - first < kRows ? f.count - first : kRows;
    for (std::size_t j = 0; j < f.lanes; j += kTile) {
      for (std::size_t i = 0; i < count; i += kTile) {
        TransposeTile(f.sums + (first + i) * f.pitch + j, f.pitch, turned + i, kRows);
      }
      const std::size_t end = f.lanes - j < kTile ? f.lanes - j : kTile;
      for (std::size_t row = j; row < j + end; ++row) {
        FinishRow<true>(f, turned + (row - j) * kRows, count, Behind(f.scales, row), f.bias + row,
                        row * f.stride + first);
      }
    }
  }
}

void AddUp(const float* from, std::size_t stride, std::size_t count, std::size_t size, float* out) {
  std::size_t j = 0;
  for (; j + Wide::kLanes <= size; j += Wide::kLanes) {
    auto sum = Wide::Load(from + j);
    for (std::size_t i = 1; i < count; ++i) sum = Wide::Add(sum, Wide::Load(from + i * stride + j));
    Wide::Store(out + j, sum);
  }
  for (; j < size; ++j) {
    float sum = from[j];
    for (std::size_t i = 1; i < count; ++i) sum += from[i * stride + j];
    out[j] = sum;
  }
}

}  // namespace
}  // namespace vqonnx
