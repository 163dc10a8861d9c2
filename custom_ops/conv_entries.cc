// Convolutions by tables of entries. The tables of as many input positions as a vector has lanes serve all taps: what
// they yield is added to the outputs that lie around them.
#include <algorithm>
#include <limits>

#include "border.h"
#include "linear.h"
#include "scratch.h"
#include "split.h"

namespace vqonnx {
namespace {

using std::size_t;

constexpr size_t kNearFloats = 131072;     // of sums that a task adds to
constexpr size_t kMostFloats = 1 << 20;    // that a task may need
constexpr size_t kPieceStrips = 32;        // of outputs that it computes
constexpr size_t kManyPositions = 512;     // of an image, which then has four tasks or more, and else two
constexpr size_t kImagesFloats = 1 << 20;  // of sums of images that are computed together
constexpr double kMerge = 24.0;            // products that it costs to bring an output of a lane to its place
constexpr size_t kFinishOutputs = 16;

}  // namespace

// An image as one line: its rows one after the other, `pitch` apart, so that what a tap adds to the output that belongs
// to an input lies a fixed way from it, `Step(tap)`. Between rows there is room for what pads would add, which nobody
// wants. A band is a part of the line, whose inputs reach `range` outputs more than they are. Its inputs are dealt out
// to the lanes of vectors: lane l has inputs [l * length, (l + 1) * length), and so have the outputs, where lanes reach
// into each other until they are added up.
struct Conv::Line {
  Line(const Window& window, const Grid& grid, size_t image_rows, size_t image_cols, const Entries& entries, Entry kind)
      : window(window), entry(kind), out_cols(grid.out_cols), out_rows(grid.out_rows) {
    rows = image_rows;
    cols = image_cols;
    pitch = cols + std::max(window.begin[1], window.end[1]);
    positions = rows * pitch;
    before = static_cast<std::ptrdiff_t>((window.Reach(0) - 1) * pitch + window.Reach(1) - 1) -
             static_cast<std::ptrdiff_t>(window.begin[0] * pitch + window.begin[1]);
    range = (window.Reach(0) - 1) * pitch + window.Reach(1) - 1;
    lanes = entries.lanes(entry);
    pieces = Ceil(entries.strips(), kPieceStrips);
    piece_strips = Ceil(entries.strips(), pieces);
    const size_t near = kNearFloats / (piece_strips * kStripRows * lanes);
    const size_t near_inputs = 2 * kNearFloats / (entries.blocks() * entries.width() * lanes);
    const size_t wanted = std::max({std::min(near > range ? near - range : 0, near_inputs), range, size_t{4}});
    // Few bands share what lanes reach beyond them, many leave no lane without an input: whichever costs less.
    const size_t tasks = positions < kManyPositions ? 2 : 4, least = Ceil(positions, wanted * lanes);
    products = std::numeric_limits<double>::infinity();
    const size_t most = std::max(least, Ceil(tasks, pieces));
    for (const size_t count : {least, most}) {
      const size_t its_length = Ceil(Ceil(positions, count), lanes);
      const size_t its_parts = std::clamp<size_t>(entries.blocks() / kOctet, 1, Ceil(tasks, count * pieces));
      if (count < most && count * pieces * its_parts < tasks) continue;  // not something for each thread
      const auto vectors = static_cast<double>(count * lanes), inputs = static_cast<double>(its_length);
      const auto slices = static_cast<double>(its_parts * (its_length + range));
      const auto outputs = static_cast<double>(entries.strips() * kStripRows);
      const double its_products = vectors * (inputs * entries.cost(entry) + kMerge * slices * outputs);
      if (its_products >= products) continue;
      products = its_products;
      bands = count;
      parts = its_parts;
      length = its_length;
    }
    slice_floats = piece_strips * kStripRows * lanes + 16;  // not a power of two: neighbours do not share a cache set
  }

  // Where an output lies behind the first one that its input reaches.
  size_t Step(size_t tap) const {
    const size_t row = tap / window.kernel[1], col = tap % window.kernel[1];
    return range - row * window.dilation[0] * pitch - col * window.dilation[1];
  }
  size_t slices() const { return length + range; }
  size_t floats(size_t taps) const {  // of a task, in the main
    return slices() * slice_floats + taps * Entries::LineBytes(piece_strips) / sizeof(float);
  }
  size_t band_floats() const { return lanes * length + range; }  // of an output

  // One channel's inputs of a band, zeros where there are none.
  void Lay(const float* image, size_t begin, size_t end, float* line) const {
    std::fill_n(line, lanes * length, 0.0F);
    for (size_t row = begin / pitch; row * pitch < end; ++row) {
      const size_t first = std::max(begin, row * pitch), last = std::min(end, row * pitch + cols);
      if (first < last) std::copy_n(image + row * cols + (first - row * pitch), last - first, line + (first - begin));
    }
  }

  const Window& window;
  Entry entry;
  size_t out_cols, out_rows;
  size_t rows, cols, pitch, positions;
  std::ptrdiff_t before;  // how far the first output that an input reaches lies before it
  size_t range, lanes;
  size_t pieces, piece_strips;
  size_t bands = 0, length = 0;  // inputs of a lane
  size_t parts = 0;              // of the input channels, each with sums of its own
  double products;               // that all of it costs, about
  size_t slice_floats;
};

// Sums of a band: for each output of a piece line.band_floats().
void Conv::SumLine(const Call& call, const float* image, size_t plane, const Line& line, size_t band, size_t piece,
                   size_t part, float* out) const {
  const Entries& entries = *entries_;
  const size_t lanes = line.lanes, length = line.length, slices = line.slices(), taps = entries.taps();
  const size_t strip = piece * line.piece_strips, strips = std::min(line.piece_strips, entries.strips() - strip);
  const Part octets = PartOf(Ceil(entries.blocks(), kOctet), line.parts, part);
  const Part its_blocks = {octets.begin * kOctet,
                           std::min(octets.size * kOctet, entries.blocks() - octets.begin * kOctet)};
  const size_t first_channel = its_blocks.begin * entries.width();
  const size_t channels = std::min(its_blocks.size * entries.width(), channels_ - first_channel);
  const size_t x_floats = channels * length * lanes, sums_floats = slices * line.slice_floats;
  Scratch scratch(Use::kTask, Scratch::Room<float>(x_floats) + Scratch::Room<float>(lanes * length) +
                                  Scratch::Room<float>(sums_floats) + Scratch::Room<float>(lanes * slices) +
                                  Entries::Tables::Bytes(line.entry, lanes) +
                                  Scratch::Room<std::uint8_t>(taps * Entries::LineBytes(strips)) +
                                  Scratch::Room<Entries::Lines>(taps));
  auto* x = scratch.Take<float>(x_floats);
  auto* laid = scratch.Take<float>(lanes * length);
  auto* sums = scratch.Take<float>(sums_floats);
  auto* turned = scratch.Take<float>(lanes * slices);
  Entries::Tables tables(entries, line.entry, lanes, scratch);
  auto* room = scratch.Take<std::uint8_t>(taps * Entries::LineBytes(strips));
  auto* lines = scratch.Take<Entries::Lines>(taps);
  const size_t begin = band * length * lanes, end = std::min(begin + length * lanes, line.positions);
  for (size_t c = 0; c < channels; ++c) {
    line.Lay(image + (first_channel + c) * plane, begin, end, laid);
    kernels_->transpose(laid, length, lanes, length, x + c * length * lanes, lanes);
  }
  std::fill_n(sums, sums_floats, 0.0F);
  for (size_t done = 0; done < its_blocks.size; done += Entries::kLineBlocks) {
    const size_t first = its_blocks.begin + done, blocks = std::min(Entries::kLineBlocks, its_blocks.size - done);
    for (size_t stage = 0; stage < entries.stages(); ++stage) {
      for (size_t tap = 0; tap < taps; ++tap) {
        lines[tap] =
            entries.Read(call.codes, stage, tap, first, strip, strips, room + tap * Entries::LineBytes(strips));
      }
      for (size_t j = 0; j < length; ++j) {
        for (size_t i = 0; i < blocks; i += kMostEntryTables) {
          const size_t count = std::min(kMostEntryTables, blocks - i);
          tables.Build(stage, first + i, count, x + ((done + i) * entries.width() * length + j) * lanes,
                       length * lanes);
          for (size_t tap = 0; tap < taps; ++tap) {
            tables.Sum(lines[tap], i, {sums + (j + line.Step(tap)) * line.slice_floats, lanes, strips, true});
          }
        }
      }
    }
  }
  const size_t outputs = std::min(strips * kStripRows, weight_.outputs() - strip * kStripRows);
  for (size_t output = 0; output < outputs; ++output, out += line.band_floats()) {
    kernels_->transpose(sums + output * lanes, line.slice_floats, slices, lanes, turned, slices);
    std::fill_n(out, line.band_floats(), 0.0F);
    for (size_t lane = 0; lane < lanes; ++lane) {
      kernels_->add_to(turned + lane * slices, slices, out + lane * length);
    }
  }
}

// Outputs from `first` on, of whom each band has some sums: brought together and finished.
void Conv::FinishLine(const Call& call, const Line& line, size_t image, size_t first, size_t count,
                      const float* sums) const {
  // The last row may be longer than what it adds to: pads can be wider than the kernel.
  const size_t wanted = (line.out_rows - 1) * line.pitch + std::max(line.pitch, line.out_cols);
  const size_t out_plane = line.out_rows * line.out_cols;
  const size_t piece_outputs = line.piece_strips * kStripRows;
  Scratch scratch(Use::kTask, Scratch::Room<float>(count * wanted));
  auto* total = scratch.Take<float>(count * wanted);
  std::fill_n(total, count * wanted, 0.0F);
  for (size_t index = 0; index < line.bands * line.parts; ++index) {
    const size_t band = index / line.parts;
    const float* its_sums = sums + (index * line.pieces + first / piece_outputs) * piece_outputs * line.band_floats();
    const auto place = static_cast<std::ptrdiff_t>(band * line.length * line.lanes) - line.before;
    const auto begin = static_cast<size_t>(std::max<std::ptrdiff_t>(place, 0));
    const size_t skip = place < 0 ? static_cast<size_t>(-place) : 0;
    if (begin >= wanted || skip >= line.band_floats()) continue;
    for (size_t i = 0; i < count; ++i) {
      kernels_->add_to(its_sums + (first % piece_outputs + i) * line.band_floats() + skip,
                       std::min(line.band_floats() - skip, wanted - begin), total + i * wanted + begin);
    }
  }
  const bool whole = line.pitch == line.out_cols;
  for (size_t row = 0; row < (whole ? 1 : line.out_rows); ++row) {
    const size_t at = (image * weight_.outputs() + first) * out_plane + row * line.out_cols;
    kernels_->finish_rows({.sums = total + row * line.pitch,
                           .pitch = wanted,
                           .count = count,
                           .lanes = whole ? out_plane : line.out_cols,
                           .out = call.out + at,
                           .addend = call.addend == nullptr ? nullptr : call.addend + at,
                           .stride = out_plane,
                           .scales = weight_.scales().data() + first,
                           .bias = call.bias + first,
                           .activation = call.activation});
  }
}

void Conv::PlanEntries(const std::uint8_t* codes, Precision precision) {
  const size_t taps = window_.kernel[0] * window_.kernel[1];
  const bool strided = window_.stride[0] * window_.stride[1] > 1;
  if (!Entries::Possible(weight_, taps) || (strided && (taps > 1 || window_.is_padded()))) return;
  entries_.emplace(weight_, codes, taps, precision, *kernels_);
}

Conv::Line Conv::LineOf(Entry entry, std::span<const std::int64_t> shape, const Grid& grid) const {
  const size_t image_rows = shape.size() == 4 ? static_cast<size_t>(shape[2]) : 1;
  return {window_, grid, image_rows, static_cast<size_t>(shape.back()), *entries_, entry};
}

// What tables of entries would take for an image, for all lanes, used or not.
double Conv::EntriesProducts(Entry entry, std::span<const std::int64_t> shape, const Grid& grid) const {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  const double cost = entries_ ? entries_->cost(entry) : kInfinite;
  if (cost == kInfinite) return cost;
  if (IsOneTap()) {
    const size_t lanes = entries_->lanes(entry);
    return static_cast<double>(Ceil(grid.out_rows * grid.out_cols, lanes) * lanes) * cost;
  }
  const Line line = LineOf(entry, shape, grid);
  if (line.floats(entries_->taps()) > kMostFloats) return kInfinite;
  return cost == 0.0 ? 0.0 : line.products;
}

bool Conv::RunEntries(const Call& call, std::span<const std::int64_t> shape, const Grid& grid,
                      const Tasks& tasks) const {
  const double share = IsOneTap() ? 1.0 : Border::Share(grid);
  const double exact = share * static_cast<double>(grid.out_rows * grid.out_cols * weight_.outputs() * weight_.depth());
  const double floats = EntriesProducts(Entry::kFloat, shape, grid);
  size_t inputs = 1;
  for (const std::int64_t size : shape) inputs *= static_cast<size_t>(size);
  Entry entry = Entry::kFloat;
  if (EntriesProducts(Entry::kShort, shape, grid) < std::min(exact, floats) &&
      CanRound(kernels_->largest(call.x, inputs))) {
    entry = Entry::kShort;
  } else if (floats >= exact) {
    return false;
  }
  IsOneTap() ? RunOneTap(call, entry, shape, grid, tasks) : RunLine(call, shape, LineOf(entry, shape, grid), tasks);
  return true;
}

void Conv::RunLine(const Call& call, std::span<const std::int64_t> shape, const Line& line, const Tasks& tasks) const {
  const size_t images = static_cast<size_t>(shape[0]);
  const size_t plane = static_cast<size_t>(shape.size() == 4 ? shape[2] * shape[3] : shape[2]);
  const size_t piece_floats = line.piece_strips * kStripRows * line.band_floats();
  const size_t image_tasks = line.bands * line.parts * line.pieces, image_floats = image_tasks * piece_floats;
  const size_t together = std::clamp<size_t>(kImagesFloats / image_floats, 1, std::max<size_t>(images, 1));
  Scratch scratch(Use::kRun, Scratch::Room<float>(together * image_floats));
  auto* sums = scratch.Take<float>(together * image_floats);
  for (size_t n = 0; n < images; n += together) {
    const size_t now = std::min(together, images - n);
    tasks.Each(now * image_tasks, [&](size_t task) {
      const size_t image = n + task / image_tasks, piece = task % line.pieces;
      const size_t part = task / line.pieces % line.parts, band = task % image_tasks / line.pieces / line.parts;
      SumLine(call, call.x + image * channels_ * plane, plane, line, band, piece, part, sums + task * piece_floats);
    });
    const size_t parts = Ceil(weight_.outputs(), kFinishOutputs);
    tasks.Each(now * parts, [&](size_t task) {
      const size_t image = task / parts, first = task % parts * kFinishOutputs;
      FinishLine(call, line, n + image, first, std::min(kFinishOutputs, weight_.outputs() - first),
                 sums + image * image_floats);
    });
  }
}

}  // namespace vqonnx
