// What may follow a layer: each function of one float, the same on every device.
#pragma once

#include <cmath>

#include "device.h"

namespace lrc {

// The numbers are those of ACTIVATIONS in lrcompress/ops/_activations.py.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// GELU is the exact one, x Phi(x); SiLU is x / (1 + e^-x). Not a number stays not a number.
LRC_HOST_DEVICE LRC_INLINE float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::kRelu:
            return x < 0.0F ? 0.0F : x;
        case Activation::kGelu:
            return 0.5F * x * (1.0F + erff(x * 0.70710678118654752F));
        case Activation::kSilu:
            return x / (1.0F + expf(-x));
        default:
            return x;
    }
}

}  // namespace lrc
