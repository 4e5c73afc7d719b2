// Two rows of a convolution at a time: with three rows of a kernel, four products for six.
//
// F(2, 3) over the rows (Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray 2016): from
// four rows d of the input and the three rows g of the kernel
//   m0 = (d0 - d2) g0                    m1 = (d1 + d2) (g0 + g1 + g2) / 2
//   m3 = (d1 - d3) g2                    m2 = (d2 - d1) (g0 - g1 + g2) / 2
// come the rows m0 + m1 + m2 and m1 - m2 - m3 of the output. All that is combined are whole rows, so vectors
// along the columns need no shuffles, and each product is a convolution with a kernel of one row. An output
// that an infinite input reaches may be not a number instead of infinite; no other output is touched.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/wide.h"
#include "ops/lowrank_conv2d.h"

namespace lrc {

inline constexpr std::int64_t kParts = 4;  // products of a pair of rows

LRC_INLINE std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether the encoder goes by pairs: what two products less save must be more than the combining takes. The
// factor was chosen by timing both ways on AVX2 (16 to 64 channels, images of 8 to 56 pixels), for which no
// benchmark here stands. Says the same for any batch and number of threads, so that the bits do not depend
// on them.
template <class T> bool pairs_rows(const LowrankConv2dArgs<T>& args) {
    const ConvAxis& rows = args.rows;
    const std::int64_t inside = args.channels / args.groups;
    const bool saves = inside * args.rank * args.columns.kernel > 24 * (inside + args.rank);
    return rows.kernel == 3 && rows.stride == 1 && rows.dilation == 1 && rows.out > 1 && saves;
}

// The combinations of one channel's kernels [3, columns] from `from`, each to its row of the four that lie
// `part` apart. Some entries behind each are overwritten: `whole` says that there are kWide of them to read.
template <class T>
LRC_INLINE void combine_kernel(const T* from, std::int64_t columns, bool whole, std::int64_t part,
                               float* to) {
    if (whole && columns <= kWide) {
        const Wide g0 = load_wide(from), g1 = load_wide(from + columns), g2 = load_wide(from + 2 * columns);
        const Wide outer = (g0 + g2) * 0.5F, inner = g1 * 0.5F;
        store_wide(to, g0);
        store_wide(to + part, outer + inner);
        store_wide(to + 2 * part, outer - inner);
        store_wide(to + 3 * part, g2);
        return;
    }
    for (std::int64_t b = 0; b < columns; ++b) {
        const float g0 = to_float(from[b]), g1 = to_float(from[columns + b]);
        const float g2 = to_float(from[2 * columns + b]);
        to[b] = g0;
        to[part + b] = (g0 + g2) * 0.5F + g1 * 0.5F;
        to[2 * part + b] = (g0 + g2) * 0.5F - g1 * 0.5F;
        to[3 * part + b] = g2;
    }
}

// V [groups rank, inside, 3, columns] as [groups, kParts, rank, inside, columns], the parts this far apart:
// kWide floats are between them for what is overwritten.
LRC_INLINE std::int64_t kernel_part_size(std::int64_t rank, std::int64_t inside, std::int64_t columns) {
    return rank * inside * columns + kWide;
}

template <class T>
LRC_INLINE void combine_kernels(const LowrankConv2dArgs<T>& args, float* to) {
    const std::int64_t inside = args.channels / args.groups, columns = args.columns.kernel;
    const std::int64_t part = kernel_part_size(args.rank, inside, columns);
    const T* from = args.encoder;
    const T* end = from + args.groups * args.rank * inside * 3 * columns;
    for (std::int64_t group = 0; group < args.groups; ++group, to += kParts * part) {
        for (std::int64_t i = 0; i < args.rank * inside; ++i, from += 3 * columns) {
            const bool whole = from + 2 * columns + kWide <= end;
            combine_kernel(from, columns, whole, part, to + i * columns);
        }
    }
}

// The combinations of `pairs` pairs of rows of a channel, `size` entries each and one behind the other, the
// four kinds `part` apart. Up to kWidth - 1 entries behind the last are read and overwritten.
template <int kWidth>
LRC_INLINE void combine_input(const float* from, std::int64_t size, std::int64_t pairs, std::int64_t part,
                              float* to) {
    for (std::int64_t pair = 0; pair < pairs; ++pair, from += 2 * size, to += size) {
        for (std::int64_t j = 0; j < size; j += kWidth) {
            const Floats<kWidth> d0 = load_floats<kWidth>(from + j);
            const Floats<kWidth> d1 = load_floats<kWidth>(from + size + j);
            const Floats<kWidth> d2 = load_floats<kWidth>(from + 2 * size + j);
            const Floats<kWidth> d3 = load_floats<kWidth>(from + 3 * size + j);
            store_wide(to + j, d0 - d2);
            store_wide(to + part + j, d1 + d2);
            store_wide(to + 2 * part + j, d2 - d1);
            store_wide(to + 3 * part + j, d1 - d3);
        }
    }
}

// `count` rows of `columns` entries of the output from the products of their pairs, which lie `part` apart
// and have whole vectors in a row. Overwrites up to kWidth - 1 entries behind the last row.
template <int kWidth>
LRC_INLINE void combine_output(const float* from, std::int64_t part, std::int64_t count, std::int64_t columns,
                               float* to) {
    const std::int64_t size = divide_up(columns, kWidth) * kWidth;
    for (std::int64_t row = 0; row < count; ++row, to += columns) {
        const float* m = from + row / 2 * size;
        for (std::int64_t j = 0; j < size; j += kWidth) {
            const Floats<kWidth> m1 = load_floats<kWidth>(m + part + j);
            const Floats<kWidth> m2 = load_floats<kWidth>(m + 2 * part + j);
            const Floats<kWidth> outer = load_floats<kWidth>(m + row % 2 * 3 * part + j);
            store_wide(to + j, row % 2 == 0 ? outer + m1 + m2 : m1 - m2 - outer);
        }
    }
}

}  // namespace lrc
