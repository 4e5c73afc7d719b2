// How the CPU twin cuts images into tiles, and what its parts have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

inline constexpr std::int64_t kTileSize = 1 << 14;  // floats of z: two L1 caches of 32 KiB

LRC_INLINE std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Cuts `size` into the fewest parts of at most `most`, as even as can be: part `index` begins here.
LRC_INLINE std::int64_t cut(std::int64_t size, std::int64_t most, std::int64_t index) {
    const std::int64_t parts = divide_up(size, most);
    return size / parts * index + std::min(index, size % parts);
}

// Room for `size` floats in an odd number of cache lines, so that rows fall into different sets of the L1
// cache.
LRC_INLINE std::int64_t odd_lines(std::int64_t size) { return (divide_up(size, 16) | 1) * 16; }

// How images are cut into tasks: some rows of the output each.
struct Tiling {
    std::int64_t rows;   // of a tile
    std::int64_t tiles;  // of an image
};

// One of these.
struct ImageTile {
    std::int64_t image;
    std::int64_t row;
    std::int64_t rows;
};

template <class T>
LRC_INLINE ImageTile find_tile(const LowrankConv2dArgs<T>& args, const Tiling& tiling, std::int64_t task) {
    const std::int64_t row = task % tiling.tiles * tiling.rows;
    return {task / tiling.tiles, row, std::min(tiling.rows, args.rows.out - row)};
}

// z of a tile, in which the ranks or the pixels lie side by side.
struct Hidden {
    const float* z;
    std::int64_t pixel;  // strides, one of which is 1
    std::int64_t term;
};

// `in_twos`: only whole twos of rows, but for the last tile.
template <class T> Tiling cut_images(const LowrankConv2dArgs<T>& args, bool in_twos) {
    const std::int64_t row = std::max<std::int64_t>(args.groups * args.rank * args.columns.out, 1);
    const std::int64_t fit = std::clamp<std::int64_t>(kTileSize / row, 1, args.rows.out);
    // A small batch is cut finer, so that every thread has a part.
    const std::int64_t wanted = std::min(divide_up(std::max(args.threads, 1), args.batch), args.rows.out);
    const std::int64_t even = divide_up(args.rows.out, std::max(divide_up(args.rows.out, fit), wanted));
    const std::int64_t rows = in_twos && even < args.rows.out ? divide_up(even, 2) * 2 : even;
    return {rows, divide_up(args.rows.out, rows)};
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

// Transposes `lines` entries that lie side by side in each of `columns` columns, both at most kWide, to a row
// for each entry. Of fewer columns the last comes again.
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

}  // namespace lrc
