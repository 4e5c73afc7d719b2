// How the CPU twin cuts an image into tiles, and how the input of a tile is brought into its scratch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/row_pairs.h"
#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

inline constexpr std::int64_t kMaxVectors = 8;      // at most, of the encoder's kernel
inline constexpr std::int64_t kPairSize = 3 << 11;  // floats of what is combined: most of an L1 cache
inline constexpr std::int64_t kPairVectors = 4;     // of a row of the products at least, if there are
inline constexpr std::int64_t kTileSize = 1 << 14;  // floats of z: two L1 caches of 32 KiB

// Cuts `size` into the fewest parts of at most `most`, as even as can be: part `index` begins here.
LRC_INLINE std::int64_t cut(std::int64_t size, std::int64_t most, std::int64_t index) {
    const std::int64_t parts = divide_up(size, most);
    return size / parts * index + std::min(index, size % parts);
}

// Room for `size` floats in an odd number of cache lines, so that rows fall into different sets of the L1
// cache.
LRC_INLINE std::int64_t odd_lines(std::int64_t size) { return (divide_up(size, 16) | 1) * 16; }

// How a tile lies in its scratch, the same for all tiles.
struct ConvLayout {
    std::int64_t tile_rows;    // of the output
    std::int64_t tiles;        // of an image
    std::int64_t group_block;  // groups whose input is copied at once
    std::int64_t phase_size;   // columns of one remainder modulo the stride
    std::int64_t row_size;     // of the copy: all remainders
    std::int64_t plane_size;   // of the copy: one input channel
    std::int64_t group_size;   // of the copy: the channels of one group
    std::int64_t z_stride;     // between the rows of z
    bool keeps_zeros;          // of the copy, where the next groups' input is written over the first groups'
    bool paired;               // the encoder makes two rows of the output at a time, see row_pairs.h
    std::int64_t pair_block;   // then: pairs of rows at once
    std::int64_t plane_pairs;  // one combination of their rows in the copy, of a channel
    std::int64_t part_size;    // the same of the channels of one group
    std::int64_t sum_stride;   // between the rows of its products
    std::vector<std::int64_t> taps;     // [channels / groups * kernel area] offsets in what the encoder reads
    std::vector<std::int64_t> sources;  // [vectors, rounded up] offsets of its vectors there
    std::vector<std::int64_t> targets;  // the same in a row of what it writes, ascending
};

// The rows that the encoder makes of `count` rows of the output.
LRC_INLINE std::int64_t made_rows(const ConvLayout& layout, std::int64_t count) {
    return layout.paired ? divide_up(count, 2) * 2 : count;
}

template <class T> std::int64_t choose_tile_rows(const LowrankConv2dArgs<T>& args, bool paired) {
    const std::int64_t row = std::max<std::int64_t>(args.groups * args.rank * args.columns.out, 1);
    const std::int64_t fit = std::clamp<std::int64_t>(kTileSize / row, 1, args.rows.out);
    // A small batch is cut finer, so that every thread has a part.
    const std::int64_t wanted = std::min(divide_up(std::max(args.threads, 1), args.batch), args.rows.out);
    const std::int64_t chosen = divide_up(args.rows.out, std::max(divide_up(args.rows.out, fit), wanted));
    // The same pairs in any tiles.
    return paired && chosen < args.rows.out ? divide_up(chosen, 2) * 2 : chosen;
}

template <int kWidth, class T> void list_offsets(const LowrankConv2dArgs<T>& args, ConvLayout& layout) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    const std::int64_t plane = layout.paired ? layout.plane_pairs : layout.plane_size;
    const std::int64_t kernel_rows = layout.paired ? 1 : rows.kernel;
    layout.taps.reserve(args.channels / args.groups * kernel_rows * columns.kernel);
    for (std::int64_t i = 0; i < args.channels / args.groups; ++i) {
        for (std::int64_t a = 0; a < kernel_rows; ++a) {
            for (std::int64_t b = 0; b < columns.kernel; ++b) {
                const std::int64_t column = b * columns.dilation;
                layout.taps.push_back(i * plane + a * rows.dilation * layout.row_size +
                                      column % columns.stride * layout.phase_size + column / columns.stride);
            }
        }
    }
    const std::int64_t row_vectors = divide_up(columns.out, kWidth);
    const std::int64_t source = layout.row_size * (layout.paired ? 1 : rows.stride);
    const std::int64_t target = layout.paired ? row_vectors * kWidth : columns.out;
    const std::int64_t count = layout.paired ? layout.pair_block : layout.tile_rows;
    for (std::int64_t row = 0; row < count; ++row) {
        for (std::int64_t v = 0; v < row_vectors; ++v) {
            layout.sources.push_back(row * source + v * kWidth);
            layout.targets.push_back(row * target + v * kWidth);
        }
    }
    // The kernel takes some vectors at a time: the last may come again.
    for (std::int64_t i = 1; i < kMaxVectors; ++i) {
        layout.sources.push_back(layout.sources.back());
        layout.targets.push_back(layout.targets.back());
    }
}

// Which of the columns `phase`, `phase` + stride, ... of a padded row lie in the image, and where the first
// of these lies.
struct Inside {
    std::int64_t begin;
    std::int64_t end;
    std::int64_t column;
};

LRC_INLINE Inside find_inside(const ConvAxis& axis, std::int64_t phase, std::int64_t size) {
    const std::int64_t first = phase - axis.padding;
    const std::int64_t begin = first >= 0 ? 0 : std::min(divide_up(-first, axis.stride), size);
    const std::int64_t inside = first >= axis.in ? 0 : divide_up(axis.in - first, axis.stride);
    return {begin, std::clamp(inside, begin, size), first + begin * axis.stride};
}

// The fields of pairs of rows.
template <int kWidth, class T> void plan_pairs(const LowrankConv2dArgs<T>& args, ConvLayout& layout) {
    const std::int64_t inside = args.channels / args.groups;
    const std::int64_t row_vectors = divide_up(args.columns.out, kWidth);
    const std::int64_t pair = kParts * (inside * layout.row_size + args.rank * row_vectors * kWidth);
    layout.pair_block = std::clamp(std::max(kPairSize / pair, divide_up(kPairVectors, row_vectors)),
                                   std::int64_t{1}, divide_up(layout.tile_rows, 2));
    layout.plane_pairs = layout.pair_block * layout.row_size;
    layout.part_size = odd_lines(inside * layout.plane_pairs + kWidth);
    layout.sum_stride = odd_lines(layout.pair_block * row_vectors * kWidth);
}

template <int kWidth, class T> ConvLayout make_layout(const LowrankConv2dArgs<T>& args) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    const std::int64_t inside = args.channels / args.groups;
    ConvLayout layout{};
    layout.paired = pairs_rows(args);
    layout.tile_rows = choose_tile_rows(args, layout.paired);
    layout.tiles = divide_up(rows.out, layout.tile_rows);
    // Channels that lie side by side are copied a vector of them at a time.
    layout.group_block =
        args.channels_last ? std::min(divide_up(kWide, std::max<std::int64_t>(inside, 1)), args.groups) : 1;
    const std::int64_t last_tap = (columns.kernel - 1) * columns.dilation;
    layout.phase_size = divide_up(columns.out, kWidth) * kWidth + last_tap / columns.stride;
    layout.row_size = layout.phase_size * std::min(columns.stride, last_tap + 1);
    // The last vector of a row may reach into the next one, that of the last row behind it.
    const std::int64_t made = made_rows(layout, layout.tile_rows);
    layout.plane_size =
        layout.row_size * ((made - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1) + kWidth;
    layout.group_size = inside * layout.plane_size;
    layout.z_stride = odd_lines(layout.tile_rows * columns.out + kWidth);
    if (layout.paired) plan_pairs<kWidth>(args, layout);
    // A block of fewer pixels than a vector has is written whole.
    layout.keeps_zeros = true;
    for (std::int64_t phase = 0; phase * layout.phase_size < layout.row_size; ++phase) {
        const Inside inside = find_inside(columns, phase, layout.phase_size);
        layout.keeps_zeros &= inside.end - inside.begin >= kWide;
    }
    list_offsets<kWidth>(args, layout);
    return layout;
}

// Whole vectors of zeros: up to kWide - 1 entries behind `end` are overwritten.
LRC_INLINE void clear(float* to, const float* end) {
    for (; to < end; to += kWide) store_wide(to, Wide{});
}

// Columns `phase`, `phase` + stride, ... of one padded row of the input. Like all writers of the copy it
// writes some entries too many, where what comes next in the plane is written later.
template <class T>
LRC_INLINE void copy_phase(const T* from, const ConvAxis& axis, std::int64_t phase, std::int64_t size,
                           float* to) {
    const Inside inside = find_inside(axis, phase, size);
    const std::int64_t count = inside.end - inside.begin;
    clear(to, to + inside.begin);
    float* begin = to + inside.begin;
    const std::int64_t first = inside.column;
    if (axis.stride == 1) {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + q]);
    } else if (axis.stride == 2) {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + 2 * q]);
    } else {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + axis.stride * q]);
    }
    clear(to + inside.end, to + size);
}

LRC_INLINE void transpose(Wide (&m)[8]) {
    Wide a[8], b[8];
    LRC_UNROLL
    for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    LRC_UNROLL
    for (int i = 0; i < 8; i += 4) {
        LRC_UNROLL
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    LRC_UNROLL
    for (int i = 0; i < 4; ++i) {
        m[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        m[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// `lines` channels that lie side by side in each of `columns` pixels, both at most kWide, to a row for each
// channel. Of fewer pixels the last comes again.
template <class T>
LRC_INLINE void copy_block(const T* from, std::int64_t step, std::int64_t columns, std::int64_t lines,
                           std::int64_t plane, float* to) {
    if (lines < kWide) {
        for (std::int64_t k = 0; k < lines; ++k) {
            for (std::int64_t j = 0; j < columns; ++j) to[k * plane + j] = to_float(from[j * step + k]);
        }
        return;
    }
    Wide pixels[kWide];
    LRC_UNROLL
    for (std::int64_t j = 0; j < kWide; ++j) pixels[j] = load_wide(from + std::min(j, columns - 1) * step);
    transpose(pixels);
    LRC_UNROLL
    for (std::int64_t k = 0; k < kWide; ++k) store_wide(to + k * plane, pixels[k]);
}

// What copy_phase does, of `count` channels that lie side by side in each of `stored` channels' pixels; `to`
// is the first one's row. The last block of a row, or of the channels, moves back to be whole.
template <class T>
LRC_INLINE void copy_phase_last(const T* from, std::int64_t stored, std::int64_t count, const ConvAxis& axis,
                                std::int64_t phase, const ConvLayout& layout, bool clears, float* to) {
    const std::int64_t plane = layout.plane_size;
    const Inside inside = find_inside(axis, phase, layout.phase_size);
    for (std::int64_t c = 0; clears && c < count; ++c) clear(to + c * plane, to + c * plane + inside.begin);
    for (std::int64_t q = inside.begin; q < inside.end; q += kWide) {
        const std::int64_t begin = std::max(std::min(q, inside.end - kWide), inside.begin);
        const T* pixels = from + (inside.column + (begin - inside.begin) * axis.stride) * stored;
        for (std::int64_t i = 0; i < count; i += kWide) {
            const std::int64_t c = std::max<std::int64_t>(std::min(i, count - kWide), 0);
            // Strides of whole pixels are not foreseen by the processor.
            for (std::int64_t j = 0; j < kWide; ++j)
                __builtin_prefetch(pixels + c + (j + kWide) * axis.stride * stored);
            copy_block(pixels + c, axis.stride * stored, std::min(kWide, inside.end - begin),
                       std::min(kWide, count - c), plane, to + c * plane + begin);
        }
    }
    for (std::int64_t c = 0; clears && c < count; ++c)
        clear(to + c * plane + inside.end, to + c * plane + layout.phase_size);
}

// What `count` output rows from `row` on read of `channels` channels from `channel` on. Without `clears` the
// zeros around it are there already.
template <class T>
LRC_INLINE void copy_input(const LowrankConv2dArgs<T>& args, const ConvLayout& layout, std::int64_t image,
                           std::int64_t channel, std::int64_t channels, std::int64_t row, std::int64_t count,
                           bool clears, float* to) {
    const ConvAxis& rows = args.rows;
    const T* input = args.input + image * args.channels * rows.in * args.columns.in;
    const std::int64_t needed = (count - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1;
    for (std::int64_t i = 0; i < needed; ++i, to += layout.row_size) {
        const std::int64_t from = row * rows.stride - rows.padding + i;
        if (from < 0 || from >= rows.in) {
            for (std::int64_t c = 0; clears && c < channels; ++c)
                clear(to + c * layout.plane_size, to + c * layout.plane_size + layout.row_size);
            continue;
        }
        for (std::int64_t phase = 0; phase * layout.phase_size < layout.row_size; ++phase) {
            float* begin = to + phase * layout.phase_size;
            if (args.channels_last) {
                const T* pixels = input + from * args.columns.in * args.channels + channel;
                copy_phase_last(pixels, args.channels, channels, args.columns, phase, layout, clears, begin);
                continue;
            }
            for (std::int64_t c = 0; c < channels; ++c) {
                const T* line = input + ((channel + c) * rows.in + from) * args.columns.in;
                copy_phase(line, args.columns, phase, layout.phase_size, begin + c * layout.plane_size);
            }
        }
    }
}

}  // namespace lrc
