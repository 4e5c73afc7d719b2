// Eight floats at a time through the compiler's vector types: what is in memory may be of 16 bits, all
// arithmetic is of float32.
#pragma once

#include <bit>
#include <cstdint>

#include "device.h"
#include "math/activation.h"
#include "math/floats.h"

namespace lrc {

inline constexpr std::int64_t kWide = 8;

typedef float Wide __attribute__((vector_size(32), may_alias));
typedef std::uint32_t WideBits __attribute__((vector_size(32), may_alias));
typedef std::uint16_t WideHalves __attribute__((vector_size(16), may_alias));
typedef float LooseWide __attribute__((vector_size(32), aligned(4), may_alias));
typedef std::uint16_t LooseHalves __attribute__((vector_size(16), aligned(2), may_alias));

LRC_INLINE Wide load_wide(const float* p) { return *reinterpret_cast<const LooseWide*>(p); }
LRC_INLINE Wide load_wide(const Bfloat16* p) {
    const WideHalves halves = *reinterpret_cast<const LooseHalves*>(p);
    return std::bit_cast<Wide>(__builtin_convertvector(halves, WideBits) << 16);
}

LRC_INLINE void store_wide(float* p, Wide x) { *reinterpret_cast<LooseWide*>(p) = x; }
// As from_float<Bfloat16> does.
LRC_INLINE void store_wide(Bfloat16* p, Wide x) {
    const auto bits = std::bit_cast<WideBits>(x);
    const WideBits rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const WideBits quiet = bits >> 16 | 0x40;
    const WideBits chosen = x == x ? rounded : quiet;
    *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(chosen, WideHalves);
}

// The first `count` of them.
template <class T> LRC_INLINE void store_some(T* p, Wide x, std::int64_t count) {
    T all[kWide];
    store_wide(all, x);
    for (std::int64_t i = 0; i < kWide; ++i) {
        if (i < count) p[i] = all[i];
    }
}

// e^x for x <= 0, within 2e-7 of itself; 0 where that is below the smallest normal float. The polynomial is
// the Chebyshev fit of e^r over |r| <= log(2) / 2.
LRC_INLINE Wide exp_negative(Wide x) {
    constexpr float kLowest = -87.33654F;
    constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Wide clamped = x < kLowest ? Wide{} + kLowest : x;
    const Wide shifted = clamped * 1.44269504F + kMagic;
    const Wide n = shifted - kMagic;
    const Wide r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
    Wide sum = Wide{} + 0.00138294277F;
    for (const float c : {0.00837477762F, 0.0416683592F, 0.166664213F, 0.499999911F, 1.0F, 1.0F})
        sum = sum * r + c;
    const WideBits exponent = (std::bit_cast<WideBits>(shifted) - std::bit_cast<std::uint32_t>(kMagic)) << 23;
    const auto scaled = std::bit_cast<Wide>(std::bit_cast<WideBits>(sum) + exponent);
    return x < kLowest ? Wide{} : scaled;
}

LRC_INLINE Wide magnitude(Wide x) { return x < 0.0F ? -x : x; }

// x Phi(x). With t = 1 / (1 + 0.47 |x|) the tail Phi(-|x|) is t e^(-x^2 / 2) times a polynomial in t, within
// 3e-7 of itself.
LRC_INLINE Wide gelu(Wide x) {
    const Wide t = 1.0F / (1.0F + 0.47F * magnitude(x));
    Wide sum = Wide{} + 0.0475151390F;
    for (const float c : {-0.258650064F, 0.560391247F, -0.556637466F, 0.168585360F, 0.00998190325F,
                          0.154514804F, 0.186769411F, 0.187529668F})
        sum = sum * t + c;
    const Wide tail = t * sum * exp_negative(-0.5F * x * x);
    return x * (x < 0.0F ? tail : 1.0F - tail);
}

LRC_INLINE Wide silu(Wide x) {
    const Wide e = exp_negative(-magnitude(x));
    const Wide scaled = x / (1.0F + e);
    return x < 0.0F ? scaled * e : scaled;
}

LRC_INLINE Wide activate(Activation activation, Wide x) {
    switch (activation) {
        case Activation::kRelu:
            return x < 0.0F ? Wide{} : x;
        case Activation::kGelu:
            return gelu(x);
        case Activation::kSilu:
            return silu(x);
        default:
            return x;
    }
}

}  // namespace lrc
