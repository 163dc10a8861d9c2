// Convolutions: what is checked and planned once, and which way a run takes.
#include <algorithm>

#include "linear.h"

namespace vqonnx {

using std::size_t;

Conv::Conv(const Inputs& inputs, std::span<const std::int64_t> perm, std::span<const std::int64_t> strides,
           std::span<const std::int64_t> dilations, std::span<const std::int64_t> pads, std::int64_t group,
           Precision precision, const Kernels& kernels)
    : kernels_(&kernels),
      weight_(inputs, perm, 0, kernels),
      window_(KernelSizes(weight_.shape()), strides, dilations, pads) {
  if (group < 1 || static_cast<size_t>(group) > weight_.outputs() || weight_.outputs() % static_cast<size_t>(group)) {
    throw Invalid("group is " + Text(group) + ", which does not divide " + Text(weight_.outputs()) + " outputs");
  }
  groups_ = static_cast<size_t>(group);
  channels_ = static_cast<size_t>(weight_.shape()[1]);
  is_depthwise_ = channels_ == 1 && groups_ == weight_.outputs() &&
                  std::is_sorted(weight_.column_axes().begin() + (weight_.column_axes()[0] == 1 ? 1 : 0),
                                 weight_.column_axes().end() - (weight_.column_axes().back() == 1 ? 1 : 0));
  if (groups_ > 1 || !HasTapsOutside()) return;
  const auto* codes = static_cast<const std::uint8_t*>(inputs.codes.data);
  PlanEntries(codes, precision);
  if (precision == Precision::kExact || precision == Precision::kEntries || precision == Precision::kShorts) return;
  PlanLookup(codes, precision);
}

// Whether input channels run fastest, so that all taps can share what is made of some of them, and taps are in order.
bool Conv::HasTapsOutside() const {
  const std::vector<size_t>& axes = weight_.column_axes();
  if (window_.kernel[0] * window_.kernel[1] > 1 && axes.back() != 1) return false;
  for (size_t i = 0; i + 2 < axes.size(); ++i) {
    if (axes[i] > axes[i + 1]) return false;
  }
  return true;
}

std::vector<std::int64_t> Conv::OutputShape(std::span<const std::int64_t> image) const {
  return ConvOutputShape(window_, weight_.shape(), groups_, image);
}

bool Conv::ByTables(std::span<const std::int64_t> shape, const Grid& grid) const {
  if (!lookup_) return false;
  const double products = static_cast<double>(grid.out_rows * grid.out_cols) * lookup_products_;
  return products <= std::min(EntriesProducts(Entry::kFloat, shape, grid), EntriesProducts(Entry::kShort, shape, grid));
}

void Conv::Run(const Call& call, std::span<const std::int64_t> shape, const Tasks& tasks) const {
  if (shape[0] == 0) return;
  const Grid grid(window_, shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1, static_cast<size_t>(shape.back()));
  if (!ByTables(shape, grid) || !RunLookup(call, shape, grid, tasks)) RunExact(call, shape, grid, tasks);
}

}  // namespace vqonnx
