// FISTA's step on either device against the formulas written out, one after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "math/momentum.h"
#include "ops/group_lasso.h"

namespace steps {

constexpr double kUntouched = -12345.5;
constexpr double kTol = 1e-3;

struct Case {
    std::vector<std::int64_t> sizes;  // rows of each group
    std::int64_t outputs;             // a multiple of 4
    std::int64_t penalties;
    bool with_weight;
};

// Two buffers of iterates and products, [inputs, penalties, outputs], and what the kernel keeps.
struct Iterates {
    std::vector<double> buffers[2];
    std::vector<double> products[2];
    std::vector<double> momentum;
    std::vector<std::int64_t> state;
    bool operator==(const Iterates&) const = default;
};

struct Problem {
    Case shape;
    std::vector<std::int64_t> starts{0};
    std::int64_t inputs = 0;
    std::vector<double> curvature, linear, weight, thresholds;
    double energy = 0;
    double step = 0;
    std::int64_t at(std::int64_t row, std::int64_t penalty, std::int64_t column) const {
        return (row * shape.penalties + penalty) * shape.outputs + column;
    }
};

// A = identity + a a^T / inputs, whose largest eigenvalue is no more than its trace.
inline Problem make_problem(const Case& shape, unsigned seed) {
    Problem problem;
    problem.shape = shape;
    for (std::int64_t size : shape.sizes) problem.starts.push_back(problem.inputs += size);
    const std::int64_t d = problem.inputs, o = shape.outputs;
    const std::vector<double> a = check::normal_vector(d, seed);
    problem.curvature.assign(d * d, 0);
    double trace = 0;
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < d; ++j) problem.curvature[i * d + j] = (i == j) + a[i] * a[j] / d;
        trace += a[i] * a[i] / d;
    }
    problem.step = 1 / (1 + trace);
    problem.weight = check::normal_vector(d * o, seed + 1);
    problem.linear.assign(d * o, 0);
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < d; ++j) {
            for (std::int64_t c = 0; c < o; ++c)
                problem.linear[i * o + c] += problem.curvature[i * d + j] * problem.weight[j * o + c];
        }
    }
    for (std::int64_t i = 0; i < d * o; ++i) problem.energy += problem.linear[i] * problem.weight[i];
    // From a penalty that leaves little to one that leaves almost everything.
    for (std::int64_t p = 0; p < shape.penalties; ++p) {
        for (std::size_t g = 0; g < shape.sizes.size(); ++g)
            problem.thresholds.push_back(std::sqrt(shape.sizes[g] * o) * std::pow(0.1, p) * (1 + 0.01 * g));
    }
    return problem;
}

inline Iterates start_of(const Problem& problem, unsigned seed) {
    const std::size_t size = problem.inputs * problem.shape.penalties * problem.shape.outputs;
    Iterates iterates;
    for (int i : {0, 1}) {
        iterates.buffers[i] = check::normal_vector(size, seed);
        iterates.products[i].assign(size, 0);
        for (auto* array : {&iterates.buffers[i], &iterates.products[i]}) array->push_back(kUntouched);
    }
    for (std::int64_t p = 0; p < problem.shape.penalties; ++p) {
        iterates.momentum.insert(iterates.momentum.end(), {1, 0, 0, 0});
        iterates.state.insert(iterates.state.end(), {0, 1, 0});
    }
    return iterates;
}

inline void multiply(const Problem& problem, Iterates& iterates, int now) {
    for (std::int64_t i = 0; i < problem.inputs; ++i) {
        for (std::int64_t p = 0; p < problem.shape.penalties; ++p) {
            for (std::int64_t c = 0; c < problem.shape.outputs; ++c) {
                double sum = 0;
                for (std::int64_t j = 0; j < problem.inputs; ++j)
                    sum += problem.curvature[i * problem.inputs + j] *
                           iterates.buffers[now][problem.at(j, p, c)];
                iterates.products[now][problem.at(i, p, c)] = sum;
            }
        }
    }
}

template <class Device> void step(Device device, const Problem& problem, Iterates& iterates, int now,
                                  int threads) {
    const std::int64_t groups = static_cast<std::int64_t>(problem.shape.sizes.size());
    std::vector<double> terms(problem.shape.penalties * groups * lrc::kStepTerms, kUntouched);
    lrc::group_lasso_step(device, {.current = iterates.buffers[now].data(),
                                   .other = iterates.buffers[1 - now].data(),
                                   .current_product = iterates.products[now].data(),
                                   .other_product = iterates.products[1 - now].data(),
                                   .linear = problem.linear.data(),
                                   .weight = problem.shape.with_weight ? problem.weight.data() : nullptr,
                                   .starts = problem.starts.data(),
                                   .thresholds = problem.thresholds.data(),
                                   .energy = problem.energy,
                                   .step = problem.step,
                                   .tol = kTol,
                                   .inputs = problem.inputs,
                                   .penalties = problem.shape.penalties,
                                   .outputs = problem.shape.outputs,
                                   .groups = groups,
                                   .terms = terms.data(),
                                   .momentum = iterates.momentum.data(),
                                   .state = iterates.state.data(),
                                   .threads = threads});
}

// One penalty's FISTA, with the extrapolated point stored, and every sum over all groups at once.
struct Written {
    std::vector<double> current, point;
    double growth = 1;
    std::int64_t iterations = 0;
    bool running = true;
    double objective = 0, gap = 0;
};

inline std::vector<double> gradient_of(const Problem& problem, const std::vector<double>& M) {
    const std::int64_t d = problem.inputs, o = problem.shape.outputs;
    std::vector<double> gradient(d * o);
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t c = 0; c < o; ++c) {
            double sum = -problem.linear[i * o + c];
            for (std::int64_t j = 0; j < d; ++j) sum += problem.curvature[i * d + j] * M[j * o + c];
            gradient[i * o + c] = sum;
        }
    }
    return gradient;
}

inline double norm_of(const Problem& problem, const std::vector<double>& M, std::size_t g) {
    double sum = 0;
    for (std::int64_t i = problem.starts[g] * problem.shape.outputs;
         i < problem.starts[g + 1] * problem.shape.outputs; ++i)
        sum += M[i] * M[i];
    return std::sqrt(sum);
}

inline void write_out(const Problem& problem, std::int64_t penalty, Written& written) {
    if (!written.running) return;
    const std::size_t groups = problem.shape.sizes.size();
    const double* thresholds = problem.thresholds.data() + penalty * groups;
    const std::vector<double> slope = gradient_of(problem, written.current);
    double residual = 0, aligned = 0, scale = 1, cost = 0;
    for (std::size_t i = 0; i < slope.size(); ++i) {
        residual += (written.current[i] - problem.weight[i]) * slope[i];
        aligned -= slope[i] * problem.weight[i];
    }
    for (std::size_t g = 0; g < groups; ++g) {
        cost += thresholds[g] * norm_of(problem, written.current, g);
        scale = std::min(scale, thresholds[g] / norm_of(problem, slope, g));
    }
    scale = std::clamp(aligned / residual, 0.0, scale);
    written.objective = residual / 2 + cost;
    written.gap = written.objective - scale * aligned + scale * scale * residual / 2;
    if (written.gap <= kTol * written.objective) {
        written.running = false;
        return;
    }
    ++written.iterations;
    const std::vector<double> steep = gradient_of(problem, written.point);
    std::vector<double> next(slope.size());
    for (std::size_t i = 0; i < next.size(); ++i) next[i] = written.point[i] - problem.step * steep[i];
    double uphill = 0;
    for (std::size_t g = 0; g < groups; ++g) {
        const double factor = std::max(0.0, 1 - problem.step * thresholds[g] / norm_of(problem, next, g));
        for (std::int64_t i = problem.starts[g] * problem.shape.outputs;
             i < problem.starts[g + 1] * problem.shape.outputs; ++i)
            next[i] *= factor;
    }
    for (std::size_t i = 0; i < next.size(); ++i)
        uphill += (written.point[i] - next[i]) * (next[i] - written.current[i]);
    if (uphill > 0) written.growth = 1;
    const double grown = (1 + std::sqrt(1 + 4 * written.growth * written.growth)) / 2;
    const double beta = uphill > 0 ? 0 : (written.growth - 1) / grown;
    written.growth = grown;
    for (std::size_t i = 0; i < next.size(); ++i)
        written.point[i] = next[i] + beta * (next[i] - written.current[i]);
    written.current = next;
}

// Runs some iterations of both and compares them; returns where the device's ended.
template <class Device>
Iterates expect_steps(const char* what, Device device, const Case& shape, int iterations, int threads,
                      unsigned seed) {
    const Problem problem = make_problem(shape, seed);
    Iterates iterates = start_of(problem, seed + 2);
    std::vector<Written> written(shape.penalties);
    for (std::int64_t p = 0; p < shape.penalties; ++p) {
        for (std::int64_t row = 0; row < problem.inputs; ++row) {
            for (std::int64_t c = 0; c < shape.outputs; ++c)
                written[p].current.push_back(iterates.buffers[0][problem.at(row, p, c)]);
        }
        written[p].point = written[p].current;
    }
    for (int number = 0; number < iterations; ++number) {
        multiply(problem, iterates, number % 2);
        step(device, problem, iterates, number % 2, threads);
        for (std::int64_t p = 0; p < shape.penalties; ++p) write_out(problem, p, written[p]);
    }
    for (std::int64_t p = 0; p < shape.penalties; ++p) {
        const Written& truth = written[p];
        const double* momentum = iterates.momentum.data() + p * lrc::kMomentum;
        const std::int64_t* state = iterates.state.data() + p * lrc::kState;
        check::expect(
            state[lrc::kIterations] == truth.iterations && (state[lrc::kRunning] != 0) == truth.running,
            "%s: %lld iterations, not %lld", what, static_cast<long long>(state[lrc::kIterations]),
            static_cast<long long>(truth.iterations));
        check::expect(state[lrc::kTicket] == 0, "%s: a ticket is left", what);
        check::expect(std::fabs(momentum[lrc::kGap] - truth.gap) <= 1e-9 * problem.energy,
                      "%s: gap %g, not %g", what, momentum[lrc::kGap], truth.gap);
        check::expect(std::fabs(momentum[lrc::kObjective] - truth.objective) <= 1e-9 * problem.energy,
                      "%s: objective %g, not %g", what, momentum[lrc::kObjective], truth.objective);
        const std::vector<double>& found = iterates.buffers[state[lrc::kIterations] % 2];
        double worst = 0;
        for (std::int64_t row = 0; row < problem.inputs; ++row) {
            for (std::int64_t c = 0; c < shape.outputs; ++c) {
                const double off = found[problem.at(row, p, c)] - truth.current[row * shape.outputs + c];
                worst = std::isfinite(off) ? std::max(worst, std::fabs(off)) : INFINITY;
            }
        }
        check::expect(worst <= 1e-9, "%s: an entry is off by %g", what, worst);
    }
    for (int i : {0, 1}) {
        check::expect(iterates.buffers[i].back() == kUntouched && iterates.products[i].back() == kUntouched,
                      "%s: wrote past the end", what);
    }
    return iterates;
}

// One group, groups of several rows, more groups than a block has threads, and a group of more entries.
inline std::vector<Case> cases() {
    return {{{1}, 4, 1, true},
            {{3, 1, 2, 5}, 12, 3, true},
            {{2, 3}, 4, 2, false},
            {std::vector<std::int64_t>(131, 1), 4, 2, true},
            {{7, 9}, 68, 2, false}};
}

}  // namespace steps
