// The first product of a tile by Winograd's algorithm: vectors run along the ranks of a group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/wide.h"
#include "cpu/winograd.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

inline constexpr std::int64_t kBlock = 12;  // squares of the output at once: whole calls of the kernel

// How a tile lies in its scratch, the same for all tiles.
struct WinogradLayout {
    std::int64_t inside;       // channels of a group, >= kWide
    std::int64_t vectors;      // of them, the last of which moves back to be whole
    std::int64_t rank_stride;  // rank, rounded up to whole vectors
    std::int64_t z_stride;     // between the pixels of z
    std::int64_t z_size;       // of a tile
    std::int64_t copy_size;    // of the input of a group, where its channels do not lie side by side
    std::vector<float> zeros;  // the channels of a group around the image
    std::int64_t line_stride;  // between the ranks of z where the output's pixels lie side by side
};

// Whether the encoder is Winograd's: what it saves must be more than what the transforms take, whose weight
// here is read off bench/lowrank_conv2d_encoders.py. Says the same for any batch, number of threads and width
// of vectors, so that the bits do not depend on them.
template <class T> bool uses_winograd(const LowrankConv2dArgs<T>& args) {
    const auto fits = [](const ConvAxis& axis) {
        return axis.kernel == 3 && axis.stride == 1 && axis.dilation == 1 && axis.out > 1;
    };
    const std::int64_t inside = args.channels / args.groups;
    const std::int64_t rank = divide_up(args.rank, kWide) * kWide;
    const bool saves = 9 * inside * args.rank > 4 * inside * rank + 14 * inside + 18 * rank;
    const bool wanted =
        args.algorithm == ConvEncoder::kAuto ? saves : args.algorithm == ConvEncoder::kWinograd;
    return wanted && inside >= kWide && args.rank > 0 && fits(args.rows) && fits(args.columns);
}

template <int kWidth, class T>
WinogradLayout make_winograd_layout(const LowrankConv2dArgs<T>& args, std::int64_t tile_rows) {
    const std::int64_t inside = args.channels / args.groups, vectors = divide_up(inside, kWide);
    const std::int64_t rank_stride = divide_up(args.rank, kWidth) * kWidth;
    const std::int64_t z_stride = (args.groups - 1) * args.rank + rank_stride;
    const std::int64_t pixels = tile_rows * args.columns.out;
    const std::int64_t input = (tile_rows + kSquareIn - 1) * args.columns.in * inside;
    return {.inside = inside,
            .vectors = vectors,
            .rank_stride = rank_stride,
            .z_stride = z_stride,
            .z_size = divide_up(pixels * z_stride, 16) * 16,
            .copy_size = args.channels_last ? 0 : divide_up(input, 16) * 16,
            .zeros = std::vector<float>(inside),
            .line_stride = args.channels_last ? 0 : odd_lines(pixels + kWidth)};
}

// Floats of a block's input, [vectors, kParts, kBlock, kWide], and of its products, [rank_stride / width,
// kParts, kBlock, width].
inline std::int64_t block_size(const WinogradLayout& layout) {
    return kParts * kBlock * (layout.vectors * kWide + layout.rank_stride);
}
// Floats of the scratch.
template <class T>
std::int64_t scratch_size(const LowrankConv2dArgs<T>& args, const WinogradLayout& layout) {
    const std::int64_t lines = args.groups * args.rank * layout.line_stride;
    return layout.z_size + block_size(layout) + std::max(layout.copy_size, lines);
}
// Calls of Ahead::fetch() in a tile of `rows` rows.
template <class T>
std::int64_t fetch_calls(const LowrankConv2dArgs<T>& args, const WinogradLayout&, std::int64_t rows) {
    return args.groups * divide_up(rows, kSquareOut) * divide_up(args.columns.out, kSquareOut);
}

// z of a tile, in `scratch`; `encoder` is V as pack_winograd() leaves it. For T = float and Bfloat16, and
// both widths.
template <int kWidth, class T>
Hidden encode(Width<kWidth> width, const LowrankConv2dArgs<T>& args, const WinogradLayout& layout,
              const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch);

}  // namespace lrc
