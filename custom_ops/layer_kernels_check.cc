// Checks of the kernels of linear layers. Where a kernel rounds as the formula does, it must yield the same bits.
#include <algorithm>
#include <array>
#include <optional>

#include "check.h"

namespace vqonnx::check {
namespace {

Sample Named(unsigned seed) {
  Sample sample = {};
  sample.seed = seed;
  return sample;
}

// Whether `got` may be what the activation makes of `value`: its bits, or for silu within 3e-7.
bool IsActivated(float got, float value, const Activation& activation) {
  if (!activation.silu) {
    value = activation.low > value ? activation.low : value;
    return Same(got, activation.high < value ? activation.high : value);
  }
  const double want = Activated(value, activation);
  if (!std::isfinite(want)) return Same(got, static_cast<float>(want));
  return std::fabs(double{got} - want) <= 3e-7 * std::fabs(want) + 1e-36;
}

void CheckTiles(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  struct Form {
    const char* name;
    void (*multiply)(const Tile&);
    size_t lanes, most;
    bool windows, chosen;
  };
  const size_t lanes = kernels.tile_lanes, most = kernels.tile_count;
  const Form forms[] = {{"tile_windows", kernels.tile_windows, lanes, most, true, false},
                        {"tile_windows of chosen columns", kernels.tile_windows, lanes, most, true, true},
                        {"tile_positions", kernels.tile_positions, lanes, most, false, false}};
  for (const Form& form : forms) {
    const size_t depth = Pick(random, 1, 50), count = Pick(random, 1, form.most), shift = Pick(random, 0, 3);
    const size_t wanted = form.windows || Pick(random, 0, 1) ? form.lanes : Pick(random, 1, form.lanes);
    const size_t gathered = form.windows ? count : wanted <= kernels.row_lanes ? kernels.row_lanes : form.lanes;
    std::vector<std::int32_t> at(depth), from(depth);
    for (std::int32_t& place : at) place = static_cast<std::int32_t>(Pick(random, 0, 100));
    for (size_t k = 0; k < depth; ++k) {
      from[k] = static_cast<std::int32_t>((form.chosen ? Pick(random, 0, depth - 1) : k) * form.lanes);
    }
    // Not a value more than may be read.
    const std::vector<float> near =
        Values(random, shift + (form.windows ? depth * form.lanes : (count - 1) * kTilePitch + depth), false);
    const std::vector<float> far = Values(random, 100 + gathered, false);
    Guarded sums(count * form.lanes, shift);
    const bool add = Pick(random, 0, 1) != 0;
    std::vector<float> before = Values(random, count * form.lanes, false);
    if (add) std::copy(before.begin(), before.end(), sums.data());
    const float* stored = near.data() + shift;
    form.multiply({.vectors = form.windows ? stored : far.data(),
                   .scalars = form.windows ? far.data() : stored,
                   .at = at.data(),
                   .depth = depth,
                   .count = count,
                   .sums = sums.data(),
                   .add = add,
                   .from = form.chosen ? from.data() : nullptr,
                   .lanes = form.windows ? 0 : wanted});
    if (!sums.Intact()) return Fail(kernels, Named(seed), std::string(form.name) + " writes beside its sums");
    for (size_t i = 0; i < count; ++i) {
      for (size_t j = 0; j < wanted; ++j) {
        double want = add ? before[i * form.lanes + j] : 0.0, scale = std::fabs(want);
        for (size_t k = 0; k < depth; ++k) {
          const size_t place = static_cast<size_t>(at[k]);
          const double product = form.windows ? double{stored[static_cast<size_t>(from[k]) + j]} * far[place + i]
                                              : double{stored[i * kTilePitch + k]} * far[place + j];
          want += product;
          scale += std::fabs(product);
        }
        if (Close(sums.data()[i * form.lanes + j], want, scale)) continue;
        return Fail(kernels, Named(seed),
                    std::string(form.name) + " differs at " + std::to_string(i) + ", " + std::to_string(j));
      }
    }
  }
}

void CheckEverySecond(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  const size_t count = Pick(random, 1, 70), shift = Pick(random, 0, 3);
  const std::vector<float> from = Values(random, shift + 2 * count - 1, false);  // not a value more than may be read
  Guarded to(count, shift);
  kernels.every_second(from.data() + shift, count, to.data());
  if (!to.Intact()) return Fail(kernels, Named(seed), "every_second writes beside its output");
  for (size_t i = 0; i < count; ++i) {
    if (!Same(to.data()[i], from[shift + 2 * i])) {
      return Fail(kernels, Named(seed), "every_second differs at " + std::to_string(i));
    }
  }
}

void CheckFinish(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  struct Form {
    const char* name;
    void (*finish)(const Finish&);
    bool by_row, across;
  };
  const Form forms[] = {{"finish_rows", kernels.finish_rows, true, false},
                        {"finish_columns", kernels.finish_columns, false, false},
                        {"finish_across", kernels.finish_across, false, true}};
  for (const Form& form : forms) {
    const size_t count = Pick(random, 1, 40), lanes = Pick(random, 1, 70),
                 pitch = (lanes + 7) / 8 * 8 + Pick(random, 0, 2) * 8;
    const size_t stride = (form.across ? count : lanes) + Pick(random, 0, 5);
    const std::vector<float> sums = Values(random, (count + 8) * pitch, true);
    const std::vector<float> bias = Values(random, std::max(count, lanes), true),
                             scales = Values(random, bias.size(), true);
    const size_t size = ((form.across ? lanes : count) - 1) * stride + (form.across ? count : lanes);
    const std::vector<float> addend = Values(random, size, true);
    const bool scaled = Pick(random, 0, 1) != 0, adds = Pick(random, 0, 1) != 0;
    const float kInfinity = std::numeric_limits<float>::infinity();
    const std::array<Activation, 4> activations = {
        {{-kInfinity, kInfinity, false}, {0.0F, kInfinity, false}, {-0.5F, 0.75F, false}, {1.0F, 2.0F, true}}};
    const Activation activation = activations[Pick(random, 0, 3)];
    Guarded out(size, seed % 5);
    const std::vector<float> before(out.data(), out.data() + size);
    std::vector<float> values(size);
    std::vector<bool> wanted(size, false);
    for (size_t i = 0; i < count; ++i) {
      for (size_t j = 0; j < lanes; ++j) {
        const size_t place = form.across ? j * stride + i : i * stride + j;
        float value = sums[i * pitch + j];
        if (scaled) value *= scales[form.by_row ? i : j];
        value += bias[form.by_row ? i : j];
        if (adds) value += addend[place];
        values[place] = value;
        wanted[place] = true;
      }
    }
    form.finish({.sums = sums.data(),
                 .pitch = pitch,
                 .count = count,
                 .lanes = lanes,
                 .out = out.data(),
                 .addend = adds ? addend.data() : nullptr,
                 .stride = stride,
                 .scales = scaled ? scales.data() : nullptr,
                 .bias = bias.data(),
                 .activation = activation});
    if (!out.Intact()) return Fail(kernels, Named(seed), std::string(form.name) + " writes beside its output");
    for (size_t i = 0; i < size; ++i) {
      const float got = out.data()[i];
      if (wanted[i] ? !IsActivated(got, values[i], activation) : !Same(got, before[i])) {
        return Fail(kernels, Named(seed), std::string(form.name) + " differs at " + std::to_string(i));
      }
    }
  }
  const size_t count = Pick(random, 1, 9), size = Pick(random, 1, 70), stride = size + Pick(random, 0, 3);
  const std::vector<float> from = Values(random, (count - 1) * stride + size, true);
  Guarded out(size, seed % 5);
  kernels.add_up(from.data(), stride, count, size, out.data());
  bool same = out.Intact();
  for (size_t j = 0; j < size; ++j) {
    float want = from[j];
    for (size_t i = 1; i < count; ++i) want += from[i * stride + j];
    same = same && Same(out.data()[j], want);
  }
  if (!same) Fail(kernels, Named(seed), "add_up differs");
}

// Silu of any floats, and of those in the range where its power is finite.
void CheckSilu(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  constexpr size_t kCount = 500;
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values = {-infinity, infinity, std::nanf(""), 0.0F, -0.0F, 100.0F, -100.0F, 88.0F, -88.5F, -89.0F};
  while (values.size() < kCount) {
    values.push_back(Pick(random, 0, 1) != 0 ? std::bit_cast<float>(static_cast<std::uint32_t>(random()))
                                             : std::uniform_real_distribution<float>(-90.0F, 90.0F)(random));
  }
  const Activation activation = {0.0F, 0.0F, true};
  const float no_bias = 0.0F;
  Guarded out(kCount, 0);
  kernels.finish_rows({.sums = values.data(),
                       .pitch = kCount,
                       .count = 1,
                       .lanes = kCount,
                       .out = out.data(),
                       .addend = nullptr,
                       .stride = kCount,
                       .scales = nullptr,
                       .bias = &no_bias,
                       .activation = activation});
  for (size_t i = 0; i < kCount; ++i) {
    if (IsActivated(out.data()[i], values[i], activation)) continue;
    return Fail(kernels, Named(seed), "silu differs at " + std::to_string(values[i]));
  }
}

// Panels of a random form, whose words may be anything.
void CheckPanel(const Kernels& kernels, unsigned seed) {
  Random random(~seed);  // other numbers than those of the sample, or few stages would always go with few columns
  Sample sample = RandomSample(seed, 40);
  const size_t first = Pick(random, 0, sample.rows - 1), rows = Pick(random, 1, sample.rows - first);
  const size_t group = Pick(random, 0, (sample.groups - 1) / kOctet) * kOctet;
  const size_t cols = Pick(random, 1, sample.cols - group * sample.width);
  if (sample.stages > 8) return;
  Guarded out(cols * kernels.tile_lanes, seed % 5);
  kernels.decode_panel(sample.View(), first, rows, group, cols, sample.scales.data() + first, out.data());
  if (!out.Intact()) return Fail(kernels, sample, "decode_panel writes beside its panel");
  for (size_t row = 0; row < rows && row < kernels.tile_lanes; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const float want = sample.ValueAt(first + row, group * sample.width + col);
      if (Same(out.data()[col * kernels.tile_lanes + row], want)) continue;
      return Fail(kernels, sample,
                  "decode_panel differs at row " + std::to_string(row) + ", column " + std::to_string(col));
    }
  }
}

// Windows over a few channels, without image and output.
Windows RandomWindows(Random& random, unsigned seed) {
  const bool usual = Pick(random, 0, 2) != 0;  // windows that have code of their own
  const size_t size = usual ? 3 + 2 * Pick(random, 0, 1) : 0, stride = usual ? Pick(random, 1, 2) : 0;
  const auto pick = [&](size_t its_usual, size_t most) { return usual ? its_usual : Pick(random, 1, most); };
  const size_t most_size = seed % 8 == 0 ? 20 : 4;
  Windows w = {};
  w.channels = Pick(random, 1, 3);
  w.kernel_rows = pick(size, most_size), w.kernel_cols = pick(size, most_size);
  w.stride_rows = pick(stride, 3), w.stride_cols = pick(stride, 3);
  w.dilation_rows = pick(1, 2), w.dilation_cols = pick(1, 2);
  const size_t longest[] = {12, 12, 70, seed % 8 == 1 ? size_t{2500} : 70};
  w.image_rows = Pick(random, 1, 12), w.image_cols = Pick(random, 1, longest[Pick(random, 0, 3)]);
  w.pad_rows = Pick(random, 0, 5), w.pad_cols = Pick(random, 0, 5);
  const size_t reach_rows = (w.kernel_rows - 1) * w.dilation_rows + 1,
               reach_cols = (w.kernel_cols - 1) * w.dilation_cols + 1;
  const size_t padded_rows = std::max(reach_rows, w.image_rows + w.pad_rows + Pick(random, 0, 5)),
               padded_cols = std::max(reach_cols, w.image_cols + w.pad_cols + Pick(random, 0, 5));
  w.out_rows = (padded_rows - reach_rows) / w.stride_rows + 1;
  w.out_cols = (padded_cols - reach_cols) / w.stride_cols + 1;
  return w;
}

// Which value of its channel's image a tap of output `i` (of all channels) takes; nothing outside of the image.
std::optional<size_t> PlaceOf(const Windows& w, size_t i, size_t tap) {
  const size_t row = i / w.out_cols % w.out_rows, col = i % w.out_cols;
  const size_t y = row * w.stride_rows + tap / w.kernel_cols * w.dilation_rows - w.pad_rows;
  const size_t x = col * w.stride_cols + tap % w.kernel_cols * w.dilation_cols - w.pad_cols;
  if (y >= w.image_rows || x >= w.image_cols) return std::nullopt;  // before the image they wrap around
  return y * w.image_cols + x;
}

// Every output against the sum of its taps.
void CheckDepthwise(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Depthwise d = {};
  d.windows = RandomWindows(random, seed);
  Windows& w = d.windows;
  const size_t image = w.image_rows * w.image_cols, out_plane = w.out_rows * w.out_cols;
  const size_t taps_count = w.kernel_rows * w.kernel_cols;
  // Not a value more than may be read.
  const std::vector<float> x = Values(random, w.channels * image, false),
                           taps = Values(random, w.channels * taps_count, false),
                           bias = Values(random, w.channels, false),
                           addend = Values(random, w.channels * out_plane, false);
  const bool adds = Pick(random, 0, 3) == 0;
  w.x = x.data(), d.taps = taps.data(), d.bias = bias.data(), d.addend = adds ? addend.data() : nullptr;
  d.activation = {-1.0F, 2.0F, Pick(random, 0, 2) == 0};
  Guarded out(w.channels * out_plane, seed % 5);
  w.out = out.data();
  kernels.depthwise(d);
  if (!out.Intact()) return Fail(kernels, Named(seed), "depthwise writes beside its output");
  for (size_t i = 0; i < w.channels * out_plane; ++i) {
    const size_t channel = i / out_plane;
    double want = double{bias[channel]} + (adds ? addend[i] : 0.0F), scale = std::fabs(want);
    for (size_t tap = 0; tap < taps_count; ++tap) {
      const std::optional<size_t> place = PlaceOf(w, i, tap);
      if (!place) continue;
      const double product = double{taps[channel * taps_count + tap]} * x[channel * image + *place];
      want += product;
      scale += std::fabs(product);
    }
    if (!Close(out.data()[i], Activated(want, d.activation), kSiluRise * (scale + 1.0))) {
      return Fail(kernels, Named(seed), "depthwise differs at " + std::to_string(i));
    }
  }
}

void CheckMaxPool(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  Windows w = RandomWindows(random, seed);
  if (seed % 4 != 0) w.dilation_rows = 1, w.dilation_cols = 1;  // the outputs are as many as they are
  const size_t image = w.image_rows * w.image_cols, out_plane = w.out_rows * w.out_cols;
  const std::vector<float> x = Values(random, w.channels * image, false);  // not a value more than may be read
  Guarded out(w.channels * out_plane, seed % 5);
  w.x = x.data(), w.out = out.data();
  kernels.max_pool(w);
  if (!out.Intact()) return Fail(kernels, Named(seed), "max_pool writes beside its output");
  for (size_t i = 0; i < w.channels * out_plane; ++i) {
    float want = -std::numeric_limits<float>::infinity();
    for (size_t tap = 0; tap < w.kernel_rows * w.kernel_cols; ++tap) {
      const std::optional<size_t> place = PlaceOf(w, i, tap);
      if (place) want = std::max(want, x[i / out_plane * image + *place]);
    }
    if (out.data()[i] != want) return Fail(kernels, Named(seed), "max_pool differs at " + std::to_string(i));
  }
}

// The integers must be the portable ones.
void CheckTables(const Kernels& kernels, unsigned seed) {
  if (kernels.sum_tables == nullptr) return;
  Random random(seed);
  const size_t blocks = Pick(random, 1, kTableBlocks), pairs = Pick(random, 1, 9), sets = Pick(random, 1, kMostSets);
  std::vector<float> x = Values(random, blocks * pairs * 2, false);
  const Extent want = kPortable.measure(x.data(), blocks, pairs * 2),
               got = kernels.measure(x.data(), blocks, pairs * 2);
  if (!got.finite || got.most != want.most || std::fabs(got.square - want.square) > 1e-5F * want.square) {
    return Fail(kernels, Named(seed), "measure differs");
  }
  const float specials[] = {std::nanf(""), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()};
  std::vector<float> broken = x;
  broken[Pick(random, 0, x.size() - 1)] = specials[seed % 3];
  if (kernels.measure(broken.data(), blocks, pairs * 2).finite)
    return Fail(kernels, Named(seed), "measure sees no special value");

  const float scale = 32767.0F / want.most;
  std::vector<std::int16_t> rounded(x.size() + 1, 77), expected(x.size());
  kPortable.quantise(x.data(), x.size(), scale, expected.data());
  kernels.quantise(x.data(), x.size(), scale, rounded.data());
  if (!std::equal(expected.begin(), expected.end(), rounded.begin()) || rounded.back() != 77) {
    return Fail(kernels, Named(seed), "quantise differs");
  }
  std::vector<std::vector<std::int16_t>> words(3, std::vector<std::int16_t>(pairs * 2 * kTableWords));
  for (auto& book : words) {
    for (std::int16_t& value : book)
      value = static_cast<std::int16_t>(static_cast<int>(Pick(random, 0, 65534)) - 32767);
  }
  std::vector<const std::int16_t*> books(blocks);
  for (const std::int16_t*& book : books) book = words[Pick(random, 0, 2)].data();
  std::vector<std::uint8_t> tables(blocks * kTableBytes), expected_tables(tables.size());
  BuildTables build = {rounded.data(), books.data(), blocks, pairs, expected_tables.data()};
  kPortable.build_tables(build);
  build.tables = tables.data();
  kernels.build_tables(build);
  if (tables != expected_tables) return Fail(kernels, Named(seed), "build_tables differs");

  std::vector<std::uint8_t> codes(blocks * sets * kSetRows);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(Pick(random, 0, 255));
  const bool add = Pick(random, 0, 1) != 0;
  const std::vector<float> before = Values(random, sets * kSetRows, false);
  Guarded sums(sets * kSetRows, seed % 5), expected_sums(sets * kSetRows, 0);
  float* places[kMostSets];
  float* expected_places[kMostSets];
  for (size_t i = 0; i < sets; ++i) {
    places[i] = sums.data() + i * kSetRows;
    expected_places[i] = expected_sums.data() + i * kSetRows;
  }
  std::copy(before.begin(), before.end(), sums.data());
  std::copy(before.begin(), before.end(), expected_sums.data());
  SumTables sum = {.codes = codes.data(),
                   .strips = nullptr,
                   .next = nullptr,
                   .tables = tables.data(),
                   .blocks = blocks,
                   .sets = sets,
                   .factor = 0.125F,
                   .sums = expected_places,
                   .add = add};
  // The same codes in strips, which are not aligned and come in another order.
  std::vector<std::uint8_t> stored(codes.size() + 5);
  const std::uint8_t* strips[kMostSets];
  for (size_t set = 0; set < sets; ++set) {
    std::uint8_t* strip = stored.data() + 5 + (sets - 1 - set) * blocks * kSetRows;
    strips[set] = strip;
    for (size_t i = 0; i < blocks * kSetRows; ++i) {
      strip[i] = codes[(i / kSetRows * sets + set) * kSetRows + SetPlace(i % kSetRows)];
    }
  }
  const size_t bits = Pick(random, 1, 7), row_bytes = Pick(random, 1, 30), codes_in_row = row_bytes * 8 / bits;
  if (codes_in_row > 0) {
    std::vector<std::uint8_t> strip(row_bytes * kSetRows);
    for (std::uint8_t& byte : strip) byte = static_cast<std::uint8_t>(Pick(random, 0, 255));
    const size_t group = Pick(random, 0, codes_in_row - 1) / kOctet * kOctet, count = codes_in_row - group;
    std::vector<std::uint8_t> want(count * kSetRows), got(want.size());
    kPortable.unpack_strip(strip.data(), row_bytes, bits, group, count, want.data());
    kernels.unpack_strip(strip.data(), row_bytes, bits, group, count, got.data());
    if (got != want) return Fail(kernels, Named(seed), "unpack_strip differs");
  }
  kPortable.sum_tables(sum);
  if (Pick(random, 0, 1) != 0) {
    sum.strips = sum.next = strips;
    for (size_t i = 0; i < sets * kSetRows; ++i) {
      sums.data()[i / kSetRows * kSetRows + StripPlace(i % kSetRows)] = before[i];
    }
  }
  sum.sums = places;
  kernels.sum_tables(sum);
  if (sum.strips != nullptr) {
    kernels.sort_rows(sums.data(), sets);
  }
  if (!sums.Intact()) return Fail(kernels, Named(seed), "sum_tables writes beside its sums");
  for (size_t i = 0; i < sets * kSetRows; ++i) {
    const float a = sums.data()[i], b = expected_sums.data()[i];
    if (std::fabs(a - b) > 1e-6F * (std::fabs(b) + 1.0F))
      return Fail(kernels, Named(seed), "sum_tables differs at " + std::to_string(i));
  }
}

}  // namespace

void CheckLayerKernels(const Kernels& kernels, unsigned seed) {
  CheckTiles(kernels, seed);
  CheckFinish(kernels, seed);
  CheckSilu(kernels, seed);
  CheckEverySecond(kernels, seed);
  CheckPanel(kernels, seed);
  CheckDepthwise(kernels, seed);
  CheckMaxPool(kernels, seed);
  CheckTables(kernels, seed);
}

}  // namespace vqonnx::check
