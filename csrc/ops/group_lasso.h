// Group lasso on second moments, by block coordinate descent.
#pragma once

#include <cstdint>

#include "device.h"

namespace lrc {

// min_M f(M) = 1/2 <M, A M> - <B, M> + energy/2 + sum_g thresholds[g] |M_g|, with |.| the Frobenius norm of a
// group of rows, A positive semi-definite, and each group's diagonal block of A a diagonal matrix (every
// problem becomes one by rotating its groups), so that a block has the exact solution
// M_i = b_i n / (A_ii n + t), where the norm n solves sum_i |b_i|^2 / (A_ii n + t)^2 = 1
// (Qin, Scheinberg & Goldfarb 2013; Yang & Hastie 2024).
// Rows are the inputs of a layer: M is the transpose of a weight [outputs, inputs]. All is contiguous.
struct GroupLassoArgs {
    const double* curvature;     // A [inputs, inputs]
    const double* linear;        // B [inputs, outputs]
    const double* weight;        // W [inputs, outputs] with B = A W and energy = <B, W>, or null
    const std::int64_t* starts;  // [groups + 1], rows of group g: [starts[g], starts[g + 1])
    const double* thresholds;    // [groups], > 0
    double energy;               // f(0) = energy / 2, the least with which the minimum over all M is >= 0
    std::int64_t inputs;
    std::int64_t outputs;  // a multiple of 4
    std::int64_t groups;
    double tol;               // on the duality gap over the objective
    std::int64_t max_sweeps;  // over the working set
    double max_work;          // multiplications of all sweeps: the sweep that reaches it is the last
    double* solution;         // M [inputs, outputs], the start on entry
    double* gradient;         // A M - B [inputs, outputs], on entry and on return
    int threads;              // of the gradient; the result does not depend on it
};

struct GroupLassoResult {
    double objective;
    double duality_gap;
    std::int64_t sweeps;
    std::int64_t support;  // rows of M that are not zero
};

// There is no CUDA twin: a sweep is a chain of small steps.
GroupLassoResult group_lasso(Cpu device, const GroupLassoArgs& args);

}  // namespace lrc
