// The two 16-bit floats as bits, so that no header of a device or a compiler is needed to name them.
#pragma once

#include <bit>
#include <cstdint>

#include "device.h"

namespace lrc {

// The upper half of a float32.
struct Bfloat16 {
    std::uint16_t bits;
};

// IEEE 754 binary16.
struct Half {
    std::uint16_t bits;
};

LRC_HOST_DEVICE LRC_INLINE float to_float(float x) { return x; }
LRC_HOST_DEVICE LRC_INLINE float to_float(Bfloat16 x) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// Rounds to nearest, ties to even; not a number stays not a number.
template <class T> LRC_HOST_DEVICE LRC_INLINE T from_float(float x);
template <> LRC_HOST_DEVICE LRC_INLINE float from_float<float>(float x) { return x; }
template <> LRC_HOST_DEVICE LRC_INLINE Bfloat16 from_float<Bfloat16>(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return {static_cast<std::uint16_t>(x != x ? bits >> 16 | 0x40 : rounded)};
}

}  // namespace lrc
