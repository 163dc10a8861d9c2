// The kernels for AVX-512 with VBMI and VNNI: those of avx512.cc, and products by table lookup. Everything is in
// unnamed namespaces except the table, see docs/kernels.md.
// clang-format off
#include "avx512-inl.h"
#include "rows-inl.h"
#include "scalar-vbmi-inl.h"
#include "algorithms-inl.h"
#include "table-vbmi-inl.h"
#include "entries-vbmi-inl.h"
// clang-format on

namespace vqonnx {

const Kernels kAvx512Vbmi = {.name = "avx512vbmi",
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
                             .build_entries = BuildEntryByPairs,
                             .takes_short_books = true,
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
                             .measure = Measure,
                             .quantise = Quantise,
                             .build_tables = BuildTable,
                             .sum_tables = SumTable,
                             .sort_rows = SortRows,
                             .unpack_strip = UnpackSetOfRows,
                             .tables_pay = true};

}  // namespace vqonnx
