#include "decode.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kBlockRows = 16;       // one cache line of floats when rows become columns
constexpr size_t kBlockFloats = 16384;  // 64 KB: a task's scratch, or what it writes

void CheckPerm(std::span<const std::int64_t> perm) {
  std::vector<bool> seen(perm.size(), false);
  for (const std::int64_t axis : perm) {
    if (axis < 0 || static_cast<size_t>(axis) >= perm.size() || seen[static_cast<size_t>(axis)]) {
      throw Invalid("perm " + Text(perm) + " is no permutation of " + Text(perm.size()) + " axes: axis " + Text(axis) +
                    " is out of range or there twice");
    }
    seen[static_cast<size_t>(axis)] = true;
  }
}

void CheckCodesShape(const Tensor& codes) {
  if (codes.dims.size() != 4) return CheckTensor("codes", codes, "[stages, rows, row_bytes]", 3);
  CheckTensor("codes", codes, "[stages, strips, row_bytes, 64]", 4);
  if (codes.dims[3] == static_cast<std::int64_t>(kStripRows)) return;
  throw Invalid("codes are " + Text(codes.dims) + "; a strip has " + Text(kStripRows) + " rows");
}

}  // namespace

const std::uint8_t* RowOfCodes(const Coded& m, size_t stage, size_t row, std::vector<std::uint8_t>& room) {
  const size_t lane = row % m.lanes;
  const std::uint8_t* first = m.codes + (stage * m.rows + row - lane) * m.row_bytes + lane;
  if (m.lanes == 1) return first;
  room.resize(m.row_bytes);
  for (size_t byte = 0; byte < m.row_bytes; ++byte) room[byte] = first[byte * m.lanes];
  return room.data();
}

Decode::Decode(const Inputs& inputs, std::span<const std::int64_t> perm, const Kernels& kernels) : kernels_(&kernels) {
  CheckPerm(perm);
  CheckType("codes", inputs.codes, std::array{Type::kUint8}, "uint8");
  CheckWords("codebooks", inputs.codebooks);
  CheckFloats("scales", inputs.scales);
  CheckType("layout", inputs.layout, std::array{Type::kInt64}, "int64");
  CheckCodesShape(inputs.codes);
  CheckTensor("codebooks", inputs.codebooks, "[stages, books, words, width]", 4);
  CheckTensor("scales", inputs.scales, "[rows, 1]", 2);
  CheckTensor("layout", inputs.layout, "[2 + n]", 1);

  // From here on sizes are those of memory that exists, or are compared before they are multiplied.
  Coded& m = matrix_;
  m.stages = static_cast<size_t>(inputs.codes.dims[0]);
  m.lanes = inputs.codes.dims.size() == 4 ? kStripRows : 1;
  m.rows = static_cast<size_t>(inputs.codes.dims[1]) * m.lanes;
  m.row_bytes = static_cast<size_t>(inputs.codes.dims[2]);
  m.books = static_cast<size_t>(inputs.codebooks.dims[1]);
  m.words = static_cast<size_t>(inputs.codebooks.dims[2]);
  m.width = static_cast<size_t>(inputs.codebooks.dims[3]);
  const auto stages = static_cast<size_t>(inputs.codebooks.dims[0]);
  if (stages != m.stages) throw Invalid("codes have " + Text(m.stages) + " stages, codebooks " + Text(stages));
  const std::vector<std::int64_t>& scales = inputs.scales.dims;
  if (scales[1] != 1 || (scales[0] != 1 && scales[0] != static_cast<std::int64_t>(m.rows))) {
    throw Invalid("scales are " + Text(scales) + "; they must be [" + Text(m.rows) + ", 1] or [1, 1]");
  }

  const std::span<const std::int64_t> layout(static_cast<const std::int64_t*>(inputs.layout.data),
                                             static_cast<size_t>(inputs.layout.dims[0]));
  if (layout.size() != perm.size() + 2) {
    throw Invalid("layout has " + Text(layout.size()) + " values; with perm of " + Text(perm.size()) +
                  " axes it must have " + Text(perm.size() + 2));
  }
  for (const std::int64_t value : layout) {
    if (value < 1)
      throw Invalid("layout " + Text(layout) + " holds " + Text(value) + "; every value must be at least 1");
  }
  if (layout[0] > static_cast<std::int64_t>(kMaxBits)) {
    throw Invalid("layout says " + Text(layout[0]) + " bits; a code has 1 to " + Text(kMaxBits));
  }
  m.bits = static_cast<size_t>(layout[0]);
  cols_ = static_cast<size_t>(layout[1]);
  if (m.words > size_t{1} << m.bits) {
    throw Invalid("codebooks have " + Text(m.words) + " words; " + Text(m.bits) + " bits reach " +
                  Text(size_t{1} << m.bits));
  }
  const size_t groups = (cols_ - 1) / m.width + 1;
  const std::optional<size_t> row_bits = Times(groups, m.bits);
  if (!row_bits || (*row_bits - 1) / 8 + 1 != m.row_bytes) {
    throw Invalid("a row of codes has " + Text(m.row_bytes) + " bytes, which is not right for " + Text(groups) +
                  " groups (" + Text(cols_) + " columns of width " + Text(m.width) + ") of " + Text(m.bits) + " bits");
  }
  if (m.books > groups) throw Invalid("codebooks have " + Text(m.books) + " books for " + Text(groups) + " groups");

  const std::span<const std::int64_t> sizes = layout.subspan(2);
  const std::optional<size_t> count = Times(m.rows, cols_);
  std::optional<size_t> product = 1;
  for (const std::int64_t size : sizes) {
    if (product) product = Times(*product, static_cast<size_t>(size));
  }
  if (!count || !product || *count != *product || !Times(*count, sizeof(float))) {
    throw Invalid("layout reshapes to " + Text(sizes) + ", which is not " + Text(m.rows) + " rows of " + Text(cols_) +
                  " columns");
  }
  for (const std::int64_t axis : perm) shape_.push_back(sizes[static_cast<size_t>(axis)]);

  const size_t floats = m.stages * m.books * m.words * m.width;
  codebooks_.resize(floats + kPad);
  for (size_t i = 0; i < floats; ++i) codebooks_[i] = FloatAt(inputs.codebooks, i);

  Coded stored = m;
  stored.codes = static_cast<const std::uint8_t*>(inputs.codes.data);
  if (m.bits <= 8) {
    CheckCodes(stored, kernels_->unpack);
  } else {
    CheckCodes(stored, kernels_->unpack_wide);
  }
  PlanAxes(sizes, perm);
  PlanBlocks();
}

template <class Code>
void Decode::CheckCodes(const Coded& m, void (*unpack)(const std::uint8_t*, size_t, size_t, size_t, Code*)) const {
  if (m.words == size_t{1} << m.bits) return;
  constexpr size_t kChunk = 512;
  std::array<Code, kChunk> codes;
  const size_t groups = (cols_ - 1) / m.width + 1;
  std::vector<std::uint8_t> room;
  for (size_t line = 0; line < m.stages * m.rows; ++line) {
    const std::uint8_t* row = RowOfCodes(m, line / m.rows, line % m.rows, room);
    for (size_t group = 0; group < groups; group += kChunk) {
      const size_t byte = group * m.bits / 8;
      const size_t count = std::min(kChunk, groups - group);
      unpack(row + byte, m.row_bytes - byte, m.bits, count, codes.data());
      const auto end = codes.begin() + static_cast<std::ptrdiff_t>(count);
      const auto bad = std::find_if(codes.begin(), end, [&](Code code) { return code >= m.words; });
      if (bad == end) continue;
      throw Invalid("code " + Text(size_t{*bad}) + " at stage " + Text(line / m.rows) + ", row " + Text(line % m.rows) +
                    ", group " + Text(group + static_cast<size_t>(bad - codes.begin())) +
                    " is beyond the codebook of " + Text(m.words) + " words");
    }
  }
}

void Decode::PlanAxes(std::span<const std::int64_t> sizes, std::span<const std::int64_t> perm) {
  std::vector<size_t> to(sizes.size());
  for (size_t i = perm.size(), stride = 1; i-- > 0;) {
    const auto axis = static_cast<size_t>(perm[i]);
    to[axis] = stride;
    stride *= static_cast<size_t>(sizes[axis]);
  }
  // From the last axis to the first: axes of one step say nothing, and axes that stay neighbours are one axis,
  // except where rows end.
  std::vector<Axis> axes;
  size_t below = 1;
  bool aligned = false;
  path_ = Path::kStraight;
  for (size_t i = sizes.size(); i-- > 0;) {
    const Axis axis = {static_cast<size_t>(sizes[i]), below, to[i]};
    if (below == cols_ && !aligned) {
      aligned = true;
      split_ = axes.size();
    }
    below *= axis.size;
    if (axis.size == 1) continue;
    if (axis.from != axis.to) path_ = Path::kBlocked;
    const bool at_split = aligned && split_ == axes.size();
    if (!axes.empty() && !at_split && axis.to == axes.back().size * axes.back().to) {
      axes.back().size *= axis.size;
    } else {
      axes.push_back(axis);
    }
  }
  if (below == cols_ && !aligned) {  // one row, and no axis for it
    aligned = true;
    split_ = axes.size();
  }
  if (path_ == Path::kBlocked && !aligned) path_ = Path::kScattered;
  axes_.assign(axes.rbegin(), axes.rend());
  split_ = axes_.size() - split_;
}

// The smallest number of columns, about `target`, that starts each block of columns on a whole octet of codes and on a
// whole step of the first column axis.
size_t Decode::ColumnStep(size_t target) const {
  const std::optional<size_t> octet = Times(kOctet, matrix_.width);
  const size_t inner = path_ == Path::kBlocked && split_ < axes_.size() ? axes_[split_].from : 1;
  if (!octet) return cols_;
  const std::optional<size_t> unit = Times(*octet / std::gcd(*octet, inner), inner);
  if (!unit || *unit >= cols_) return cols_;
  return std::min(cols_, std::max<size_t>(1, target / *unit) * *unit);
}

void Decode::PlanBlocks() {
  run_ = matrix_.rows;
  bool rows_innermost = false;
  if (path_ == Path::kBlocked) {
    run_ = split_ > 0 ? axes_[split_ - 1].size : 1;
    rows_innermost = split_ > 0 && axes_[split_ - 1].to == 1;
  }
  // Rows that become columns want many rows for a cache line; everything else wants whole rows.
  block_cols_ = ColumnStep(rows_innermost ? kBlockFloats / kBlockRows / 2 : kBlockFloats);
  block_rows_ = std::clamp<size_t>(kBlockFloats / block_cols_, 1, path_ == Path::kStraight ? kBlockFloats : kBlockRows);
  block_rows_ = std::min(block_rows_, run_);
  row_blocks_ = matrix_.rows / run_ * ((run_ - 1) / block_rows_ + 1);
  col_blocks_ = (cols_ - 1) / block_cols_ + 1;
}

// Where the output has the value with this flat index over the axes [first, last).
size_t Decode::Offset(size_t index, size_t first_axis, size_t last_axis) const {
  size_t offset = 0;
  for (size_t i = last_axis; i-- > first_axis;) {
    offset += index % axes_[i].size * axes_[i].to;
    index /= axes_[i].size;
  }
  return offset;
}

void Decode::Copy(const Axis* axis, const Axis* end, const float* from, float* to) const {
  if (axis == end) {
    *to = *from;
  } else if (axis + 1 == end && axis->from == 1 && axis->to == 1) {
    std::memcpy(to, from, axis->size * sizeof(float));
  } else if (axis + 2 == end && axis[0].from == 1 && axis[1].to == 1) {
    kernels_->transpose(from, axis[1].from, axis[1].size, axis[0].size, to, axis[0].to);
  } else {
    for (size_t i = 0; i < axis->size; ++i) Copy(axis + 1, end, from + i * axis->from, to + i * axis->to);
  }
}

Coded Decode::View(const void* codes) const {
  Coded m = matrix_;
  m.codes = static_cast<const std::uint8_t*>(codes);
  m.codebooks = codebooks_.data();
  return m;
}

void Decode::Run(const Tensor& codes, const Tensor& scales, size_t task, float* out) const {
  const Coded m = View(codes.data);
  const size_t runs = (run_ - 1) / block_rows_ + 1;
  const size_t row_block = task / col_blocks_;
  const size_t in_run = row_block % runs * block_rows_;
  const size_t row = row_block / runs * run_ + in_run;
  const size_t rows = std::min(block_rows_, run_ - in_run);
  const size_t col = task % col_blocks_ * block_cols_;
  const size_t cols = std::min(block_cols_, cols_ - col);
  const bool one_scale = scales.dims[0] == 1;
  std::vector<float> its_scales(rows);
  for (size_t r = 0; r < rows; ++r) its_scales[r] = FloatAt(scales, one_scale ? 0 : row + r);
  const auto decode = [&](float* target, size_t stride) {
    kernels_->decode_rows(m, row, rows, col / m.width, cols, its_scales.data(), target, stride);
  };

  if (path_ == Path::kStraight) return decode(out + row * cols_ + col, cols_);
  const size_t stride = cols + kBlockRows;  // not a power of two: the rows of a column do not share a cache set
  std::vector<float> scratch(rows * stride);
  decode(scratch.data(), stride);
  if (path_ == Path::kScattered) {
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < cols; ++c) {
        out[Offset((row + r) * cols_ + col + c, 0, axes_.size())] = scratch[r * stride + c];
      }
    }
    return;
  }
  std::vector<Axis> axes;
  size_t offset = Offset(row, 0, split_);
  if (split_ > 0) axes.push_back({rows, stride, axes_[split_ - 1].to});
  for (size_t i = split_; i < axes_.size(); ++i) axes.push_back(axes_[i]);
  if (split_ < axes_.size()) {
    Axis& first = axes[split_ > 0 ? 1 : 0];
    offset += col / first.from * first.to;
    first.size = cols / first.from;
  }
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.to > b.to; });
  Copy(axes.data(), axes.data() + axes.size(), scratch.data(), out + offset);
}

}  // namespace vqonnx
