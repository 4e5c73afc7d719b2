// The factors as the CPU twin reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/lowrank_conv2d_winograd.h"

namespace lrc {
namespace {

// Entries that the decoder's kernel makes side by side.
template <int kWidth> constexpr std::int64_t kPair = 2 * kWidth;

// The factors in float32. Where channels lie side by side, U is transposed in strips of `pair` filters,
// [strips, groups rank, pair]; what is behind the last filter is of no meaning.
struct Weights {
    const float* encoder;  // V, or its factors of Winograd's products
    const float* decoder;
    const float* bias;  // [filters, rounded up to `pair`], zeros without one
};

struct PackedWeights {
    std::unique_ptr<float[]> numbers;
    Weights weights;  // null for V and U that are read where they lie

    template <class T> Weights with(const LowrankConv2dArgs<T>& args) const {
        Weights all = weights;
        if constexpr (std::is_same_v<T, float>) {
            if (all.encoder == nullptr) all.encoder = args.encoder;
            if (all.decoder == nullptr) all.decoder = args.decoder;
        }
        return all;
    }
};

template <class T> LRC_INLINE void convert(const T* from, std::int64_t size, float* to) {
    for (std::int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

template <class T>
LRC_INLINE void pack_decoder(const LowrankConv2dArgs<T>& args, std::int64_t pair, float* decoder) {
    const std::int64_t inner = args.groups * args.rank;
    if (!args.channels_last) return convert(args.decoder, args.filters * inner, decoder);
    if (args.filters % pair != 0) {
        const std::int64_t whole = args.filters / pair * pair * inner;
        std::fill_n(decoder + whole, pair * inner, 0.0F);
    }
    for (std::int64_t f = 0; f < args.filters; f += kWide) {
        float* strip = decoder + f / pair * pair * inner + f % pair;
        for (std::int64_t i = 0; i < inner; i += kWide) {
            const std::int64_t m = std::max<std::int64_t>(std::min(i, inner - kWide), 0);
            copy_block(args.decoder + f * inner + m, inner, std::min(kWide, args.filters - f),
                       std::min(kWide, inner - m), pair, strip + m * pair);
        }
    }
}

// Whether V is read from a copy.
template <class T> bool packs_encoder(const LowrankConv2dArgs<T>& args) {
    return !std::is_same_v<T, float> || args.encoder_last || uses_winograd(args);
}

// V as the factors of Winograd's products, [groups, kParts, channels / groups, rank_stride]: zeros behind the
// last rank.
template <class T>
LRC_INLINE void pack_winograd(const LowrankConv2dArgs<T>& args, std::int64_t rank_stride, float* to) {
    constexpr int kTaps = 9;
    const std::int64_t inside = args.channels / args.groups, part = inside * rank_stride;
    std::fill_n(to, args.groups * kParts * part, 0.0F);
    for (std::int64_t group = 0; group < args.groups; ++group, to += kParts * part) {
        for (std::int64_t r = 0; r < args.rank; r += kWide) {
            const std::int64_t count = std::min(kWide, args.rank - r);
            const T* from = args.encoder + (group * args.rank + r) * inside * kTaps;
            for (std::int64_t i = 0; i < inside; ++i, from += kTaps) {
                float taps[kTaps][kWide] = {};
                for (std::int64_t q = 0; q < count; ++q) {
                    for (int t = 0; t < kTaps; ++t) taps[t][q] = to_float(from[q * inside * kTaps + t]);
                }
                const auto tap = [&](int a, int b) { return load_wide(taps[3 * a + b]); };
                transform_kernels(tap, part, to + i * rank_stride + r);
            }
        }
    }
}

template <class T>
LRC_INLINE void pack_weights(const LowrankConv2dArgs<T>& args, std::int64_t width, PackedWeights& packed) {
    const std::int64_t pair = 2 * width;
    const std::int64_t inside = args.channels / args.groups, columns = args.columns.kernel;
    const std::int64_t filters = divide_up(args.filters, pair) * pair;
    const std::int64_t rank_stride = divide_up(args.rank, width) * width;
    const bool winograds = uses_winograd(args), packs = packs_encoder(args);
    const bool packs_decoder = !std::is_same_v<T, float> || args.channels_last;
    const std::int64_t group =
        winograds ? kParts * inside * rank_stride : args.rank * inside * args.rows.kernel * columns;
    const std::int64_t decoder_size = packs_decoder ? filters * args.groups * args.rank : 0;
    const std::int64_t encoder_size = packs ? args.groups * group : 0;
    packed.numbers = std::make_unique_for_overwrite<float[]>(filters + decoder_size + encoder_size);
    float* bias = packed.numbers.get();
    float* decoder = bias + filters;
    float* encoder = decoder + decoder_size;
    std::fill_n(bias, filters, 0.0F);
    if (args.bias != nullptr) convert(args.bias, args.filters, bias);
    if (packs_decoder) pack_decoder(args, pair, decoder);
    if (winograds) {
        pack_winograd(args, rank_stride, encoder);
    } else if (packs) {
        convert(args.encoder, encoder_size, encoder);
    }
    packed.weights = {
        .encoder = packs ? encoder : nullptr, .decoder = packs_decoder ? decoder : nullptr, .bias = bias};
}

}  // namespace
}  // namespace lrc
