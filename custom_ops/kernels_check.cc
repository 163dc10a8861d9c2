// Checks every table of kernels that this processor has: kernels_check [seeds [nodes to make no sense of]]. With
// --bench, times the tables instead; with --round-trip, how long a cache line takes to another processor and back.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "check.h"

namespace {

// What two threads pay for each value that one of them writes and the other reads.
void RoundTrip() {
  constexpr int kRounds = 200000;
  alignas(128) std::atomic<int> turn = 0;
  const auto play = [&turn](int own) {
    for (int i = 0; i < kRounds; ++i) {
      while (turn.load(std::memory_order_acquire) != own) continue;
      turn.store(1 - own, std::memory_order_release);
    }
  };
  std::thread other(play, 1);
  const auto start = std::chrono::steady_clock::now();
  play(0);
  other.join();
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
  std::printf("%.0f ns\n", taken.count() / kRounds);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace vqonnx::check;
  if (argc > 1 && std::strcmp(argv[1], "--round-trip") == 0) {
    RoundTrip();
    return 0;
  }
  const vqonnx::Kernels* usable[vqonnx::kMaxTables];
  const std::vector<const vqonnx::Kernels*> tables(usable, usable + vqonnx::UsableKernels(usable));
  if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
    Bench(tables);
    BenchLayers(tables);
    BenchTables(tables);
    return 0;
  }
  const unsigned seeds = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 500;
  const unsigned nodes = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 10000;
  std::string names;
  for (const vqonnx::Kernels* kernels : tables) {
    names += std::string(" ") + kernels->name;
    for (unsigned seed = 0; seed < seeds && failures < 20; ++seed) {
      CheckKernels(*kernels, RandomSample(seed));
      CheckPlan(*kernels, seed);
      CheckLayerKernels(*kernels, seed);
      CheckDots(*kernels, seed);
      CheckEntries(*kernels, seed);
      if (seed % 4 == 0) CheckLayers(*kernels, seed);
    }
    CheckErrors(*kernels);
    CheckSizes(*kernels);
  }
  FuzzLayers(*tables.back(), nodes);
  std::printf("kernels_check: %s, %u seeds of%s, %u nodes\n", failures ? "FAILED" : "ok", seeds, names.c_str(), nodes);
  return failures ? 1 : 0;
}
