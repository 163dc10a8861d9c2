// Checks every table of kernels that this processor has: kernels_check [seeds [nodes to make no sense of]]. With
// --bench, times the tables instead.
#include <cstdlib>
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  using namespace vqonnx::check;
  const vqonnx::Kernels* usable[vqonnx::kMaxTables];
  const std::vector<const vqonnx::Kernels*> tables(usable, usable + vqonnx::UsableKernels(usable));
  if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
    Bench(tables);
    BenchLayers(tables);
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
      if (seed % 4 == 0) CheckLayers(*kernels, seed);
    }
    CheckErrors(*kernels);
  }
  FuzzLayers(*tables.back(), nodes);
  std::printf("kernels_check: %s, %u seeds of%s, %u nodes\n", failures ? "FAILED" : "ok", seeds, names.c_str(), nodes);
  return failures ? 1 : 0;
}
