// The scalars of a Householder reflector, shared by the twins.
#pragma once

#include <cmath>

#include "device.h"

namespace lrc {

// H = I - u u^T / scale maps x = (rest, alpha) to (0, beta), with u = (rest, pivot).
struct Reflector {
    double beta;
    double pivot;
    double scale;
    bool identity;  // H = I and u = 0
};

// A vector shorter than 2^-60 of the unit-scaled matrix is beneath the rounding of every eigenvalue and is
// taken as zero. It also keeps the square of `scale`, a fourth power of that length, far from underflow: the
// remainder of a matrix of low rank shrinks by eps at every step.
inline constexpr double kNegligibleSquare = 0x1p-120;

LRC_HOST_DEVICE LRC_INLINE Reflector make_reflector(double alpha, double rest_square) {
    if (rest_square <= kNegligibleSquare) {
        return {alpha, 0, 1, true};
    }
    // beta takes the sign opposite to alpha's, so that the pivot does not cancel.
    const double beta = -std::copysign(std::sqrt(alpha * alpha + rest_square), alpha);
    const double pivot = alpha - beta;
    return {beta, pivot, -beta * pivot, false};
}

}  // namespace lrc
