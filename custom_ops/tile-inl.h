// Products of matrices in tiles that fit in registers, over the vocabulary of kernels-inl.h and activation-inl.h and,
// from `Wide`:
//
//   LoadPart(p, n), StorePart(p, n, a)   the first n < kLanes lanes
//   kTileVectors, kTileCount        the tile: so many vectors wide, so many rows high
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

constexpr std::size_t kTileLanes = kTileVectors * Wide::kLanes;
static_assert(kTileCount * kTileLanes <= kMaxTileFloats);

// Sums that are in registers, to rows of the output.
template <std::size_t kCount, std::size_t kVectors>
VQONNX_INLINE void FinishTile(const Finish& f, decltype(Wide::Set(0.0F)) (&sums)[kCount][kVectors]) {
  const Activate<false> activate(f.activation);
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto bias = Wide::Set(f.bias[i]);
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::size_t at = i * f.stride + j * Wide::kLanes;
      auto value = Wide::Add(sums[i][j], bias);
      if (f.lanes >= (j + 1) * Wide::kLanes) {
        if (f.addend != nullptr) value = Wide::Add(value, Wide::Load(f.addend + at));
        Wide::Store(f.out + at, activate(value));
      } else if (f.lanes > j * Wide::kLanes) {
        const std::size_t rest = f.lanes - j * Wide::kLanes;
        if (f.addend != nullptr) value = Wide::Add(value, Wide::LoadPart(f.addend + at, rest));
        Wide::StorePart(f.out + at, rest, activate(value));
      }
    }
  }
}

enum class Read { kWindows, kChosen, kPositions };

// One load for each scalar and vector, and kCount * kVectors multiplications: as long as all sums stay in registers,
// the multiplications are what it costs.
template <Read kRead, std::size_t kVectors, std::size_t kCount>
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
    const auto step = static_cast<std::ptrdiff_t>(k);
    const float* vectors = tile.vectors + (kRead == Read::kWindows  ? step * static_cast<std::ptrdiff_t>(kTileLanes)
                                           : kRead == Read::kChosen ? tile.from[k]
                                                                    : tile.at[k]);
    const float* scalars = tile.scalars + (kRead == Read::kPositions ? step : tile.at[k]);
    V vector[kVectors];
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) vector[j] = Wide::Load(vectors + j * Wide::kLanes);
    if constexpr (kRead == Read::kPositions) {
      VQONNX_UNROLL
      for (std::size_t j = 0; j < kVectors; ++j) VQONNX_FETCH(vectors + kTileLanes + j * Wide::kLanes);
    }
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kCount; ++i) {
      const V scalar = Wide::Set(scalars[i * (kRead == Read::kPositions ? kTilePitch : 1)]);
      VQONNX_UNROLL
      for (std::size_t j = 0; j < kVectors; ++j) sums[i][j] = Wide::MulAdd(vector[j], scalar, sums[i][j]);
    }
  }
  if constexpr (kRead == Read::kPositions) {
    if (tile.finish != nullptr) return FinishTile<kCount, kVectors>(*tile.finish, sums);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kCount; ++i) {
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kVectors; ++j) {
      Wide::Store(tile.sums + i * kTileLanes + j * Wide::kLanes, sums[i][j]);
    }
  }
}

template <Read kRead, std::size_t kVectors, std::size_t kCount>
void ChooseTile(const Tile& tile) {
  if constexpr (kCount > 1) {
    if (tile.count < kCount) return ChooseTile<kRead, kVectors, kCount - 1>(tile);
  }
  MultiplyTile<kRead, kVectors, kCount>(tile);
}

void TileWindows(const Tile& tile) {
  if (tile.from != nullptr) return ChooseTile<Read::kChosen, kTileVectors, kTileCount>(tile);
  ChooseTile<Read::kWindows, kTileVectors, kTileCount>(tile);
}
void TilePositions(const Tile& tile) {
  if (tile.lanes <= Wide::kLanes) return ChooseTile<Read::kPositions, 1, kTileCount>(tile);
  ChooseTile<Read::kPositions, kTileVectors, kTileCount>(tile);
}

// Blocks [0, blocks) of one stage for one vector of rows with a scale each; codes are `stride` apart from row to row,
// and `step` from block to block.
template <bool kFirst, bool kLast, std::size_t kWidth, class Code>
void TurnWordsOf(const Coded& m, const Code* codes, std::size_t stride, std::size_t step, std::size_t stage,
                 std::size_t group, std::size_t cols, const float* scales, float* out) {
  using V = decltype(Wide::Set(0.0F));
  const V scale = Wide::Load(scales);
  const std::size_t width = kWidth ? kWidth : m.width;
  const bool has_single = kFirst && kLast && width % 8 == 1;  // a last value: turning eight would cost more
  const std::size_t book_size = m.words * width;
  const float* const end = m.codebooks + (stage + 1) * m.books * book_size;
  const float* book = m.codebooks + (stage * m.books + group % m.books) * book_size;
  for (std::size_t block = 0; block * width < cols;
       ++block, codes += step, book = book + book_size == end ? end - m.books * book_size : book + book_size) {
    for (std::size_t j = 0; j < width; j += 8) {
      const std::size_t col = block * width + j;
      if (has_single && j + 1 == width) {
        if (col >= cols) continue;
        float* to = out + col * kTileLanes;
        VQONNX_UNROLL
        for (std::size_t i = 0; i < Wide::kLanes; ++i) to[i] = book[codes[i * stride] * width + j];
        continue;
      }
      V turned[8];
      LoadTurned([&](std::size_t i) { return book + (codes[i * stride] * width + j); }, turned);
      const std::size_t in_word = width - j < 8 ? width - j : 8;
      const std::size_t count = col + in_word > cols ? (col < cols ? cols - col : 0) : in_word;
      const auto put = [&](std::size_t i) {
        float* to = out + (col + i) * kTileLanes;
        V value = kFirst ? turned[i] : Wide::Add(Wide::Load(to), turned[i]);
        if (kLast) value = Wide::Mul(value, scale);
        Wide::Store(to, value);
      };
      if (count == 8) {
        VQONNX_UNROLL
        for (std::size_t i = 0; i < 8; ++i) put(i);
      } else {
        for (std::size_t i = 0; i < count; ++i) put(i);
      }
    }
  }
  if (has_single) {  // later, when what was stored value by value can be loaded as a whole
    for (std::size_t col = width - 1; col < cols; col += width) {
      Wide::Store(out + col * kTileLanes, Wide::Mul(Wide::Load(out + col * kTileLanes), scale));
    }
  }
}

template <bool kFirst, bool kLast, class Code>
void TurnWords(const Coded& m, const Code* codes, std::size_t stride, std::size_t step, std::size_t stage,
               std::size_t group, std::size_t cols, const float* scales, float* out) {
  if (m.width == 8) return TurnWordsOf<kFirst, kLast, 8>(m, codes, stride, step, stage, group, cols, scales, out);
  if (m.width == 9) return TurnWordsOf<kFirst, kLast, 9>(m, codes, stride, step, stage, group, cols, scales, out);
  TurnWordsOf<kFirst, kLast, 0>(m, codes, stride, step, stage, group, cols, scales, out);
}

void UnpackAny(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count, std::uint8_t* out) {
  Unpack(packed, bytes, bits, count, out);
}
void UnpackAny(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count, std::uint16_t* out) {
  UnpackWide(packed, bytes, bits, count, out);
}

template <class Code>
void DecodePanelCodes(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                      const float* scales, float* out) {
  alignas(64) Code codes[Wide::kLanes * kChunk];
  for (std::size_t first = 0; first < kTileLanes && first < rows; first += Wide::kLanes) {
    float its_scales[Wide::kLanes];
    for (std::size_t i = 0; i < Wide::kLanes; ++i) its_scales[i] = scales[first + i < rows ? first + i : rows - 1];
    for (std::size_t done = 0; done * m.width < cols; done += kChunk) {
      const std::size_t left = cols - done * m.width;
      const std::size_t now = left < kChunk * m.width ? left : kChunk * m.width;
      const std::size_t blocks = (now - 1) / m.width + 1;
      for (std::size_t stage = 0; stage < m.stages; ++stage) {
        const std::size_t first_row = row + first;
        const bool in_strip = m.lanes > 1 && (first_row & (kStripRows - 1)) + Wide::kLanes <= kStripRows;
        const Code* its_codes = codes;
        std::size_t stride = kChunk, step = 1;
        if (sizeof(Code) == 1 && m.bits == 8 && first + Wide::kLanes <= rows && (in_strip || m.lanes == 1)) {
          its_codes = reinterpret_cast<const Code*>(RowByte(m, stage, first_row, group + done));  // as they are stored
          stride = in_strip ? 1 : m.row_bytes;
          step = m.lanes;
        } else if (in_strip) {  // also rows that are not wanted
          UnpackStrip(m, stage, first_row, Wide::kLanes, group + done, blocks, codes);
          stride = 1;
          step = Wide::kLanes;
        } else {
          for (std::size_t i = 0; i < Wide::kLanes; ++i) {  // the last row stands in for those that are not there
            const std::size_t its_row = first_row + (first + i < rows ? i : rows - 1 - first);
            std::uint8_t room[kChunk * sizeof(Code)];
            std::size_t bytes;
            const std::uint8_t* packed = PackedCodes(m, stage, its_row, group + done, blocks, room, bytes);
            UnpackAny(packed, bytes, m.bits, blocks, codes + i * kChunk);
          }
        }
        float* to = out + done * m.width * kTileLanes + first;
        if (m.stages == 1) {
          TurnWords<true, true>(m, its_codes, stride, step, stage, group + done, now, its_scales, to);
        } else if (stage == 0) {
          TurnWords<true, false>(m, its_codes, stride, step, stage, group + done, now, its_scales, to);
        } else if (stage + 1 < m.stages) {
          TurnWords<false, false>(m, its_codes, stride, step, stage, group + done, now, its_scales, to);
        } else {
          TurnWords<false, true>(m, its_codes, stride, step, stage, group + done, now, its_scales, to);
        }
      }
    }
  }
}

void DecodePanel(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                 const float* scales, float* out) {
  if (m.bits > 8) return DecodePanelCodes<std::uint16_t>(m, row, rows, group, cols, scales, out);
  DecodePanelCodes<std::uint8_t>(m, row, rows, group, cols, scales, out);
}

// One row of the output, with one scale and bias for all of it, or one for each value.
// `lanes` is f.lanes, as a constant where it is the usual one.
template <bool kOne, bool kScaled, bool kAdds, bool kSilu>
VQONNX_INLINE void FinishRow(const Finish& f, std::size_t lanes, const float* sums, const float* scales,
                             const float* bias, std::size_t at) {
  using V = decltype(Wide::Set(0.0F));
  const Activate<kSilu> activate(f.activation);
  const V one_scale = Wide::Set(kOne && kScaled ? *scales : 1.0F), one_bias = Wide::Set(kOne ? *bias : 0.0F);
  float* out = f.out + at;
  std::size_t j = 0;
  for (; j + Wide::kLanes <= lanes; j += Wide::kLanes) {
    V value = Wide::Load(sums + j);
    if (kScaled) value = Wide::Mul(value, kOne ? one_scale : Wide::Load(scales + j));
    value = Wide::Add(value, kOne ? one_bias : Wide::Load(bias + j));
    if (kAdds) value = Wide::Add(value, Wide::Load(f.addend + at + j));
    Wide::Store(out + j, activate(value));
  }
  if (j == lanes) return;
  const std::size_t rest = lanes - j;
  V value = Wide::LoadPart(sums + j, rest);
  if (kScaled) value = Wide::Mul(value, kOne ? one_scale : Wide::LoadPart(scales + j, rest));
  value = Wide::Add(value, kOne ? one_bias : Wide::LoadPart(bias + j, rest));
  if (kAdds) value = Wide::Add(value, Wide::LoadPart(f.addend + at + j, rest));
  Wide::StorePart(out + j, rest, activate(value));
}

template <bool kOne, bool kScaled, bool kAdds, bool kSilu>
void FinishEach(const Finish& f) {
  for (std::size_t i = 0; i < f.count; ++i) {
    const std::size_t own = kOne ? i : 0;
    const float* sums = f.sums + i * f.pitch;
    const float* scales = kScaled ? f.scales + own : nullptr;
    if (f.lanes == kTileLanes) {
      FinishRow<kOne, kScaled, kAdds, kSilu>(f, kTileLanes, sums, scales, f.bias + own, i * f.stride);
    } else {
      FinishRow<kOne, kScaled, kAdds, kSilu>(f, f.lanes, sums, scales, f.bias + own, i * f.stride);
    }
  }
}

template <bool kOne, bool kScaled, bool kAdds>
void ChooseActivation(const Finish& f) {
  f.activation.silu ? FinishEach<kOne, kScaled, kAdds, true>(f) : FinishEach<kOne, kScaled, kAdds, false>(f);
}

template <bool kOne>
void FinishAny(const Finish& f) {
  if (f.scales != nullptr)
    return f.addend != nullptr ? ChooseActivation<kOne, true, true>(f) : ChooseActivation<kOne, true, false>(f);
  f.addend != nullptr ? ChooseActivation<kOne, false, true>(f) : ChooseActivation<kOne, false, false>(f);
}

void FinishRows(const Finish& f) { FinishAny<true>(f); }
void FinishColumns(const Finish& f) { FinishAny<false>(f); }

template <bool kSilu>
void FinishTurned(const Finish& f) {
  using V = decltype(Wide::Set(0.0F));
  const Activate<kSilu> activate(f.activation);
  for (std::size_t first = 0; first < f.count; first += Wide::kLanes) {
    const std::size_t count = f.count - first < Wide::kLanes ? f.count - first : Wide::kLanes;
    const float* rows[Wide::kLanes];  // the last one stands in for those that are not there
    for (std::size_t i = 0; i < Wide::kLanes; ++i) rows[i] = f.sums + (first + (i < count ? i : count - 1)) * f.pitch;
    for (std::size_t j = 0; j < f.lanes; j += 8) {
      V turned[8];
      LoadTurned([&](std::size_t i) { return rows[i] + j; }, turned);
      const std::size_t end = f.lanes - j < 8 ? f.lanes - j : 8;
      for (std::size_t i = 0; i < end; ++i) {
        V value = turned[i];
        const std::size_t at = (j + i) * f.stride + first;
        if (f.scales != nullptr) value = Wide::Mul(value, Wide::Set(f.scales[j + i]));
        value = Wide::Add(value, Wide::Set(f.bias[j + i]));
        if (f.addend != nullptr) value = Wide::Add(value, Wide::LoadPart(f.addend + at, count));
        Wide::StorePart(f.out + at, count, activate(value));
      }
    }
  }
}

void FinishAcross(const Finish& f) { f.activation.silu ? FinishTurned<true>(f) : FinishTurned<false>(f); }

void AddTo(const float* from, std::size_t size, float* to) {
  std::size_t j = 0;
  for (; j + Wide::kLanes <= size; j += Wide::kLanes)
    Wide::Store(to + j, Wide::Add(Wide::Load(to + j), Wide::Load(from + j)));
  for (; j < size; ++j) to[j] += from[j];
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
