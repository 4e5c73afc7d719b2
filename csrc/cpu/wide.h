// Some floats at a time through the compiler's vector types: what is in memory may be of 16 bits, all
// arithmetic is of float32.
#pragma once

#include <bit>
#include <cstdint>

#include "device.h"
#include "math/activation.h"
#include "math/floats.h"

namespace lrc {

// The types of a width: a register of AVX holds 8 floats, one of AVX-512 holds 16.
template <int kWidth> struct Vectors;
template <> struct Vectors<8> {
    typedef float Floats __attribute__((vector_size(32), may_alias));
    typedef float LooseFloats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef std::uint32_t Bits __attribute__((vector_size(32), may_alias));
    typedef std::uint16_t Halves __attribute__((vector_size(16), may_alias));
    typedef std::uint16_t LooseHalves __attribute__((vector_size(16), aligned(2), may_alias));
};
template <> struct Vectors<16> {
    typedef float Floats __attribute__((vector_size(64), may_alias));
    typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));
    typedef std::uint32_t Bits __attribute__((vector_size(64), may_alias));
    typedef std::uint16_t Halves __attribute__((vector_size(32), may_alias));
    typedef std::uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));
};
template <int kWidth> using Floats = typename Vectors<kWidth>::Floats;
template <class V> using VectorsOf = Vectors<sizeof(V) / sizeof(float)>;

template <int kWidth> struct Width {};  // to choose among functions

inline constexpr std::int64_t kWide = 8;
using Wide = Floats<kWide>;
using WideBits = Vectors<kWide>::Bits;
using WideHalves = Vectors<kWide>::Halves;
using LooseHalves = Vectors<kWide>::LooseHalves;

template <int kWidth> LRC_INLINE Floats<kWidth> load_floats(const float* p) {
    return *reinterpret_cast<const typename Vectors<kWidth>::LooseFloats*>(p);
}
template <int kWidth> LRC_INLINE Floats<kWidth> load_floats(const Bfloat16* p) {
    using Bits = typename Vectors<kWidth>::Bits;
    const typename Vectors<kWidth>::Halves halves =
        *reinterpret_cast<const typename Vectors<kWidth>::LooseHalves*>(p);
    return std::bit_cast<Floats<kWidth>>(__builtin_convertvector(halves, Bits) << 16);
}
template <class T> LRC_INLINE Wide load_wide(const T* p) { return load_floats<kWide>(p); }

template <class V> LRC_INLINE void store_wide(float* p, V x) {
    *reinterpret_cast<typename VectorsOf<V>::LooseFloats*>(p) = x;
}
// As from_float<Bfloat16> does.
template <class V> LRC_INLINE void store_wide(Bfloat16* p, V x) {
    using Bits = typename VectorsOf<V>::Bits;
    const auto bits = std::bit_cast<Bits>(x);
    const Bits rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Bits quiet = bits >> 16 | 0x40;
    const Bits chosen = x == x ? rounded : quiet;
    *reinterpret_cast<typename VectorsOf<V>::LooseHalves*>(p) =
        __builtin_convertvector(chosen, typename VectorsOf<V>::Halves);
}

// The first `count` of them.
template <class T, class V> LRC_INLINE void store_some(T* p, V x, std::int64_t count) {
    constexpr std::int64_t kWidth = sizeof(V) / sizeof(float);
    T all[kWidth];
    store_wide(all, x);
    for (std::int64_t i = 0; i < kWidth; ++i) {
        if (i < count) p[i] = all[i];
    }
}

// e^x for x <= 0, within 2e-7 of itself; 0 where that is below the smallest normal float. The polynomial is
// the Chebyshev fit of e^r over |r| <= log(2) / 2.
template <class V> LRC_INLINE V exp_negative(V x) {
    using Bits = typename VectorsOf<V>::Bits;
    constexpr float kLowest = -87.33654F;
    constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const V clamped = x < kLowest ? V{} + kLowest : x;
    const V shifted = clamped * 1.44269504F + kMagic;
    const V n = shifted - kMagic;
    const V r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
    V sum = V{} + 0.00138294277F;
    for (const float c : {0.00837477762F, 0.0416683592F, 0.166664213F, 0.499999911F, 1.0F, 1.0F})
        sum = sum * r + c;
    const Bits exponent = (std::bit_cast<Bits>(shifted) - std::bit_cast<std::uint32_t>(kMagic)) << 23;
    const auto scaled = std::bit_cast<V>(std::bit_cast<Bits>(sum) + exponent);
    return x < kLowest ? V{} : scaled;
}

template <class V> LRC_INLINE V magnitude(V x) { return x < 0.0F ? -x : x; }

// x Phi(x). With t = 1 / (1 + 0.47 |x|) the tail Phi(-|x|) is t e^(-x^2 / 2) times a polynomial in t, within
// 3e-7 of itself.
template <class V> LRC_INLINE V gelu(V x) {
    const V t = 1.0F / (1.0F + 0.47F * magnitude(x));
    V sum = V{} + 0.0475151390F;
    for (const float c : {-0.258650064F, 0.560391247F, -0.556637466F, 0.168585360F, 0.00998190325F,
                          0.154514804F, 0.186769411F, 0.187529668F})
        sum = sum * t + c;
    const V tail = t * sum * exp_negative(-0.5F * x * x);
    return x * (x < 0.0F ? tail : 1.0F - tail);
}

template <class V> LRC_INLINE V silu(V x) {
    const V e = exp_negative(-magnitude(x));
    const V scaled = x / (1.0F + e);
    return x < 0.0F ? scaled * e : scaled;
}

template <class V> LRC_INLINE V activate(Activation activation, V x) {
    const V active = x < kLowestActive ? V{} + kLowestActive : x;
    switch (activation) {
        case Activation::kRelu:
            return x < 0.0F ? V{} : x;
        case Activation::kGelu:
            return gelu(active);
        case Activation::kSilu:
            return silu(active);
        default:
            return x;
    }
}

}  // namespace lrc
