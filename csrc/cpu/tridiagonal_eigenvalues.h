// Eigenvalues of a symmetric tridiagonal matrix on one CPU thread.
#pragma once

#include <cstdint>

namespace lrc {

// Writes all eigenvalues, ascending. `off_diagonal` is squared in place; not all entries are 0.
void tridiagonal_eigenvalues(
    const double* diagonal,  // [side]
    double* off_diagonal,    // [side]: entry i couples rows i - 1 and i, the first is 0
    std::int64_t side,
    double* values);  // [side]

}  // namespace lrc
