// The end of an iteration of FISTA for one penalty, shared by the twins.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"

namespace lrc {

// Of one group, and summed over groups (the excess, |G_g| over its threshold and at least 1: the largest).
enum StepTerm { kCost, kAlongIterate, kAlongTarget, kUphill, kExcess, kStepTerms };
enum Momentum { kGrowth, kBeta, kObjective, kGap, kMomentum };
enum State { kIterations, kRunning, kTicket, kState };

// What a group of a penalty adds, from |M_g|, |G_g|, <G_g, M_g>, <G_g, W_g> or <B_g, M_g>, and the product
// of the step with the way uphill.
LRC_HOST_DEVICE inline void set_terms(double threshold, double norm, double slope, double along_iterate,
                                      double along_target, double uphill, double* terms) {
    terms[kCost] = threshold * norm;
    terms[kAlongIterate] = along_iterate;
    terms[kAlongTarget] = along_target;
    terms[kUphill] = uphill;
    terms[kExcess] = std::fmax(1.0, slope / threshold);
}

// By what a group of this length is multiplied by the proximal step.
LRC_HOST_DEVICE inline double shrinkage(double norm, double threshold) {
    return norm > threshold ? 1 - threshold / norm : 0;
}

// Measures the gap, and stops or chooses the next step's momentum.
LRC_HOST_DEVICE inline void conclude(const double* totals,  // [kStepTerms]
                                     bool has_weight, double energy, double tol,
                                     double* momentum,       // [kMomentum]
                                     std::int64_t* state) {  // [kState]
    const double aligned = has_weight ? -totals[kAlongTarget] : energy - totals[kAlongTarget];
    const double residual = std::fmax(0.0, aligned + totals[kAlongIterate]);
    double scale = 1 / totals[kExcess];
    if (residual > 0) scale = std::fmin(scale, std::fmax(0.0, aligned / residual));
    const double objective = residual / 2 + totals[kCost];
    const double gap = std::fmax(0.0, objective - scale * aligned + scale * scale * residual / 2);
    momentum[kObjective] = objective;
    momentum[kGap] = gap;
    if (gap <= tol * objective) {
        state[kRunning] = 0;
        return;
    }
    ++state[kIterations];
    const bool restart = totals[kUphill] > 0;
    const double growth = restart ? 1 : momentum[kGrowth];
    const double grown = (1 + std::sqrt(1 + 4 * growth * growth)) / 2;
    momentum[kBeta] = restart ? 0 : (growth - 1) / grown;
    momentum[kGrowth] = grown;
}

}  // namespace lrc
