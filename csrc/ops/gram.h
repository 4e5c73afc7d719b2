// Products A A^T, in float64, of many matrices of different shapes.
#pragma once

#include <cstdint>

#include "device.h"

namespace lrc {

// Where one matrix A [side, terms] lies and its product goes: A[i][k] = matrix[i * row_stride + k *
// column_stride]. The transpose of a matrix is the same memory with its strides swapped.
template <class T> struct GramProblem {
    const T* matrix;
    std::int64_t row_stride;
    std::int64_t column_stride;
    std::int64_t side;         // >= 0
    std::int64_t terms;        // >= 0
    std::int64_t out_offset;   // of A A^T in `out`, whose rows follow each other: row stride `side`
    std::int64_t tile_offset;  // gram_tiles() of all problems before this one
};

// out[out_offset + i * side + j] = sum_k A[i][k] A[j][k] for j <= i. What lies above the diagonal is left as
// it is. The terms of a sum are added in an order that depends neither on the other problems nor on
// `threads`.
template <class T> struct GramArgs {
    const GramProblem<T>* problems;  // [count], on the device of the matrices
    std::int64_t count;
    std::int64_t tiles;  // gram_tiles() of all problems
    double* out;         // no two products overlap, nor a product and a matrix
    int threads;         // of the CPU twin; the CUDA twin ignores it
};

// The lower triangle is cut into squares of this side: a block of the CUDA twin each.
inline constexpr std::int64_t kGramTile = 64;

LRC_HOST_DEVICE LRC_INLINE std::int64_t gram_tiles(std::int64_t side) {
    const std::int64_t rows = (side + kGramTile - 1) / kGramTile;
    return rows * (rows + 1) / 2;
}

// For T = float and double.
template <class T> void gram(Cpu device, const GramArgs<T>& args);
template <class T> void gram(Cuda device, const GramArgs<T>& args);

}  // namespace lrc
