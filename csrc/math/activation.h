// What may follow a layer: each function of one float, the same on every device.
#pragma once

#include <cmath>

#include "device.h"

namespace lrc {

// The numbers are those of ACTIVATIONS in lrcompress/ops/_activations.py.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// Below it GELU and SiLU are -0 in float. So is their limit at -infinity, where their formulas have 0
// infinity.
inline constexpr float kLowestActive = -120.0F;

// GELU is the exact one, x Phi(x); SiLU is x / (1 + e^-x). Not a number stays not a number.
LRC_HOST_DEVICE LRC_INLINE float activate(Activation activation, float x) {
    const float active = x < kLowestActive ? kLowestActive : x;
    switch (activation) {
        case Activation::kRelu:
            return x < 0.0F ? 0.0F : x;
        case Activation::kGelu:
            return 0.5F * active * (1.0F + erff(active * 0.70710678118654752F));
        case Activation::kSilu:
            return active / (1.0F + expf(-active));
        default:
            return x;
    }
}

}  // namespace lrc
