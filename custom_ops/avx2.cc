// The kernels for AVX2 with FMA. Everything is in unnamed namespaces except the table, see docs/kernels.md.
// clang-format off
#include "kernels.h"
#include "bytes-x86-inl.h"
// clang-format on

namespace vqonnx {
namespace {

struct Narrow {
  static constexpr std::size_t kLanes = 4;
  static __m128 Load(const float* p) { return _mm_loadu_ps(p); }
  static void Store(float* p, __m128 a) { _mm_storeu_ps(p, a); }
  static __m128 Add(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
  static __m128 Mul(__m128 a, __m128 b) { return _mm_mul_ps(a, b); }
  static __m128 Set(float a) { return _mm_set1_ps(a); }
  static __m128 MulAdd(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
};

struct Wide {
  static constexpr std::size_t kLanes = 8;
  static __m256 Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
  static __m256 Add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 Mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 Set(float a) { return _mm256_set1_ps(a); }
  static __m256 MulAdd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256 Max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  static __m256 Min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
  static __m256 Div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
  static __m256 Sqrt(__m256 a) { return _mm256_sqrt_ps(a); }
  static __m256 ToExponent(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
  static __m256i First(std::size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 LoadPart(const float* p, std::size_t n) { return _mm256_maskload_ps(p, First(n)); }
  static void StorePart(float* p, std::size_t n, __m256 a) {  // the masked store takes tens of cycles on some AMD cores
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (std::size_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  using Range = __m256i;
  static Range RangeOf(std::size_t begin, std::size_t end) { return _mm256_andnot_si256(First(begin), First(end)); }
  static __m256 LoadRange(const float* p, Range range) { return _mm256_maskload_ps(p, range); }
  static __m256 LoadRangeOr(const float* p, Range range, __m256 other) {
    return _mm256_blendv_ps(other, LoadRange(p, range), _mm256_castsi256_ps(range));
  }
  static void SplitPairs(__m256 a, __m256 b, __m256* even, __m256* odd) {
    const __m256d evens = _mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));  // a b | a b
    const __m256d odds = _mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
    *even = _mm256_castpd_ps(_mm256_permute4x64_pd(evens, _MM_SHUFFLE(3, 1, 2, 0)));
    *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(odds, _MM_SHUFFLE(3, 1, 2, 0)));
  }
};
using Middle = Wide;

// Lanes in the order in which packing leaves them: unpacking two vectors then yields pairs of eight lanes, in order.
struct Shorts {
  static constexpr std::size_t kLanes = 16;
  static __m256i Load(const std::int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i Add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  template <std::size_t kPart>
  static __m256 Floats(__m256i a) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(Pairs<kPart>(a, a), 16));
  }
  template <std::size_t kPart>
  static __m256 FloatsOfSum(__m256i a, __m256i b) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(Pairs<kPart>(a, b), _mm256_set1_epi16(1)));
  }
  template <std::size_t kPart>
  static __m256i Pairs(__m256i a, __m256i b) {
    return kPart == 0 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpackhi_epi16(a, b);
  }
  static void StoreNearest(std::int16_t* p, const __m256* parts) {
    const __m256i nearest = _mm256_packs_epi32(_mm256_cvtps_epi32(parts[0]), _mm256_cvtps_epi32(parts[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), nearest);
  }
};

// Each code ends up in the lowest byte of a 64-bit lane; shifting the lanes over each other leaves one shuffle to do.
inline void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  const long long b = static_cast<long long>(bits);
  const __m256i all = _mm256_set1_epi64x(static_cast<long long>(window));
  const __m256i mask = _mm256_set1_epi64x((1LL << b) - 1);
  const __m256i low = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(0, b, 2 * b, 3 * b)), mask);
  const __m256i high = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(4 * b, 5 * b, 6 * b, 7 * b)), mask);
  const __m256i both = _mm256_or_si256(low, _mm256_slli_epi64(high, 32));  // 0 . 4 . | 1 . 5 . | 2 . 6 . | 3 . 7 .
  const __m128i even_odd =
      _mm_or_si128(_mm256_castsi256_si128(both), _mm_slli_epi64(_mm256_extracti128_si256(both, 1), 16));
  const __m128i order = _mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, -1, -1, -1, -1, -1, -1, -1, -1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(even_odd, order));
}

constexpr std::size_t kTileVectors = 2, kTileCount = 6;  // 12 of 16 registers hold sums

// Three rounds, each of which brings together values that are one, two and four rows apart.
template <class Row>
VQONNX_INLINE void LoadTurned(Row row, __m256* out) {
  __m256 pairs[8], quads[8];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 8; i += 2) {
    const __m256 even = _mm256_loadu_ps(row(i)), odd = _mm256_loadu_ps(row(i + 1));
    pairs[i] = _mm256_unpacklo_ps(even, odd);
    pairs[i + 1] = _mm256_unpackhi_ps(even, odd);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

struct WordTable {
  static constexpr std::size_t kWords = 16;
  explicit WordTable(const float* words) : low_(Wide::Load(words)), high_(Wide::Load(words + 8)) {}
  __m256 At(const std::uint8_t* codes) const {
    return Look(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
  }
  __m256 Look(__m256i codes) const {
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, codes), _mm256_permutevar8x32_ps(high_, codes), is_high);
  }
  __m256 low_, high_;
};

struct ProductTable : WordTable {
  using WordTable::WordTable;
  static __m256i FromFloats(__m256 a) { return _mm256_castps_si256(a); }
  static __m256 FourBytes(const std::uint8_t* p, std::size_t step) {
    const auto load = [&](std::size_t i) {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * step)));
    };
    const __m256i low = _mm256_or_si256(load(0), _mm256_slli_epi32(load(1), 8));
    const __m256i high = _mm256_or_si256(_mm256_slli_epi32(load(2), 16), _mm256_slli_epi32(load(3), 24));
    return _mm256_castsi256_ps(_mm256_or_si256(low, high));
  }
  template <int kBits>
  static __m256i Next(__m256i codes) {
    return _mm256_srli_epi32(codes, kBits);
  }
};

bool DecodeScalarCodes(const Coded&, std::size_t, std::size_t, std::size_t, std::size_t, const float*, float*,
                       std::size_t) {
  return false;
}

}  // namespace
}  // namespace vqonnx

#include "algorithms-inl.h"
namespace vqonnx {

const Kernels kAvx2 = {.name = "avx2",
                       .unpack = Unpack,
                       .unpack_wide = UnpackWide,
                       .decode_rows = DecodeRows,
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
                       .measure = nullptr,
                       .quantise = nullptr,
                       .build_tables = nullptr,
                       .sum_tables = nullptr,
                       .sort_rows = nullptr,
                       .unpack_strip = nullptr,
                       .tables_pay = false};

}  // namespace vqonnx
