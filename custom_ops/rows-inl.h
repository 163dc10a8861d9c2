// Where the codes of a row are. Included by the files of instruction sets, before anything that reads codes.
#ifndef VQONNX_ROWS_INL_H_
#define VQONNX_ROWS_INL_H_

#include "kernels.h"

namespace vqonnx {
namespace {

// Where a byte of a row of codes is; those that follow are m.lanes apart.
VQONNX_INLINE const std::uint8_t* RowByte(const Coded& m, std::size_t stage, std::size_t row, std::size_t byte) {
  const std::size_t lane = row & (m.lanes - 1);
  return m.codes + (stage * m.rows + row - lane) * m.row_bytes + byte * m.lanes + lane;
}

// `count` codes of a row from block `group` on, a multiple of kOctet, as bytes that follow each other: where they are
// stored, or, out of a strip, brought together in `room`. `bytes` is how many may be read.
inline const std::uint8_t* PackedCodes(const Coded& m, std::size_t stage, std::size_t row, std::size_t group,
                                       std::size_t count, std::uint8_t* room, std::size_t& bytes) {
  const std::size_t byte = group * m.bits / 8;
  const std::uint8_t* first = RowByte(m, stage, row, byte);
  bytes = m.row_bytes - byte;
  if (m.lanes == 1) return first;
  bytes = (count * m.bits + 7) / 8;
  for (std::size_t i = 0; i < bytes; ++i) room[i] = first[i * m.lanes];
  return room;
}

}  // namespace
}  // namespace vqonnx

#endif  // VQONNX_ROWS_INL_H_
