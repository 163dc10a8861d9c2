// The kernels for NEON, which every 64-bit ARM has. Everything is in unnamed namespaces except the table:
// see docs/kernels.md.
#include <arm_neon.h>

#include "kernels.h"

namespace vqonnx {
namespace {

struct Wide {
  static constexpr std::size_t kLanes = 4;
  static float32x4_t Load(const float* p) { return vld1q_f32(p); }
  static void Store(float* p, float32x4_t a) { vst1q_f32(p, a); }
  static float32x4_t Add(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
  static float32x4_t Mul(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
  static float32x4_t Set(float a) { return vdupq_n_f32(a); }
  static float32x4_t MulAdd(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
  // Not vmaxq and vminq, which tell the zeros apart.
  static float32x4_t Max(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static float32x4_t Min(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static float32x4_t Div(float32x4_t a, float32x4_t b) { return vdivq_f32(a, b); }
  static float32x4_t Sqrt(float32x4_t a) { return vsqrtq_f32(a); }
  static float32x4_t ToExponent(float32x4_t a) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a), 23));
  }
  static float32x4_t LoadPart(const float* p, std::size_t n) {
    float lanes[kLanes] = {};
    for (std::size_t i = 0; i < n; ++i) lanes[i] = p[i];
    return Load(lanes);
  }
  static void StorePart(float* p, std::size_t n, float32x4_t a) {
    float lanes[kLanes];
    Store(lanes, a);
    for (std::size_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  struct Range {
    std::size_t begin, end;
  };
  static Range RangeOf(std::size_t begin, std::size_t end) { return {begin, end}; }
  static float32x4_t LoadRange(const float* p, Range range) { return LoadRangeOr(p, range, Set(0.0F)); }
  static float32x4_t LoadRangeOr(const float* p, Range range, float32x4_t other) {
    if (range.begin == 0 && range.end == kLanes) return Load(p);
    float lanes[kLanes];
    Store(lanes, other);
    for (std::size_t i = range.begin; i < range.end; ++i) lanes[i] = p[i];
    return Load(lanes);
  }
  static void SplitPairs(float32x4_t a, float32x4_t b, float32x4_t* even, float32x4_t* odd) {
    *even = vuzp1q_f32(a, b);
    *odd = vuzp2q_f32(a, b);
  }
};
using Middle = Wide;
using Narrow = Wide;

struct Shorts {
  static constexpr std::size_t kLanes = 8;
  static int16x8_t Load(const std::int16_t* p) { return vld1q_s16(p); }
  static int16x8_t Add(int16x8_t a, int16x8_t b) { return vaddq_s16(a, b); }
  template <std::size_t kPart>
  static float32x4_t Floats(int16x8_t a) {
    return vcvtq_f32_s32(vmovl_s16(kPart == 0 ? vget_low_s16(a) : vget_high_s16(a)));
  }
  template <std::size_t kPart>
  static float32x4_t FloatsOfSum(int16x8_t a, int16x8_t b) {
    return vcvtq_f32_s32(kPart == 0 ? vaddl_s16(vget_low_s16(a), vget_low_s16(b))
                                    : vaddl_s16(vget_high_s16(a), vget_high_s16(b)));
  }
  static void StoreNearest(std::int16_t* p, const float32x4_t* parts) {
    const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(parts[0])), high = vqmovn_s32(vcvtnq_s32_f32(parts[1]));
    vst1q_s16(p, vcombine_s16(low, high));
  }
};

inline std::uint64_t LoadEight(const std::uint8_t* p) { return vget_lane_u64(vreinterpret_u64_u8(vld1_u8(p)), 0); }

inline void TurnEight(const std::uint64_t (&rows)[8], std::uint8_t* out, std::size_t stride) {
  const auto pair = [&](std::size_t i) {  // bytes of two rows in turn
    const uint8x8x2_t both = vzip_u8(vcreate_u8(rows[i]), vcreate_u8(rows[i + 1]));
    return vreinterpretq_u16_u8(vcombine_u8(both.val[0], both.val[1]));
  };
  const uint16x8x2_t low = vzipq_u16(pair(0), pair(2)), high = vzipq_u16(pair(4), pair(6));
  for (std::size_t i = 0; i < 2; ++i) {
    const uint32x4x2_t all = vzipq_u32(vreinterpretq_u32_u16(low.val[i]), vreinterpretq_u32_u16(high.val[i]));
    for (std::size_t j = 0; j < 2; ++j) {
      const uint8x16_t two = vreinterpretq_u8_u32(all.val[j]);
      vst1_u8(out + (4 * i + 2 * j) * stride, vget_low_u8(two));
      vst1_u8(out + (4 * i + 2 * j + 1) * stride, vget_high_u8(two));
    }
  }
}

inline void UnpackOctet(std::uint64_t window, std::size_t bits, std::uint8_t* out) {
  const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
  for (std::size_t i = 0; i < kOctet; ++i) out[i] = static_cast<std::uint8_t>(window >> (i * bits) & mask);
}

constexpr std::size_t kTileVectors = 4, kTileCount = 6;  // 24 of 32 registers hold sums

// Two squares of four rows.
template <class Row>
VQONNX_INLINE void LoadTurned(Row row, float32x4_t* out) {
  VQONNX_UNROLL
  for (std::size_t half = 0; half < 2; ++half) {
    const float32x4_t a = vld1q_f32(row(0) + 4 * half), b = vld1q_f32(row(1) + 4 * half);
    const float32x4_t c = vld1q_f32(row(2) + 4 * half), d = vld1q_f32(row(3) + 4 * half);
    const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                      ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                      cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    out[4 * half] = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
    out[4 * half + 1] = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
    out[4 * half + 2] = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
    out[4 * half + 3] = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
  }
}

// Sixteen words are four registers of bytes.
struct WordTable {
  static constexpr std::size_t kWords = 16;
  explicit WordTable(const float* words) {
    for (int i = 0; i < 4; ++i) bytes_.val[i] = vreinterpretq_u8_f32(vld1q_f32(words + 4 * i));
  }
  float32x4_t At(const std::uint8_t* codes) const {
    const std::uint32_t four = static_cast<std::uint32_t>(codes[0]) | static_cast<std::uint32_t>(codes[1]) << 8 |
                               static_cast<std::uint32_t>(codes[2]) << 16 | static_cast<std::uint32_t>(codes[3]) << 24;
    const uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(four));
    const uint8x16_t spread = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t within = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8x16_t places = vaddq_u8(vshlq_n_u8(vqtbl1q_u8(all, spread), 2), within);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes_, places));
  }
  uint8x16x4_t bytes_;
};

struct ProductTable : WordTable {
  using WordTable::WordTable;
  static uint32x4_t FromFloats(float32x4_t a) { return vreinterpretq_u32_f32(a); }
  static float32x4_t FourBytes(const std::uint8_t* p, std::size_t step) {
    const auto load = [&](std::size_t i) {  // four bytes, and four zeros
      const std::uint8_t* from = p + i * step;
      const std::uint64_t low = from[0] | std::uint64_t{from[1]} << 8 | std::uint64_t{from[2]} << 16;
      return vcreate_u8(low | std::uint64_t{from[3]} << 24);
    };
    const uint8x8_t even = vzip1_u8(load(0), load(2)), odd = vzip1_u8(load(1), load(3));
    return vreinterpretq_f32_u8(vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)));
  }
  template <int kBits>
  static uint32x4_t Next(uint32x4_t codes) {
    return vshrq_n_u32(codes, kBits);
  }
  float32x4_t Look(uint32x4_t codes) const {  // the four bytes of word w are bytes 4 * w to 4 * w + 3
    const uint32x4_t word = vandq_u32(codes, vdupq_n_u32(15));
    const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), word, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes_, vreinterpretq_u8_u32(places)));
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

const Kernels kNeon = {.name = "neon",
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
