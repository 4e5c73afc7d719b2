// The CPU twin of the convolution, by the width of its vectors.
#pragma once

#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

// For T = float and Bfloat16, with vectors of 8 floats on any processor, or of 16 where has_avx512(). Both
// add the terms of a sum in the same order.
template <int kWidth, class T> void lowrank_conv2d(Width<kWidth> width, const LowrankConv2dArgs<T>& args);

}  // namespace lrc
