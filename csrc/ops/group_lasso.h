// Group lasso on second moments, by block coordinate descent with Anderson acceleration.
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
    double max_work;          // multiplications: sweeps go on past them only while the gap falls fast
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

// What is proved of M as a solution of min_M 1/2 E|y - M x|^2 + sum_g thresholds[g] |M_g|, from its gradient
// G = M R - E[y x^T]: the objective; its gap to the dual value of the residual, scaled until no |G_g| exceeds
// its threshold; and the largest |G_g + thresholds[g] M_g / |M_g||, or |G_g| - thresholds[g] where M_g = 0.
// Groups are those of columns here. All is contiguous.
struct GroupLassoCertificateArgs {
    const double* solution;     // M [penalties, outputs, inputs]
    const double* gradient;     // G [penalties, outputs, inputs]
    const double* target;       // W [outputs, inputs] where y = W x, else E[y x^T]
    bool is_weight;             // what `target` is
    double energy;              // E|y|^2, of no use where y = W x
    const std::int64_t* group;  // [inputs], of each column
    const double* thresholds;   // [penalties, groups], > 0
    std::int64_t penalties;
    std::int64_t outputs;
    std::int64_t inputs;
    std::int64_t groups;
    double* certificates;  // [penalties, 3]: objective, duality gap, distance from optimality
    int threads;           // the result does not depend on it
};

// On CUDA tensors ops/ composes it of library calls.
void group_lasso_certificate(Cpu device, const GroupLassoCertificateArgs& args);

// What an iteration of FISTA does between two products with A, for many penalties at once: it measures the
// gap at M, and where that is too large takes the next step from Y = M + beta (M - M'), with A Y by the same
// extrapolation (Beck & Teboulle 2009, eq. 4.1-4.3; O'Donoghue & Candes 2015, restart by the gradient).
// All is contiguous and float64, which tensor cores multiply as fast as other units multiply float32.
struct GroupLassoStepArgs {
    const double* current;          // M [inputs, penalties, outputs]
    double* other;                  // M' the iterate before, as M; the next one on return
    const double* current_product;  // A M, as M
    const double* other_product;    // A M', as M
    const double* linear;           // B [inputs, outputs]
    const double* weight;           // as in GroupLassoArgs
    const std::int64_t* starts;     // [groups + 1], as in GroupLassoArgs
    const double* thresholds;       // [penalties, groups], > 0
    double energy;                  // as in GroupLassoArgs
    double step;                    // 1 / the largest eigenvalue of A
    double tol;                     // on the duality gap over the objective
    std::int64_t inputs;
    std::int64_t penalties;
    std::int64_t outputs;
    std::int64_t groups;
    double* terms;        // [penalties, groups, kStepTerms], of no meaning between two calls
    double* momentum;     // [penalties, kMomentum], {1, 0, ...} at the start
    std::int64_t* state;  // [penalties, kState], {0, 1, 0} at the start
    int threads;          // the result does not depend on it
};

// A penalty whose gap is small enough is left alone: M stays in the buffer that it is in.
void group_lasso_step(Cpu device, const GroupLassoStepArgs& args);
void group_lasso_step(Cuda device, const GroupLassoStepArgs& args);

}  // namespace lrc
