// The vocabulary of kernels-inl.h and tile-inl.h for AVX-512 (F, BW, DQ, VL), which two tables share.
// No include guard and no standard library on purpose: see docs/kernels.md.
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

struct Middle {
  static constexpr std::size_t kLanes = 8;
  static __m256 Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
  static __m256 Add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 Mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 Set(float a) { return _mm256_set1_ps(a); }
  static __m256 MulAdd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
};

struct Wide {
  static constexpr std::size_t kLanes = 16;
  static __m512 Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, __m512 a) { _mm512_storeu_ps(p, a); }
  static __m512 Add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 Mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 Set(float a) { return _mm512_set1_ps(a); }
  static __m512 MulAdd(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512 Max(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
  static __m512 Min(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
  static __m512 Div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
  static __m512 Sqrt(__m512 a) { return _mm512_maskz_sqrt_ps(0xFFFF, a); }
  static __m512 ToExponent(__m512 a) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_castps_si512(a), 23));
  }
  static __mmask16 First(std::size_t n) { return static_cast<__mmask16>((1U << n) - 1); }
  static __m512 LoadPart(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(First(n), p); }
  static void StorePart(float* p, std::size_t n, __m512 a) { _mm512_mask_storeu_ps(p, First(n), a); }
  using Range = __mmask16;
  static Range RangeOf(std::size_t begin, std::size_t end) { return static_cast<Range>((1U << end) - (1U << begin)); }
  static __m512 LoadRange(const float* p, Range range) { return _mm512_maskz_loadu_ps(range, p); }
  static __m512 LoadRangeOr(const float* p, Range range, __m512 other) { return _mm512_mask_loadu_ps(other, range, p); }
  static void SplitPairs(__m512 a, __m512 b, __m512* even, __m512* odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(a, evens, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
  }
};

struct Shorts {
  static constexpr std::size_t kLanes = 16;
  static __m256i Load(const std::int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i Add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  template <std::size_t kPart>
  static __m512 Floats(__m256i a) {
    static_assert(kPart == 0);
    return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi16_epi32(0xFFFF, a));
  }
  template <std::size_t kPart>
  static __m512 FloatsOfSum(__m256i a, __m256i b) {
    static_assert(kPart == 0);
    const __m512i sum =
        _mm512_add_epi32(_mm512_maskz_cvtepi16_epi32(0xFFFF, a), _mm512_maskz_cvtepi16_epi32(0xFFFF, b));
    return _mm512_maskz_cvtepi32_ps(0xFFFF, sum);
  }
  static void StoreNearest(std::int16_t* p, const __m512* a) {
    const __m512i nearest = _mm512_maskz_cvtps_epi32(0xFFFF, *a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtsepi32_epi16(0xFFFF, nearest));
  }
};

// The forms with a full mask do the same as those without, which g++ 12 suspects of reading what was never set.
inline void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  const long long b = static_cast<long long>(bits);
  const __m512i shifts = _mm512_setr_epi64(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
  const __m512i codes = _mm512_maskz_srlv_epi64(0xFF, _mm512_set1_epi64(static_cast<long long>(window)), shifts);
  const __m512i mask = _mm512_set1_epi64((1LL << b) - 1);
  _mm512_mask_cvtepi64_storeu_epi8(out, 0xFF, _mm512_and_si512(codes, mask));
}

constexpr std::size_t kTileVectors = 2, kTileCount = 14;  // 28 of 32 registers hold sums

// Rows i and i + 8 share a register; then three rounds, each of which brings together values that are one, two and four
// rows apart.
template <class Row>
VQONNX_INLINE void LoadTurned(Row row, __m512* out) {
  __m512 both[8], pairs[8], quads[8];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 8; ++i) {
    both[i] = _mm512_maskz_insertf32x8(0xFFFF, _mm512_castps256_ps512(_mm256_loadu_ps(row(i))),
                                       _mm256_loadu_ps(row(i + 8)), 1);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_maskz_unpacklo_ps(0xFFFF, both[i], both[i + 1]);
    pairs[i + 1] = _mm512_maskz_unpackhi_ps(0xFFFF, both[i], both[i + 1]);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 8; i += 4) {
    quads[i] = _mm512_maskz_shuffle_ps(0xFFFF, pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 1] = _mm512_maskz_shuffle_ps(0xFFFF, pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    quads[i + 2] = _mm512_maskz_shuffle_ps(0xFFFF, pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 3] = _mm512_maskz_shuffle_ps(0xFFFF, pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(quads[i]), high = _mm512_castps_pd(quads[i + 4]);
    out[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    out[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
}

struct WordTable {
  static constexpr std::size_t kWords = 32;
  explicit WordTable(const float* words) : low_(Wide::Load(words)), high_(Wide::Load(words + 16)) {}
  __m512 At(const std::uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_permutex2var_ps(low_, _mm512_maskz_cvtepu8_epi32(0xFFFF, bytes), high_);
  }
  __m512 low_, high_;
};

struct ProductTable {
  static constexpr std::size_t kWords = 16;
  explicit ProductTable(const float* words) : words_(Wide::Load(words)) {}
  static __m512i FromFloats(__m512 a) { return _mm512_castps_si512(a); }
  static __m512 FourBytes(const std::uint8_t* p, std::size_t step) {
    const auto load = [&](std::size_t i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step));
      return _mm512_maskz_cvtepu8_epi32(0xFFFF, bytes);
    };
    const __m512i low = _mm512_or_si512(load(0), _mm512_maskz_slli_epi32(0xFFFF, load(1), 8));
    const __m512i high =
        _mm512_or_si512(_mm512_maskz_slli_epi32(0xFFFF, load(2), 16), _mm512_maskz_slli_epi32(0xFFFF, load(3), 24));
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
  }
  template <int kBits>
  static __m512i Next(__m512i codes) {
    return _mm512_maskz_srli_epi32(0xFFFF, codes, kBits);
  }
  __m512 Look(__m512i codes) const { return _mm512_maskz_permutexvar_ps(0xFFFF, codes, words_); }
  __m512 words_;
};

}  // namespace
}  // namespace vqonnx
