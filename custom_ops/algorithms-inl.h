// All algorithms over the vocabulary of kernels-inl.h. In this order: each uses those before it.
// clang-format off
#include "rows-inl.h"
#include "kernels-inl.h"
#include "activation-inl.h"
#include "tile-inl.h"
#include "few-words-inl.h"
#include "dot-inl.h"
#include "entries-inl.h"
#include "windows-inl.h"
#include "depthwise-inl.h"
#include "pool-inl.h"
// clang-format on
