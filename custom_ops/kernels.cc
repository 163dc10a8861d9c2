// The portable kernels, which are the specification of the fast ones, and the choice between tables.
#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>

#if defined(VQONNX_X86)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace vqonnx {
namespace {

struct Scalar {
  static constexpr std::size_t kLanes = 1;
  static float Load(const float* p) { return *p; }
  static void Store(float* p, float a) { *p = a; }
  static float Add(float a, float b) { return a + b; }
  static float Mul(float a, float b) { return a * b; }
  static float Set(float a) { return a; }
  static float MulAdd(float a, float b, float c) { return a * b + c; }
  static float Max(float a, float b) { return a > b ? a : b; }
  static float Min(float a, float b) { return a < b ? a : b; }
  static float Div(float a, float b) { return a / b; }
  static float Sqrt(float a) { return std::sqrt(a); }
  static float ToExponent(float a) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) << 23); }
  static float LoadPart(const float* p, std::size_t) { return *p; }
  static void StorePart(float* p, std::size_t, float a) { *p = a; }
  using Range = bool;
  static Range RangeOf(std::size_t begin, std::size_t end) { return begin < end; }
  static float LoadRange(const float* p, Range range) { return range ? *p : 0.0F; }
  static float LoadRangeOr(const float* p, Range range, float other) { return range ? *p : other; }
  static void SplitPairs(float a, float b, float* even, float* odd) { *even = a, *odd = b; }
};
using Narrow = Scalar;
using Middle = Scalar;
using Wide = Scalar;

struct Shorts {
  static constexpr std::size_t kLanes = 1;
  static std::int16_t Load(const std::int16_t* p) { return *p; }
  static std::int16_t Add(std::int16_t a, std::int16_t b) { return static_cast<std::int16_t>(a + b); }
  template <std::size_t>
  static float Floats(std::int16_t a) {
    return a;
  }
  template <std::size_t>
  static float FloatsOfSum(std::int16_t a, std::int16_t b) {
    return static_cast<float>(a + b);
  }
  static void StoreNearest(std::int16_t* p, const float* a) {
    *p = static_cast<std::int16_t>(std::clamp(std::nearbyint(*a), -32768.0F, 32767.0F));
  }
};

std::uint64_t LoadEight(const std::uint8_t* p) {
  std::uint64_t window = 0;
  for (std::size_t i = 0; i < 8; ++i) window |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  return window;
}

void TurnEight(const std::uint64_t (&rows)[8], std::uint8_t* out, std::size_t stride) {
  for (std::size_t i = 0; i < 8; ++i) {
    for (std::size_t r = 0; r < 8; ++r) out[i * stride + r] = static_cast<std::uint8_t>(rows[r] >> (8 * i));
  }
}

void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  assert(1 <= bits && bits <= 8);
  for (std::size_t i = 0; i < kOctet; ++i) {
    out[i] = static_cast<std::uint8_t>(window >> (i * bits) & ((1U << bits) - 1));
  }
}

constexpr std::size_t kTileVectors = 4, kTileCount = 3;

template <class Row>
void LoadTurned(Row row, float* out) {
  for (std::size_t i = 0; i < 8; ++i) out[i] = row(0)[i];
}

struct WordTable {
  static constexpr std::size_t kWords = 256;
  explicit WordTable(const float* words) : words_(words) {}
  float At(const std::uint8_t* codes) const { return words_[*codes]; }
  const float* words_;
};

struct ProductTable {
  static constexpr std::size_t kWords = 0;
};

bool DecodeScalarCodes(const Coded&, std::size_t, std::size_t, std::size_t, std::size_t, const float*, float*,
                       std::size_t) {
  return false;
}

}  // namespace
}  // namespace vqonnx

#include "algorithms-inl.h"
#include "table-portable-inl.h"
namespace vqonnx {
namespace {

void CheckedDecodeRows(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                       const float* scales, float* out, std::size_t stride) {
  assert(row < m.rows && rows <= m.rows - row && cols >= 1 && group % kOctet == 0);
  assert(m.stages >= 1 && m.books >= 1 && m.words >= 1 && m.width >= 1);
  assert(1 <= m.bits && m.bits <= kMaxBits && m.words <= std::size_t{1} << m.bits);
  assert(m.lanes == 1 || (m.lanes == kStripRows && m.rows % kStripRows == 0));
  assert(((group + (cols - 1) / m.width + 1) * m.bits + 7) / 8 <= m.row_bytes);
  DecodeRows(m, row, rows, group, cols, scales, out, stride);
}

#if defined(VQONNX_X86)
struct Registers {
  unsigned a, b, c, d;
};

Registers CpuId(unsigned leaf) {
#if defined(_MSC_VER)
  int r[4];
  __cpuidex(r, static_cast<int>(leaf), 0);
  return {static_cast<unsigned>(r[0]), static_cast<unsigned>(r[1]), static_cast<unsigned>(r[2]),
          static_cast<unsigned>(r[3])};
#else
  Registers r = {};
  if (!__get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
#endif
}

// Which register files the operating system saves for a thread. Only valid when CPUID reports OSXSAVE.
unsigned SavedState() {
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool HasAll(unsigned value, unsigned mask) { return (value & mask) == mask; }

unsigned Bit(int n) { return 1U << n; }

bool HasAvx2() {
  if (CpuId(0).a < 7) return false;
  const unsigned osxsave = Bit(27), avx = Bit(28), fma = Bit(12), avx2 = Bit(5), xmm_ymm = Bit(1) | Bit(2);
  return HasAll(CpuId(1).c, osxsave | avx | fma) && HasAll(SavedState(), xmm_ymm) && HasAll(CpuId(7).b, avx2);
}

bool HasAvx512() {
  const unsigned f = Bit(16), dq = Bit(17), bw = Bit(30), vl = Bit(31), mask_zmm = Bit(5) | Bit(6) | Bit(7);
  return HasAvx2() && HasAll(SavedState(), mask_zmm) && HasAll(CpuId(7).b, f | dq | bw | vl);
}

bool HasVbmi() {
  const unsigned vbmi = Bit(1), vnni = Bit(11);
  return HasAvx512() && HasAll(CpuId(7).c, vbmi | vnni);
}
#endif

bool Always() { return true; }

struct Entry {
  const Kernels* kernels;
  bool (*usable)();
};

// Slowest first.
const Entry kEntries[] = {
    {&kPortable, Always},
#if defined(VQONNX_X86)
    {&kAvx2, HasAvx2},
    {&kAvx512, HasAvx512},
    {&kAvx512Vbmi, HasVbmi},
#elif defined(VQONNX_ARM)
    {&kNeon, Always},
#endif
};
static_assert(sizeof(kEntries) / sizeof(kEntries[0]) <= kMaxTables);

}  // namespace

const Kernels kPortable = {.name = "portable",
                           .unpack = Unpack,
                           .unpack_wide = UnpackWide,
                           .decode_rows = CheckedDecodeRows,
                           .transpose = Transpose,
                           .decode_panel = DecodePanel,
                           .dot = DotProducts,
                           .dot_has_tables = HasTables<ProductTable>,
                           .row_lanes = Wide::kLanes,
                           .few_row_lanes = Middle::kLanes,
                           .short_lanes = Shorts::kLanes,
                           .code_lines = CodeLines,
                           .build_entries = BuildEntry,
                           .takes_short_books = false,
                           .sum_entries = SumEntry,
                           .tile_lanes = kTileLanes,
                           .tile_count = kTileCount,
                           .tile_windows = TileWindows,
                           .tile_positions = TilePositions,
                           .depthwise = SumDepthwise,
                           .every_second = EverySecond,
                           .max_pool = MaxPools,
                           .finish_rows = FinishRows,
                           .finish_columns = FinishColumns,
                           .finish_across = FinishAcross,
                           .add_up = AddUp,
                           .add_to = AddTo,
                           .largest = Largest,
                           .measure = Measure,
                           .quantise = Quantise,
                           .build_tables = BuildTable,
                           .sum_tables = SumTable,
                           .sort_rows = SortRows,
                           .unpack_strip = UnpackSetOfRows,
                           .tables_pay = false};

std::size_t UsableKernels(const Kernels** tables) {
  std::size_t count = 0;
  for (const Entry& entry : kEntries) {
    if (entry.usable()) tables[count++] = entry.kernels;
  }
  return count;
}

const Kernels* ChooseKernels(const char* isa, char* error, std::size_t error_size) {
  const Kernels* best = nullptr;
  bool known = false;
  char names[64] = "";
  for (const Entry& entry : kEntries) {
    const bool usable = entry.usable();
    const bool asked = isa != nullptr && std::strcmp(isa, entry.kernels->name) == 0;
    if (asked && usable) return entry.kernels;
    if (usable) best = entry.kernels;
    known = known || asked;
    const std::size_t length = std::strlen(names);
    std::snprintf(names + length, sizeof(names) - length, "%s%s", length ? ", " : "", entry.kernels->name);
  }
  if (isa == nullptr || *isa == '\0') return best;
  std::snprintf(error, error_size, "VQONNX_ISA is '%.40s', which %s; known are: %s (this processor: up to %s)", isa,
                known ? "this processor lacks" : "is no instruction set of this library", names, best->name);
  return nullptr;
}

}  // namespace vqonnx
