// Plain views of stored arrays, and the table of kernels that each instruction set fills.
//
// Included by the per-instruction-set files, so nothing here may have inline code: the linker could keep a copy of it
// that needs a newer processor than the one it runs on.
#ifndef VQONNX_KERNELS_H_
#define VQONNX_KERNELS_H_

#include <cstddef>
#include <cstdint>

// In front of loops over registers, which must not be loops, and of functions that take or return many registers.
// VQONNX_FETCH brings a cache line near that is needed soon, VQONNX_FETCH_LATER less near one that is needed later, if
// there are such lines.
#if defined(__GNUC__)
#define VQONNX_UNROLL _Pragma("GCC unroll 32")
#define VQONNX_INLINE inline __attribute__((always_inline))
#define VQONNX_FETCH(p) __builtin_prefetch(p)
#define VQONNX_FETCH_LATER(p) __builtin_prefetch(p, 0, 2)
#else
#define VQONNX_UNROLL
#define VQONNX_INLINE __forceinline
#define VQONNX_FETCH(p) ((void)0)
#define VQONNX_FETCH_LATER(p) ((void)0)
#endif

namespace vqonnx {

// Floats after the last codeword that a kernel may read (never use), so that it can load whole vectors.
constexpr std::size_t kPad = 32;

// Codes of one row come in octets: eight codes of b bits are exactly b bytes.
constexpr std::size_t kOctet = 8;

// The longest code.
constexpr std::size_t kMaxBits = 16;

// Rows of a strip.
constexpr std::size_t kStripRows = 64;

// A coded matrix; the words are those of docs/format.md. Sizes and codes have been checked by whoever made the view.
struct Coded {
  const std::uint8_t* codes;  // [stages, rows, row_bytes], or in strips [stages, rows / lanes, row_bytes, lanes]
  const float* codebooks;     // [stages, books, words, width], then kPad floats of anything
  std::size_t stages, rows, row_bytes, bits;
  std::size_t books, words, width;
  std::size_t lanes;  // how far the bytes of a row are apart: 1, or kStripRows in strips
};

// What becomes of a value at last: not below `low` and not above `high`; or, with `silu`, value * sigmoid(value), and
// these two are ignored. A NaN stays one.
struct Activation {
  float low, high;
  bool silu;
};

// What follows a product: + bias, + addend, then the activation.
struct Finish {
  const float* sums;  // [count] rows, `pitch` apart
  std::size_t pitch;
  std::size_t count;
  std::size_t lanes;    // how many are wanted of each row
  float* out;           // value [i][j] goes to out[i * stride + j], or to out[j * stride + i]
  const float* addend;  // like `out`, or null
  std::size_t stride;
  const float* scales;  // one for each i, or for each j; or null
  const float* bias;    // the same
  Activation activation;
};

// Part of a product of matrices: `count` times `Kernels::tile_lanes` sums over `depth` columns.
struct Tile {
  const float* vectors;    // of each column tile_lanes values, which all sums of a row of the tile take
  const float* scalars;    // of each column `count` values
  const std::int32_t* at;  // of each column, where its vectors or scalars are
  std::size_t depth;
  std::size_t count;  // 1 to Kernels::tile_count
  float* sums;        // [count][tile_lanes]
  bool add;           // to what `sums` holds
  // Of each column, where its vectors are; null: one after the other. Only for tile_windows.
  const std::int32_t* from = nullptr;
  // How many of its lanes are wanted. Only for tile_positions, which may write the others or not.
  std::size_t lanes = 0;
  // What follows the product; null: nothing, sums[i] are the sums. Only for tile_positions, without scales and silu,
  // and with at most tile_lanes lanes: then `sums` is not written, and finish->sums not read.
  const Finish* finish = nullptr;
};

// The distance of the rows of scalars in Kernels::tile_positions, in floats; they are at most kTileDepth long.
constexpr std::size_t kTileDepth = 512;
constexpr std::size_t kTilePitch = kTileDepth + 16;

// Some channels of one image, and what is made of each of them, window by window. Windows reach `pad_rows` and
// `pad_cols` before the image.
struct Windows {
  const float* x;  // [channels][image_rows][image_cols]
  std::size_t channels, image_rows, image_cols;
  std::size_t kernel_rows, kernel_cols, stride_rows, stride_cols, dilation_rows, dilation_cols, pad_rows, pad_cols;
  float* out;  // [channels][out_rows][out_cols]
  std::size_t out_rows, out_cols;
};

// Depthwise convolutions: channel c of `out` is
//   bias[c] + taps of channel c times channel c of x, + addend, then the activation
// Outside of the image there are zeros.
struct Depthwise {
  Windows windows;
  const float* taps;    // [channels][kernel_rows][kernel_cols]
  const float* bias;    // [channels]
  const float* addend;  // like `out`, or null
  Activation activation;
};

// Products by table lookup. x is rounded to int16 in blocks of `pairs` pairs, like the words of the codebooks. A table
// holds, for one block of x, what it yields with each of 256 words: (dot product + 2^31 + 2^15) / 2^16 as 16 bits, the
// 256 low bytes before the 256 high bytes. Rows of the weight come in sets of kSetRows, whose codes stand in the order
// of `SetPlace`.
constexpr std::size_t kTableWords = 256;
constexpr std::size_t kTableBytes = 2 * kTableWords;
constexpr std::size_t kTableBlocks = 64;  // most blocks whose tables are summed at once: 32 KB of tables
constexpr std::size_t kSetRows = kStripRows;
constexpr std::size_t kMostSets = 4;  // that are summed at once

// Where among the 64 codes of a set the code of row `row` stands: lookups yield bytes, and this order brings the bytes
// of a sum together, in the order of rows, when they are widened.
constexpr std::size_t SetPlace(std::size_t row) {
  return 2 * (row % 16 / 4 * 8 + row / 16 % 2 * 4 + row % 4) + row / 32;
}

// Where among the 64 sums of a set that of row `row` stands if its codes are in a strip, until Kernels::sort_rows.
constexpr std::size_t StripPlace(std::size_t row) {
  return row % 2 * 32 + row % 16 / 8 * 16 + row / 16 * 4 + row % 8 / 2;
}

struct BuildTables {
  const std::int16_t* x;             // [blocks][pairs][2]
  const std::int16_t* const* books;  // for each block [pairs][kTableWords][2]
  std::size_t blocks, pairs;
  std::uint8_t* tables;  // [blocks][kTableBytes]
};

struct SumTables {
  const std::uint8_t* codes;  // [blocks][sets][kSetRows]
  // If not null, instead: for each set [blocks][kSetRows] in the order of rows, and as much that will be wanted next.
  const std::uint8_t* const* strips;
  const std::uint8_t* const* next;
  const std::uint8_t* tables;
  std::size_t blocks;  // at most kTableBlocks
  std::size_t sets;    // 1 to kMostSets
  float factor;        // what one unit of the tables is worth
  float* const* sums;  // for each set kSetRows values, of strips in the order of StripPlace
  bool add;            // to what they hold
};

// Products by tables of entries: what one word of a codebook yields with `lanes` rows of x, one after the other:
// floats, of Kernels::row_lanes or few_row_lanes rows, or integers of 16 bits, of Kernels::short_lanes, each row in
// units of its own, so large that the sum of two entries does not overflow, of the first and second table or the third
// and fourth.
constexpr std::size_t kMostEntryTables = 4;  // whose entries are added up at once: as many as stay near
constexpr float kShortSum = 32700.0F;        // what such a sum may be, with some room for rounding
constexpr std::size_t kMostShortWidth = 16;  // of words in 16 bits, whose rounding uses some of that room
constexpr float kShortInput = 1e-19F;        // a block of x that is shorter is taken for as long
struct BuildEntries {
  const float* x;  // [tables * width][lanes], x_stride apart
  std::size_t x_stride;
  const float* const* books;  // of each table [words][width]
  std::size_t tables;         // 1 to kMostEntryTables
  std::size_t words, width;
  std::size_t cols;  // of the last table; the others have `width`
  std::size_t lanes;
  float* entries;        // [tables][kTableWords][lanes]; or null:
  std::int16_t* shorts;  // the same, the nearest integers to products / units, of an entry's rows in any order
  const float* longest;  // of each table: the length of its longest word, or more; positive
  // [lanes]: longest / kShortSum times the length of the block of x, summed over two tables; the larger such sum.
  float* units;
  // Or null; else words in 16 bits, which some kernels multiply in the place of `books`: for each table
  // [words][pairs of columns][2], the nearest integers to words * word_scale, and readable words up to a multiple of 4.
  // Then x is rounded as well, and units are not below that of 2.001 times the largest magnitude of x / word_scale.
  const std::int16_t* const* short_books;
  float word_scale;
};

struct SumEntries {
  // For each table, of each strip of kStripRows outputs a line of codes, `strip_bytes` apart.
  const std::uint8_t* const* codes;
  std::size_t strips, strip_bytes;
  const float* entries;        // [tables][kTableWords][lanes]; or null:
  const std::int16_t* shorts;  // the same, with
  const float* units;          // [lanes]
  std::size_t tables;          // 1 to kMostEntryTables
  std::size_t lanes;
  float* sums;  // [strips * kStripRows][lanes], `pitch` apart: entries in the order of tables, their sum added
  std::size_t pitch;
  bool add;  // to what they hold
};

// What x must be rounded with: the largest magnitude, the largest sum of squares of a block; unspecified where some
// value is not finite.
struct Extent {
  float most, square;
  bool finite;
};

// Products of up to kMostDots vectors with some rows of a matrix, without its scales.
constexpr std::size_t kMostDots = 4;
struct Dot {
  const Coded& matrix;    // kOctet words of it have at most kTileDepth values
  std::size_t row, rows;  // those that are wanted
  std::size_t cols;       // all of them
  const float* x;         // [batch] rows, x_stride apart
  std::size_t x_stride, batch;
  float* out;  // out[b * out_stride + i] for row `row + i`
  std::size_t out_stride;
};

struct Kernels {
  const char* name;

  // Unpacks `count` codes of `bits` bits, at most 8, from a bit string that starts on a byte and has `bytes` readable
  // bytes. `out` has room for `count` rounded up to octets; what lies beyond `count` is unspecified.
  void (*unpack)(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count, std::uint8_t* out);

  // The same for codes of more than 8 bits.
  void (*unpack_wide)(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count,
                      std::uint16_t* out);

  // Writes the `cols` values that start with block `group`, a multiple of kOctet, of one row or more that lie next to
  // each other: out[i * stride + col] for row `row + i`, with a scale for each. The last block may be cut. Writes
  // nothing but these values.
  void (*decode_rows)(const Coded& matrix, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                      const float* scales, float* out, std::size_t stride);

  // to[c * to_stride + r] = from[r * from_stride + c] for r < rows and c < cols.
  void (*transpose)(const float* from, std::size_t from_stride, std::size_t rows, std::size_t cols, float* to,
                    std::size_t to_stride);

  // The same for up to tile_lanes rows next to each other: out[col * tile_lanes + i] for row `row + i`, with a scale
  // for each; unspecified beyond `rows`. At most 8 stages.
  void (*decode_panel)(const Coded& matrix, std::size_t row, std::size_t rows, std::size_t group, std::size_t cols,
                       const float* scales, float* out);

  // For some matrices each call of many rows makes tables of products: the more rows, the better.
  void (*dot)(const Dot& dot);
  bool (*dot_has_tables)(const Coded& matrix);

  // Tables of entries. `code_lines` brings codes of at most 8 bits, of any form, to the order in which they are needed:
  // out[code][kStripRows] for rows from `row` on, a multiple of kStripRows, and blocks from `group` on, a multiple of
  // kOctet; zeros for rows that the matrix does not have. There is room for `count` rounded up to octets.
  std::size_t row_lanes, few_row_lanes, short_lanes;
  void (*code_lines)(const Coded& matrix, std::size_t stage, std::size_t row, std::size_t group, std::size_t count,
                     std::uint8_t* out);
  void (*build_entries)(const BuildEntries& build);
  bool takes_short_books;  // of words of up to kMostShortWidth values
  void (*sum_entries)(const SumEntries& sum);

  // A tile of sums. In `windows` the vectors are outputs and lie one after the other; the scalars are positions:
  //   sums[i][j] (+)= vectors[k * tile_lanes + j] * scalars[at[k] + i]
  // In `positions` it is the other way around:
  //   sums[i][j] (+)= vectors[at[k] + j] * scalars[i * kTilePitch + k]
  std::size_t tile_lanes, tile_count;
  void (*tile_windows)(const Tile& tile);
  void (*tile_positions)(const Tile& tile);
  void (*depthwise)(const Depthwise& depthwise);

  // to[i] = from[2 * i] for i < count.
  void (*every_second)(const float* from, std::size_t count, float* to);

  // The largest value of each window. What lies outside of the image is left out; a window that lies there wholly has
  // minus infinity. A NaN may be left out as well.
  void (*max_pool)(const Windows& windows);

  // Out comes [i][j] with a bias for each i (`rows`) or each j (`columns`), or [j][i] with a bias for each j (`across`,
  // which may read rows of `sums` up to the next multiple of 8).
  void (*finish_rows)(const Finish& finish);
  void (*finish_columns)(const Finish& finish);
  void (*finish_across)(const Finish& finish);

  // out[j] = the sum of from[i * stride + j] over i < count, in that order.
  void (*add_up)(const float* from, std::size_t stride, std::size_t count, std::size_t size, float* out);

  // to[j] += from[j].
  void (*add_to)(const float* from, std::size_t size, float* to);

  // The largest magnitude of x, and not a finite number where some value is none.
  float (*largest)(const float* x, std::size_t count);

  // Table lookup; null where the instruction set has no use for it. `quantise` rounds x * scale to the nearest
  // integers.
  Extent (*measure)(const float* x, std::size_t blocks, std::size_t width);
  void (*quantise)(const float* x, std::size_t count, float scale, std::int16_t* out);
  void (*build_tables)(const BuildTables& build);
  void (*sum_tables)(const SumTables& sum);

  // Brings the sums of strips to the order of rows. Null where sum_tables is.
  void (*sort_rows)(float* sums, std::size_t sets);

  // Unpacks `count` codes of less than 8 bits of the rows of a strip, from block `group` on, a multiple of kOctet:
  // out[code][kSetRows]. `strip` has `row_bytes` lines; bits beyond them are unspecified. Null where sum_tables is.
  void (*unpack_strip)(const std::uint8_t* strip, std::size_t row_bytes, std::size_t bits, std::size_t group,
                       std::size_t count, std::uint8_t* out);
  bool tables_pay;  // whether lookups are faster than multiplications
};

constexpr std::size_t kMaxTileFloats = 16 * 32;  // room for the sums of any table's tile

extern const Kernels kPortable;
#if defined(VQONNX_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vbmi;
#elif defined(VQONNX_ARM)
extern const Kernels kNeon;
#endif

// The tables that this processor can run, slowest first. Returns how many; `tables` has room for kMaxTables.
constexpr std::size_t kMaxTables = 4;
std::size_t UsableKernels(const Kernels** tables);

// The table called `isa`, or the fastest usable one when `isa` is null or empty. When there is none, returns null and
// writes one line into `error` that names the known ones.
const Kernels* ChooseKernels(const char* isa, char* error, std::size_t error_size);

}  // namespace vqonnx

#endif  // VQONNX_KERNELS_H_
