// The range a matrix is brought to before squares are taken, shared by the twins.
#pragma once

#include <cmath>

#include "device.h"

namespace lrc {

// The e for which 2^-e scales the largest entry to [0.5, 1). A power of two scales without rounding; the
// clamp keeps it and its inverse finite.
LRC_HOST_DEVICE LRC_INLINE int scale_exponent(double largest) {
    const int exponent = std::ilogb(largest) + 1;
    return exponent < -1021 ? -1021 : exponent > 1021 ? 1021 : exponent;
}

}  // namespace lrc
