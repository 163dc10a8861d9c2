// Eight bytes at a time, for all instruction sets of x86. Part of the vocabulary of kernels-inl.h.
// No include guard and no standard library on purpose: see docs/kernels.md.
#include <immintrin.h>

namespace vqonnx {
namespace {

inline std::uint64_t LoadEight(const std::uint8_t* p) {
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

VQONNX_INLINE void TurnEight(const std::uint64_t (&rows)[8], std::uint8_t* out, std::size_t stride) {
  __m128i pairs[4], quads[4];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    pairs[i] = _mm_unpacklo_epi8(_mm_cvtsi64_si128(static_cast<long long>(rows[2 * i])),
                                 _mm_cvtsi64_si128(static_cast<long long>(rows[2 * i + 1])));
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 2; ++i) {
    quads[i] = _mm_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1]);
    quads[2 + i] = _mm_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    const __m128i low = quads[i / 2 * 2], high = quads[i / 2 * 2 + 1];
    const __m128i two = i % 2 == 0 ? _mm_unpacklo_epi32(low, high) : _mm_unpackhi_epi32(low, high);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 2 * i * stride), two);
    _mm_storeh_pd(reinterpret_cast<double*>(out + (2 * i + 1) * stride), _mm_castsi128_pd(two));
  }
}

}  // namespace
}  // namespace vqonnx
