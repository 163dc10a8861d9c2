// What a layer may do to be fast. Knows neither onnxruntime nor intrinsics.
#ifndef VQONNX_PRECISION_H_
#define VQONNX_PRECISION_H_

namespace vqonnx {

// kFast allows tables of 16 bits, kAuto only where their error is small. For checks, kTables takes those of products
// wherever there can be some, kEntries those of entries in float32, kShorts those in 16 bits.
enum class Precision { kAuto, kExact, kFast, kTables, kEntries, kShorts };

// The relative error of a layer up to which kAuto allows it, as it is expected.
constexpr double kMostError = 2.5e-4;

// Magnitudes whose squares float can represent.
constexpr float kHuge = 1e18F, kTiny = 1e-18F;

// Whether tables of 16 bits can deal with inputs of which this is the largest magnitude, and lose no more than they
// should: finite, and neither huge nor tiny.
constexpr bool CanRound(float largest) { return largest == 0.0F || (largest > kTiny && largest < kHuge); }

}  // namespace vqonnx

#endif  // VQONNX_PRECISION_H_
