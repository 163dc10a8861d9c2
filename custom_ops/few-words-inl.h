// Products of a few vectors with many rows of a matrix whose codebooks have few words: for each block of a vector a
// table of its products with all words, from which each row takes what its code names. Rows are the lanes of vectors,
// a table lies in registers, and codes are read as they are stored. For small batches, in float32.
//
// Over the vocabulary of kernels-inl.h, and
//
//   ProductTable  kWords floats; Look(codes) looks up Wide::kLanes codes at once, one in the lowest four bits of each
//                 32-bit lane, whatever the other bits are. FromFloats(v) makes such lanes of the bits of floats,
//                 Next<kBits>(codes) shifts them right; FourBytes(p, step) are floats with the bits of the bytes p[i],
//                 p[step + i], p[2 * step + i] and p[3 * step + i]. Where kWords is 0 there is nothing of it.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

constexpr std::size_t kWindows = 16;          // of 32 bits that are read of a row at a time: a cache line
constexpr std::size_t kEarly = 2;             // visits of a row before it is read that its codes are fetched
constexpr std::size_t kPassRows = 512;        // rows that share the tables of a chunk of blocks
constexpr std::size_t kLookRows = 4;          // vectors of rows that share a table while it is in registers
constexpr std::size_t kFewestTableRows = 32;  // with fewer a table costs more than it saves

// The windows of kLanes rows, `stride` bytes apart: windows[kWindows][kLanes].
VQONNX_INLINE void TurnWindows(const std::uint8_t* codes, std::size_t stride, float* windows) {
  for (std::size_t half = 0; half < kWindows; half += 8) {  // as many as LoadTurned turns
    decltype(Wide::Set(0.0F)) turned[8];
    LoadTurned([&](std::size_t i) { return reinterpret_cast<const float*>(codes + i * stride + half * 4); }, turned);
    VQONNX_UNROLL
    for (std::size_t i = 0; i < 8; ++i) Wide::Store(windows + (half + i) * Wide::kLanes, turned[i]);
  }
}

// The same for rows of a strip.
template <class Table>
VQONNX_INLINE void TurnStrip(const std::uint8_t* codes, float* windows) {
  for (std::size_t window = 0; window < kWindows; ++window, codes += 4 * kStripRows) {
    Wide::Store(windows + window * Wide::kLanes, Table::FourBytes(codes, kStripRows));
  }
}

// Codes of some blocks, from `block` on, of `rows` rows from `row` on, as windows [rows / kLanes][kWindows][kLanes]. A
// code takes `step` bits of a window: as it is stored, or a byte. Blocks and rows that are not there have any code.
template <class Table>
void TurnCodes(const Coded& m, std::size_t stage, std::size_t row, std::size_t rows, std::size_t block,
               std::size_t step, float* windows) {
  constexpr std::size_t kBytes = kWindows * 4, kGroup = kLookRows * Wide::kLanes;
  const std::size_t byte = block * m.bits / 8, left = m.row_bytes - byte;
  const bool as_stored = m.bits == step;
  for (std::size_t r = 0; r < (rows + kGroup - 1) / kGroup * kGroup; r += Wide::kLanes) {
    if (as_stored && left >= kBytes && r + Wide::kLanes <= rows) {
      const std::uint8_t* codes = RowByte(m, stage, row + r, byte);
      if (m.lanes == 1) {
        for (std::size_t i = 0; i < Wide::kLanes; ++i) VQONNX_FETCH(codes + i * m.row_bytes + kEarly * kBytes);
        TurnWindows(codes, m.row_bytes, windows + r * kWindows);
        continue;
      }
      if (((row + r) & (kStripRows - 1)) + Wide::kLanes <= kStripRows) {
        TurnStrip<Table>(codes, windows + r * kWindows);
        continue;
      }
    }
    alignas(64) std::uint8_t room[Wide::kLanes * kBytes] = {};
    for (std::size_t i = 0; i < Wide::kLanes && r + i < rows; ++i) {
      const std::uint8_t* its = RowByte(m, stage, row + r + i, byte);
      if (as_stored) {
        for (std::size_t j = 0; j < left && j < kBytes; ++j) room[i * kBytes + j] = its[j * m.lanes];
      } else {
        const std::size_t count = left * 8 / m.bits < kBytes ? left * 8 / m.bits : kBytes;
        std::uint8_t gathered[kBytes];
        std::size_t bytes;
        const std::uint8_t* packed = PackedCodes(m, stage, row + r + i, block, count, gathered, bytes);
        Unpack(packed, bytes, m.bits, count, room + i * kBytes);
      }
    }
    TurnWindows(room, kBytes, windows + r * kWindows);
  }
}

// words[i][w]: value i of the word that codes mean whose lowest bits are those of w.
template <class Table>
void TurnWords(const Coded& m, std::size_t stage, float* words) {
  const float* book = m.codebooks + stage * m.words * m.width;
  const std::size_t mask = (std::size_t{1} << m.bits) - 1;
  for (std::size_t i = 0; i < m.width; ++i) {
    for (std::size_t w = 0; w < Table::kWords; ++w) {
      words[i * Table::kWords + w] = (w & mask) < m.words ? book[(w & mask) * m.width + i] : 0.0F;
    }
  }
}

// A table for each block of `cols` values, zeros for those that have none.
template <class Table>
void BuildProducts(const float* words, std::size_t width, const float* x, std::size_t cols, std::size_t blocks,
                   float* tables) {
  constexpr std::size_t kVectors = Table::kWords / Wide::kLanes;
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::size_t count = cols < width ? cols : width;
    decltype(Wide::Set(0.0F)) sums[kVectors];
    VQONNX_UNROLL
    for (std::size_t v = 0; v < kVectors; ++v) sums[v] = Wide::Set(0.0F);
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = Wide::Set(x[i]);
      VQONNX_UNROLL
      for (std::size_t v = 0; v < kVectors; ++v) {
        sums[v] = Wide::MulAdd(value, Wide::Load(words + i * Table::kWords + v * Wide::kLanes), sums[v]);
      }
    }
    VQONNX_UNROLL
    for (std::size_t v = 0; v < kVectors; ++v) Wide::Store(tables + block * Table::kWords + v * Wide::kLanes, sums[v]);
    x += count;
    cols -= count;
  }
}

// sums[row] += what the codes of `count` windows of each row name.
template <class Table, std::size_t kStep>
void SumProducts(const float* windows, std::size_t count, const float* tables, std::size_t rows, float* sums) {
  for (std::size_t r = 0; r < rows; r += kLookRows * Wide::kLanes) {
    decltype(Wide::Set(0.0F)) totals[kLookRows];
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kLookRows; ++i) totals[i] = Wide::Set(0.0F);
    const float* table = tables;
    for (std::size_t window = 0; window < count; ++window) {
      decltype(Table::FromFloats(Wide::Set(0.0F))) codes[kLookRows];
      VQONNX_UNROLL
      for (std::size_t i = 0; i < kLookRows; ++i) {
        codes[i] = Table::FromFloats(Wide::Load(windows + (r + i * Wide::kLanes) * kWindows + window * Wide::kLanes));
      }
      for (std::size_t code = 0; code < 32 / kStep; ++code, table += Table::kWords) {
        const Table products(table);
        VQONNX_UNROLL
        for (std::size_t i = 0; i < kLookRows; ++i) {
          totals[i] = Wide::Add(totals[i], products.Look(codes[i]));
          codes[i] = Table::template Next<kStep>(codes[i]);
        }
      }
    }
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kLookRows; ++i) {
      float* its = sums + r + i * Wide::kLanes;
      Wide::Store(its, Wide::Add(Wide::Load(its), totals[i]));
    }
  }
}

template <class Table, std::size_t kStep>
void DotTables(const Dot& d) {
  const Coded& m = d.matrix;
  constexpr std::size_t kCodes = 32 / kStep, kBlocks = kWindows * kCodes;
  alignas(64) float windows[kPassRows * kWindows];
  alignas(64) float tables[kBlocks * Table::kWords];
  alignas(64) float words[kTileDepth / kOctet * Table::kWords];
  alignas(64) float sums[kMostDots][kPassRows];
  const std::size_t all_blocks = (d.cols - 1) / m.width + 1;
  for (std::size_t first = 0; first < d.rows; first += kPassRows) {
    const std::size_t rows = d.rows - first < kPassRows ? d.rows - first : kPassRows;
    for (std::size_t b = 0; b < d.batch; ++b) {
      for (float& sum : sums[b]) sum = 0.0F;
    }
    for (std::size_t stage = 0; stage < m.stages; ++stage) {
      TurnWords<Table>(m, stage, words);
      for (std::size_t block = 0; block < all_blocks; block += kBlocks) {
        const std::size_t blocks = all_blocks - block < kBlocks ? all_blocks - block : kBlocks;
        const std::size_t count = (blocks + kCodes - 1) / kCodes, col = block * m.width;
        TurnCodes<Table>(m, stage, d.row + first, rows, block, kStep, windows);
        for (std::size_t b = 0; b < d.batch; ++b) {
          BuildProducts<Table>(words, m.width, d.x + b * d.x_stride + col, d.cols - col, count * kCodes, tables);
          SumProducts<Table, kStep>(windows, count, tables, rows, sums[b]);
        }
      }
    }
    for (std::size_t b = 0; b < d.batch; ++b) {
      for (std::size_t i = 0; i < rows; ++i) d.out[b * d.out_stride + first + i] = sums[b][i];
    }
  }
}

template <class Table>
bool HasTables(const Coded& m) {
  return m.words <= Table::kWords && m.books == 1 && m.bits <= 8;
}

// Whether it has done the work of Kernels::dot.
template <class Table>
bool DotFewWords(const Dot& d) {
  if constexpr (Table::kWords > 0) {
    if (!HasTables<Table>(d.matrix) || d.rows < kFewestTableRows || d.cols == 0) return false;
    if (d.matrix.bits == 1) return DotTables<Table, 1>(d), true;
    if (d.matrix.bits == 2) return DotTables<Table, 2>(d), true;
    if (d.matrix.bits == 4) return DotTables<Table, 4>(d), true;
    return DotTables<Table, 8>(d), true;
  } else {
    return false;
  }
}

}  // namespace
}  // namespace vqonnx
