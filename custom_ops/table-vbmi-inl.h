// Products by table lookup for AVX512-VBMI and VNNI. A table is eight registers, so a lookup reads no memory but codes.

namespace vqonnx {
namespace {

inline __m512i LoadBytes(const void* p) { return _mm512_loadu_si512(p); }

// Each lane gets the sum of its group of kWidth lanes.
template <std::size_t kWidth>
inline __m512 SumOfGroup(__m512 a) {
  if constexpr (kWidth >= 2) a = _mm512_add_ps(a, _mm512_maskz_permute_ps(0xFFFF, a, 0xB1));
  if constexpr (kWidth >= 4) a = _mm512_add_ps(a, _mm512_maskz_permute_ps(0xFFFF, a, 0x4E));
  if constexpr (kWidth >= 8) a = _mm512_add_ps(a, _mm512_maskz_shuffle_f32x4(0xFFFF, a, a, 0xB1));
  if constexpr (kWidth >= 16) a = _mm512_add_ps(a, _mm512_maskz_shuffle_f32x4(0xFFFF, a, a, 0x4E));
  return a;
}

inline float MaxLane(__m512 a) {
  a = Wide::Max(a, _mm512_maskz_shuffle_f32x4(0xFFFF, a, a, 0x4E));
  a = Wide::Max(a, _mm512_maskz_shuffle_f32x4(0xFFFF, a, a, 0xB1));
  a = Wide::Max(a, _mm512_maskz_permute_ps(0xFFFF, a, 0x4E));
  a = Wide::Max(a, _mm512_maskz_permute_ps(0xFFFF, a, 0xB1));
  return _mm512_cvtss_f32(a);
}

template <std::size_t kWidth>
Extent MeasureGroups(const float* x, std::size_t count) {
  __m512 most = _mm512_setzero_ps(), square = most, zero = most;
  for (std::size_t i = 0; i < count; i += 16) {
    const std::size_t rest = count - i;
    const __m512 value = rest >= 16 ? Wide::Load(x + i) : Wide::LoadPart(x + i, rest);
    most = Wide::Max(_mm512_maskz_range_ps(0xFFFF, value, value, 0x08 | 0x02), most);
    square = Wide::Max(SumOfGroup<kWidth>(Wide::Mul(value, value)), square);
    zero = Wide::MulAdd(value, _mm512_setzero_ps(), zero);  // NaN from the first value on that is not finite
  }
  const bool finite = _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
  return {MaxLane(most), MaxLane(square), finite};
}

Extent Measure(const float* x, std::size_t blocks, std::size_t width) {
  switch (width) {
    case 2:
      return MeasureGroups<2>(x, blocks * width);
    case 4:
      return MeasureGroups<4>(x, blocks * width);
    case 8:
      return MeasureGroups<8>(x, blocks * width);
    case 16:
      return MeasureGroups<16>(x, blocks * width);
    default:
      break;
  }
  Extent extent = MeasureGroups<2>(x, blocks * width);
  extent.square = 0.0F;
  for (std::size_t block = 0; block < blocks; ++block) {
    __m512 sum = _mm512_setzero_ps();
    for (std::size_t i = 0; i < width; i += 16) {
      const std::size_t rest = width - i < 16 ? width - i : 16;
      const __m512 value = Wide::LoadPart(x + block * width + i, rest);
      sum = Wide::MulAdd(value, value, sum);
    }
    const float its_square = MaxLane(SumOfGroup<16>(sum));
    extent.square = its_square > extent.square ? its_square : extent.square;
  }
  return extent;
}

void Quantise(const float* x, std::size_t count, float scale, std::int16_t* out) {
  const __m512 factor = Wide::Set(scale);
  for (std::size_t i = 0; i < count; i += 16) {
    const std::size_t rest = count - i;
    const __mmask16 mask = rest >= 16 ? 0xFFFF : Wide::First(rest);
    const __m512i rounded = _mm512_maskz_cvtps_epi32(0xFFFF, Wide::Mul(_mm512_maskz_loadu_ps(mask, x + i), factor));
    _mm512_mask_cvtepi32_storeu_epi16(out + i, mask, rounded);
  }
}

// sum += the dot products of pairs of 16 bits. The compiler copies the sums of the intrinsic around.
VQONNX_INLINE void AddProducts(__m512i& sum, __m512i value, const std::int16_t* words) {
#if defined(__GNUC__)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(value), "m"(*reinterpret_cast<const std::int16_t(*)[32]>(words)));
#else
  sum = _mm512_dpwssd_epi32(sum, value, LoadBytes(words));
#endif
}

// From two registers of 32-bit sums, the third byte of each and then the fourth.
struct ByteOrder {
  constexpr ByteOrder() : bytes{} {
    for (std::size_t i = 0; i < 32; ++i) {
      bytes[i] = static_cast<std::uint8_t>(4 * i + 2);
      bytes[32 + i] = static_cast<std::uint8_t>(4 * i + 3);
    }
  }
  std::uint8_t bytes[64];
};
alignas(64) constexpr ByteOrder kThirdThenFourth;

// Per block 16 multiplications a pair, and 40 instructions to sort the bytes: about 45 cycles for a width of 8.
void BuildTable(const BuildTables& b) {
  const __m512i bytes = LoadBytes(kThirdThenFourth.bytes);
  const __m512i start = _mm512_set1_epi32(static_cast<int>(0x80008000U));
  for (std::size_t block = 0; block < b.blocks; ++block) {
    const std::int16_t* x = b.x + block * b.pairs * 2;
    const std::int16_t* book = b.books[block];
    __m512i sums[16];
    VQONNX_UNROLL
    for (std::size_t i = 0; i < 16; ++i) sums[i] = start;
    for (std::size_t pair = 0; pair < b.pairs; ++pair) {
      const auto low = static_cast<std::uint16_t>(x[pair * 2]), high = static_cast<std::uint16_t>(x[pair * 2 + 1]);
      const __m512i value = _mm512_set1_epi32(static_cast<int>(low | static_cast<std::uint32_t>(high) << 16));
      VQONNX_UNROLL
      for (std::size_t i = 0; i < 16; ++i) {
        AddProducts(sums[i], value, book + (pair * kTableWords + i * 16) * 2);
      }
    }
    std::uint8_t* table = b.tables + block * kTableBytes;
    VQONNX_UNROLL
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i first = _mm512_permutex2var_epi8(sums[4 * i], bytes, sums[4 * i + 1]);
      const __m512i second = _mm512_permutex2var_epi8(sums[4 * i + 2], bytes, sums[4 * i + 3]);
      _mm512_storeu_si512(table + i * 64, _mm512_maskz_shuffle_i64x2(0xFF, first, second, 0x44));
      _mm512_storeu_si512(table + kTableWords + i * 64, _mm512_maskz_shuffle_i64x2(0xFF, first, second, 0xEE));
    }
  }
}

// Bytes are added up in 16-bit lanes. A lane of `both` holds sum(even) + 256 * sum(odd) modulo 2^16, one of `odd` the
// sum of the odd bytes; neither sum overflows within kTableBlocks blocks.
struct ByteSums {
  __m512i both, odd;
  __m512i Even() const { return _mm512_sub_epi16(both, _mm512_slli_epi16(odd, 8)); }
};

// The low or the high bytes of a table: of words 0 to 63, 64 to 127 and so on.
struct Bytes {
  __m512i a, b, c, d;
};

// Looks up 64 codes and adds what they yield. With intrinsics the compiler runs out of registers, and takes the form of
// the permutation that overwrites the table: 4.9 instead of 4.2 cycles.
VQONNX_INLINE void AddLookups(const std::uint8_t* codes, const Bytes& low, const Bytes& high, ByteSums& lows,
                              ByteSums& highs) {
#if defined(__GNUC__)
  __m512i code, yield, other;
  __mmask64 upper;
  __asm__(
      "vmovdqu64 %[codes], %[code]\n\t"
      "vpmovb2m %[code], %[upper]\n\t"
      "vmovdqa64 %[code], %[yield]\n\t"
      "vmovdqa64 %[code], %[other]\n\t"
      "vpermi2b %[lb], %[la], %[yield]\n\t"
      "vpermi2b %[ld], %[lc], %[other]\n\t"
      "vmovdqu8 %[other], %[yield]%{%[upper]%}\n\t"
      "vmovdqa64 %[code], %[other]\n\t"
      "vpaddw %[yield], %[low_both], %[low_both]\n\t"
      "vpsrlw $8, %[yield], %[yield]\n\t"
      "vpaddw %[yield], %[low_odd], %[low_odd]\n\t"
      "vpermi2b %[hb], %[ha], %[other]\n\t"
      "vpermi2b %[hd], %[hc], %[code]\n\t"
      "vmovdqu8 %[code], %[other]%{%[upper]%}\n\t"
      "vpaddw %[other], %[high_both], %[high_both]\n\t"
      "vpsrlw $8, %[other], %[other]\n\t"
      "vpaddw %[other], %[high_odd], %[high_odd]\n\t"
      : [low_both] "+&v"(lows.both), [low_odd] "+&v"(lows.odd), [high_both] "+&v"(highs.both),
        [high_odd] "+&v"(highs.odd), [code] "=&v"(code), [yield] "=&v"(yield), [other] "=&v"(other),
        [upper] "=&Yk"(upper)
      : [codes] "m"(*reinterpret_cast<const std::uint8_t(*)[64]>(codes)), [la] "v"(low.a), [lb] "v"(low.b),
        [lc] "v"(low.c), [ld] "v"(low.d), [ha] "v"(high.a), [hb] "v"(high.b), [hc] "v"(high.c), [hd] "v"(high.d));
#else
  const __m512i code = LoadBytes(codes);
  const __mmask64 upper = _mm512_movepi8_mask(code);
  const __m512i yield_low = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low.a, code, low.b),
                                                   _mm512_permutex2var_epi8(low.c, code, low.d));
  const __m512i yield_high = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high.a, code, high.b),
                                                    _mm512_permutex2var_epi8(high.c, code, high.d));
  lows.both = _mm512_add_epi16(lows.both, yield_low);
  lows.odd = _mm512_add_epi16(lows.odd, _mm512_srli_epi16(yield_low, 8));
  highs.both = _mm512_add_epi16(highs.both, yield_high);
  highs.odd = _mm512_add_epi16(highs.odd, _mm512_srli_epi16(yield_high, 8));
#endif
}

// The eight codes of an octet are in kBits lines, each at the same place in all octets.
template <std::size_t kBits>
void UnpackOctetsOfRows(const std::uint8_t* lines, std::size_t left, std::size_t count, std::uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1U << kBits) - 1));
  for (std::size_t done = 0; done < count; done += kOctet, lines += kBits * kSetRows) {
    __m512i line[kBits];
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kBits; ++i) {
      line[i] = i < left ? LoadBytes(lines + i * kSetRows) : _mm512_setzero_si512();
    }
    left -= left < kBits ? left : kBits;
    VQONNX_UNROLL
    for (std::size_t j = 0; j < kOctet; ++j) {
      if (done + j >= count) return;
      // Shifts are those of pairs of bytes; what comes from the other byte of a pair is masked.
      const std::size_t start = j * kBits, shift = start % 8;
      const __m512i low = _mm512_maskz_srlv_epi16(~__mmask32{0}, line[start / 8], _mm512_set1_epi16(short(shift)));
      __m512i code = low;
      if (shift + kBits > 8) {
        const __m512i next = line[start / 8 + 1], part = _mm512_set1_epi8(static_cast<char>(255U >> shift));
        const __m512i high = _mm512_maskz_sllv_epi16(~__mmask32{0}, next, _mm512_set1_epi16(short(8 - shift)));
        code = _mm512_ternarylogic_epi32(part, low, high, 0xCA);  // of the one where there is a part, else of the other
      }
      _mm512_storeu_si512(out + (done + j) * kSetRows, _mm512_and_si512(code, mask));
    }
  }
}

void UnpackSetOfRows(const std::uint8_t* strip, std::size_t row_bytes, std::size_t bits, std::size_t group,
                     std::size_t count, std::uint8_t* out) {
  const std::size_t first = group / kOctet * bits;
  const std::uint8_t* lines = strip + first * kSetRows;
  switch (bits) {
    case 1:
      return UnpackOctetsOfRows<1>(lines, row_bytes - first, count, out);
    case 2:
      return UnpackOctetsOfRows<2>(lines, row_bytes - first, count, out);
    case 3:
      return UnpackOctetsOfRows<3>(lines, row_bytes - first, count, out);
    case 4:
      return UnpackOctetsOfRows<4>(lines, row_bytes - first, count, out);
    case 5:
      return UnpackOctetsOfRows<5>(lines, row_bytes - first, count, out);
    case 6:
      return UnpackOctetsOfRows<6>(lines, row_bytes - first, count, out);
    default:
      return UnpackOctetsOfRows<7>(lines, row_bytes - first, count, out);
  }
}

void SortRows(float* sums, std::size_t sets) {
  for (std::size_t set = 0; set < sets; ++set, sums += kSetRows) {
    __m512i v[4];
    VQONNX_UNROLL
    for (std::size_t j = 0; j < 4; ++j) v[j] = LoadBytes(sums + 16 * j);
    const __m512i a = _mm512_maskz_unpacklo_epi32(0xFFFF, v[0], v[2]),
                  b = _mm512_maskz_unpackhi_epi32(0xFFFF, v[0], v[2]);
    const __m512i c = _mm512_maskz_unpacklo_epi32(0xFFFF, v[1], v[3]),
                  d = _mm512_maskz_unpackhi_epi32(0xFFFF, v[1], v[3]);
    // Each lane of 128 bits now has four neighbouring rows of its 16.
    const __m512i ab_low = _mm512_maskz_shuffle_i64x2(0xFF, a, b, 0x44),
                  ab_high = _mm512_maskz_shuffle_i64x2(0xFF, a, b, 0xEE);
    const __m512i cd_low = _mm512_maskz_shuffle_i64x2(0xFF, c, d, 0x44),
                  cd_high = _mm512_maskz_shuffle_i64x2(0xFF, c, d, 0xEE);
    _mm512_storeu_si512(sums, _mm512_maskz_shuffle_i64x2(0xFF, ab_low, cd_low, 0x88));
    _mm512_storeu_si512(sums + 16, _mm512_maskz_shuffle_i64x2(0xFF, ab_low, cd_low, 0xDD));
    _mm512_storeu_si512(sums + 32, _mm512_maskz_shuffle_i64x2(0xFF, ab_high, cd_high, 0x88));
    _mm512_storeu_si512(sums + 48, _mm512_maskz_shuffle_i64x2(0xFF, ab_high, cd_high, 0xDD));
  }
}

template <std::size_t kSets, bool kStrips>
void SumSets(const SumTables& s) {
  constexpr std::size_t kAhead = 8192;  // bytes of codes that are fetched early: they may come from memory
  ByteSums lows[kSets], highs[kSets];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kSets; ++i) lows[i] = highs[i] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  constexpr std::size_t kStep = kStrips ? 0 : kSets * kSetRows;
  const std::uint8_t* codes = s.codes;
  const std::uint8_t* table = s.tables;
  const std::uint8_t *strips[kSets], *ahead[kSets];
  for (std::size_t i = 0; kStrips && i < kSets; ++i) {
    strips[i] = s.strips[i];
    ahead[i] = s.next[i];
  }
  for (std::size_t block = 0; block < s.blocks; ++block, codes += kStep, table += kTableBytes) {
    const Bytes low = {LoadBytes(table), LoadBytes(table + 64), LoadBytes(table + 128), LoadBytes(table + 192)};
    const Bytes high = {LoadBytes(table + 256), LoadBytes(table + 320), LoadBytes(table + 384), LoadBytes(table + 448)};
    VQONNX_UNROLL
    for (std::size_t i = 0; i < kSets; ++i) {
      const std::uint8_t* its = kStrips ? strips[i] + block * kSetRows : codes + i * kSetRows;
      if (kStrips) {
        // To the second cache: strips are often a multiple of 4 KB apart, and then all of a block compete for the same
        // places in the nearest one, which also cannot wait for as many lines at once.
        _mm_prefetch(reinterpret_cast<const char*>(ahead[i] + block * kSetRows), _MM_HINT_T1);
      } else {
        _mm_prefetch(reinterpret_cast<const char*>(its + kAhead), _MM_HINT_T0);
      }
      AddLookups(its, low, high, lows[i], highs[i]);
    }
  }
  const __m512i weights = _mm512_set1_epi32(1 | 256 << 16);
  const __m512i start = _mm512_set1_epi32(-32768 * static_cast<int>(s.blocks));
  const __m512 factor = Wide::Set(s.factor);
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kSets; ++i) {
    const __m512i even_low = lows[i].Even(), even_high = highs[i].Even();
    const __m512i pairs[4] = {_mm512_unpacklo_epi16(even_low, even_high), _mm512_unpackhi_epi16(even_low, even_high),
                              _mm512_unpacklo_epi16(lows[i].odd, highs[i].odd),
                              _mm512_unpackhi_epi16(lows[i].odd, highs[i].odd)};
    float* sums = s.sums[i];
    VQONNX_UNROLL
    for (std::size_t j = 0; j < 4; ++j) {
      const __m512 sum = _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_dpwssd_epi32(start, pairs[j], weights));
      Wide::Store(sums + 16 * j, s.add ? Wide::MulAdd(sum, factor, Wide::Load(sums + 16 * j)) : Wide::Mul(sum, factor));
    }
  }
}

template <bool kStrips>
void SumSetsOf(const SumTables& s) {
  switch (s.sets) {
    case 1:
      return SumSets<1, kStrips>(s);
    case 2:
      return SumSets<2, kStrips>(s);
    case 3:
      return SumSets<3, kStrips>(s);
    default:
      return SumSets<4, kStrips>(s);
  }
}

void SumTable(const SumTables& s) { s.strips != nullptr ? SumSetsOf<true>(s) : SumSetsOf<false>(s); }

}  // namespace
}  // namespace vqonnx
