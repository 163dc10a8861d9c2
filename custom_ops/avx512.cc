// The kernels for AVX-512 (F, BW, DQ, VL). Everything is in unnamed namespaces except the table:
// see docs/kernels.md.
#include "avx512-inl.h"

namespace vqonnx {
namespace {

bool DecodeScalarCodes(const Coded&, std::size_t, std::size_t, std::size_t, std::size_t, const float*, float*,
                       std::size_t) {
  return false;
}

}  // namespace
}  // namespace vqonnx

#include "algorithms-inl.h"

namespace vqonnx {

const Kernels kAvx512 = {.name = "avx512",
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
