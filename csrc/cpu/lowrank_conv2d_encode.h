// The first product of a tile, z of one group.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/simd.h"

namespace lrc {
namespace {

constexpr int kRegisters = 16;               // of AVX2; AVX-512 has more
constexpr std::int64_t kVectors = 12;        // of a part of z: whole calls of the kernels
constexpr std::int64_t kCopySize = 1 << 12;  // floats: half an L1 cache of 32 KiB

// Vectors [begin, end) of kRank rows of z from one group, kCount at once: each vector that is loaded serves
// all the ranks.
template <int kWidth, int kRank, int kCount>
LRC_INLINE void encode(const float* copy, const float* weights, const ConvLayout& layout, std::int64_t begin,
                       std::int64_t end, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t* taps = layout.taps.data();
    const std::int64_t stride = layout.paired ? layout.sum_stride : layout.z_stride;
    for (std::int64_t v = begin; v < end; v += kCount) {
        const float* from[kCount];
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) from[c] = copy + layout.sources[v + c];
        Floats<kWidth> sums[kRank][kCount] = {};
        for (std::int64_t m = 0; m < terms; ++m) {
            // Either all that is loaded of x stays in registers beside the sums and a weight, or the weights.
            if constexpr (kRank * kCount + kCount < kRegisters) {
                Floats<kWidth> x[kCount];
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) x[c] = load_floats<kWidth>(from[c] + taps[m]);
                LRC_UNROLL
                for (int r = 0; r < kRank; ++r) {
                    LRC_UNROLL
                    for (int c = 0; c < kCount; ++c) sums[r][c] += weights[r * terms + m] * x[c];
                }
            } else {
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) {
                    const Floats<kWidth> x = load_floats<kWidth>(from[c] + taps[m]);
                    LRC_UNROLL
                    for (int r = 0; r < kRank; ++r) sums[r][c] += weights[r * terms + m] * x;
                }
            }
        }
        // In ascending order: what a row's last vector holds too much, the next row replaces.
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) {
            LRC_UNROLL
            for (int r = 0; r < kRank; ++r) store_wide(z + r * stride + layout.targets[v + c], sums[r][c]);
        }
    }
}

// All rows of z of one group: 4 at once by 3 vectors, or 3 by 4 where that takes fewer calls of the kernel.
template <int kWidth>
LRC_INLINE void encode_rows(const float* copy, const float* weights, std::int64_t rank,
                            const ConvLayout& layout, std::int64_t vectors, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t most =
        divide_up(rank, 3) * divide_up(vectors, 4) < divide_up(rank, 4) * divide_up(vectors, 3) ? 3 : 4;
    // A copy that the L1 cache does not hold is gone through once, some vectors by all ranks at a time.
    const bool once = rank > most && (layout.paired ? layout.part_size : layout.group_size) > kCopySize;
    const std::int64_t size = once ? kVectors : vectors;
    for (std::int64_t begin = 0; begin < vectors; begin += size) {
        const std::int64_t end = std::min(begin + size, vectors);
        for (std::int64_t part = 0; part < divide_up(rank, most); ++part) {
            const std::int64_t first = cut(rank, most, part);
            const float* rows = weights + first * terms;
            float* to = z + first * (layout.paired ? layout.sum_stride : layout.z_stride);
            switch (cut(rank, most, part + 1) - first) {
                case 1:
                    encode<kWidth, 1, 8>(copy, rows, layout, begin, end, to);
                    break;
                case 2:
                    encode<kWidth, 2, 4>(copy, rows, layout, begin, end, to);
                    break;
                case 3:
                    encode<kWidth, 3, 4>(copy, rows, layout, begin, end, to);
                    break;
                default:
                    encode<kWidth, 4, 3>(copy, rows, layout, begin, end, to);
            }
        }
    }
}

// Not inlined: the loops of the kernels need all registers.
LRC_MULTIVERSION void encode_group(Width<8>, const float* copy, const float* weights, std::int64_t rank,
                                   const ConvLayout& layout, std::int64_t vectors, float* z) {
    encode_rows<8>(copy, weights, rank, layout, vectors, z);
}
LRC_AVX512 void encode_group(Width<16>, const float* copy, const float* weights, std::int64_t rank,
                             const ConvLayout& layout, std::int64_t vectors, float* z) {
    encode_rows<16>(copy, weights, rank, layout, vectors, z);
}

// `count` rows of z of one group by pairs: the combinations of its input, their products, and the
// combinations of these. `scratch` has room for the first two.
template <int kWidth, class T>
LRC_INLINE void encode_pairs(const LowrankConv2dArgs<T>& args, const ConvLayout& layout, const float* copy,
                             const float* weights, std::int64_t count, float* scratch, float* z) {
    const std::int64_t inside = args.channels / args.groups, columns = args.columns.out;
    const std::int64_t kernel_part = kernel_part_size(args.rank, inside, args.columns.kernel);
    const std::int64_t part = args.rank * layout.sum_stride;
    float* sums = scratch;
    float* parts = scratch + kParts * part;
    for (std::int64_t row = 0; row < count; row += 2 * layout.pair_block) {
        const std::int64_t rows = std::min(2 * layout.pair_block, count - row), pairs = divide_up(rows, 2);
        for (std::int64_t i = 0; i < inside; ++i) {
            combine_input<kWidth>(copy + i * layout.plane_size + row * layout.row_size, layout.row_size,
                                  pairs, layout.part_size, parts + i * layout.plane_pairs);
        }
        for (std::int64_t t = 0; t < kParts; ++t) {
            encode_group(Width<kWidth>{}, parts + t * layout.part_size, weights + t * kernel_part, args.rank,
                         layout, pairs * divide_up(columns, kWidth), sums + t * part);
        }
        for (std::int64_t r = 0; r < args.rank; ++r) {
            combine_output<kWidth>(sums + r * layout.sum_stride, part, rows, columns,
                                   z + r * layout.z_stride + row * columns);
        }
    }
}

}  // namespace
}  // namespace lrc
