// Products of many rows of x with a matrix of codes, in float32: for each block of x a table that has for each word an
// entry, its products with as many rows as a vector has lanes. An output takes the entry that its code names: one load
// and one addition in the place of `width` multiplications. Over the vocabulary of kernels-inl.h.
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

// Codes of kStripRows rows from `row` on, a multiple of that: out[code][kStripRows], zeros for rows that there are not.
// There is room for `count` rounded up to octets.
void CodeLines(const Coded& m, std::size_t stage, std::size_t row, std::size_t group, std::size_t count,
               std::uint8_t* out) {
  if (m.lanes > 1) return UnpackStrip(m, stage, row, kStripRows, group, count, out);
  constexpr std::size_t kAhead = 16;  // rows, which are far apart
  const std::size_t first_byte = group * m.bits / 8;
  for (std::size_t r = 0; r < kAhead && row + r < m.rows; ++r) VQONNX_FETCH(RowByte(m, stage, row + r, first_byte));
  for (std::size_t r = 0; r < kStripRows; r += 8) {
    for (std::size_t i = r + kAhead; i < r + kAhead + 8 && row + i < m.rows; ++i) {
      VQONNX_FETCH(RowByte(m, stage, row + i, first_byte));
    }
    for (std::size_t done = 0; done < count; done += kOctet) {
      const std::size_t byte = (group + done) * m.bits / 8, bytes = m.row_bytes - byte;
      std::uint64_t v[8] = {};
      for (std::size_t i = 0; i < 8 && row + r + i < m.rows; ++i) {
        v[i] = LoadBits(RowByte(m, stage, row + r + i, byte), bytes);
        if (m.bits == 8) continue;
        alignas(8) std::uint8_t octet[kOctet];
        UnpackOctet(v[i], m.bits, octet);
        v[i] = LoadEight(octet);
      }
      TurnEight(v, out + done * kStripRows + r, kStripRows);
    }
  }
}

// kCols: of a block, or 0 for any number.
template <class F, std::size_t kCols>
void BuildEntriesOf(const BuildEntries& b) {
  using V = decltype(F::Set(0.0F));
  if constexpr (kCols > 0) {
    V x[kCols];
    VQONNX_UNROLL
    for (std::size_t k = 0; k < kCols; ++k) x[k] = F::Load(b.x + k * b.x_stride);
    for (std::size_t word = 0; word < b.words; ++word) {
      const float* values = b.book + word * b.width;
      V sum = F::Mul(x[0], F::Set(values[0]));
      VQONNX_UNROLL
      for (std::size_t k = 1; k < kCols; ++k) sum = F::MulAdd(x[k], F::Set(values[k]), sum);
      F::Store(b.entries + word * F::kLanes, sum);
    }
  } else {
    for (std::size_t word = 0; word < b.words; ++word) {
      const float* values = b.book + word * b.width;
      V sum = F::Mul(F::Load(b.x), F::Set(values[0]));
      for (std::size_t k = 1; k < b.cols; ++k) sum = F::MulAdd(F::Load(b.x + k * b.x_stride), F::Set(values[k]), sum);
      F::Store(b.entries + word * F::kLanes, sum);
    }
  }
}

template <class F>
void BuildEntriesFor(const BuildEntries& b) {
  switch (b.cols) {
    case 1:
      return BuildEntriesOf<F, 1>(b);
    case 2:
      return BuildEntriesOf<F, 2>(b);
    case 4:
      return BuildEntriesOf<F, 4>(b);
    case 8:
      return BuildEntriesOf<F, 8>(b);
    default:
      return BuildEntriesOf<F, 0>(b);
  }
}

void BuildEntry(const BuildEntries& b) {
  b.lanes == Wide::kLanes ? BuildEntriesFor<Wide>(b) : BuildEntriesFor<Middle>(b);
}

template <class F, std::size_t kTables>
void SumEntriesOf(const SumEntries& s) {
  const std::size_t table = s.words * F::kLanes;
  float* sums = s.sums;
  for (std::size_t strip = 0; strip < s.strips; ++strip) {
    for (std::size_t r = 0; r < kStripRows; r += 8, sums += 8 * s.pitch) {
      std::uint64_t eight[kTables];
      VQONNX_UNROLL
      for (std::size_t t = 0; t < kTables; ++t) eight[t] = LoadEight(s.codes[t] + strip * s.strip_bytes + r);
      VQONNX_UNROLL
      for (std::size_t i = 0; i < 8; ++i) {
        auto sum = F::Load(s.entries + (eight[0] >> (8 * i) & 255) * F::kLanes);
        VQONNX_UNROLL
        for (std::size_t t = 1; t < kTables; ++t) {
          sum = F::Add(sum, F::Load(s.entries + t * table + (eight[t] >> (8 * i) & 255) * F::kLanes));
        }
        float* to = sums + i * s.pitch;
        F::Store(to, s.add ? F::Add(F::Load(to), sum) : sum);
      }
    }
  }
}

template <class F>
void SumEntriesFor(const SumEntries& s) {
  switch (s.tables) {
    case 1:
      return SumEntriesOf<F, 1>(s);
    case 2:
      return SumEntriesOf<F, 2>(s);
    case 3:
      return SumEntriesOf<F, 3>(s);
    default:
      return SumEntriesOf<F, 4>(s);
  }
}

void SumEntry(const SumEntries& s) {
  s.lanes == Wide::kLanes ? SumEntriesFor<Wide>(s) : SumEntriesFor<Middle>(s);
}

}  // namespace
}  // namespace vqonnx
