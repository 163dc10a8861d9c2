// The kernels for AVX-512 (F, BW, DQ, VL). Everything is in unnamed namespaces except the table, see STYLE.md,
// section 5.
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
};

inline std::uint64_t LoadEight(const std::uint8_t* p) {
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  const long long b = static_cast<long long>(bits);
  const __m512i shifts = _mm512_setr_epi64(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
  const __m512i codes = _mm512_maskz_srlv_epi64(0xFF, _mm512_set1_epi64(static_cast<long long>(window)), shifts);
  const __m512i mask = _mm512_set1_epi64((1LL << b) - 1);
  _mm512_mask_cvtepi64_storeu_epi8(out, 0xFF, _mm512_and_si512(codes, mask));
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

namespace vqonnx {

const Kernels kAvx512 = {.name = "avx512", .unpack = Unpack, .decode_row = DecodeRow};

}  // namespace vqonnx
