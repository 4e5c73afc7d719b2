// Eigenvalues of a symmetric tridiagonal matrix by bisection, shared by the twins.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace lrc {

// Entry i of `squares` is the squared off-diagonal entry that couples rows i - 1 and i; the first is 0.
struct Tridiagonal {
    const double* diagonal;  // [side]
    const double* squares;   // [side]
    std::int64_t side;
    double bound;  // >= |lambda|, > 0, and within a factor of 2 side of the largest entry
};

// Gershgorin's bound of |lambda| from row i alone; the bound of the matrix is the largest of all rows.
LRC_HOST_DEVICE LRC_INLINE double gershgorin_row(const double* diagonal,      // [side]
                                                 const double* off_diagonal,  // [side], the first is 0
                                                 std::int64_t side, std::int64_t i) {
    const double right = i + 1 < side ? std::fabs(off_diagonal[i + 1]) : 0;
    return std::fabs(diagonal[i]) + std::fabs(off_diagonal[i]) + right;
}

// The square of an off-diagonal entry, kept from vanishing. Moving every entry to 2^-55 bound shifts no
// eigenvalue by more than 2^-54 bound, and makes sure that no two neighbours of a Sturm sequence are zero
// together.
LRC_HOST_DEVICE LRC_INLINE double coupling_square(double off_diagonal, double bound) {
    const double entry = std::fmax(std::fabs(off_diagonal), 0x1p-55 * bound);
    return entry * entry;
}

template <class To, class From>
LRC_HOST_DEVICE LRC_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A Sturm sequence is rescaled by a power of two after this many terms. Meanwhile a term falls by no more
// than 2^-113 (see coupling_square) and grows by no more than 4 side, so neither end of the range of double
// is reached.
inline constexpr std::int64_t kRescaleEvery = 8;

// Sturm sequences of T - x I for kShifts values of x at once: (Real, Bits) is (double, uint64) or vectors of
// them.
template <class Real, class Bits, int kShifts> struct SturmSequences {
    Real before[kShifts];
    Real now[kShifts];

    // The next term, the leading principal minor of size i + 1; counts the sign changes.
    LRC_HOST_DEVICE LRC_INLINE void advance(const Tridiagonal& matrix, std::int64_t i,
                                            const Real (&shifts)[kShifts], Bits (&counts)[kShifts]) {
        for (int v = 0; v < kShifts; ++v) {
            const Real next = (matrix.diagonal[i] - shifts[v]) * now[v] - matrix.squares[i] * before[v];
            counts[v] += (bits_as<Bits>(next) ^ bits_as<Bits>(now[v])) >> 63;
            before[v] = now[v];
            now[v] = next;
        }
    }

    // Multiplies by 2^-e where |now| + |before| is in [2^e, 2^(e + 1)).
    LRC_HOST_DEVICE LRC_INLINE void rescale() {
        constexpr std::uint64_t kExponent = 0x7ffull << 52;
        constexpr std::uint64_t kMagnitude = ~0ull >> 1;
        for (int v = 0; v < kShifts; ++v) {
            const Real size = bits_as<Real>(bits_as<Bits>(now[v]) & kMagnitude) +
                              bits_as<Real>(bits_as<Bits>(before[v]) & kMagnitude);
            const Real scale = bits_as<Real>((0x7feull << 52) - (bits_as<Bits>(size) & kExponent));
            now[v] = now[v] * scale;
            before[v] = before[v] * scale;
        }
    }
};

// Adds to counts[v] how many eigenvalues lie below shifts[v]: the sign changes in the sequence of leading
// principal minors (Givens 1954; Wilkinson 1965, chapter 5.37). Unlike the count of negative pivots, it
// divides nothing.
template <class Real, class Bits, int kShifts>
LRC_HOST_DEVICE LRC_INLINE void count_below(const Tridiagonal& matrix, const Real (&shifts)[kShifts],
                                            Bits (&counts)[kShifts]) {
    SturmSequences<Real, Bits, kShifts> sequences{};
    for (int v = 0; v < kShifts; ++v) sequences.now[v] = sequences.before[v] + 1.0;
    std::int64_t i = 0;
    for (; i + kRescaleEvery <= matrix.side; i += kRescaleEvery) {
        LRC_UNROLL
        for (int term = 0; term < kRescaleEvery; ++term) sequences.advance(matrix, i + term, shifts, counts);
        sequences.rescale();
    }
    for (; i < matrix.side; ++i) sequences.advance(matrix, i, shifts, counts);
}

// Halvings that take a bracket of `width` bounds to 2 * 2^-53 bounds, whose middle is in error by 2^-53
// bounds.
LRC_HOST_DEVICE LRC_INLINE int bisection_steps(double width) { return 52 + std::ilogb(width) + 1; }

}  // namespace lrc
