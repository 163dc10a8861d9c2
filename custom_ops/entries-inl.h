// Products of many rows of x with a matrix of codes: for each block of x a table that has for each word an entry, its
// products with some rows, in float32 or in 16 bits. An output takes the entry that its code names: one load and one
// addition in the place of `width` multiplications. Over the vocabulary of kernels-inl.h.
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

// Entries in float32: products as they are, one vector a word.
template <class F>
struct FloatTable {
  using Vector = decltype(F::Set(0.0F));
  Vector Take(Vector x) const { return x; }
  void Put(std::size_t word, Vector product) const { F::Store(entries + word * F::kLanes, product); }
  float* entries;
};

// Entries in 16 bits, where a vector of floats has all their lanes: x is divided by the units first.
struct ShortTable {
  using Vector = decltype(Wide::Set(0.0F));
  Vector Take(Vector x) const { return Wide::Mul(x, one_over_units); }
  void Put(std::size_t word, Vector product) const { Shorts::StoreNearest(entries + word * Shorts::kLanes, &product); }
  std::int16_t* entries;
  Vector one_over_units;
};

// A block of x, [cols] lines of which vectors are read, and the words of its book.
struct BookAndBlock {
  const float* x;
  std::size_t x_stride;
  const float* book;
  std::size_t words, width, cols;
};

// The entries of some words at once, so that their sums need not wait for each other. kCols: of a block, or 0 for any
// number.
template <class F, std::size_t kCols, std::size_t kAtOnce, class Table>
VQONNX_INLINE void BuildWords(const BookAndBlock& b, std::size_t word, const Table& table,
                              const typename Table::Vector (&x)[kCols + 1]) {
  typename Table::Vector sums[kAtOnce];
  const float* values = b.book + word * b.width;
  const auto first = kCols > 0 ? x[0] : table.Take(F::Load(b.x));
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) sums[w] = F::Mul(first, F::Set(values[w * b.width]));
  const auto add = [&](std::size_t k, typename Table::Vector value) {
    VQONNX_UNROLL
    for (std::size_t w = 0; w < kAtOnce; ++w) sums[w] = F::MulAdd(value, F::Set(values[w * b.width + k]), sums[w]);
  };
  if constexpr (kCols > 0) {
    VQONNX_UNROLL
    for (std::size_t k = 1; k < kCols; ++k) add(k, x[k]);
  } else {
    for (std::size_t k = 1; k < b.cols; ++k) add(k, table.Take(F::Load(b.x + k * b.x_stride)));
  }
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) table.Put(word + w, sums[w]);
}

template <class F, std::size_t kCols, class Table>
void BuildTableOf(const BookAndBlock& b, const Table& table) {
  typename Table::Vector x[kCols + 1];
  VQONNX_UNROLL
  for (std::size_t k = 0; k < kCols; ++k) x[k] = table.Take(F::Load(b.x + k * b.x_stride));
  constexpr std::size_t kAtOnce = 2;
  std::size_t word = 0;
  for (; word + kAtOnce <= b.words; word += kAtOnce) BuildWords<F, kCols, kAtOnce>(b, word, table, x);
  for (; word < b.words; ++word) BuildWords<F, kCols, 1>(b, word, table, x);
}

template <class F, class Table>
void BuildOneTable(const BookAndBlock& b, const Table& table) {
  switch (b.cols) {
    case 1:
      return BuildTableOf<F, 1>(b, table);
    case 2:
      return BuildTableOf<F, 2>(b, table);
    case 4:
      return BuildTableOf<F, 4>(b, table);
    case 8:
      return BuildTableOf<F, 8>(b, table);
    default:
      return BuildTableOf<F, 0>(b, table);
  }
}

VQONNX_INLINE BookAndBlock BlockOf(const BuildEntries& b, std::size_t table) {
  return {b.x + table * b.width * b.x_stride,     b.x_stride, b.books[table], b.words, b.width,
          table + 1 < b.tables ? b.width : b.cols};
}

template <class F>
void BuildFloats(const BuildEntries& b) {
  for (std::size_t t = 0; t < b.tables; ++t) {
    BuildOneTable<F>(BlockOf(b, t), FloatTable<F>{b.entries + t * kTableWords * F::kLanes});
  }
}

// Vectors of floats that have the lanes of an entry in 16 bits.
constexpr std::size_t kShortParts = Shorts::kLanes / Wide::kLanes;

// The same where it takes several vectors: each value of a word is then loaded once for all of them.
template <std::size_t kAtOnce, class Vector>
VQONNX_INLINE void BuildShortWords(const BookAndBlock& b, std::size_t word, const Vector (&one_over_units)[kShortParts],
                                   std::int16_t* entries) {
  const float* values = b.book + word * b.width;
  Vector sums[kAtOnce][kShortParts];
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) {
    VQONNX_UNROLL
    for (std::size_t p = 0; p < kShortParts; ++p) sums[w][p] = Wide::Set(0.0F);
  }
  for (std::size_t k = 0; k < b.cols; ++k) {
    Vector x[kShortParts];
    VQONNX_UNROLL
    for (std::size_t p = 0; p < kShortParts; ++p) x[p] = Wide::Load(b.x + k * b.x_stride + p * Wide::kLanes);
    VQONNX_UNROLL
    for (std::size_t w = 0; w < kAtOnce; ++w) {
      const auto value = Wide::Set(values[w * b.width + k]);
      VQONNX_UNROLL
      for (std::size_t p = 0; p < kShortParts; ++p) sums[w][p] = Wide::MulAdd(x[p], value, sums[w][p]);
    }
  }
  VQONNX_UNROLL
  for (std::size_t w = 0; w < kAtOnce; ++w) {
    VQONNX_UNROLL
    for (std::size_t p = 0; p < kShortParts; ++p) sums[w][p] = Wide::Mul(sums[w][p], one_over_units[p]);
    Shorts::StoreNearest(entries + (word + w) * Shorts::kLanes, sums[w]);
  }
}

template <class Vector>
void BuildShortTable(const BookAndBlock& b, const Vector (&one_over_units)[kShortParts], std::int16_t* entries) {
  if constexpr (kShortParts == 1) {
    BuildOneTable<Wide>(b, ShortTable{entries, one_over_units[0]});
  } else {
    constexpr std::size_t kAtOnce = 3;
    std::size_t word = 0;
    for (; word + kAtOnce <= b.words; word += kAtOnce) BuildShortWords<kAtOnce>(b, word, one_over_units, entries);
    for (; word < b.words; ++word) BuildShortWords<1>(b, word, one_over_units, entries);
  }
}

// The units of the rows from `lane` on, a vector of them, and the largest magnitudes of x.
struct UnitsAndMost {
  decltype(Wide::Set(0.0F)) units, most;
};

VQONNX_INLINE UnitsAndMost UnitsOf(const BuildEntries& b, std::size_t lane) {
  const auto zero = Wide::Set(0.0F);
  auto units = zero, most = zero, before = zero;  // of the first table of two
  for (std::size_t t = 0; t < b.tables; ++t) {
    const BookAndBlock block = BlockOf(b, t);
    auto square = zero;
    for (std::size_t k = 0; k < block.cols; ++k) {
      const auto value = Wide::Load(block.x + k * block.x_stride + lane);
      square = Wide::MulAdd(value, value, square);
      most = Wide::Max(most, Wide::Max(value, Wide::Mul(value, Wide::Set(-1.0F))));
    }
    const auto length = Wide::Max(Wide::Sqrt(square), Wide::Set(kShortInput));
    before = Wide::MulAdd(length, Wide::Set(b.longest[t] / kShortSum), t % 2 == 0 ? zero : before);
    units = Wide::Max(units, before);
  }
  return {units, most};
}

void BuildShorts(const BuildEntries& b) {
  decltype(Wide::Set(0.0F)) one_over_units[kShortParts];
  for (std::size_t part = 0; part < kShortParts; ++part) {
    const std::size_t lane = part * Wide::kLanes;
    const auto units = UnitsOf(b, lane).units;
    Wide::Store(b.units + lane, units);
    one_over_units[part] = Wide::Div(Wide::Set(1.0F), units);
  }
  for (std::size_t t = 0; t < b.tables; ++t) {
    BuildShortTable(BlockOf(b, t), one_over_units, b.shorts + t * kTableWords * Shorts::kLanes);
  }
}

void BuildEntry(const BuildEntries& b) {
  if (b.entries == nullptr) return BuildShorts(b);
  b.lanes == Wide::kLanes ? BuildFloats<Wide>(b) : BuildFloats<Middle>(b);
}

// Byte `i` of eight, times kBytes, a power of two: both shifts are one.
template <std::size_t kBytes>
VQONNX_INLINE std::size_t ByteTimes(std::uint64_t eight, std::size_t i) {
  constexpr std::size_t kShift = kBytes == 2 ? 1 : kBytes == 4 ? 2 : kBytes == 16 ? 4 : kBytes == 32 ? 5 : 6;
  static_assert(kBytes == std::size_t{1} << kShift);
  const std::uint64_t shifted = 8 * i < kShift ? eight << (kShift - 8 * i) : eight >> (8 * i - kShift);
  return static_cast<std::size_t>(shifted & 255 * kBytes);
}

// Entries of either kind. `Put` adds up those that at(table) yields, and adds what they come to.
template <class F>
struct FloatEntries {
  using Value = float;
  static constexpr std::size_t kLanes = F::kLanes;
  explicit FloatEntries(const SumEntries& s) : entries(s.entries) {}
  static auto At(const float* entry) { return F::Load(entry); }
  template <std::size_t kTables, bool kAdd, class Entry>
  VQONNX_INLINE void Put(const Entry& at, float* to) const {
    auto sum = at(0);
    VQONNX_UNROLL
    for (std::size_t t = 1; t < kTables; ++t) sum = F::Add(sum, at(t));
    F::Store(to, kAdd ? F::Add(F::Load(to), sum) : sum);
  }
  const float* entries;
};

struct ShortEntries {
  using Value = std::int16_t;
  static constexpr std::size_t kLanes = Shorts::kLanes;
  explicit ShortEntries(const SumEntries& s) : entries(s.shorts) {
    for (std::size_t i = 0; i < kShortParts; ++i) units[i] = Wide::Load(s.units + i * Wide::kLanes);
  }
  static auto At(const std::int16_t* entry) { return Shorts::Load(entry); }
  template <std::size_t kTables, bool kAdd, class Entry>
  VQONNX_INLINE void Put(const Entry& at, float* to) const {
    auto first = at(0);
    if constexpr (kTables > 1) first = Shorts::Add(first, at(1));
    auto second = first;  // used where there is a third table
    if constexpr (kTables > 2) second = at(2);
    if constexpr (kTables > 3) second = Shorts::Add(second, at(3));
    PutPart<(kTables > 2), kAdd, 0>(first, second, to);
    if constexpr (kShortParts > 1) PutPart<(kTables > 2), kAdd, 1>(first, second, to);
  }
  template <bool kTwo, bool kAdd, std::size_t kPart, class Vector>
  VQONNX_INLINE void PutPart(Vector first, Vector second, float* to) const {
    auto sum = Wide::Set(0.0F);
    if constexpr (kTwo) {
      sum = Shorts::FloatsOfSum<kPart>(first, second);
    } else {
      sum = Shorts::Floats<kPart>(first);
    }
    to += kPart * Wide::kLanes;
    Wide::Store(to, kAdd ? Wide::MulAdd(sum, units[kPart], Wide::Load(to)) : Wide::Mul(sum, units[kPart]));
  }
  const std::int16_t* entries;
  decltype(Wide::Set(0.0F)) units[kShortParts];
};

template <class E, std::size_t kTables, bool kAdd>
void SumEntriesOf(const SumEntries& s) {
  using Value = typename E::Value;
  constexpr std::size_t kBytes = E::kLanes * sizeof(Value);
  constexpr std::size_t kStripsAhead = 8;  // whose lines are fetched early: they are far apart
  const std::size_t pitch = s.pitch, strip_bytes = s.strip_bytes;
  const E kind(s);
  const std::uint8_t* codes[kTables];
  VQONNX_UNROLL
  for (std::size_t t = 0; t < kTables; ++t) codes[t] = s.codes[t];
  float* sums = s.sums;
  for (std::size_t strip = 0; strip < s.strips; ++strip) {
    VQONNX_UNROLL
    for (std::size_t t = 0; t < kTables; ++t) VQONNX_FETCH_LATER(codes[t] + kTables * kStripRows);  // the next tables'
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
        const auto entry = [&](std::size_t t) {
          const auto* table = reinterpret_cast<const std::uint8_t*>(kind.entries + t * kTableWords * E::kLanes);
          return kind.At(reinterpret_cast<const Value*>(table + ByteTimes<kBytes>(eight[t], i)));
        };
        kind.template Put<kTables, kAdd>(entry, sums + i * pitch);
      }
    }
    VQONNX_UNROLL
    for (std::size_t t = 0; t < kTables; ++t) codes[t] += strip_bytes;
  }
}

template <class E, std::size_t kTables>
void SumEntriesOfCount(const SumEntries& s) {
  if constexpr (kTables > 1) {
    if (s.tables < kTables) return SumEntriesOfCount<E, kTables - 1>(s);
  }
  s.add ? SumEntriesOf<E, kTables, true>(s) : SumEntriesOf<E, kTables, false>(s);
}

void SumEntry(const SumEntries& s) {
  if (s.entries == nullptr) return SumEntriesOfCount<ShortEntries, kMostEntryTables>(s);
  s.lanes == Wide::kLanes ? SumEntriesOfCount<FloatEntries<Wide>, kMostEntryTables>(s)
                          : SumEntriesOfCount<FloatEntries<Middle>, kMostEntryTables>(s);
}

// A value that is no finite number, times zero, is none; sums of zeros remember it.
float Largest(const float* x, std::size_t count) {
  constexpr std::size_t kAtOnce = 4, kLanes = Wide::kLanes;
  using V = decltype(Wide::Set(0.0F));
  V most[kAtOnce], zeros[kAtOnce];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kAtOnce; ++i) most[i] = zeros[i] = Wide::Set(0.0F);
  const auto take = [&](std::size_t i, V value) {
    most[i] = Wide::Max(most[i], Wide::Max(value, Wide::Mul(value, Wide::Set(-1.0F))));
    zeros[i] = Wide::MulAdd(value, Wide::Set(0.0F), zeros[i]);
  };
  for (; count >= kAtOnce * kLanes; count -= kAtOnce * kLanes, x += kAtOnce * kLanes) {
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kAtOnce; ++i) take(i, Wide::Load(x + i * kLanes));
  }
  for (; count >= kLanes; count -= kLanes, x += kLanes) take(0, Wide::Load(x));
  if (count > 0) take(0, Wide::LoadPart(x, count));
  float lanes[kAtOnce * kLanes], largest = 0.0F, sum = 0.0F;
  for (std::size_t i = 0; i < kAtOnce; ++i) Wide::Store(lanes + i * kLanes, most[i]);
  for (const float value : lanes) largest = value > largest ? value : largest;
  for (std::size_t i = 0; i < kAtOnce; ++i) Wide::Store(lanes + i * kLanes, zeros[i]);
  for (const float value : lanes) sum += value;
  return largest + sum;
}

}  // namespace
}  // namespace vqonnx
