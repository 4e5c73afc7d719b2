// A 3 x 3 convolution by squares of 2 x 2 outputs: sixteen products for thirty-six.
//
// F(2 x 2, 3 x 3) (Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray 2016). Along either
// axis, from four entries d of the input and the three entries g of the kernel,
//   m0 = (d0 - d2) g0                    m1 = (d1 + d2) (g0 + g1 + g2) / 2
//   m3 = (d1 - d3) g2                    m2 = (d2 - d1) (g0 - g1 + g2) / 2
// give the entries m0 + m1 + m2 and m1 - m2 - m3 of the output. Vectors run along the channels, then along
// the ranks, so nothing is shuffled, and each product of a part is a matrix product. An output that an
// infinite input reaches may be not a number instead of infinite; no other output is touched.
#pragma once

#include <cstdint>

#include "cpu/wide.h"

namespace lrc {

inline constexpr std::int64_t kParts = 16;     // products of a square
inline constexpr std::int64_t kSquareOut = 2;  // rows and columns of a square of the output
inline constexpr std::int64_t kSquareIn = 4;   // of its input

// Four entries of the input, or three of the kernel, as the factors of the products.
template <class V> LRC_INLINE void combine_input(V d0, V d1, V d2, V d3, V (&to)[4]) {
    to[0] = d0 - d2;
    to[1] = d1 + d2;
    to[2] = d2 - d1;
    to[3] = d1 - d3;
}
template <class V> LRC_INLINE void combine_kernel(V g0, V g1, V g2, V (&to)[4]) {
    to[0] = g0;
    to[1] = 0.5F * (g0 + g2) + 0.5F * g1;
    to[2] = 0.5F * (g0 + g2) - 0.5F * g1;
    to[3] = g2;
}
// Four products as the two entries of the output.
template <class V> LRC_INLINE void combine_output(V m0, V m1, V m2, V m3, V (&to)[2]) {
    to[0] = m0 + m1 + m2;
    to[1] = m1 - m2 - m3;
}

// The factors of 3 x 3 kernels, of which tap(row, column) loads an entry of each, `part` apart.
template <class Tap> LRC_INLINE void transform_kernels(const Tap& tap, std::int64_t part, float* to) {
    Wide columns[3][4];
    LRC_UNROLL
    for (int b = 0; b < 3; ++b) combine_kernel(tap(0, b), tap(1, b), tap(2, b), columns[b]);
    LRC_UNROLL
    for (int i = 0; i < 4; ++i) {
        Wide row[4];
        combine_kernel(columns[0][i], columns[1][i], columns[2][i], row);
        LRC_UNROLL
        for (int j = 0; j < 4; ++j) store_wide(to + (4 * i + j) * part, row[j]);
    }
}

// The factors of a square's input, which pixel(row, column) loads, kPart apart.
template <int kPart, class Pixel> LRC_INLINE void transform_input(const Pixel& pixel, float* to) {
    Wide columns[4][4];
    LRC_UNROLL
    for (int j = 0; j < 4; ++j) combine_input(pixel(0, j), pixel(1, j), pixel(2, j), pixel(3, j), columns[j]);
    LRC_UNROLL
    for (int i = 0; i < 4; ++i) {
        Wide row[4];
        combine_input(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
        LRC_UNROLL
        for (int j = 0; j < 4; ++j) store_wide(to + (4 * i + j) * kPart, row[j]);
    }
}

// The 2 x 2 outputs of a square from its products, kPart apart: store(row, column, vector).
template <int kWidth, int kPart, class Store>
LRC_INLINE void transform_output(const float* from, const Store& store) {
    const auto load = [&](int i, int j) { return load_floats<kWidth>(from + (4 * i + j) * kPart); };
    Floats<kWidth> columns[4][2];
    LRC_UNROLL
    for (int j = 0; j < 4; ++j) combine_output(load(0, j), load(1, j), load(2, j), load(3, j), columns[j]);
    LRC_UNROLL
    for (int i = 0; i < 2; ++i) {
        Floats<kWidth> row[2];
        combine_output(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
        LRC_UNROLL
        for (int j = 0; j < 2; ++j) store(i, j, row[j]);
    }
}

}  // namespace lrc
