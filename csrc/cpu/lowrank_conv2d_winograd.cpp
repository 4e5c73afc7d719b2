#include "cpu/lowrank_conv2d_winograd.h"

#include "cpu/simd.h"

namespace lrc {
namespace {

constexpr std::int64_t kSums = 12;  // registers of the products: of 16, the others hold factors

// The pixels of some rows of an image: the channels of one group, which lie side by side.
template <class P> struct Pixels {
    const P* first;       // of row `begin`, column 0
    std::int64_t row;     // strides
    std::int64_t column;  //
    std::int64_t begin;   // the rows that are there
    std::int64_t end;     //
    std::int64_t columns;
};

// Where a square lies among those of some rows of the output.
struct Place {
    std::int64_t row, column;

    LRC_INLINE Place(std::int64_t square, std::int64_t columns)
        : row(square / divide_up(columns, kSquareOut) * kSquareOut),
          column(square % divide_up(columns, kSquareOut) * kSquareOut) {}
    LRC_INLINE void advance(std::int64_t columns) {
        column += kSquareOut;
        if (column < columns) return;
        column = 0;
        row += kSquareOut;
    }
};

// The factors of the products of one square, of whose input at(row, column) is the first channel.
template <class At> LRC_INLINE void make_vectors(const WinogradLayout& layout, const At& at, float* to) {
    for (std::int64_t v = 0; v < layout.vectors; ++v, to += kParts * kBlock * kWide) {
        const std::int64_t channel = std::min(v * kWide, layout.inside - kWide);
        transform_input<kBlock * kWide>([&](int i, int j) { return load_wide(at(i, j) + channel); }, to);
    }
}

// The same of a square whose input begins at `row` and `column` of the image.
template <class P>
LRC_INLINE void make_input(const WinogradLayout& layout, const Pixels<P>& pixels, std::int64_t row,
                           std::int64_t column, float* to) {
    const std::int64_t down = pixels.row, right = pixels.column;
    const auto find = [&](std::int64_t i, std::int64_t j) {
        return pixels.first + (row + i - pixels.begin) * down + (column + j) * right;
    };
    if (row >= pixels.begin && row + kSquareIn <= pixels.end && column >= 0 &&
        column + kSquareIn <= pixels.columns) {
        const P* lines[kSquareIn] = {find(0, 0), find(1, 0), find(2, 0), find(3, 0)};
        const std::int64_t columns[kSquareIn] = {0, right, 2 * right, 3 * right};
        make_vectors(layout, [&](int i, int j) { return lines[i] + columns[j]; }, to);
        return;
    }
    const P* table[kSquareIn][kSquareIn];
    for (int i = 0; i < kSquareIn; ++i) {
        for (int j = 0; j < kSquareIn; ++j) {
            const bool there = row + i >= pixels.begin && row + i < pixels.end && column + j >= 0 &&
                               column + j < pixels.columns;
            table[i][j] = there ? find(i, j) : reinterpret_cast<const P*>(layout.zeros.data());
        }
    }
    make_vectors(layout, [&](int i, int j) { return table[i][j]; }, to);
}

// One part of the products of kCount squares, by kVectors vectors of ranks.
template <int kWidth, int kVectors, int kCount>
LRC_INLINE void multiply(const WinogradLayout& layout, const float* inputs, const float* kernel, float* to) {
    Floats<kWidth> sums[kCount][kVectors] = {};
    for (std::int64_t v = 0; v < layout.vectors; ++v, inputs += kParts * kBlock * kWide) {
        const std::int64_t known = std::max<std::int64_t>((v + 1) * kWide - layout.inside, 0);
        for (std::int64_t k = known; k < kWide; ++k, kernel += layout.rank_stride) {
            Floats<kWidth> factors[kVectors];
            LRC_UNROLL
            for (int r = 0; r < kVectors; ++r) factors[r] = load_floats<kWidth>(kernel + r * kWidth);
            LRC_UNROLL
            for (int t = 0; t < kCount; ++t) {
                LRC_UNROLL
                for (int r = 0; r < kVectors; ++r) sums[t][r] += inputs[t * kWide + k] * factors[r];
            }
        }
    }
    LRC_UNROLL
    for (int t = 0; t < kCount; ++t) {
        LRC_UNROLL
        for (int r = 0; r < kVectors; ++r) store_wide(to + (r * kParts * kBlock + t) * kWidth, sums[t][r]);
    }
}

// One part of the products of a block by kVectors vectors of ranks. Those of some squares behind `count` may
// be made, too, of whatever is there.
template <int kWidth, int kVectors>
LRC_INLINE void multiply_block(const WinogradLayout& layout, const float* inputs, const float* kernel,
                               std::int64_t count, float* to) {
    constexpr int kMost = kSums / kVectors;
    std::int64_t square = 0;
    for (; square + kMost / 2 < count; square += kMost)
        multiply<kWidth, kVectors, kMost>(layout, inputs + square * kWide, kernel, to + square * kWidth);
    if (square < count)
        multiply<kWidth, kVectors, kMost / 2>(layout, inputs + square * kWide, kernel, to + square * kWidth);
}

// All products of a block.
template <int kWidth>
LRC_INLINE void multiply_parts(const WinogradLayout& layout, const float* inputs, const float* kernel,
                               std::int64_t count, float* to) {
    const std::int64_t vectors = layout.rank_stride / kWidth;
    for (std::int64_t part = 0; part < kParts; ++part) {
        for (std::int64_t v = 0; v < vectors;) {
            const float* mine = kernel + v * kWidth;
            float* out = to + v * kParts * kBlock * kWidth;
            if (vectors - v == 3) {
                multiply_block<kWidth, 3>(layout, inputs, mine, count, out);
                v += 3;
            } else if (vectors - v >= 2) {
                multiply_block<kWidth, 2>(layout, inputs, mine, count, out);
                v += 2;
            } else {
                multiply_block<kWidth, 1>(layout, inputs, mine, count, out);
                v += 1;
            }
        }
        inputs += kBlock * kWide;
        kernel += layout.inside * layout.rank_stride;
        to += kBlock * kWidth;
    }
}

// Not inlined: the loops need all registers.
LRC_MULTIVERSION void multiply_all(Width<8>, const WinogradLayout& layout, const float* inputs,
                                   const float* kernel, std::int64_t count, float* to) {
    multiply_parts<8>(layout, inputs, kernel, count, to);
}
LRC_AVX512 void multiply_all(Width<16>, const WinogradLayout& layout, const float* inputs,
                             const float* kernel, std::int64_t count, float* to) {
    multiply_parts<16>(layout, inputs, kernel, count, to);
}

// z of one square, but for the rows and columns that there are not.
template <int kWidth>
LRC_INLINE void make_output(const WinogradLayout& layout, const float* products, const Place& place,
                            std::int64_t rows, std::int64_t columns, float* z) {
    float* to = z + (place.row * columns + place.column) * layout.z_stride;
    const bool whole = place.row + 1 < rows && place.column + 1 < columns;
    for (std::int64_t r = 0; r < layout.rank_stride; r += kWidth) {
        transform_output<kWidth, kBlock * kWidth>(
            products + r * kParts * kBlock, [&](std::int64_t i, std::int64_t j, Floats<kWidth> x) {
                if (whole || (place.row + i < rows && place.column + j < columns))
                    store_wide(to + (i * columns + j) * layout.z_stride + r, x);
            });
    }
}

// z of one group: what comes behind its last rank is overwritten.
template <int kWidth, class P>
LRC_INLINE void encode_group(const ConvAxis& rows, const ConvAxis& columns, const WinogradLayout& layout,
                             const Pixels<P>& pixels, const float* encoder, const ImageTile& tile,
                             Ahead& ahead, float* scratch, float* z) {
    float* products = scratch + kParts * kBlock * layout.vectors * kWide;
    const std::int64_t squares = divide_up(tile.rows, kSquareOut) * divide_up(columns.out, kSquareOut);
    for (std::int64_t begin = 0; begin < squares; begin += kBlock) {
        const std::int64_t count = std::min(kBlock, squares - begin);
        Place place(begin, columns.out);
        for (std::int64_t i = 0; i < count; ++i, place.advance(columns.out)) {
            ahead.fetch();
            make_input(layout, pixels, tile.row + place.row - rows.padding, place.column - columns.padding,
                       scratch + i * kWide);
        }
        multiply_all(Width<kWidth>{}, layout, scratch, encoder, count, products);
        place = Place(begin, columns.out);
        for (std::int64_t i = 0; i < count; ++i, place.advance(columns.out))
            make_output<kWidth>(layout, products + i * kWidth, place, tile.rows, columns.out, z);
    }
}

// Transposes [lines, count] to [count, stride]; the last block of either moves back to be whole. Of fewer
// than kWide lines some more are written.
template <class P>
LRC_INLINE void transpose_all(const P* from, std::int64_t step, std::int64_t lines, std::int64_t count,
                              std::int64_t stride, float* to) {
    for (std::int64_t i = 0; i < count; i += kWide) {
        const std::int64_t entry = std::max<std::int64_t>(std::min(i, count - kWide), 0);
        for (std::int64_t j = 0; j < lines; j += kWide) {
            const std::int64_t line = std::max<std::int64_t>(std::min(j, lines - kWide), 0);
            copy_block(from + line * step + entry, step, std::min(kWide, lines - line),
                       std::min(kWide, count - entry), stride, to + entry * stride + line);
        }
    }
}

template <int kWidth, class T>
LRC_INLINE Hidden encode_tile(const LowrankConv2dArgs<T>& args, const WinogradLayout& layout,
                              const float* encoder, const ImageTile& tile, Ahead& ahead, float* z) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    const std::int64_t kernel_size = kParts * layout.inside * layout.rank_stride;
    float* scratch = z + layout.z_size;
    float* rest = scratch + block_size(layout);
    const std::int64_t begin = std::clamp<std::int64_t>(tile.row - rows.padding, 0, rows.in);
    const std::int64_t end =
        std::clamp<std::int64_t>(tile.row - rows.padding + tile.rows + kSquareIn - 1, begin, rows.in);
    const T* image = args.input + tile.image * args.channels * rows.in * columns.in;
    for (std::int64_t group = 0; group < args.groups; ++group, encoder += kernel_size) {
        float* to = z + group * args.rank;
        const std::int64_t channel = group * layout.inside;
        if (args.channels_last) {
            const std::int64_t row = columns.in * args.channels;
            const Pixels<T> pixels = {
                image + begin * row + channel, row, args.channels, begin, end, columns.in};
            encode_group<kWidth>(rows, columns, layout, pixels, encoder, tile, ahead, scratch, to);
        } else {
            const T* planes = image + (channel * rows.in + begin) * columns.in;
            transpose_all(planes, rows.in * columns.in, layout.inside, (end - begin) * columns.in,
                          layout.inside, rest);
            const Pixels<float> pixels = {rest,      columns.in * layout.inside, layout.inside, begin, end,
                                          columns.in};
            encode_group<kWidth>(rows, columns, layout, pixels, encoder, tile, ahead, scratch, to);
        }
    }
    if (args.channels_last) return {z, layout.z_stride, 1};
    transpose_all(z, layout.z_stride, tile.rows * columns.out, args.groups * args.rank, layout.line_stride,
                  rest);
    return {rest, 1, layout.line_stride};
}

LRC_MULTIVERSION Hidden run(Width<8>, const LowrankConv2dArgs<float>& args, const WinogradLayout& layout,
                            const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<8>(args, layout, encoder, tile, ahead, scratch);
}
LRC_MULTIVERSION Hidden run(Width<8>, const LowrankConv2dArgs<Bfloat16>& args, const WinogradLayout& layout,
                            const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<8>(args, layout, encoder, tile, ahead, scratch);
}
LRC_AVX512 Hidden run(Width<16>, const LowrankConv2dArgs<float>& args, const WinogradLayout& layout,
                      const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<16>(args, layout, encoder, tile, ahead, scratch);
}
LRC_AVX512 Hidden run(Width<16>, const LowrankConv2dArgs<Bfloat16>& args, const WinogradLayout& layout,
                      const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<16>(args, layout, encoder, tile, ahead, scratch);
}

}  // namespace

template <int kWidth, class T>
Hidden encode(Width<kWidth> width, const LowrankConv2dArgs<T>& args, const WinogradLayout& layout,
              const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return run(width, args, layout, encoder, tile, ahead, scratch);
}

template Hidden encode(Width<8>, const LowrankConv2dArgs<float>&, const WinogradLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<8>, const LowrankConv2dArgs<Bfloat16>&, const WinogradLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<16>, const LowrankConv2dArgs<float>&, const WinogradLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<16>, const LowrankConv2dArgs<Bfloat16>&, const WinogradLayout&, const float*,
                       const ImageTile&, Ahead&, float*);

}  // namespace lrc
