// Householder reduction of a dense symmetric matrix to tridiagonal form on one CPU thread.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace lrc {

// The row stride of the dense matrix: an odd multiple of kLanes, so that rows never fall on one cache set.
inline constexpr std::int64_t dense_stride(std::int64_t side) { return padded(side) | kLanes; }

// Doubles of scratch that `tridiagonalize` needs beside the matrix.
std::int64_t tridiagonalize_scratch(std::int64_t side);

// Overwrites `matrix` and writes the tridiagonal similar to it. Row i of `matrix` holds A[i][0..i]; its 4 x 4
// blocks on the diagonal hold both triangles, and rows and columns from `side` up to padded(side) hold zeros.
// Entries are at most 1 in magnitude. All pointers are aligned to sizeof(Vec).
void tridiagonalize(double* matrix,  // [padded(side), dense_stride(side)]
                    std::int64_t side,
                    double* diagonal,      // [side]
                    double* off_diagonal,  // [side]: entry i couples rows i - 1 and i, the first is 0
                    double* scratch);

}  // namespace lrc
