// The algorithms of the kernels, once, over a small vocabulary that the including file supplies in its unnamed
// namespace:
//
//   Narrow, Middle, Wide       vectors of floats, `kLanes` of them: Load, Store, Add, Mul, Set (all lanes one value)
//   LoadEight(p)               eight bytes, the first one lowest
//   TurnEight(rows, p, step)   byte i of row r to p[i * step + r]
//   UnpackOctet(w, bits, out)  the eight codes in the low 8 * bits bits of `w`
//   WordTable                  the first `kWords` floats of a codebook; At(codes) looks up Wide::kLanes codes at once
//   DecodeScalarCodes(...)     whether it has done the work of DecodeRows for codes that are stored by rows, where the
//                              form allows something better
//   LoadTurned(row, out)       out[j] has, of each i < Wide::kLanes, value j < 8 of row(i)
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

constexpr std::size_t kChunk = 64;     // codes unpacked at a time; a multiple of kOctet
constexpr std::size_t kMaxStages = 8;  // stages whose codes are unpacked beside each other

// The first bytes of a little-endian bit string: eight, or fewer at its end, where zeros follow.
inline std::uint64_t LoadBits(const std::uint8_t* packed, std::size_t bytes) {
  if (bytes >= 8) return LoadEight(packed);
  std::uint64_t window = 0;
  for (std::size_t i = 0; i < bytes; ++i) window |= static_cast<std::uint64_t>(packed[i]) << (8 * i);
  return window;
}

void Unpack(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count, std::uint8_t* out) {
  for (std::size_t done = 0; done < count; done += kOctet) {
    UnpackOctet(LoadBits(packed, bytes), bits, out + done);
    packed += bits;
    bytes -= bytes < bits ? bytes : bits;  // the last octet of a row may be incomplete
  }
}

// Four codes at a time: eight of 16 bits would not fit in a window. The second four of an octet may start within a
// byte, but only where they have 15 bits or fewer.
void UnpackWide(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count,
                std::uint16_t* out) {
  const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
  for (std::size_t done = 0; done < count; done += kOctet / 2) {
    const std::size_t byte = done * bits / 8;
    const std::uint64_t window = LoadBits(packed + byte, bytes - byte) >> (done * bits % 8);
    for (std::size_t i = 0; i < kOctet / 2; ++i) {
      out[done + i] = static_cast<std::uint16_t>(window >> (i * bits) & mask);
    }
  }
}

// The codes of some blocks of one row and stage: where they are stored, or unpacked into `room`.
inline const std::uint8_t* ReadCodes(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count,
                                     std::uint8_t* room) {
  if (bits == 8) return packed;
  Unpack(packed, bytes, bits, count, room);
  return room;
}

inline const std::uint16_t* ReadCodes(const std::uint8_t* packed, std::size_t bytes, std::size_t bits,
                                      std::size_t count, std::uint16_t* room) {
  UnpackWide(packed, bytes, bits, count, room);
  return room;
}

// Codes of `rows` neighbouring rows of a strip, `count` of each from block `group` on: out[code][rows].
template <class Code>
void UnpackStrip(const Coded& m, std::size_t stage, std::size_t row, std::size_t rows, std::size_t group,
                 std::size_t count, Code* out) {
  const std::uint32_t mask = (1U << m.bits) - 1;
  for (std::size_t i = 0; i < count; ++i, out += rows) {
    const std::size_t start = (group + i) * m.bits, shift = start % 8, end = shift + m.bits;
    const std::uint8_t* line = RowByte(m, stage, row, start / 8);
    std::size_t r = 0;
    if (end <= 8) {  // eight rows at once
      for (; r + 8 <= rows; r += 8) {
        const std::uint64_t eight = LoadEight(line + r) >> shift & 0x0101010101010101U * mask;
        for (std::size_t j = 0; j < 8; ++j) out[r + j] = static_cast<Code>(eight >> (8 * j) & 255);
      }
    }
    const std::uint8_t* second = line + (end > 8 ? kStripRows : 0);
    const std::uint8_t* third = second + (end > 16 ? kStripRows : 0);
    for (; r < rows; ++r) {
      const std::uint32_t window = line[r] | std::uint32_t{second[r]} << 8 | std::uint32_t{third[r]} << 16;
      out[r] = static_cast<Code>(window >> shift & mask);
    }
  }
}

// Some blocks of one row, their codes unpacked: to bytes, or to pairs of bytes where they have more than 8 bits.
template <class Code>
struct Span {
  const Code* codes[kMaxStages];  // [stages][blocks]
  std::size_t blocks;
  std::size_t cols;  // (blocks - 1) * width < cols <= blocks * width
  std::size_t room;  // cols, and what else of the row follows and may be written for now
  std::size_t book;  // of the first block
  float scale;
  float* out;
};

// Blocks `first` and later, one value at a time. For the end of a row, where a vector would reach too far.
template <class Code>
void DecodeExactly(const Coded& m, const Span<Code>& span, std::size_t first) {
  const std::size_t stage_size = m.books * m.words * m.width;
  for (std::size_t block = first; block < span.blocks; ++block) {
    const float* book = m.codebooks + (span.book + block) % m.books * m.words * m.width;
    const std::size_t begin = block * m.width;
    const std::size_t length = span.cols - begin < m.width ? span.cols - begin : m.width;
    for (std::size_t i = 0; i < length; ++i) {
      float sum = book[span.codes[0][block] * m.width + i];
      for (std::size_t s = 1; s < m.stages; ++s) sum += book[s * stage_size + span.codes[s][block] * m.width + i];
      span.out[begin + i] = sum * span.scale;
    }
  }
}

// Whole blocks as kVectors vectors each (0: as many as the width needs) and kStages stages (0: as many as there are).
// A block's last vector may reach into the next block, which is written later; the caller sees to the end of the room.
template <class F, std::size_t kVectors, std::size_t kStages, class Code>
void DecodeBlocks(const Coded& m, const Span<Code>& span, std::size_t blocks) {
  const std::size_t width = m.width;
  const std::size_t vectors = kVectors ? kVectors : (width + F::kLanes - 1) / F::kLanes;
  const std::size_t stages = kStages ? kStages : m.stages;
  const std::size_t book_size = m.words * width;
  const std::size_t stage_size = m.books * book_size;
  const float* const end = m.codebooks + stage_size;
  const float* book = m.codebooks + span.book * book_size;
  const auto scale = F::Set(span.scale);
  float* out = span.out;
  for (std::size_t block = 0; block < blocks; ++block) {
    const float* first = book + span.codes[0][block] * width;
    for (std::size_t v = 0; v < vectors; ++v) {
      auto sum = F::Load(first + v * F::kLanes);
      for (std::size_t s = 1; s < stages; ++s) {
        sum = F::Add(sum, F::Load(book + s * stage_size + span.codes[s][block] * width + v * F::kLanes));
      }
      F::Store(out + v * F::kLanes, F::Mul(sum, scale));
    }
    out += width;
    book += book_size;
    if (book == end) book = m.codebooks;
  }
}

template <class F, std::size_t kVectors, class Code>
void DecodeSpan(const Coded& m, const Span<Code>& span) {
  // The vectors of a block write `reach` floats; the fast part ends with the last block for which they stay in the
  // room.
  const std::size_t reach = (m.width + F::kLanes - 1) / F::kLanes * F::kLanes;
  const std::size_t fitting = span.room < reach ? 0 : (span.room - reach) / m.width + 1;
  const std::size_t blocks = fitting < span.blocks ? fitting : span.blocks;
  if (m.stages == 1) {
    DecodeBlocks<F, kVectors, 1>(m, span, blocks);
  } else if (m.stages == 2) {
    DecodeBlocks<F, kVectors, 2>(m, span, blocks);
  } else {
    DecodeBlocks<F, kVectors, 0>(m, span, blocks);
  }
  DecodeExactly(m, span, blocks);
}

// One column a block and a codebook that fits in registers: binary codes, scalar k-means, powers of two.
void DecodeScalars(const Coded& m, const Span<std::uint8_t>& span) {
  const auto scale = Wide::Set(span.scale);
  std::size_t block = 0;
  if (m.stages == 1) {  // the usual case: the table stays in registers
    const WordTable table(m.codebooks);
    for (; block + Wide::kLanes <= span.blocks; block += Wide::kLanes) {
      Wide::Store(span.out + block, Wide::Mul(table.At(span.codes[0] + block), scale));
    }
  } else {
    for (; block + Wide::kLanes <= span.blocks; block += Wide::kLanes) {
      auto sum = WordTable(m.codebooks).At(span.codes[0] + block);
      for (std::size_t s = 1; s < m.stages; ++s) {
        sum = Wide::Add(sum, WordTable(m.codebooks + s * m.words).At(span.codes[s] + block));
      }
      Wide::Store(span.out + block, Wide::Mul(sum, scale));
    }
  }
  DecodeExactly(m, span, block);
}

// More stages than DecodeCodes unpacks beside each other: reads every code where it is.
void DecodeManyStages(const Coded& m, std::size_t row, std::size_t group, std::size_t cols, float scale, float* out) {
  const std::size_t mask = (std::size_t{1} << m.bits) - 1;
  for (std::size_t col = 0; col < cols; ++col) {
    const std::size_t block = group + col / m.width;
    const std::size_t byte = block * m.bits / 8;
    const float* word = m.codebooks + block % m.books * m.words * m.width + col % m.width;
    float sum = 0;
    for (std::size_t s = 0; s < m.stages; ++s) {
      const std::uint8_t* at = RowByte(m, s, row, byte);
      std::uint64_t window = 0;
      if (m.lanes == 1) {
        window = LoadBits(at, m.row_bytes - byte);
      } else {
        for (std::size_t i = 0; i < 3 && byte + i < m.row_bytes; ++i)
          window |= std::uint64_t{at[i * m.lanes]} << (8 * i);
      }
      const float value = word[(window >> (block * m.bits % 8) & mask) * m.width];
      sum = s == 0 ? value : sum + value;
      word += m.books * m.words * m.width;
    }
    out[col] = sum * scale;
  }
}

template <class Code>
void DecodeWords(const Coded& m, const Span<Code>& span) {
  if constexpr (sizeof(Code) == 1) {  // longer codes are for more words than any table has
    if (m.width == 1 && m.books == 1 && m.words <= WordTable::kWords) return DecodeScalars(m, span);
  }
  if (m.width <= Narrow::kLanes) return DecodeSpan<Narrow, 1>(m, span);
  if (m.width <= Middle::kLanes) return DecodeSpan<Middle, 1>(m, span);
  if (m.width <= Wide::kLanes) return DecodeSpan<Wide, 1>(m, span);
  DecodeSpan<Wide, 0>(m, span);
}

template <class Code>
void DecodeCodes(const Coded& m, std::size_t row, std::size_t group, std::size_t cols, float scale, float* out) {
  alignas(64) Code unpacked[kMaxStages][kChunk];
  std::uint8_t gathered[kMaxStages][kChunk * sizeof(Code)];
  Span<Code> span = {};
  span.scale = scale;
  for (std::size_t left = (cols - 1) / m.width + 1; left > 0; left -= span.blocks, group += span.blocks) {
    span.blocks = left < kChunk ? left : kChunk;
    span.cols = cols < span.blocks * m.width ? cols : span.blocks * m.width;
    span.room = cols;
    span.book = group % m.books;
    span.out = out;
    for (std::size_t s = 0; s < m.stages; ++s) {
      std::size_t bytes;
      const std::uint8_t* packed = PackedCodes(m, s, row, group, span.blocks, gathered[s], bytes);
      span.codes[s] = ReadCodes(packed, bytes, m.bits, span.blocks, unpacked[s]);
    }
    DecodeWords(m, span);
    out += span.cols;
    cols -= span.cols;
  }
}

void DecodeRow(const Coded& m, std::size_t row, std::size_t group, std::size_t cols, float scale, float* out) {
  if (m.stages > kMaxStages) return DecodeManyStages(m, row, group, cols, scale, out);
  if (m.bits > 8) return DecodeCodes<std::uint16_t>(m, row, group, cols, scale, out);
  DecodeCodes<std::uint8_t>(m, row, group, cols, scale, out);
}

// Codes stored by rows.
void DecodeStoredRows(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                      const float* scales, float* out, std::size_t stride) {
  if (DecodeScalarCodes(m, row, rows, group, cols, scales, out, stride)) return;
  for (std::size_t r = 0; r < rows; ++r) DecodeRow(m, row + r, group, cols, scales[r], out + r * stride);
}

// Rows of one strip, of a codebook for each stage: the bytes of eight rows are brought together at once.
void DecodeStripRows(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                     const float* scales, float* out, std::size_t stride) {
  constexpr std::size_t kRowBytes = 512;  // of all stages
  alignas(8) std::uint8_t room[kStripRows * kRowBytes];
  const std::size_t first = row & (kOctet - 1);  // of eight rows
  const std::size_t row_bytes = kRowBytes / m.stages / 8 * 8;
  const std::size_t piece = row_bytes / m.bits * kOctet * m.width;
  Coded near = m;
  near.codes = room;
  near.rows = kStripRows;
  near.row_bytes = row_bytes;
  near.lanes = 1;
  for (std::size_t done = 0; done < cols; done += piece) {
    const std::size_t now = cols - done < piece ? cols - done : piece;
    const std::size_t byte = (group + done / m.width) * m.bits / 8;
    const std::size_t bytes = (((now - 1) / m.width + 1) * m.bits + 7) / 8;
    for (std::size_t stage = 0; stage < m.stages; ++stage) {
      for (std::size_t r = 0; r < first + rows; r += 8) {
        const std::uint8_t* lines = RowByte(m, stage, row - first + r, byte);
        std::uint8_t* to = room + (stage * kStripRows + r) * row_bytes;
        for (std::size_t i = 0; i < bytes; i += 8) {
          std::uint64_t eight[8] = {};
          for (std::size_t j = 0; j < 8 && i + j < bytes; ++j) eight[j] = LoadEight(lines + (i + j) * kStripRows);
          TurnEight(eight, to + i, row_bytes);
        }
      }
    }
    DecodeStoredRows(near, first, rows, 0, now, scales, out + done, stride);
  }
}

void DecodeRows(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                const float* scales, float* out, std::size_t stride) {
  if (m.lanes == 1) return DecodeStoredRows(m, row, rows, group, cols, scales, out, stride);
  while (rows > 0) {
    const std::size_t left = kStripRows - (row & (kStripRows - 1)), now = rows < left ? rows : left;
    if (m.books > 1 || m.stages > kMaxStages) {
      for (std::size_t r = 0; r < now; ++r) DecodeRow(m, row + r, group, cols, scales[r], out + r * stride);
    } else {
      DecodeStripRows(m, row, now, group, cols, scales, out, stride);
    }
    row += now;
    scales += now;
    out += now * stride;
    rows -= now;
  }
}

// Column by column of tiles, so that the lines of the output are finished one after the other.
void Transpose(const float* from, std::size_t from_stride, std::size_t rows, std::size_t cols, float* to,
               std::size_t to_stride) {
  const std::size_t tiled_rows = rows / Wide::kLanes * Wide::kLanes;
  const std::size_t tiled_cols = cols / 8 * 8;
  for (std::size_t c = 0; c < tiled_cols; c += 8) {
    for (std::size_t r = 0; r < tiled_rows; r += Wide::kLanes) {
      decltype(Wide::Set(0.0F)) turned[8];
      LoadTurned([&](std::size_t i) { return from + (r + i) * from_stride + c; }, turned);
      VQONNX_UNROLL
      for (std::size_t i = 0; i < 8; ++i) Wide::Store(to + (c + i) * to_stride + r, turned[i]);
    }
    if (tiled_rows == rows) continue;
    decltype(Wide::Set(0.0F)) turned[8];
    LoadTurned(
        [&](std::size_t i) {  // the last row stands in for those that are not there
          return from + (tiled_rows + i < rows ? tiled_rows + i : rows - 1) * from_stride + c;
        },
        turned);
    VQONNX_UNROLL
    for (std::size_t i = 0; i < 8; ++i)
      Wide::StorePart(to + (c + i) * to_stride + tiled_rows, rows - tiled_rows, turned[i]);
  }
  for (std::size_t c = tiled_cols; c < cols; ++c) {
    for (std::size_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

}  // namespace
}  // namespace vqonnx
