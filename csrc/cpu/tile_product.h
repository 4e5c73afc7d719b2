// A product of two bfloat16 matrices on tiles of 16 x 16 sums in float32, its terms taken in equal steps.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/amx.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/wide.h"

namespace lrc {

#define LRC_INLINE_LAMBDA __attribute__((always_inline))

inline constexpr std::int64_t kTileSide = 16;      // lines of A, columns of B
inline constexpr std::int64_t kStepTerms = 32;     // of a step, at most
inline constexpr std::int64_t kTileRowBytes = 64;  // of B and of the sums
inline constexpr std::int64_t kTileSums = kTileSide * kTileSide;

// Memory in whole cache lines, zeros at first.
struct alignas(64) CacheLine {
    Bfloat16 entries[32];
};
class TileMemory {
  public:
    explicit TileMemory(std::int64_t size) : lines_(std::make_unique<CacheLine[]>((size + 31) / 32)) {}
    Bfloat16* data() const { return reinterpret_cast<Bfloat16*>(lines_.get()); }

  private:
    std::unique_ptr<CacheLine[]> lines_;
};

// All steps are equally long, so that one shape of tile serves them all and none reads what is not its own:
// no zero in the other factor would keep a stranger's infinity out of the sums.
struct TileSteps {
    std::int64_t count;
    std::int64_t terms;  // even, of a step
};

// `terms` is what `padded_terms` allows.
inline TileSteps cut_terms(std::int64_t terms) {
    const std::int64_t count = (terms + kStepTerms - 1) / kStepTerms;
    return {count, count == 0 ? 0 : terms / count};
}

// The least size >= `size` of which `times` make up equal steps.
inline std::int64_t padded_terms(std::int64_t size, std::int64_t times) {
    while (true) {
        const TileSteps steps = cut_terms(size * times);
        if (steps.count * steps.terms == size * times && steps.terms % 2 == 0) return size;
        ++size;
    }
}

// Tiles 0 to 3 are sums, 4 and 5 of A, 6 and 7 of B.
inline TileConfig tile_config(const TileSteps& steps) {
    TileConfig config;
    const int tiles = steps.terms == 0 ? 4 : 8;
    for (int tile = 0; tile < tiles; ++tile) {
        const bool of_a = tile == 4 || tile == 5, of_b = tile >= 6;
        config.rows[tile] = static_cast<std::uint8_t>(of_b ? steps.terms / 2 : kTileSide);
        config.row_bytes[tile] = static_cast<std::uint16_t>(of_a ? steps.terms * 2 : kTileRowBytes);
    }
    return config;
}

// B lies as the instruction wants it: [tiles of columns, steps, terms of a step / 2, 16, 2].
struct TileProduct {
    const Bfloat16* a;
    std::int64_t a_line;          // entries between two lines
    const std::int64_t* offsets;  // [steps.count] of the steps in a line
    const Bfloat16* b;
    std::int64_t b_tile;  // entries between two tiles of columns
    TileSteps steps;
    std::int64_t line_tiles;
    std::int64_t column_tiles;
};

// f(0), ..., f(kCount - 1), the numbers known to the compiler.
template <int kCount, class F> LRC_INLINE void each(const F& f) {
    if constexpr (kCount > 0) {
        each<kCount - 1>(f);
        f(std::integral_constant<int, kCount - 1>{});
    }
}

// kLines x kColumns tiles from the given ones on, at most 4; to sums[kLines, kColumns, 16, 16].
template <int kLines, int kColumns, class Tiles>
LRC_INLINE void multiply_tiles(Tiles& tiles, const TileProduct& product, std::int64_t line,
                               std::int64_t column, float* sums) {
    const Bfloat16* a = product.a + line * kTileSide * product.a_line;
    const Bfloat16* b = product.b + column * product.b_tile;
    each<kLines * kColumns>([&](auto tile) LRC_INLINE_LAMBDA { tiles.template zero<tile>(); });
    for (std::int64_t s = 0; s < product.steps.count; ++s, b += product.steps.terms * kTileSide) {
        each<kColumns>([&](auto j) LRC_INLINE_LAMBDA {
            tiles.template load<6 + j>(b + j * product.b_tile, kTileRowBytes);
        });
        each<kLines>([&](auto i) LRC_INLINE_LAMBDA {
            constexpr int kA = 4 + i % 2;
            tiles.template load<kA>(a + product.offsets[s] + i * kTileSide * product.a_line,
                                    product.a_line * std::int64_t{sizeof(Bfloat16)});
            each<kColumns>([&](auto j)
                               LRC_INLINE_LAMBDA { tiles.template multiply<i * kColumns + j, kA, 6 + j>(); });
        });
    }
    each<kLines * kColumns>([&](auto tile) LRC_INLINE_LAMBDA {
        tiles.template store<tile>(sums + tile * kTileSums, kTileRowBytes);
    });
}

// Calls finish(line tile, column tile, sums [16, 16]) once for each tile of the product. Four tiles of sums
// at a time: an instruction ends long after the next could begin.
template <class Tiles, class Finish>
LRC_INLINE void multiply_all(Tiles& tiles, const TileProduct& product, const Finish& finish) {
    alignas(64) float sums[4 * kTileSums];
    std::int64_t width = 0;
    for (std::int64_t column = 0; column < product.column_tiles; column += width) {
        width = std::min<std::int64_t>(product.column_tiles - column, 2);
        std::int64_t height = 0;
        for (std::int64_t line = 0; line < product.line_tiles; line += height) {
            height = std::min(product.line_tiles - line, 4 / width);
            switch (10 * height + width) {
                case 11:
                    multiply_tiles<1, 1>(tiles, product, line, column, sums);
                    break;
                case 21:
                    multiply_tiles<2, 1>(tiles, product, line, column, sums);
                    break;
                case 31:
                    multiply_tiles<3, 1>(tiles, product, line, column, sums);
                    break;
                case 41:
                    multiply_tiles<4, 1>(tiles, product, line, column, sums);
                    break;
                case 12:
                    multiply_tiles<1, 2>(tiles, product, line, column, sums);
                    break;
                default:
                    multiply_tiles<2, 2>(tiles, product, line, column, sums);
            }
            for (std::int64_t t = 0; t < height * width; ++t)
                finish(line + t / width, column + t % width, sums + t * kTileSums);
        }
    }
}

// Where a column of B, [tiles, terms / 2, 16, 2], begins.
LRC_INLINE std::int64_t place_of_column(std::int64_t column, std::int64_t b_tile) {
    return column / kTileSide * b_tile + column % kTileSide * 2;
}

inline constexpr std::int64_t kPairedTerms = 2 * kWide;

// 16 terms of 8 lines become those of 8 columns of B.
LRC_INLINE void pair_lines(const Bfloat16* from, std::int64_t line, Bfloat16* to) {
    typedef std::uint16_t Terms __attribute__((vector_size(32), may_alias));
    typedef std::uint16_t LooseTerms __attribute__((vector_size(32), aligned(2), may_alias));
    Wide pairs[kWide];
    for (std::int64_t j = 0; j < kWide; ++j) {
        const Terms terms = *reinterpret_cast<const LooseTerms*>(from + j * line);
        pairs[j] = std::bit_cast<Wide>(terms);
    }
    transpose(pairs);
    for (std::int64_t k = 0; k < kWide; ++k)
        store_wide(reinterpret_cast<float*>(to + k * 2 * kTileSide), pairs[k]);
}

// A term of a line, and where it goes in a column.
struct PackedTerm {
    std::int64_t from;
    std::int64_t to;
};
LRC_INLINE PackedTerm packed_term(std::int64_t from, std::int64_t term) {
    return {from, term / 2 * 2 * kTileSide + term % 2};
}

// Lines [lines, line] become the columns of a zeroed B, their terms in another order. Some terms of 16 lines
// at a time: what is written in between stays in the L1 cache.
LRC_INLINE void pack_lines(const Bfloat16* from, std::int64_t lines, std::int64_t line,
                           const std::vector<PackedTerm>& terms, std::int64_t b_tile, Bfloat16* to) {
    constexpr std::int64_t kBlock = 256;
    for (std::int64_t first = 0; first < lines; first += kTileSide) {
        for (std::int64_t begin = 0; begin < line; begin += kBlock) {
            for (std::int64_t n = first; n < std::min(first + kTileSide, lines); ++n) {
                Bfloat16* column = to + place_of_column(n, b_tile);
                for (std::int64_t t = begin; t < std::min(begin + kBlock, line); ++t)
                    column[terms[t].to] = from[n * line + terms[t].from];
            }
        }
    }
}

// The same in the order they have.
LRC_INLINE void pack_lines(const Bfloat16* from, std::int64_t lines, std::int64_t line, std::int64_t b_tile,
                           Bfloat16* to) {
    for (std::int64_t n = 0; n < lines; n += kWide) {
        const std::int64_t whole = n + kWide <= lines ? line / kPairedTerms * kPairedTerms : 0;
        for (std::int64_t t = 0; t < whole; t += kPairedTerms)
            pair_lines(from + n * line + t, line, to + place_of_column(n, b_tile) + t * kTileSide);
        for (std::int64_t m = n; m < std::min(n + kWide, lines); ++m) {
            Bfloat16* column = to + place_of_column(m, b_tile);
            for (std::int64_t t = whole; t < line; ++t) column[packed_term(t, t).to] = from[m * line + t];
        }
    }
}

}  // namespace lrc
