// The vocabulary of kernels-inl.h and tile-inl.h for AVX-512 (F, BW, DQ, VL), which two tables share.
// No include guard and no standard library on purpose: see STYLE.md, section 5.
#include <immintrin.h>

#include "kernels.h"

namespace vqonnx {
namespace {

struct Narrow {
  static constexpr std::size_t kLanes = 4;
  static __m128 Load(const float* p) { return _mm_loadu_ps(p); }
  static void Store(float* p, __m128 a) { _mm_storeu_ps(p, a); }
  static __m128 Add(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
  static __m128 Mul(__m128 a, __m128 b) { return _mm_mul_ps(a, b); }
  static __m128 Set(float a) { return _mm_set1_ps(a); }
};

struct Middle {
  static constexpr std::size_t kLanes = 8;
  static __m256 Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
  static __m256 Add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 Mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 Set(float a) { return _mm256_set1_ps(a); }
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
  static __mmask16 First(std::size_t n) { return static_cast<__mmask16>((1U << n) - 1); }
  static __m512 LoadPart(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(First(n), p); }
  static void StorePart(float* p, std::size_t n, __m512 a) { _mm512_mask_storeu_ps(p, First(n), a); }
};

inline std::uint64_t LoadEight(const std::uint8_t* p) {
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// The forms with a full mask do the same as those without, which g++ 12 suspects of reading what was never set.
inline void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  const long long b = static_cast<long long>(bits);
  const __m512i shifts = _mm512_setr_epi64(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
  const __m512i codes = _mm512_maskz_srlv_epi64(0xFF, _mm512_set1_epi64(static_cast<long long>(window)), shifts);
  const __m512i mask = _mm512_set1_epi64((1LL << b) - 1);
  _mm512_mask_cvtepi64_storeu_epi8(out, 0xFF, _mm512_and_si512(codes, mask));
}

constexpr std::size_t kTile = 8;
constexpr std::size_t kTileVectors = 2, kTileCount = 14;  // 28 of 32 registers hold sums

// As in avx2.cc: eight by eight suits kernels of nine taps, where sixteen would leave everything to the scalar loop.
inline void TransposeTile(const float* from, std::size_t from_stride, float* to, std::size_t to_stride) {
  __m256 rows[8], pairs[8], quads[8];
  for (std::size_t i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * from_stride);
  for (std::size_t i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (std::size_t i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  for (std::size_t i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
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

}  // namespace
}  // namespace vqonnx

#include "kernels-inl.h"
#include "tile-inl.h"
