// Eigenvalues, without vectors, of many symmetric float64 matrices of different sides.
#pragma once

#include <cstdint>

#include "device.h"

namespace lrc {

// Where one matrix A [side, side] lies: A[i][j] = matrices[offset + i * row_stride + j] for j <= i. The
// strictly upper triangle is never read.
struct EigenProblem {
    std::int64_t offset;        // of A[0][0] in `matrices`
    std::int64_t row_stride;    // >= side
    std::int64_t side;          // >= 0
    std::int64_t value_offset;  // of the smallest eigenvalue in `values`
};

// values[value_offset + k] = lambda_k(A), ascending: Householder's tridiagonalisation (Golub & Van Loan 2013,
// section 8.3.1), then the eigenvalues of the tridiagonal. The error is absolute, a small multiple of eps
// max|lambda|; a matrix with an entry that is not finite gets NaN for all its values.
struct SymmetricEigenvaluesArgs {
    const double* matrices;        // flat workspace
    const EigenProblem* problems;  // [count], on the device of `matrices`
    std::int64_t count;
    std::int64_t max_side;  // >= every side; the CUDA twin takes at most kMaxCudaSide
    double* values;         // [sum of the sides]; must not alias `matrices`
    int threads;            // of the CPU twin; the CUDA twin ignores it
};

// The largest matrix, padded to an odd row stride, that fits the 163 KB of shared memory an sm_80 block may
// use.
inline constexpr std::int64_t kMaxCudaSide = 128;

void symmetric_eigenvalues(Cpu device, const SymmetricEigenvaluesArgs& args);
void symmetric_eigenvalues(Cuda device, const SymmetricEigenvaluesArgs& args);

}  // namespace lrc
