// The kernel of the CPU twin for bfloat16 on tiles. A task is some output rows of one image, as it is
// without tiles, but pixels are the lines of the products and channels their columns.
//
// The group's input is copied to [row, column, channel], zeros around it. Where the columns of the kernel are
// not dilated, what one of its rows reads for a pixel is one run of the copy, and the next pixel's begins a
// fixed distance later: a tile of 16 pixels is loaded from the copy as it lies. Rows of one remainder modulo
// the stride are neighbours in the copy, so the distance from the last pixel of a row to the first of the
// next is some pixels too: pixels are counted through all rows, those between two rows are computed for
// nothing and dropped.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "cpu/conv_factors.h"
#include "cpu/lowrank_conv2d_amx_layout.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/parallel.h"
#include "cpu/tile_product.h"
#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

// Products that an instruction on tiles must stand for. It takes 16 cycles, in which vectors make 256 of
// them, but also what is laid out for it and read back takes time. Timed ad hoc on one processor with tiles,
// layers of bench/lowrank_conv2d.py: 18 to 84 products were slower than without, 144 and more faster at a
// batch of 64. bench/lowrank_conv2d_encoders.py --dtype bfloat16 compares where tiles are chosen, not where
// they are not.
inline constexpr std::int64_t kTileProducts = 112;

// Whether a group's steps on tiles are faster than its sums without.
LRC_INLINE bool fills_tiles(const LowrankConv2dArgs<Bfloat16>& args) {
    const std::int64_t inside = args.channels / args.groups;
    const std::int64_t taps = args.rows.kernel * args.columns.kernel;
    const std::int64_t joined = tiled::joined_taps(args.columns);
    const std::int64_t steps = taps / joined * cut_terms(padded_terms(inside, joined) * joined).count;
    return kTileProducts * steps * divide_up(args.rank, kTileSide) <= args.rank * inside * taps;
}

// The CPU twin on the tiles of AMX, for a processor that has them.
void lowrank_conv2d_amx(const LowrankConv2dArgs<Bfloat16>& args);

namespace tiled {

struct Scratch {
    TileMemory copy;
    TileMemory z;      // [pixels, z_stride]
    TileMemory pairs;  // the same as B, where channels do not lie side by side
    Scratch(const ConvArgs& args, const Layout& layout)
        : copy(layout.copy_size), z(layout.z_size), pairs(args.channels_last ? 0 : layout.z_size) {}
};

// Two channels' rows of 8 columns, an entry of the one and of the other by turns.
LRC_INLINE Wide interleave(const Bfloat16* even, const Bfloat16* odd) {
    const WideHalves a = *reinterpret_cast<const LooseHalves*>(even);
    const WideHalves b = odd == nullptr ? WideHalves{} : *reinterpret_cast<const LooseHalves*>(odd);
    return std::bit_cast<Wide>(
        __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}

// 8 columns of up to 16 channels, `plane` entries apart; `lines` of them, even, are to be written, and those
// from `stored` on are zeros.
LRC_INLINE void copy_columns(const Bfloat16* from, std::int64_t plane, std::int64_t stored,
                             std::int64_t lines, std::int64_t column, Bfloat16* to) {
    Wide pairs[kWide];
    for (std::int64_t k = 0; k < kWide; ++k) {
        const Bfloat16* even = from + 2 * k * plane;
        pairs[k] = 2 * k >= stored ? Wide{} : interleave(even, 2 * k + 1 < stored ? even + plane : nullptr);
    }
    transpose(pairs);
    for (std::int64_t j = 0; j < kWide; ++j) {
        if (lines == 2 * kWide) {
            store_wide(reinterpret_cast<float*>(to + j * column), pairs[j]);
            continue;
        }
        alignas(32) Bfloat16 entries[2 * kWide];
        store_wide(reinterpret_cast<float*>(entries), pairs[j]);
        std::int64_t k = 0;
        if (lines >= kWide) {
            *reinterpret_cast<LooseHalves*>(to + j * column) = *reinterpret_cast<LooseHalves*>(entries);
            k = kWide;
        }
        for (; k < lines; ++k) to[j * column + k] = entries[k];
    }
}

// `count` columns of one row of the group, [channels, columns], to [columns, layout.inside].
LRC_INLINE void copy_planes(const Bfloat16* from, std::int64_t plane, std::int64_t channels,
                            std::int64_t count, const Layout& layout, Bfloat16* to) {
    const std::int64_t inside = layout.inside;
    if (layout.columns.stride > 1 || count < kWide) {
        for (std::int64_t q = 0; q < count; ++q) {
            for (std::int64_t c = 0; c < channels; ++c)
                to[q * inside + c] = from[c * plane + q * layout.columns.stride];
        }
        return;
    }
    for (std::int64_t q = 0; q < count; q += kWide) {
        const std::int64_t begin = std::min(q, count - kWide);  // the last block moves back to be whole
        for (std::int64_t c = 0; c < channels; c += 2 * kWide) {
            copy_columns(from + c * plane + begin, plane, std::min(channels - c, 2 * kWide),
                         std::min(inside - c, 2 * kWide), inside, to + begin * inside + c);
        }
    }
}

// The same of [columns, channels of all groups].
LRC_INLINE void copy_pixels(const Bfloat16* from, std::int64_t stored, std::int64_t channels,
                            std::int64_t count, const Layout& layout, Bfloat16* to) {
    const std::int64_t inside = layout.inside;
    if (layout.columns.stride == 1 && channels == stored && channels == inside) {
        std::copy_n(from, count * channels, to);
        return;
    }
    for (std::int64_t q = 0; q < count; ++q, from += layout.columns.stride * stored, to += inside) {
        if (channels < kWide) {
            for (std::int64_t c = 0; c < channels; ++c) to[c] = from[c];
        } else {
            for (std::int64_t c = 0; c < channels; c += kWide) {
                const std::int64_t k = std::min(c, channels - kWide);  // the last vector moves back
                *reinterpret_cast<LooseHalves*>(to + k) = *reinterpret_cast<const LooseHalves*>(from + k);
            }
        }
    }
}

// What `count` output rows from `row` on read of one group. Zeros beside the columns of the image, and those
// of channels that there are not, are there from the beginning and stay.
LRC_INLINE void copy_group(const ConvArgs& args, const Layout& layout, std::int64_t image, std::int64_t group,
                           std::int64_t row, std::int64_t count, Bfloat16* copy) {
    const ConvAxis& rows = args.rows;
    const std::int64_t channels = args.channels / args.groups;
    const std::int64_t width = args.columns.in, plane = rows.in * width;
    const Bfloat16* input = args.input + image * args.channels * plane;
    const Inside inside = find_inside(layout.columns, 0, layout.pitch);
    const std::int64_t needed = (count - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1;
    for (std::int64_t i = 0; i < needed; ++i) {
        if (i % rows.stride >= layout.phases) continue;
        Bfloat16* to = copy + layout.copied_row(rows, i);
        const std::int64_t y = row * rows.stride - rows.padding + i;
        if (y < 0 || y >= rows.in) {
            std::fill_n(to, layout.pitch * layout.inside, Bfloat16{});
            continue;
        }
        Bfloat16* begin = to + inside.begin * layout.inside;
        const std::int64_t columns = inside.end - inside.begin;
        if (args.channels_last) {
            const Bfloat16* from = input + (y * width + inside.column) * args.channels + group * channels;
            copy_pixels(from, args.channels, channels, columns, layout, begin);
        } else {
            const Bfloat16* from = input + group * channels * plane + y * width + inside.column;
            copy_planes(from, plane, channels, columns, layout, begin);
        }
    }
}

// The first `count` <= 16 of a row of sums, and zeros up to a whole vector. The sums behind them need not be
// zero: no number times zero is, where it is infinite.
LRC_INLINE void store_codes(Bfloat16* to, const float* sums, std::int64_t count) {
    constexpr WideBits kLane{0, 1, 2, 3, 4, 5, 6, 7};
    for (std::int64_t i = 0; i < count; i += kWide) {
        const Wide all = load_wide(sums + i);
        const auto left = static_cast<std::uint32_t>(count - i);
        store_wide(to + i, kLane < left ? all : Wide{});
    }
}

// z of `count` rows of one group.
template <class Tiles>
LRC_INLINE void encode_group(Tiles& tiles, const ConvArgs& args, const Layout& layout, const Factors& factors,
                             std::int64_t group, std::int64_t count, const Scratch& scratch) {
    const std::int64_t width = args.columns.out;
    const TileProduct product{.a = scratch.copy.data(),
                              .a_line = layout.step * layout.inside,
                              .offsets = layout.encoder_offsets.data(),
                              .b = factors.encoder.data() + group * Factors::encoder_group(args, layout),
                              .b_tile = Factors::encoder_tile(layout),
                              .steps = layout.encoder,
                              .line_tiles = divide_up((count - 1) * layout.row_pixels + width, kTileSide),
                              .column_tiles = divide_up(args.rank, kTileSide)};
    multiply_all(tiles, product,
                 [&](std::int64_t line, std::int64_t column, const float* sums) LRC_INLINE_LAMBDA {
                     std::int64_t row = line * kTileSide / layout.row_pixels;
                     std::int64_t pixel = line * kTileSide % layout.row_pixels;
                     const std::int64_t first = column * kTileSide;
                     Bfloat16* z = scratch.z.data() + group * args.rank + first;
                     for (std::int64_t m = 0; m < kTileSide && row < count; ++m) {
                         if (pixel < width) {
                             store_codes(z + (row * width + pixel) * layout.z_stride, sums + m * kTileSide,
                                         std::min(args.rank - first, kTileSide));
                         }
                         if (++pixel == layout.row_pixels) {
                             pixel = 0;
                             ++row;
                         }
                     }
                 });
}

// z as B.
LRC_INLINE void pair_pixels(const Layout& layout, std::int64_t pixels, const Scratch& scratch) {
    const std::int64_t stride = layout.z_stride;
    for (std::int64_t pixel = 0; pixel < pixels; pixel += kWide) {
        Bfloat16* to = scratch.pairs.data() + place_of_column(pixel, stride * kTileSide);
        for (std::int64_t q = 0; q < stride; q += kPairedTerms)
            pair_lines(scratch.z.data() + pixel * stride + q, stride, to + q * kTileSide);
    }
}

// Bias, activation and rounding of a tile of sums, kLast where channels lie side by side: [pixels, filters],
// else the other way round.
template <bool kLast>
LRC_INLINE void finish(const ConvArgs& args, const Factors& factors, std::int64_t filter, std::int64_t pixels,
                       const float* sums, Bfloat16* out) {
    const std::int64_t filters = std::min(args.filters - filter, kTileSide);
    const std::int64_t rows = kLast ? pixels : filters, count = kLast ? filters : pixels;
    const std::int64_t line = kLast ? args.filters : args.rows.out * args.columns.out;
    const float* bias = factors.bias.data() + filter;
    for (std::int64_t m = 0; m < rows; ++m) {
        for (std::int64_t i = 0; i < count; i += kWide) {
            const Wide add = kLast ? load_wide(bias + i) : Wide{} + bias[m];
            const Wide y = activate(args.activation, load_wide(sums + m * kTileSide + i) + add);
            if (i + kWide <= count) {
                store_wide(out + m * line + i, y);
            } else {
                store_some(out + m * line + i, y, count - i);
            }
        }
    }
}

// All filters of `pixels` pixels; `out` is the first one's first filter.
template <bool kLast, class Tiles>
LRC_INLINE void decode(Tiles& tiles, const ConvArgs& args, const Layout& layout, const Factors& factors,
                       std::int64_t pixels, const Scratch& scratch, Bfloat16* out) {
    const std::int64_t pixel_tiles = divide_up(pixels, kTileSide);
    const std::int64_t filter_tiles = divide_up(args.filters, kTileSide);
    const TileProduct product{.a = kLast ? scratch.z.data() : factors.decoder.data(),
                              .a_line = kLast ? layout.z_stride : layout.inner,
                              .offsets = layout.decoder_offsets.data(),
                              .b = kLast ? factors.decoder.data() : scratch.pairs.data(),
                              .b_tile = kTileSide * (kLast ? layout.inner : layout.z_stride),
                              .steps = layout.decoder,
                              .line_tiles = kLast ? pixel_tiles : filter_tiles,
                              .column_tiles = kLast ? filter_tiles : pixel_tiles};
    multiply_all(tiles, product,
                 [&](std::int64_t line, std::int64_t column, const float* sums) LRC_INLINE_LAMBDA {
                     const std::int64_t filter = kTileSide * (kLast ? column : line);
                     const std::int64_t pixel = kTileSide * (kLast ? line : column);
                     Bfloat16* to = out + (kLast ? pixel * args.filters + filter
                                                 : filter * args.rows.out * args.columns.out + pixel);
                     finish<kLast>(args, factors, filter, std::min(pixels - pixel, kTileSide), sums, to);
                 });
}

template <class Tiles>
LRC_INLINE void run_task(const ConvArgs& args, const Layout& layout, const Factors& factors,
                         std::int64_t task, const Scratch& scratch) {
    const std::int64_t image = task / layout.tiles;
    const std::int64_t row = task % layout.tiles * layout.tile_rows;
    const std::int64_t count = std::min(layout.tile_rows, args.rows.out - row);
    const std::int64_t pixels = count * args.columns.out, pixel = row * args.columns.out;
    Bfloat16* out = args.out + image * args.filters * args.rows.out * args.columns.out;
    Tiles tiles;
    tiles.configure(tile_config(layout.encoder));
    for (std::int64_t group = 0; group < args.groups; ++group) {
        copy_group(args, layout, image, group, row, count, scratch.copy.data());
        encode_group(tiles, args, layout, factors, group, count, scratch);
    }
    tiles.configure(tile_config(layout.decoder));
    if (args.channels_last) {
        decode<true>(tiles, args, layout, factors, pixels, scratch, out + pixel * args.filters);
    } else {
        pair_pixels(layout, pixels, scratch);
        decode<false>(tiles, args, layout, factors, pixels, scratch, out + pixel);
    }
    tiles.release();
}

// Kernel::pack and Kernel::run are pack_factors, and run_task of some tiles, compiled for the processor that
// has them.
template <class Kernel> void run_all(const ConvArgs& args) {
    if (args.batch * args.filters * args.rows.out * args.columns.out == 0) return;
    const Layout layout = make_tiled_layout(args);
    const auto make = [&](const ConvArgs& standard) {
        auto made = std::make_shared<Factors>(standard, layout);
        Kernel::pack(standard, layout, *made);
        return made;
    };
    constexpr std::int64_t kKind = 0;  // the others are widths of vectors
    const auto factors = packed_factors<Factors>(args, kKind, true, make);
    const std::int64_t tasks = args.batch * layout.tiles;
    std::vector<Scratch> scratch;
    for (int worker = 0; worker < worker_count(args.threads, tasks); ++worker)
        scratch.emplace_back(args, layout);
    parallel_for(args.threads, tasks, [&](int worker, std::int64_t task) noexcept {
        Kernel::run(args, layout, *factors, task, scratch[worker]);
    });
}

}  // namespace tiled
}  // namespace lrc
