// Plain views of stored arrays, and the table of kernels that each instruction set fills.
//
// Included by the per-instruction-set files, so nothing here may have inline code: the linker could keep a copy of it
// that needs a newer processor than the one it runs on.
#ifndef VQONNX_KERNELS_H_
#define VQONNX_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace vqonnx {

// Floats after the last codeword that a kernel may read (never use), so that it can load whole vectors.
constexpr std::size_t kPad = 32;

// Codes of one row come in octets: eight codes of b bits are exactly b bytes.
constexpr std::size_t kOctet = 8;

// The longest code.
constexpr std::size_t kMaxBits = 16;

// A coded matrix; the words are those of docs/format.md. Sizes and codes have been checked by whoever made the view.
struct Coded {
  const std::uint8_t* codes;  // [stages, rows, row_bytes]
  const float* codebooks;     // [stages, books, words, width], then kPad floats of anything
  std::size_t stages, rows, row_bytes, bits;
  std::size_t books, words, width;
};

struct Kernels {
  const char* name;

  // Unpacks `count` codes of `bits` bits, at most 8, from a bit string that starts on a byte and has `bytes` readable
  // bytes. `out` has room for `count` rounded up to octets; what lies beyond `count` is unspecified.
  void (*unpack)(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count, std::uint8_t* out);

  // The same for codes of more than 8 bits.
  void (*unpack_wide)(const std::uint8_t* packed, std::size_t bytes, std::size_t bits, std::size_t count,
                      std::uint16_t* out);

  // Writes the `cols` values of a row that start with block `group`, a multiple of kOctet; the last block may be cut.
  // Writes nothing beyond out[cols - 1].
  void (*decode_row)(const Coded& matrix, std::size_t row, std::size_t group, std::size_t cols, float scale,
                     float* out);

  // to[c * to_stride + r] = from[r * from_stride + c] for r < rows and c < cols.
  void (*transpose)(const float* from, std::size_t from_stride, std::size_t rows, std::size_t cols, float* to,
                    std::size_t to_stride);
};

extern const Kernels kPortable;
#if defined(VQONNX_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The tables that this processor can run, slowest first. Returns how many; `tables` has room for kMaxTables.
constexpr std::size_t kMaxTables = 4;
std::size_t UsableKernels(const Kernels** tables);

// The table called `isa`, or the fastest usable one when `isa` is null or empty. When there is none, returns null and
// writes one line into `error` that names the known ones.
const Kernels* ChooseKernels(const char* isa, char* error, std::size_t error_size);

}  // namespace vqonnx

#endif  // VQONNX_KERNELS_H_
