// Decoding of scalar codes for AVX512-VBMI: a codebook of up to 256 floats is held in registers as four planes of
// bytes, 64 codes are looked up at once in each, and the bytes are put together again. Needs the vocabulary of
// avx512-inl.h.

namespace vqonnx {
namespace {

// Rows of bytes in the order that makes what unpacking yields come out in the order of the codes: 128-bit lane l of
// register r gets codes 16 * r + 4 * l and the three after it.
struct LaneOrder {
  constexpr LaneOrder() : bytes{} {
    for (std::size_t code = 0; code < 64; ++code) {
      const std::size_t part = code / 16, lane = code % 16 / 4;
      bytes[16 * lane + 4 * part + code % 4] = static_cast<std::uint8_t>(code);
    }
  }
  std::uint8_t bytes[64];
};
alignas(64) constexpr LaneOrder kLaneOrder;

// Where the windows of eight octets of codes start: eight bytes from byte `bits * octet` on.
inline __m512i WindowBytes(std::size_t bits) {
  const __m512i octet = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i start =
      _mm512_mullo_epi64(octet, _mm512_set1_epi64(static_cast<long long>(bits * 0x0101010101010101ULL)));
  return _mm512_add_epi8(start, _mm512_set1_epi64(0x0706050403020100LL));
}

// 64 codes of up to 8 bits from a bit string of which `bytes` bytes may be read; zeros beyond them.
inline __m512i Unpack64(const std::uint8_t* packed, std::size_t bytes, __m512i windows, __m512i shifts, __m512i mask) {
  const __mmask64 readable = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
  const __m512i all = _mm512_maskz_loadu_epi8(readable, packed);
  const __m512i spread = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, windows, all);
  return _mm512_and_si512(_mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, shifts, spread), mask);
}

// Every fourth byte of two registers, in the lower half and in the upper half of what is looked up with it.
struct FourthOrder {
  constexpr FourthOrder() : bytes{} {
    for (std::size_t i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(4 * (i % 32));
  }
  std::uint8_t bytes[64];
};
alignas(64) constexpr FourthOrder kFourthOrder;

// The bytes of up to 64 words, as four planes.
inline void LoadPlanes(const float* words, std::size_t count, __m512i (&planes)[4]) {
  __m512i part[4];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    const std::size_t left = count < 16 * i ? 0 : count - 16 * i;
    part[i] = _mm512_maskz_loadu_epi32(left >= 16 ? 0xFFFF : Wide::First(left), words + 16 * i);
  }
  VQONNX_UNROLL
  for (std::size_t i = 0; i < 4; ++i) {
    const __m512i order =
        _mm512_add_epi8(_mm512_load_si512(kFourthOrder.bytes), _mm512_set1_epi8(static_cast<char>(i)));
    planes[i] = _mm512_maskz_shuffle_i64x2(0xFF, _mm512_permutex2var_epi8(part[0], order, part[1]),
                                           _mm512_permutex2var_epi8(part[2], order, part[3]), 0x44);
  }
}

template <std::size_t kQuarters>  // of 64 words
struct Plane {
  __m512i part[kQuarters];
  __m512i At(__m512i codes, __mmask64 upper) const {
    if constexpr (kQuarters == 1) {
      return _mm512_maskz_permutexvar_epi8(~__mmask64{0}, codes, part[0]);
    } else if constexpr (kQuarters == 2) {
      return _mm512_permutex2var_epi8(part[0], codes, part[1]);
    } else {
      return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part[0], codes, part[1]),
                                    _mm512_permutex2var_epi8(part[2], codes, part[3]));
    }
  }
};

constexpr std::size_t kAhead = 2048;  // bytes

template <std::size_t kQuarters>
void DecodeScalarCodesOf(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                         const float* scales, float* out, std::size_t stride) {
  Plane<kQuarters> planes[4];
  VQONNX_UNROLL
  for (std::size_t i = 0; i < kQuarters; ++i) {
    const std::size_t left = m.words < 64 * i ? 0 : m.words - 64 * i;
    __m512i bytes[4];
    LoadPlanes(m.codebooks + 64 * i, left, bytes);
    VQONNX_UNROLL
    for (std::size_t j = 0; j < 4; ++j) planes[j].part[i] = bytes[j];
  }
  const long long b = static_cast<long long>(m.bits);
  const __m512i windows = WindowBytes(m.bits), mask = _mm512_set1_epi8(static_cast<char>((1U << m.bits) - 1));
  const __m512i shifts = _mm512_set1_epi64(b << 8 | (2 * b) << 16 | (3 * b) << 24 | (4 * b) << 32 | (5 * b) << 40 |
                                           (6 * b) << 48 | (7 * b) << 56);
  const __m512i order = _mm512_load_si512(kLaneOrder.bytes);
  // The codes of a later row, of which usually the same part is wanted: they may come from memory.
  const std::size_t ahead = (kAhead / m.row_bytes + 1) * m.row_bytes;
  for (std::size_t r = 0; r < rows; ++r, out += stride) {
    const std::uint8_t* packed = RowByte(m, 0, row + r, group * m.bits / 8);
    std::size_t bytes = m.row_bytes - group * m.bits / 8;
    const __m512 factor = Wide::Set(scales[r]);
    for (std::size_t col = 0; col < cols;
         col += 64, packed += 8 * m.bits, bytes -= bytes < 8 * m.bits ? bytes : 8 * m.bits) {
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead), _MM_HINT_T0);
      const __m512i codes =
          _mm512_maskz_permutexvar_epi8(~__mmask64{0}, order, Unpack64(packed, bytes, windows, shifts, mask));
      const __mmask64 upper = _mm512_movepi8_mask(codes);
      const __m512i p0 = planes[0].At(codes, upper), p1 = planes[1].At(codes, upper);
      const __m512i p2 = planes[2].At(codes, upper), p3 = planes[3].At(codes, upper);
      const __m512i low_even = _mm512_unpacklo_epi8(p0, p1), low_odd = _mm512_unpackhi_epi8(p0, p1);
      const __m512i high_even = _mm512_unpacklo_epi8(p2, p3), high_odd = _mm512_unpackhi_epi8(p2, p3);
      const __m512i values[4] = {_mm512_unpacklo_epi16(low_even, high_even), _mm512_unpackhi_epi16(low_even, high_even),
                                 _mm512_unpacklo_epi16(low_odd, high_odd), _mm512_unpackhi_epi16(low_odd, high_odd)};
      VQONNX_UNROLL
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t at = col + 16 * i;
        if (at >= cols) break;
        const __m512 value = Wide::Mul(_mm512_castsi512_ps(values[i]), factor);
        if (cols - at >= 16) {
          Wide::Store(out + at, value);
        } else {
          Wide::StorePart(out + at, cols - at, value);
        }
      }
    }
  }
}

// The hook of kernels-inl.h.
bool DecodeScalarCodes(const Coded& m, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                       const float* scales, float* out, std::size_t stride) {
  if (m.width != 1 || m.books != 1 || m.stages != 1 || m.bits > 8) return false;
  if (m.words <= 64) {
    DecodeScalarCodesOf<1>(m, row, rows, group, cols, scales, out, stride);
  } else if (m.words <= 128) {
    DecodeScalarCodesOf<2>(m, row, rows, group, cols, scales, out, stride);
  } else {
    DecodeScalarCodesOf<4>(m, row, rows, group, cols, scales, out, stride);
  }
  return true;
}

}  // namespace
}  // namespace vqonnx
