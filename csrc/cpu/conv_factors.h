// The factors of a convolution, packed in this call or in an earlier one.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/packed_factors.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

// The same arguments with V as [groups rank, channels / groups, rows.kernel, columns.kernel], in `room` where
// the caller's does not lie so, which encoder_last goes on saying.
template <class T>
LowrankConv2dArgs<T> with_standard_encoder(LowrankConv2dArgs<T> args, std::vector<T>& room) {
    if (!args.encoder_last) return args;
    const std::int64_t inside = args.channels / args.groups, taps = args.rows.kernel * args.columns.kernel;
    room.resize(args.groups * args.rank * inside * taps);
    T* to = room.data();
    for (std::int64_t q = 0; q < args.groups * args.rank; ++q) {
        const T* from = args.encoder + q * inside * taps;
        for (std::int64_t i = 0; i < inside; ++i) {
            for (std::int64_t tap = 0; tap < taps; ++tap) *to++ = from[tap * inside + i];
        }
    }
    args.encoder = room.data();
    return args;
}

// make(arguments with V as above), or what it made of equal factors the last time. `kind` tells apart the
// types and layouts that are made of the same sizes; without `reads_encoder` V is no part of what is made.
template <class Made, class T, class Make>
std::shared_ptr<const Made> packed_factors(const LowrankConv2dArgs<T>& args, std::int64_t kind,
                                           bool reads_encoder, const Make& make) {
    const auto pack = [&] {
        std::vector<T> room;
        return make(with_standard_encoder(args, room));
    };
    if (args.packed == nullptr) return pack();
    const ConvAxis& y = args.rows;
    const ConvAxis& x = args.columns;
    const std::int64_t layouts =
        (static_cast<std::int64_t>(args.algorithm) * 2 + args.channels_last) * 2 + args.encoder_last;
    const PackedFactors::Key key = {kind,        sizeof(T), layouts,    args.channels, args.filters,
                                    args.groups, args.rank, y.in,       y.out,         y.kernel,
                                    y.stride,    y.padding, y.dilation, x.in,          x.out,
                                    x.kernel,    x.stride,  x.padding,  x.dilation};
    const std::int64_t inner = args.groups * args.rank;
    const auto bytes = [](const T* from, std::int64_t size) {
        return std::as_bytes(std::span<const T>(from, from == nullptr ? 0 : size));
    };
    const std::int64_t size = reads_encoder ? inner * (args.channels / args.groups) * y.kernel * x.kernel : 0;
    const std::array sources = {bytes(args.encoder, size), bytes(args.decoder, args.filters * inner),
                                bytes(args.bias, args.filters)};
    return args.packed->template get<Made>(key, sources, pack);
}

}  // namespace lrc
