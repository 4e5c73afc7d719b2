// The second product of a tile: U times z, the bias and the activation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lowrank_conv2d_weights.h"
#include "cpu/simd.h"

namespace lrc {
namespace {

inline constexpr std::int64_t kLines = 6;              // of kPair entries: their sums fill 16 registers
inline constexpr std::int64_t kDecoderSize = 1 << 12;  // floats of U: half an L1 cache of 32 KiB

// A product of two matrices with `terms` terms: out[i, j] = activation(sum_m a[i, m] b[m, j] + bias), the
// bias of j where channels lie side by side, else of i.
template <class T> struct Product {
    const float* a;  // [lines, terms], by its strides
    std::int64_t a_line;
    std::int64_t a_term;
    const float* b;  // [terms, kPair<kWidth>], by the stride of its terms
    std::int64_t b_term;
    const float* bias;
    T* out;  // [lines, width], by the stride of its lines
    std::int64_t out_line;
    std::int64_t width;  // <= kPair<kWidth>
    std::int64_t terms;
    Activation activation;
};

// Not inlined: its constants would take the registers of the sums.
void activate_all(Activation activation, float* values, const float* end);

// The first `count` entries of a vector, if there are any, or all of it.
template <class T, class V> LRC_INLINE void store_first(T* to, V x, std::int64_t count) {
    if (count >= static_cast<std::int64_t>(sizeof(V) / sizeof(float))) {
        store_wide(to, x);
    } else if (count > 0) {
        store_some(to, x, count);
    }
}

template <int kWidth, int kCount, bool kLast, bool kByLine, class T>
LRC_INLINE void multiply(const Product<T>& product) {
    const std::int64_t line = kByLine ? 1 : product.a_line, term = kByLine ? product.a_term : 1;
    Floats<kWidth> sums[kCount][2];
    LRC_UNROLL
    for (int i = 0; i < kCount; ++i) {
        LRC_UNROLL
        for (int v = 0; v < 2; ++v)
            sums[i][v] =
                kLast ? load_floats<kWidth>(product.bias + v * kWidth) : Floats<kWidth>{} + product.bias[i];
    }
    const float* a = product.a;
    const float* b = product.b;
    for (std::int64_t m = 0; m < product.terms; ++m, a += term, b += product.b_term) {
        const Floats<kWidth> low = load_floats<kWidth>(b), high = load_floats<kWidth>(b + kWidth);
        LRC_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const float factor = a[i * line];
            sums[i][0] += factor * low;
            sums[i][1] += factor * high;
        }
    }
    if (product.activation == Activation::kRelu) {
        LRC_UNROLL
        for (int i = 0; i < kCount; ++i) {
            LRC_UNROLL
            for (int v = 0; v < 2; ++v) sums[i][v] = activate(Activation::kRelu, sums[i][v]);
        }
    } else if (product.activation != Activation::kNone) {
        float held[kCount * kPair<kWidth>];
        LRC_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) store_wide(held + i * kWidth, sums[i / 2][i % 2]);
        activate_all(product.activation, held, held + kCount * kPair<kWidth>);
        LRC_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) sums[i / 2][i % 2] = load_floats<kWidth>(held + i * kWidth);
    }
    LRC_UNROLL
    for (int i = 0; i < kCount; ++i) {
        T* out = product.out + i * product.out_line;
        store_first(out, sums[i][0], product.width);
        store_first(out + kWidth, sums[i][1], product.width - kWidth);
    }
}

// kByLine: what is of one term lies side by side in `a`, else what is of one line.
template <int kWidth, bool kLast, bool kByLine, class T>
LRC_INLINE void multiply(const Product<T>& product, std::int64_t lines) {
    switch (lines) {
        case 1:
            return multiply<kWidth, 1, kLast, kByLine>(product);
        case 2:
            return multiply<kWidth, 2, kLast, kByLine>(product);
        case 3:
            return multiply<kWidth, 3, kLast, kByLine>(product);
        case 4:
            return multiply<kWidth, 4, kLast, kByLine>(product);
        case 5:
            return multiply<kWidth, 5, kLast, kByLine>(product);
        default:
            return multiply<kWidth, 6, kLast, kByLine>(product);
    }
}

// All filters of a tile of `pixels` pixels, where pixels lie side by side; `out` is its first pixel of the
// first filter.
template <int kWidth, class T>
LRC_INLINE void decode_first(const LowrankConv2dArgs<T>& args, const Weights& weights, const Hidden& hidden,
                             std::int64_t pixels, T* out) {
    const std::int64_t terms = args.groups * args.rank;
    const std::int64_t plane = args.rows.out * args.columns.out;
    for (std::int64_t pixel = 0; pixel < pixels; pixel += kPair<kWidth>) {
        for (std::int64_t part = 0; part < divide_up(args.filters, kLines); ++part) {
            const std::int64_t first = cut(args.filters, kLines, part);
            const Product<T> product{.a = weights.decoder + first * terms,
                                     .a_line = terms,
                                     .a_term = 1,
                                     .b = hidden.z + pixel,
                                     .b_term = hidden.term,
                                     .bias = weights.bias + first,
                                     .out = out + first * plane + pixel,
                                     .out_line = plane,
                                     .width = std::min(kPair<kWidth>, pixels - pixel),
                                     .terms = terms,
                                     .activation = args.activation};
            multiply<kWidth, false, false>(product, cut(args.filters, kLines, part + 1) - first);
        }
    }
}

// The same where channels lie side by side; `out` is the tile's first pixel.
template <int kWidth, bool kByLine, class T>
LRC_INLINE void decode_last(const LowrankConv2dArgs<T>& args, const Weights& weights, const Hidden& hidden,
                            std::int64_t pixels, T* out) {
    const std::int64_t terms = args.groups * args.rank;
    const std::int64_t parts = divide_up(pixels, kLines), strips = divide_up(args.filters, kPair<kWidth>);
    // What is gone through again and again, all of U or one strip of it, stays in the L1 cache.
    const bool stays = strips * kPair<kWidth> * terms <= kDecoderSize;
    for (std::int64_t outer = 0; outer < (stays ? parts : strips); ++outer) {
        for (std::int64_t nested = 0; nested < (stays ? strips : parts); ++nested) {
            const std::int64_t part = stays ? outer : nested;
            const std::int64_t filter = kPair<kWidth> * (stays ? nested : outer);
            const std::int64_t first = cut(pixels, kLines, part);
            const Product<T> product{.a = hidden.z + first * hidden.pixel,
                                     .a_line = hidden.pixel,
                                     .a_term = hidden.term,
                                     .b = weights.decoder + filter * terms,
                                     .b_term = kPair<kWidth>,
                                     .bias = weights.bias + filter,
                                     .out = out + first * args.filters + filter,
                                     .out_line = args.filters,
                                     .width = std::min(kPair<kWidth>, args.filters - filter),
                                     .terms = terms,
                                     .activation = args.activation};
            multiply<kWidth, true, kByLine>(product, cut(pixels, kLines, part + 1) - first);
        }
    }
}

template <int kWidth, class T>
LRC_INLINE void decode_tile(const LowrankConv2dArgs<T>& args, const Weights& weights, const Hidden& hidden,
                            const ImageTile& tile) {
    const std::int64_t pixels = tile.rows * args.columns.out, pixel = tile.row * args.columns.out;
    T* out = args.out + tile.image * args.filters * args.rows.out * args.columns.out;
    if (args.channels_last && hidden.pixel == 1) {
        decode_last<kWidth, true>(args, weights, hidden, pixels, out + pixel * args.filters);
    } else if (args.channels_last) {
        decode_last<kWidth, false>(args, weights, hidden, pixels, out + pixel * args.filters);
    } else {
        decode_first<kWidth>(args, weights, hidden, pixels, out + pixel);
    }
}

}  // namespace
}  // namespace lrc
