// The CPU twin of the two products, by the width of its vectors.
#pragma once

#include "cpu/wide.h"
#include "ops/lowrank_linear.h"

namespace lrc {

// For T = float and Bfloat16, with vectors of 8 floats on any processor, or of 16 where has_avx512().
template <int kWidth, class T> void lowrank_linear(Width<kWidth> width, const LowrankLinearArgs<T>& args);

}  // namespace lrc
