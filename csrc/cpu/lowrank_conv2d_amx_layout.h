// How the kernel on tiles (cpu/lowrank_conv2d_amx.h) lays out what it copies, and the factors as it wants
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/tile_product.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {
namespace tiled {

using ConvArgs = LowrankConv2dArgs<Bfloat16>;

LRC_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// How a task lies in its scratch, the same for all tasks. Sizes are of entries, but for pixels and rows.
struct Layout {
    std::int64_t tile_rows;  // of the output
    std::int64_t tiles;      // of an image
    std::int64_t inside;     // channels of a group, with those of zeros
    ConvAxis columns;        // the stride is that from a column of the copy to the next, in the image
    std::int64_t step;       // columns of the copy from a pixel to the next
    std::int64_t pitch;      // columns of a row of the copy
    std::int64_t phases;     // remainders of rows modulo the stride, of those that are read
    std::int64_t phase_rows;
    std::int64_t row_pixels;  // from a row's first pixel to the next row's
    TileSteps encoder;
    TileSteps decoder;
    std::int64_t inner;     // groups rank, with the terms of zeros
    std::int64_t z_stride;  // between the pixels of z
    std::int64_t copy_size;
    std::int64_t z_size;
    std::vector<std::int64_t> encoder_offsets;  // of the steps, in the copy
    std::vector<std::int64_t> decoder_offsets;  // of the steps, in a pixel of z or a filter of U

    // Row i of those that a task reads.
    LRC_INLINE std::int64_t copied_row(const ConvAxis& rows, std::int64_t i) const {
        return (i % rows.stride * phase_rows + i / rows.stride) * pitch * inside;
    }
};

// Taps of one row of the kernel that lie side by side in the copy.
LRC_INLINE std::int64_t joined_taps(const ConvAxis& columns) {
    return columns.dilation == 1 ? columns.kernel : 1;
}

inline void list_steps(const ConvArgs& args, Layout& layout) {
    const ConvAxis& columns = args.columns;
    const std::int64_t joined = joined_taps(columns);
    const TileSteps run = cut_terms(joined * layout.inside);
    for (std::int64_t a = 0; a < args.rows.kernel; ++a) {
        for (std::int64_t b = 0; b < columns.kernel; b += joined) {
            const std::int64_t begin =
                layout.copied_row(args.rows, a * args.rows.dilation) + b * columns.dilation * layout.inside;
            for (std::int64_t s = 0; s < run.count; ++s)
                layout.encoder_offsets.push_back(begin + s * run.terms);
        }
    }
    layout.encoder = {static_cast<std::int64_t>(layout.encoder_offsets.size()), run.terms};
    for (std::int64_t s = 0; s < layout.decoder.count; ++s)
        layout.decoder_offsets.push_back(s * layout.decoder.terms);
}

// Rows of a task: z and the copy stay in the L2 cache, and no tile is left to a few pixels.
inline std::int64_t choose_rows(const ConvArgs& args, const Layout& layout) {
    constexpr std::int64_t kZSize = 1 << 15, kCopySize = 1 << 17;  // entries
    constexpr std::int64_t kPixels = 4 * kTileSide;  // at least, for which the factors are loaded once
    const std::int64_t rows = args.rows.out, pixels = args.columns.out;
    const std::int64_t row_size = layout.pitch * layout.inside * std::min(args.rows.stride, args.rows.kernel);
    const std::int64_t fit = std::min(kZSize / std::max<std::int64_t>(layout.inner * pixels, 1),
                                      kCopySize / std::max<std::int64_t>(row_size, 1));
    const std::int64_t most = std::max(fit, divide_up(kPixels, pixels));
    // A small batch is cut finer, so that every thread has a part.
    const std::int64_t wanted =
        std::min(divide_up(std::max(args.threads, 1), args.batch), divide_up(rows * pixels, kTileSide));
    const std::int64_t even = divide_up(rows, std::max(divide_up(rows, most), std::min(wanted, rows)));
    return pixels == 1 ? std::min(round_up(even, kTileSide), rows) : even;
}

inline Layout make_tiled_layout(const ConvArgs& args) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    Layout layout{};
    layout.inside = padded_terms(args.channels / args.groups, joined_taps(columns));
    // A kernel one column wide reads some columns only: the copy has no others.
    layout.step = columns.kernel == 1 ? 1 : columns.stride;
    layout.columns = columns;
    layout.columns.stride = columns.stride / layout.step;
    const std::int64_t last_tap = (columns.kernel - 1) * columns.dilation;
    layout.pitch = round_up((columns.out - 1) * layout.step + last_tap + 1, layout.step);
    layout.row_pixels = layout.pitch / layout.step;
    const std::int64_t last_row = (rows.kernel - 1) * rows.dilation;
    layout.phases = std::min(rows.stride, last_row + 1);
    layout.inner = padded_terms(args.groups * args.rank, 1);
    layout.decoder = cut_terms(layout.inner);
    layout.tile_rows = choose_rows(args, layout);
    layout.tiles = divide_up(rows.out, layout.tile_rows);
    layout.phase_rows = divide_up((layout.tile_rows - 1) * rows.stride + last_row + 1, rows.stride);
    list_steps(args, layout);
    // A group's codes are stored in whole vectors.
    const std::int64_t stored = (args.groups - 1) * args.rank + round_up(args.rank, kWide);
    layout.z_stride = round_up(std::max(layout.inner, stored), kTileSide);
    layout.z_size = round_up(layout.tile_rows * columns.out, kTileSide) * layout.z_stride;
    // The last tile may have more pixels than there are.
    const std::int64_t pixels = (layout.tile_rows - 1) * layout.row_pixels + columns.out;
    const std::int64_t last_pixel = (round_up(pixels, kTileSide) - 1) * layout.step * layout.inside;
    layout.copy_size = layout.phases * layout.phase_rows * layout.pitch * layout.inside;
    for (const std::int64_t offset : layout.encoder_offsets)
        layout.copy_size = std::max(layout.copy_size, last_pixel + offset + layout.encoder.terms);
    return layout;
}

// V as B, a group after the other. U as B where the lines of the product are pixels, which is where channels
// lie side by side; else as A, the lines being filters.
struct Factors {
    TileMemory encoder;
    TileMemory decoder;
    std::vector<float> bias;  // [filters, rounded up to 16], zeros without one

    static std::int64_t encoder_tile(const Layout& layout) {
        return layout.encoder.count * layout.encoder.terms * kTileSide;
    }
    static std::int64_t encoder_group(const ConvArgs& args, const Layout& layout) {
        return divide_up(args.rank, kTileSide) * encoder_tile(layout);
    }
    Factors(const ConvArgs& args, const Layout& layout)
        : encoder(args.groups * encoder_group(args, layout)),
          decoder(round_up(args.filters, kTileSide) * layout.inner),
          bias(round_up(args.filters, kTileSide)) {}
};

// V's terms [channels / groups, rows.kernel, columns.kernel], in the order of the copy.
inline std::vector<PackedTerm> encoder_terms(const ConvArgs& args, const Layout& layout) {
    const std::int64_t taps = args.rows.kernel * args.columns.kernel;
    std::vector<PackedTerm> terms;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
        for (std::int64_t i = 0; i < args.channels / args.groups; ++i)
            terms.push_back(packed_term(i * taps + tap, tap * layout.inside + i));
    }
    return terms;
}

LRC_INLINE void pack_factors(const ConvArgs& args, const Layout& layout, Factors& factors) {
    const std::int64_t inner = args.groups * args.rank;
    for (std::int64_t f = 0; args.bias != nullptr && f < args.filters; ++f)
        factors.bias[f] = to_float(args.bias[f]);
    const std::vector<PackedTerm> terms = encoder_terms(args, layout);
    const auto line = static_cast<std::int64_t>(terms.size());
    for (std::int64_t group = 0; group < args.groups; ++group) {
        const Bfloat16* from = args.encoder + group * args.rank * line;
        Bfloat16* to = factors.encoder.data() + group * Factors::encoder_group(args, layout);
        if (args.rows.kernel * args.columns.kernel == 1) {
            pack_lines(from, args.rank, line, Factors::encoder_tile(layout), to);
        } else {
            pack_lines(from, args.rank, line, terms, Factors::encoder_tile(layout), to);
        }
    }
    if (args.channels_last) {
        pack_lines(args.decoder, args.filters, inner, layout.inner * kTileSide, factors.decoder.data());
    } else {
        for (std::int64_t f = 0; f < args.filters; ++f)
            std::copy_n(args.decoder + f * inner, inner, factors.decoder.data() + f * layout.inner);
    }
}

}  // namespace tiled
}  // namespace lrc
