// Products of a few vectors with rows of a coded matrix, without decoding the matrix: each word is multiplied from
// where it stands in the codebook. For small batches, over the vocabulary of kernels-inl.h and tile-inl.h.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

// In groups of eight rows, or fewer where there are several vectors: as many sums as registers hold, and enough of them
// for one not to wait for the other.
constexpr std::size_t DotHeight(std::size_t batch) { return batch == 1 ? 8 : batch == 2 ? 4 : kTileCount / 3; }

constexpr std::size_t kStripsEarly = 16;  // blocks before they are read that codes of a strip are fetched

template <class F>
float SumOfLanes(decltype(F::Set(0.0F)) a) {
  float lanes[F::kLanes];
  F::Store(lanes, a);
  float sum = lanes[0];
  for (std::size_t i = 1; i < F::kLanes; ++i) sum += lanes[i];
  return sum;
}

// `blocks` whole blocks, in eights, of one stage and one book. Words are kVectors vectors (0: as many as the width
// has).
template <class F, std::size_t kVectors, std::size_t kRows, std::size_t kBatch>
VQONNX_INLINE void DotBlocks(const Coded& m, const float* book, const std::uint8_t* codes, std::size_t stride,
                             std::size_t blocks, const float* x, std::size_t x_stride,
                             decltype(F::Set(0.0F)) (&sums)[kRows][kBatch]) {
  const std::size_t vectors = kVectors ? kVectors : m.width / F::kLanes;
  const std::size_t width = vectors * F::kLanes;
  for (std::size_t block = 0; block < blocks; block += 8) {
    std::uint64_t eight[kRows];
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kRows; ++i) eight[i] = LoadEight(codes + i * stride + block);
    VQONNX_UNROLL
    for (std::size_t j = 0; j < 8; ++j) {
      const float* at = x + (block + j) * width;
      for (std::size_t v = 0; v < vectors; ++v) {
        VQONNX_UNROLL
        for (std::size_t i = 0; i < kRows; ++i) {
          const auto word = F::Load(book + (eight[i] >> (8 * j) & 255) * width + v * F::kLanes);
          VQONNX_UNROLL
          for (std::size_t b = 0; b < kBatch; ++b) {
            sums[i][b] = F::MulAdd(word, F::Load(at + b * x_stride + v * F::kLanes), sums[i][b]);
          }
        }
      }
    }
  }
}

// The same for rows of a strip: the codes of a block are beside each other, and `step` from those of the next one.
template <class F, std::size_t kVectors, std::size_t kRows, std::size_t kBatch>
VQONNX_INLINE void DotStrip(const Coded& m, const float* book, const std::uint8_t* codes, std::size_t step,
                            std::size_t blocks, const float* x, std::size_t x_stride,
                            decltype(F::Set(0.0F)) (&sums)[kRows][kBatch]) {
  const std::size_t vectors = kVectors ? kVectors : m.width / F::kLanes;
  const std::size_t width = vectors * F::kLanes;
  for (std::size_t block = 0; block < blocks; ++block, codes += step, x += width) {
    VQONNX_FETCH(codes + kStripsEarly * step);
    for (std::size_t v = 0; v < vectors; ++v) {
      VQONNX_UNROLL
      for (std::size_t i = 0; i < kRows; ++i) {
        const auto word = F::Load(book + codes[i] * width + v * F::kLanes);
        VQONNX_UNROLL
        for (std::size_t b = 0; b < kBatch; ++b) {
          sums[i][b] = F::MulAdd(word, F::Load(x + b * x_stride + v * F::kLanes), sums[i][b]);
        }
      }
    }
  }
}

// One row, piece by piece, decoded. Any form.
void DotDecoded(const Dot& d, std::size_t row, std::size_t first_col) {
  const Coded& m = d.matrix;
  constexpr std::size_t kRoom = 1024;
  alignas(64) float values[kRoom];
  const std::size_t octet = kOctet * m.width;
  const std::size_t piece = kRoom / octet * octet;  // octets fit: see Kernels::dot
  for (std::size_t b = 0; b < d.batch; ++b) {
    if (first_col == 0) d.out[b * d.out_stride + row - d.row] = 0.0F;
  }
  for (std::size_t col = first_col; col < d.cols; col += piece) {
    const std::size_t cols = d.cols - col < piece ? d.cols - col : piece;
    const float scale = 1.0F;
    DecodeRows(m, row, 1, col / m.width, cols, &scale, values, 0);
    for (std::size_t b = 0; b < d.batch; ++b) {
      const float* x = d.x + b * d.x_stride + col;
      decltype(Wide::Set(0.0F)) sums[4] = {Wide::Set(0.0F), Wide::Set(0.0F), Wide::Set(0.0F), Wide::Set(0.0F)};
      std::size_t i = 0;
      for (; i + 4 * Wide::kLanes <= cols; i += 4 * Wide::kLanes) {
        VQONNX_UNROLL
        for (std::size_t j = 0; j < 4; ++j) {
          sums[j] =
              Wide::MulAdd(Wide::Load(values + i + j * Wide::kLanes), Wide::Load(x + i + j * Wide::kLanes), sums[j]);
        }
      }
      float sum = SumOfLanes<Wide>(Wide::Add(Wide::Add(sums[0], sums[1]), Wide::Add(sums[2], sums[3])));
      for (; i < cols; ++i) sum += values[i] * x[i];
      d.out[b * d.out_stride + row - d.row] += sum;
    }
  }
}

template <class F, std::size_t kVectors, std::size_t kRows, std::size_t kBatch>
void DotRows(const Dot& d, std::size_t row) {
  const Coded& m = d.matrix;
  using V = decltype(F::Set(0.0F));
  V sums[kRows][kBatch];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kRows; ++i) {
    VQONNX_UNROLL
    for (std::size_t b = 0; b < kBatch; ++b) sums[i][b] = F::Set(0.0F);
  }
  const std::size_t blocks = d.cols / m.width / 8 * 8;
  for (std::size_t stage = 0; stage < m.stages; ++stage) {
    const float* book = m.codebooks + stage * m.words * m.width;
    const std::uint8_t* codes = RowByte(m, stage, row, 0);
    if (m.bits == 8) {
      DotBlocks<F, kVectors, kRows, kBatch>(m, book, codes, m.row_bytes, blocks, d.x, d.x_stride, sums);
      continue;
    }
    alignas(64) std::uint8_t unpacked[kRows * kChunk];
    for (std::size_t done = 0; done < blocks; done += kChunk) {
      const std::size_t now = blocks - done < kChunk ? blocks - done : kChunk;
      const std::size_t byte = done * m.bits / 8;
      for (std::size_t i = 0; i < kRows; ++i) {
        Unpack(codes + i * m.row_bytes + byte, m.row_bytes - byte, m.bits, now, unpacked + i * kChunk);
      }
      DotBlocks<F, kVectors, kRows, kBatch>(m, book, unpacked, kChunk, now, d.x + done * m.width, d.x_stride, sums);
    }
  }
  for (std::size_t i = 0; i < kRows; ++i) {
    VQONNX_UNROLL
    for (std::size_t b = 0; b < kBatch; ++b) d.out[b * d.out_stride + row + i - d.row] = SumOfLanes<F>(sums[i][b]);
    if (blocks * m.width < d.cols && blocks > 0) DotDecoded(d, row + i, blocks * m.width);
  }
}

// Rows of one strip, a multiple of kRows. Lines of codes have those of all of them, and are used while they are near.
template <class F, std::size_t kVectors, std::size_t kRows, std::size_t kBatch>
void DotInStrip(const Dot& d, std::size_t row, std::size_t rows) {
  constexpr std::size_t kPiece = 128, kFloats = kBatch * F::kLanes;  // blocks; of a row
  const Coded& m = d.matrix;
  alignas(64) float room[kStripRows * kFloats];
  alignas(64) std::uint8_t unpacked[kPiece * kStripRows];
  for (float& value : room) value = 0.0F;
  const std::size_t blocks = d.cols / m.width / 8 * 8;
  for (std::size_t stage = 0; stage < m.stages; ++stage) {
    const float* book = m.codebooks + stage * m.words * m.width;
    for (std::size_t done = 0; done < blocks; done += kPiece) {
      const std::size_t now = blocks - done < kPiece ? blocks - done : kPiece;
      const bool as_stored = m.bits == 8;
      if (!as_stored) UnpackStrip(m, stage, row, rows, done, now, unpacked);
      const std::uint8_t* codes = as_stored ? RowByte(m, stage, row, done) : unpacked;
      const std::size_t step = as_stored ? kStripRows : rows;
      for (std::size_t r = 0; r < rows; r += kRows) {
        decltype(F::Set(0.0F)) sums[kRows][kBatch];
        const auto place = [&](std::size_t i, std::size_t b) { return room + (r + i) * kFloats + b * F::kLanes; };
        VQONNX_UNROLL
        for (std::size_t i = 0; i < kRows; ++i) {
          VQONNX_UNROLL
          for (std::size_t b = 0; b < kBatch; ++b) sums[i][b] = F::Load(place(i, b));
        }
        DotStrip<F, kVectors, kRows, kBatch>(m, book, codes + r, step, now, d.x + done * m.width, d.x_stride, sums);
        VQONNX_UNROLL
        for (std::size_t i = 0; i < kRows; ++i) {
          VQONNX_UNROLL
          for (std::size_t b = 0; b < kBatch; ++b) F::Store(place(i, b), sums[i][b]);
        }
      }
    }
  }
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t b = 0; b < kBatch; ++b) {
      d.out[b * d.out_stride + row + i - d.row] = SumOfLanes<F>(F::Load(room + i * kFloats + b * F::kLanes));
    }
    if (blocks * m.width < d.cols && blocks > 0) DotDecoded(d, row + i, blocks * m.width);
  }
}

template <class F, std::size_t kVectors, std::size_t kBatch>
void DotBatch(const Dot& d) {
  if constexpr (kBatch > 1) {
    if (d.batch < kBatch) return DotBatch<F, kVectors, kBatch - 1>(d);
  }
  constexpr std::size_t kRows = DotHeight(kBatch);
  const std::size_t end = d.row + d.rows;
  std::size_t row = d.row;
  if (d.matrix.lanes > 1) {
    while (row < end) {
      const std::size_t in_strip = kStripRows - row % kStripRows, left = end - row < in_strip ? end - row : in_strip;
      const std::size_t rows = left / kRows * kRows;
      if (rows > 0) DotInStrip<F, kVectors, kRows, kBatch>(d, row, rows);
      if (rows < left) DotInStrip<F, kVectors, 1, kBatch>(d, row + rows, left - rows);
      row += left;
    }
    return;
  }
  for (; row + kRows <= end; row += kRows) DotRows<F, kVectors, kRows, kBatch>(d, row);
  for (; row < end; ++row) DotRows<F, kVectors, 1, kBatch>(d, row);
}

template <class F>
void DotWidth(const Dot& d) {
  if (d.matrix.width == F::kLanes) return DotBatch<F, 1, kMostDots>(d);
  DotBatch<F, 0, kMostDots>(d);
}

void DotProducts(const Dot& d) {
  const Coded& m = d.matrix;
  if (DotFewWords<ProductTable>(d)) return;
  const bool direct = m.books == 1 && m.bits <= 8 && m.stages <= kMaxStages && d.cols >= 8 * m.width;
  if (direct && m.width % Wide::kLanes == 0) return DotWidth<Wide>(d);
  if (direct && m.width % Middle::kLanes == 0) return DotWidth<Middle>(d);
  if (direct && m.width % Narrow::kLanes == 0) return DotWidth<Narrow>(d);
  for (std::size_t row = d.row; row < d.row + d.rows; ++row) DotDecoded(d, row, 0);
}

}  // namespace
}  // namespace vqonnx
