// The first product of a tile as direct sums: vectors run along the columns of the image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

inline constexpr std::int64_t kMaxVectors = 8;  // at most, of the kernel

// How a tile of the direct encoder lies in its scratch, the same for all tiles.
struct DirectLayout {
    std::int64_t group_block;  // groups whose input is copied at once
    std::int64_t phase_size;   // columns of one remainder modulo the stride
    std::int64_t row_size;     // of the copy: all remainders
    std::int64_t plane_size;   // of the copy: one input channel
    std::int64_t group_size;   // of the copy: the channels of one group
    std::int64_t z_stride;     // between the rows of z
    bool keeps_zeros;          // of the copy, where the next groups' input is written over the first groups'
    std::vector<std::int64_t> taps;     // [channels / groups * kernel area] offsets in what the encoder reads
    std::vector<std::int64_t> sources;  // [vectors, rounded up] offsets of its vectors there
    std::vector<std::int64_t> targets;  // the same in a row of what it writes, ascending
};

template <int kWidth, class T>
void list_offsets(const LowrankConv2dArgs<T>& args, std::int64_t tile_rows, DirectLayout& layout) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    layout.taps.reserve(args.channels / args.groups * rows.kernel * columns.kernel);
    for (std::int64_t i = 0; i < args.channels / args.groups; ++i) {
        for (std::int64_t a = 0; a < rows.kernel; ++a) {
            for (std::int64_t b = 0; b < columns.kernel; ++b) {
                const std::int64_t column = b * columns.dilation;
                layout.taps.push_back(i * layout.plane_size + a * rows.dilation * layout.row_size +
                                      column % columns.stride * layout.phase_size + column / columns.stride);
            }
        }
    }
    const std::int64_t row_vectors = divide_up(columns.out, kWidth);
    for (std::int64_t row = 0; row < tile_rows; ++row) {
        for (std::int64_t v = 0; v < row_vectors; ++v) {
            layout.sources.push_back(row * layout.row_size * rows.stride + v * kWidth);
            layout.targets.push_back(row * columns.out + v * kWidth);
        }
    }
    // The kernel takes some vectors at a time: the last may come again.
    for (std::int64_t i = 1; i < kMaxVectors; ++i) {
        layout.sources.push_back(layout.sources.back());
        layout.targets.push_back(layout.targets.back());
    }
}

template <int kWidth, class T>
DirectLayout make_direct_layout(const LowrankConv2dArgs<T>& args, std::int64_t tile_rows) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    const std::int64_t inside = args.channels / args.groups;
    DirectLayout layout{};
    // Channels that lie side by side are copied a vector of them at a time.
    layout.group_block =
        args.channels_last ? std::min(divide_up(kWide, std::max<std::int64_t>(inside, 1)), args.groups) : 1;
    const std::int64_t last_tap = (columns.kernel - 1) * columns.dilation;
    layout.phase_size = divide_up(columns.out, kWidth) * kWidth + last_tap / columns.stride;
    layout.row_size = layout.phase_size * std::min(columns.stride, last_tap + 1);
    // The last vector of a row may reach into the next one, that of the last row behind it.
    layout.plane_size =
        layout.row_size * ((tile_rows - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1) + kWidth;
    layout.group_size = inside * layout.plane_size;
    layout.z_stride = odd_lines(tile_rows * columns.out + kWidth);
    // A block of fewer pixels than a vector has is written whole.
    layout.keeps_zeros = true;
    for (std::int64_t phase = 0; phase * layout.phase_size < layout.row_size; ++phase) {
        const Inside inside = find_inside(columns, phase, layout.phase_size);
        layout.keeps_zeros &= inside.end - inside.begin >= kWide;
    }
    list_offsets<kWidth>(args, tile_rows, layout);
    return layout;
}

// Floats of the scratch.
template <class T> std::int64_t scratch_size(const LowrankConv2dArgs<T>& args, const DirectLayout& layout) {
    return args.groups * args.rank * layout.z_stride + layout.group_block * layout.group_size;
}
// Calls of Ahead::fetch() in a tile of `rows` rows, about.
template <class T> std::int64_t fetch_calls(const LowrankConv2dArgs<T>& args, const DirectLayout&,
                                            std::int64_t rows) {
    return args.groups * divide_up(args.rank, 4) * divide_up(rows * divide_up(args.columns.out, kWide), 3);
}

// z of a tile, at the beginning of `scratch`; `encoder` is V. For T = float and Bfloat16, and both widths.
template <int kWidth, class T>
Hidden encode(Width<kWidth> width, const LowrankConv2dArgs<T>& args, const DirectLayout& layout,
              const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch);

}  // namespace lrc
