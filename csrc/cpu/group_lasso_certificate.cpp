#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/group_lasso.h"

// Two passes over M and G: norms of groups are sums of columns' squares, and the distance from optimality
// needs the norms.

namespace lrc {
namespace {

// Sums of one penalty.
struct Sums {
    std::vector<double> columns;  // [inputs]
    std::vector<double> norms;    // [groups], of M
    std::vector<double> slopes;   // [groups], of G
    std::vector<double> pulls;    // [inputs], threshold / norm of the column's group
    double aligned = 0;           // E<y - M x, y>
    double residual = 0;          // E|y - M x|^2
};

// squares[j] += sum_o (gradient + pulls[j] solution)^2, or gradient^2 without pulls.
LRC_MULTIVERSION void add_squares(const double* gradient, const double* solution, const double* pulls,
                                  std::int64_t outputs, std::int64_t inputs, double* squares) {
    for (std::int64_t o = 0; o < outputs; ++o) {
        const double* g = gradient + o * inputs;
        if (pulls == nullptr) {
            for (std::int64_t j = 0; j < inputs; ++j) squares[j] += g[j] * g[j];
            continue;
        }
        const double* m = solution + o * inputs;
        for (std::int64_t j = 0; j < inputs; ++j) {
            const double off = g[j] + pulls[j] * m[j];
            squares[j] += off * off;
        }
    }
}

void norms_of(const GroupLassoCertificateArgs& args, const double* matrix, const double* added,
              const double* pulls, std::vector<double>& columns, std::vector<double>& norms) {
    std::ranges::fill(columns, 0);
    std::ranges::fill(norms, 0);
    add_squares(matrix, added, pulls, args.outputs, args.inputs, columns.data());
    for (std::int64_t j = 0; j < args.inputs; ++j) norms[args.group[j]] += columns[j];
    for (double& norm : norms) norm = std::sqrt(norm);
}

// Sums of a few rows at a time, so that they stay accurate.
LRC_MULTIVERSION void add_products(const GroupLassoCertificateArgs& args, const double* M, const double* G,
                                   Sums& sums) {
    double with_target = 0, with_solution = 0;
    for (std::int64_t o = 0; o < args.outputs; ++o) {
        const double* m = M + o * args.inputs;
        const double* g = G + o * args.inputs;
        const double* t = args.target + o * args.inputs;
        const double* of_target = args.is_weight ? g : m;
        Vec target{}, solution{};
        std::int64_t j = 0;
        for (; j + kLanes <= args.inputs; j += kLanes) {
            const Vec at = load_any(m + j), wanted = load_any(t + j);
            target += wanted * load_any(of_target + j);
            solution += (args.is_weight ? at - wanted : at) * load_any(g + j);
        }
        double target_row = sum(target), solution_row = sum(solution);
        for (; j < args.inputs; ++j) {
            target_row += t[j] * of_target[j];
            solution_row += (args.is_weight ? m[j] - t[j] : m[j]) * g[j];
        }
        with_target += target_row;
        with_solution += solution_row;
    }
    sums.aligned = args.is_weight ? -with_target : args.energy - with_target;
    // <M - W, G> does not cancel where the residual is small.
    sums.residual = std::max(0.0, args.is_weight ? with_solution : sums.aligned + with_solution);
}

void certify(const GroupLassoCertificateArgs& args, std::int64_t penalty, Sums& sums) {
    const std::int64_t size = args.outputs * args.inputs;
    const double* M = args.solution + penalty * size;
    const double* G = args.gradient + penalty * size;
    const double* thresholds = args.thresholds + penalty * args.groups;
    norms_of(args, M, nullptr, nullptr, sums.columns, sums.norms);
    norms_of(args, G, nullptr, nullptr, sums.columns, sums.slopes);
    add_products(args, M, G, sums);
    double cost = 0, scale = 1;
    for (std::int64_t g = 0; g < args.groups; ++g) {
        cost += thresholds[g] * sums.norms[g];
        if (sums.slopes[g] * scale > thresholds[g]) scale = thresholds[g] / sums.slopes[g];
    }
    if (sums.residual > 0) scale = std::clamp(sums.aligned / sums.residual, 0.0, scale);
    const double objective = sums.residual / 2 + cost;
    const double dual = scale * sums.aligned - scale * scale * sums.residual / 2;

    for (std::int64_t j = 0; j < args.inputs; ++j) {
        const std::int64_t g = args.group[j];
        sums.pulls[j] = sums.norms[g] > 0 ? thresholds[g] / sums.norms[g] : 0;
    }
    norms_of(args, G, M, sums.pulls.data(), sums.columns, sums.slopes);
    double worst = 0;
    for (std::int64_t g = 0; g < args.groups; ++g) {
        worst = std::max(worst, sums.norms[g] > 0 ? sums.slopes[g] : sums.slopes[g] - thresholds[g]);
    }
    double* certificate = args.certificates + penalty * 3;
    certificate[0] = objective;
    certificate[1] = std::max(0.0, objective - dual);
    certificate[2] = worst;
}

}  // namespace

void group_lasso_certificate(Cpu, const GroupLassoCertificateArgs& args) {
    const Sums empty{.columns = std::vector<double>(args.inputs),
                     .norms = std::vector<double>(args.groups),
                     .slopes = std::vector<double>(args.groups),
                     .pulls = std::vector<double>(args.inputs)};
    std::vector<Sums> sums(worker_count(args.threads, args.penalties), empty);
    parallel_for(args.threads, args.penalties,
                 [&](int worker, std::int64_t penalty) noexcept { certify(args, penalty, sums[worker]); });
}

}  // namespace lrc
