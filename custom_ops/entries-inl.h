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

// The entries of some words at once, so that their sums need not wait for each other. kCols: of a block, or 0 for any
// number.
template <class F, std::size_t kCols, std::size_t kAtOnce>
VQONNX_INLINE void BuildWords(const BuildEntries& b, std::size_t word, const decltype(F::Set(0.0F)) (&x)[kCols + 1]) {
  using V = decltype(F::Set(0.0F));
  const float* values = b.book + word * b.width;
  V sums[kAtOnce];
  const auto first = kCols > 0 ? x[0] : F::Load(b.x);
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) sums[w] = F::Mul(first, F::Set(values[w * b.width]));
  const auto add = [&](std::size_t k, V value) {
    VQONNX_UNROLL
    for (std::size_t w = 0; w < kAtOnce; ++w) sums[w] = F::MulAdd(value, F::Set(values[w * b.width + k]), sums[w]);
  };
  if constexpr (kCols > 0) {
    VQONNX_UNROLL
    for (std::size_t k = 1; k < kCols; ++k) add(k, x[k]);
  } else {
    for (std::size_t k = 1; k < b.cols; ++k) add(k, F::Load(b.x + k * b.x_stride));
  }
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) F::Store(b.entries + (word + w) * F::kLanes, sums[w]);
}

template <class F, std::size_t kCols>
void BuildEntriesOf(const BuildEntries& b) {
  decltype(F::Set(0.0F)) x[kCols + 1];
  VQONNX_UNROLL
  for (std::size_t k = 0; k < kCols; ++k) x[k] = F::Load(b.x + k * b.x_stride);
  constexpr std::size_t kAtOnce = 2;
  std::size_t word = 0;
  for (; word + kAtOnce <= b.words; word += kAtOnce) BuildWords<F, kCols, kAtOnce>(b, word, x);
  for (; word < b.words; ++word) BuildWords<F, kCols, 1>(b, word, x);
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

// Byte `i` of eight, times kFactor floats, in bytes: both shifts are one.
template <std::size_t kFactor>
VQONNX_INLINE std::size_t ByteTimes(std::uint64_t eight, std::size_t i) {
  constexpr std::size_t kBytes = kFactor * sizeof(float);
  constexpr std::size_t kShift = kBytes == 4 ? 2 : kBytes == 16 ? 4 : kBytes == 32 ? 5 : 6;
  static_assert(kBytes == std::size_t{1} << kShift);
  const std::uint64_t shifted = 8 * i < kShift ? eight << (kShift - 8 * i) : eight >> (8 * i - kShift);
  return static_cast<std::size_t>(shifted & 255 * kBytes);
}

template <class F>
VQONNX_INLINE auto LoadAt(const float* from, std::size_t bytes) {
  return F::Load(reinterpret_cast<const float*>(reinterpret_cast<const std::uint8_t*>(from) + bytes));
}

template <class F, std::size_t kTables, bool kAdd>
void SumEntriesOf(const SumEntries& s) {
  constexpr std::size_t kStripsAhead = 8;  // whose lines are fetched early: they are far apart
  const std::size_t pitch = s.pitch, strip_bytes = s.strip_bytes;
  const float* entries = s.entries;
  const std::uint8_t* codes[kTables];
  VQONNX_UNROLL
  for (std::size_t t = 0; t < kTables; ++t) codes[t] = s.codes[t];
  float* sums = s.sums;
  for (std::size_t strip = 0; strip < s.strips; ++strip) {
    if (strip + kStripsAhead < s.strips) {
      VQONNX_UNROLL
      for (std::size_t t = 0; t < kTables; ++t) VQONNX_FETCH(codes[t] + kStripsAhead * strip_bytes);
    }
    for (std::size_t r = 0; r < kStripRows; r += 8, sums += 8 * pitch) {
      std::uint64_t eight[kTables];
      VQONNX_UNROLL
      for (std::size_t t = 0; t < kTables; ++t) eight[t] = LoadEight(codes[t] + r);
      VQONNX_UNROLL
      for (std::size_t i = 0; i < 8; ++i) {
        auto sum = LoadAt<F>(entries, ByteTimes<F::kLanes>(eight[0], i));
        VQONNX_UNROLL
        for (std::size_t t = 1; t < kTables; ++t) {
          sum = F::Add(sum, LoadAt<F>(entries + t * kTableWords * F::kLanes, ByteTimes<F::kLanes>(eight[t], i)));
        }
        float* to = sums + i * pitch;
        F::Store(to, kAdd ? F::Add(F::Load(to), sum) : sum);
      }
    }
    VQONNX_UNROLL
    for (std::size_t t = 0; t < kTables; ++t) codes[t] += strip_bytes;
  }
}

template <class F, std::size_t kTables>
void SumEntriesOfCount(const SumEntries& s) {
  if constexpr (kTables > 1) {
    if (s.tables < kTables) return SumEntriesOfCount<F, kTables - 1>(s);
  }
  s.add ? SumEntriesOf<F, kTables, true>(s) : SumEntriesOf<F, kTables, false>(s);
}

void SumEntry(const SumEntries& s) {
  s.lanes == Wide::kLanes ? SumEntriesOfCount<Wide, kMostEntryTables>(s)
                          : SumEntriesOfCount<Middle, kMostEntryTables>(s);
}

}  // namespace
}  // namespace vqonnx
