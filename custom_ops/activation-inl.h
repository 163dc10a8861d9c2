// What becomes of a value at last, over the vocabulary of kernels-inl.h and, from `Wide`:
//
//   MulAdd(a, b, c), Div(a, b)
//   Max(a, b), Min(a, b)     b where one of them is NaN
//   ToExponent(a)            the bits of `a`, shifted left to where the exponent is
//
// No include guard and no standard library on purpose: see docs/kernels.md.

namespace vqonnx {
namespace {

// x / (1 + exp(-x)), within 3e-7 of the result and 1e-36; of infinity it is what the formula is: infinity, or NaN.
//
// exp(-x) is 2^n * exp(-r), where x = r - n * log(2) and |r| is at most log(2) / 2. Below -88.7 the power is infinity,
// and above 87.7 it is zero.
VQONNX_INLINE auto Silu(decltype(Wide::Set(0.0F)) x) {
  const auto one = Wide::Set(1.0F);
  const float round =
      0x1.8p23F + 127.0F;  // a sum with it has a whole number, and the exponent's bias, in its last bits
  const auto within = Wide::Min(Wide::Set(88.0F), Wide::Max(Wide::Set(-89.0F), x));
  const auto shifted = Wide::MulAdd(within, Wide::Set(-0x1.715476p0F), Wide::Set(round));
  const auto n = Wide::Add(shifted, Wide::Set(-round));
  auto r = Wide::MulAdd(n, Wide::Set(0x1.63p-1F), within);  // log(2) in two parts: n times the first one is exact
  r = Wide::MulAdd(n, Wide::Set(-0x1.bd0106p-13F), r);
  auto exp = Wide::MulAdd(r, Wide::Set(-0x1.0fa77cp-7F), Wide::Set(0x1.573b4cp-5F));  // of least relative error
  exp = Wide::MulAdd(r, exp, Wide::Set(-0x1.555a7p-3F));
  exp = Wide::MulAdd(r, exp, Wide::Set(0x1.fffdc2p-2F));
  exp = Wide::MulAdd(r, exp, Wide::Set(-0x1.fffff6p-1F));
  exp = Wide::MulAdd(r, exp, one);
  return Wide::Div(x, Wide::MulAdd(exp, Wide::ToExponent(shifted), one));
}

// kSilu is what the activation says, so that nothing is decided in a loop.
template <bool kSilu>
struct Activate {
  using V = decltype(Wide::Set(0.0F));
  V low, high;
  VQONNX_INLINE explicit Activate(const Activation& a) : low(Wide::Set(a.low)), high(Wide::Set(a.high)) {}
  VQONNX_INLINE V operator()(V value) const {
    if constexpr (kSilu) {
      return Silu(value);
    } else {
      return Wide::Min(high, Wide::Max(low, value));
    }
  }
};

}  // namespace
}  // namespace vqonnx
