// Tables of entries in 16 bits for AVX512-VNNI: x is rounded like the words, and pairs of both are multiplied at once.

namespace vqonnx {
namespace {

// sum += the dot products of pairs of 16 bits with the same pair. The compiler copies the sums of the intrinsic around.
VQONNX_INLINE void AddPair(__m512i& sum, __m512i value, const std::int16_t* pair) {
#if defined(__GNUC__)
  __asm__("vpdpwssd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(value), "m"(*reinterpret_cast<const std::int16_t(*)[2]>(pair)));
#else
  sum = _mm512_dpwssd_epi32(sum, value, _mm512_set1_epi32(*reinterpret_cast<const int*>(pair)));
#endif
}

// The upper halves of two registers of 32-bit sums.
struct UpperHalves {
  constexpr UpperHalves() : places{} {
    for (std::size_t i = 0; i < 32; ++i) places[i] = static_cast<std::uint16_t>(2 * i + 1);
  }
  std::uint16_t places[32];
};
alignas(64) constexpr UpperHalves kUpperHalves;

// A table, of x as pairs of integers such that a unit of the sums' upper halves is one of the entries.
template <std::size_t kPairs>
void BuildTableByPairs(const __m512i* x, const std::int16_t* words, std::size_t count, std::size_t pairs,
                       std::int16_t* entries) {
  constexpr std::size_t kAtOnce = 4;
  const __m512i half = _mm512_set1_epi32(0x8000), places = LoadBytes(kUpperHalves.places);
  const std::size_t step = 2 * (kPairs > 0 ? kPairs : pairs);
  __m512i value[kPairs + 1];
  VQONNX_UNROLL
  for (std::size_t p = 0; p < kPairs; ++p) value[p] = x[p];
  for (std::size_t word = 0; word < count; word += kAtOnce, words += kAtOnce * step) {
    __m512i first = half, second = half, third = half, fourth = half;
    const auto add = [&](__m512i pair_of_x, const std::int16_t* pair) {
      AddPair(first, pair_of_x, pair);
      AddPair(second, pair_of_x, pair + step);
      AddPair(third, pair_of_x, pair + 2 * step);
      AddPair(fourth, pair_of_x, pair + 3 * step);
    };
    if constexpr (kPairs > 0) {
      VQONNX_UNROLL
      for (std::size_t p = 0; p < kPairs; ++p) add(value[p], words + 2 * p);
    } else {
      for (std::size_t p = 0; p < pairs; ++p) add(x[p], words + 2 * p);
    }
    std::int16_t* to = entries + word * Shorts::kLanes;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, places, second));
    _mm512_storeu_si512(to + 2 * Shorts::kLanes, _mm512_permutex2var_epi16(third, places, fourth));
  }
}

void BuildShortsByPairs(const BuildEntries& b) {
  const auto [least, most] = UnitsOf(b, 0);
  // An entry is the product of integers, divided by 2^16.
  const __m512 units = Wide::Max(least, Wide::Mul(most, Wide::Set(2.001F / b.word_scale)));
  Wide::Store(b.units, units);
  const __m512 factor = Wide::Div(Wide::Set(65536.0F / b.word_scale), units);
  const std::size_t pairs = (b.width + 1) / 2;
  for (std::size_t t = 0; t < b.tables; ++t) {
    const BookAndBlock block = BlockOf(b, t);
    const auto rounded = [&](std::size_t k) {
      if (k >= block.cols) return _mm512_setzero_si512();
      return _mm512_maskz_cvtps_epi32(0xFFFF, Wide::Mul(Wide::Load(block.x + k * block.x_stride), factor));
    };
    __m512i x[kMostShortWidth / 2];
    for (std::size_t p = 0; p < pairs; ++p) {
      x[p] =
          _mm512_mask_blend_epi16(0xAAAAAAAA, rounded(2 * p), _mm512_maskz_slli_epi32(0xFFFF, rounded(2 * p + 1), 16));
    }
    std::int16_t* entries = b.shorts + t * kTableWords * Shorts::kLanes;
    switch (pairs) {
      case 1:
        BuildTableByPairs<1>(x, b.short_books[t], b.words, pairs, entries);
        break;
      case 2:
        BuildTableByPairs<2>(x, b.short_books[t], b.words, pairs, entries);
        break;
      case 4:
        BuildTableByPairs<4>(x, b.short_books[t], b.words, pairs, entries);
        break;
      default:
        BuildTableByPairs<0>(x, b.short_books[t], b.words, pairs, entries);
    }
  }
}

void BuildEntryByPairs(const BuildEntries& b) {
  if (b.entries == nullptr && b.short_books != nullptr) return BuildShortsByPairs(b);
  BuildEntry(b);
}

}  // namespace
}  // namespace vqonnx
