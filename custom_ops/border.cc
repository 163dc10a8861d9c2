#include "border.h"

#include <algorithm>

namespace vqonnx {

using std::size_t;

Border::Border(const Grid& grid, size_t columns, size_t piece, size_t lanes)
    : grid_(grid), columns_(columns), piece_(piece), lanes_(lanes) {
  if (grid.whole()) return;  // a tile is of several rows
  for (size_t row = 0; row < grid.out_rows && count_ < kMostKinds; ++row) {
    const Part rows = grid.Inside(row);
    if (rows.size < grid.kernel_rows() && KindOf(row) == nullptr) kinds_[count_++] = {rows, nullptr, nullptr, nullptr};
  }
}

size_t Border::room() const {
  return count_ * (2 * Scratch::Room<std::int32_t>(columns_) + Scratch::Room<std::int32_t>(Ceil(columns_, piece_) + 1));
}

void Border::Fill(const std::int32_t* at, const std::int32_t* kernel_rows, Scratch& scratch) {
  at_ = at;
  for (size_t i = 0; i < count_; ++i) {
    Kind& kind = kinds_[i];
    kind.from = scratch.Take<std::int32_t>(columns_);
    kind.at = scratch.Take<std::int32_t>(columns_);
    kind.begins = scratch.Take<std::int32_t>(Ceil(columns_, piece_) + 1);
    size_t left = 0;
    for (size_t begin = 0, number = 0; begin < columns_; begin += piece_, ++number) {
      kind.begins[number] = static_cast<std::int32_t>(left);
      const size_t size = std::min(piece_, columns_ - begin);
      for (size_t k = 0; k < size; ++k) {  // written in any case, which costs less than a branch
        kind.from[left] = static_cast<std::int32_t>(k * lanes_);
        kind.at[left] = at[begin + k];
        left += static_cast<size_t>(kernel_rows[begin + k]) - kind.rows.begin < kind.rows.size;
      }
    }
    kind.begins[Ceil(columns_, piece_)] = static_cast<std::int32_t>(left);
  }
}

Border::Columns Border::Of(size_t out_row, size_t begin) const {
  const Kind* kind = KindOf(out_row);
  if (kind == nullptr) return {nullptr, at_ + begin, std::min(piece_, columns_ - begin)};
  const std::int32_t* begins = kind->begins + begin / piece_;
  return {kind->from + begins[0], kind->at + begins[0], static_cast<size_t>(begins[1] - begins[0])};
}

double Border::Share(const Grid& grid) {
  if (grid.whole()) return 1;
  size_t left = 0;
  for (size_t row = 0; row < grid.out_rows; ++row) left += grid.Inside(row).size;
  return static_cast<double>(left) / static_cast<double>(grid.out_rows * grid.kernel_rows());
}

const Border::Kind* Border::KindOf(size_t out_row) const {
  const Part rows = grid_.Inside(out_row);
  const auto same = [&](const Kind& kind) { return kind.rows.begin == rows.begin && kind.rows.size == rows.size; };
  const Kind* found = std::find_if(kinds_, kinds_ + count_, same);
  return found == kinds_ + count_ ? nullptr : found;
}

}  // namespace vqonnx
