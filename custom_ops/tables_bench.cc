// How fast tables are made, and looked up, without what a layer has around it: the limit of layers that take them.
#include <algorithm>
#include <chrono>
#include <functional>

#include "check.h"
#include "scratch.h"

namespace vqonnx::check {
namespace {

constexpr size_t kWidth = 8, kBlocks = 32, kStrips = 64;

// Aligned as what layers use.
template <class T>
using Lines = std::vector<T, OnLine<T>>;

// The least nanoseconds of a call.
double Time(const std::function<void()>& call) {
  double least = 1e9;
  for (int repeat = 0; repeat < 15; ++repeat) {
    constexpr int kCalls = 20;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    least = std::min(least, taken.count() / kCalls);
  }
  return least;
}

struct Codes {
  explicit Codes(Random& random) : bytes(kStrips * kBlocks * kStripRows) {
    for (std::uint8_t& code : bytes) code = static_cast<std::uint8_t>(Pick(random, 0, kTableWords - 1));
  }
  Lines<std::uint8_t> bytes;
};

void Print(const Kernels& kernels, const char* what, size_t rows, double table, double lookups) {
  std::printf("%-12s %-22s %4zu %12.1f %16.1f\n", kernels.name, what, rows, table, lookups);
}

void BenchProducts(const Kernels& kernels, const Codes& codes) {
  Lines<std::int16_t> x(kBlocks * kWidth, 100), words(kTableWords * kWidth, 100);
  const std::vector<const std::int16_t*> books(kBlocks, words.data());
  Lines<std::uint8_t> tables(kBlocks * kTableBytes);
  Lines<float> sums(kMostSets * kSetRows);
  const std::uint8_t* strips[kMostSets];
  float* its_sums[kMostSets];
  for (size_t i = 0; i < kMostSets; ++i) {
    strips[i] = codes.bytes.data() + i * kBlocks * kSetRows;
    its_sums[i] = sums.data() + i * kSetRows;
  }
  const BuildTables build = {
      .x = x.data(), .books = books.data(), .blocks = kBlocks, .pairs = kWidth / 2, .tables = tables.data()};
  const SumTables sum = {.codes = nullptr,
                         .strips = strips,
                         .next = strips,
                         .tables = tables.data(),
                         .blocks = kBlocks,
                         .sets = kMostSets,
                         .factor = 1.0F,
                         .sums = its_sums,
                         .add = false};
  const double table = Time([&] { kernels.build_tables(build); }) / kBlocks;
  const double lookups = Time([&] { kernels.sum_tables(sum); }) / (kBlocks * kMostSets);
  Print(kernels, "products, 16 bits", 1, table, lookups);
}

void BenchEntries(const Kernels& kernels, const Codes& codes, bool is_short, Random& random) {
  const size_t lanes = is_short ? kernels.short_lanes : kernels.row_lanes;
  const std::vector<float> x = Values(random, kMostEntryTables * kWidth * lanes, false),
                           words = Values(random, kTableWords * kWidth, false);
  Lines<float> entries(kMostEntryTables * kTableWords * lanes), units(lanes), sums(kStrips * kStripRows * lanes);
  Lines<std::int16_t> shorts(entries.size());
  const float* books[kMostEntryTables];
  const std::uint8_t* lines[kMostEntryTables];
  float longest[kMostEntryTables];
  const std::vector<std::int16_t> short_words(kTableWords * kWidth, 100);
  const std::int16_t* short_books[kMostEntryTables];
  for (size_t i = 0; i < kMostEntryTables; ++i) {
    books[i] = words.data();
    lines[i] = codes.bytes.data() + i * kStripRows;
    longest[i] = 10.0F;
    short_books[i] = short_words.data();
  }
  const BuildEntries build = {.x = x.data(),
                              .x_stride = lanes,
                              .books = books,
                              .tables = kMostEntryTables,
                              .words = kTableWords,
                              .width = kWidth,
                              .cols = kWidth,
                              .lanes = lanes,
                              .entries = is_short ? nullptr : entries.data(),
                              .shorts = shorts.data(),
                              .longest = longest,
                              .units = units.data(),
                              .short_books = is_short && kernels.takes_short_books ? short_books : nullptr,
                              .word_scale = 8000.0F};
  const SumEntries sum = {.codes = lines,
                          .strips = kStrips,
                          .strip_bytes = kBlocks * kStripRows,
                          .entries = is_short ? nullptr : entries.data(),
                          .shorts = shorts.data(),
                          .units = units.data(),
                          .tables = kMostEntryTables,
                          .lanes = lanes,
                          .sums = sums.data(),
                          .pitch = lanes,
                          .add = true};
  const double table = Time([&] { kernels.build_entries(build); }) / kMostEntryTables;
  const double lookups = Time([&] { kernels.sum_entries(sum); }) / (kMostEntryTables * kStrips);
  Print(kernels, is_short ? "entries, 16 bits" : "entries, float32", lanes, table, lookups);
}

}  // namespace

void BenchTables(const std::vector<const Kernels*>& tables) {
  Random random(1);
  const Codes codes(random);
  std::printf("\nns of tables of %zu words of width %zu, for so many rows (one thread)\n%-12s %-22s %4s %12s %16s\n",
              kTableWords, kWidth, "", "", "rows", "to make one", "for 64 lookups");
  for (const Kernels* kernels : tables) {
    if (kernels->sum_tables != nullptr) BenchProducts(*kernels, codes);
    BenchEntries(*kernels, codes, false, random);
    BenchEntries(*kernels, codes, true, random);
  }
}

}  // namespace vqonnx::check
