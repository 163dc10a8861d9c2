// The ops that compute a linear layer straight from its codes.
#ifndef VQONNX_FUSED_H_
#define VQONNX_FUSED_H_

#include <memory>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace vqonnx {

// One for each op. onnxruntime keeps pointers to them.
std::vector<std::shared_ptr<OrtCustomOp>> FusedOps(const Kernels& kernels);

}  // namespace vqonnx

#endif  // VQONNX_FUSED_H_
