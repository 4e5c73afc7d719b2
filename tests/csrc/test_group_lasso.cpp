// The CPU twin against the optimality conditions of each group, its outputs surrounded by numbers that must
// stay.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "ops/group_lasso.h"

namespace {

constexpr double kUntouched = -12345.5;
constexpr double kTol = 1e-10;

struct Problem {
    std::int64_t inputs;
    std::int64_t outputs;
    std::vector<std::int64_t> starts;
    std::vector<double> curvature;
    std::vector<double> weight;
    std::vector<double> linear;
    double energy = 0;
};

// Diagonal within each group, dominated by the diagonal elsewhere: positive definite.
Problem make_problem(const std::vector<std::int64_t>& sizes, std::int64_t outputs, unsigned seed) {
    Problem problem{
        .inputs = 0, .outputs = outputs, .starts = {0}, .curvature = {}, .weight = {}, .linear = {}};
    for (std::int64_t size : sizes) problem.starts.push_back(problem.inputs += size);
    const std::int64_t d = problem.inputs;
    problem.curvature = check::normal_vector(d * d, seed);
    std::vector<std::int64_t> group(d);
    for (std::size_t g = 0; g < sizes.size(); ++g) {
        std::fill(group.begin() + problem.starts[g], group.begin() + problem.starts[g + 1], g);
    }
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < i; ++j) {
            double& lower = problem.curvature[i * d + j];
            if (group[i] == group[j]) lower = 0;
            problem.curvature[j * d + i] = lower;
        }
    }
    for (std::int64_t i = 0; i < d; ++i) {
        double sum = 0.1;
        for (std::int64_t j = 0; j < d; ++j) sum += i == j ? 0 : std::fabs(problem.curvature[i * d + j]);
        problem.curvature[i * d + i] = sum;
    }
    problem.weight = check::normal_vector(d * outputs, seed + 1);
    problem.linear.assign(d * outputs, 0);
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < d; ++j) {
            for (std::int64_t o = 0; o < outputs; ++o) {
                problem.linear[i * outputs + o] +=
                    problem.curvature[i * d + j] * problem.weight[j * outputs + o];
            }
        }
    }
    for (std::int64_t i = 0; i < d * outputs; ++i) problem.energy += problem.linear[i] * problem.weight[i];
    return problem;
}

double norm_of(const double* rows, const Problem& problem, std::size_t g) {
    double sum = 0;
    for (std::int64_t i = problem.starts[g] * problem.outputs; i < problem.starts[g + 1] * problem.outputs;
         ++i)
        sum += rows[i] * rows[i];
    return std::sqrt(sum);
}

// The distance from optimality, relative to the threshold, of M with a gradient computed here.
double violation(const Problem& problem, const std::vector<double>& thresholds, const double* solution) {
    std::vector<double> gradient(problem.linear.size());
    for (std::int64_t i = 0; i < problem.inputs; ++i) {
        for (std::int64_t o = 0; o < problem.outputs; ++o) {
            double sum = -problem.linear[i * problem.outputs + o];
            for (std::int64_t j = 0; j < problem.inputs; ++j) {
                sum += problem.curvature[i * problem.inputs + j] * solution[j * problem.outputs + o];
            }
            gradient[i * problem.outputs + o] = sum;
        }
    }
    double worst = 0;
    for (std::size_t g = 0; g < thresholds.size(); ++g) {
        const double norm = norm_of(solution, problem, g);
        if (norm == 0) {
            worst = std::max(worst, norm_of(gradient.data(), problem, g) / thresholds[g] - 1);
            continue;
        }
        for (std::int64_t i = problem.starts[g] * problem.outputs;
             i < problem.starts[g + 1] * problem.outputs; ++i) {
            gradient[i] += thresholds[g] * solution[i] / norm;
        }
        worst = std::max(worst, norm_of(gradient.data(), problem, g) / thresholds[g]);
    }
    return worst;
}

struct Solved {
    lrc::GroupLassoResult result;
    std::vector<double> solution;
};

Solved solve(const Problem& problem, const std::vector<double>& thresholds, bool with_weight, int threads,
             std::int64_t max_sweeps) {
    const std::size_t size = problem.linear.size();
    std::vector<double> solution(size + 1, 0), gradient(size + 1, kUntouched);
    solution[size] = kUntouched;
    for (std::size_t i = 0; i < size; ++i) gradient[i] = -problem.linear[i];
    const lrc::GroupLassoArgs args{.curvature = problem.curvature.data(),
                                   .linear = problem.linear.data(),
                                   .weight = with_weight ? problem.weight.data() : nullptr,
                                   .starts = problem.starts.data(),
                                   .thresholds = thresholds.data(),
                                   .energy = problem.energy,
                                   .inputs = problem.inputs,
                                   .outputs = problem.outputs,
                                   .groups = static_cast<std::int64_t>(thresholds.size()),
                                   .tol = kTol,
                                   .max_sweeps = max_sweeps,
                                   .max_work = 1e18,
                                   .solution = solution.data(),
                                   .gradient = gradient.data(),
                                   .threads = threads};
    const lrc::GroupLassoResult result = lrc::group_lasso(lrc::Cpu{}, args);
    check::expect(solution[size] == kUntouched && gradient[size] == kUntouched, "wrote past the end");
    solution.pop_back();
    return {result, solution};
}

// The certificate of two copies of M, in the caller's layout, must say what the solver found and not depend
// on threads.
void expect_certified(const Problem& problem, const std::vector<double>& thresholds, const Solved& solved,
                      bool with_weight) {
    const std::int64_t d = problem.inputs, o = problem.outputs, size = d * o;
    std::vector<double> solution(2 * size), gradient(2 * size), target(size);
    std::vector<std::int64_t> group(d);
    for (std::size_t g = 0; g < thresholds.size(); ++g)
        std::fill(group.begin() + problem.starts[g], group.begin() + problem.starts[g + 1], g);
    for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t c = 0; c < o; ++c) {
            double slope = -problem.linear[i * o + c];
            for (std::int64_t j = 0; j < d; ++j)
                slope += problem.curvature[i * d + j] * solved.solution[j * o + c];
            for (std::int64_t copy : {0, 1}) {
                solution[copy * size + c * d + i] = solved.solution[i * o + c];
                gradient[copy * size + c * d + i] = slope;
            }
            target[c * d + i] = (with_weight ? problem.weight : problem.linear)[i * o + c];
        }
    }
    std::vector<double> twice(thresholds);
    twice.insert(twice.end(), thresholds.begin(), thresholds.end());
    std::vector<double> found[2];
    for (int threads : {1, 2}) {
        std::vector<double>& certificates = found[threads - 1];
        certificates.assign(2 * 3 + 1, kUntouched);
        lrc::group_lasso_certificate(lrc::Cpu{}, {.solution = solution.data(),
                                                  .gradient = gradient.data(),
                                                  .target = target.data(),
                                                  .is_weight = with_weight,
                                                  .energy = problem.energy,
                                                  .group = group.data(),
                                                  .thresholds = twice.data(),
                                                  .penalties = 2,
                                                  .outputs = o,
                                                  .inputs = d,
                                                  .groups = static_cast<std::int64_t>(thresholds.size()),
                                                  .certificates = certificates.data(),
                                                  .threads = threads});
    }
    check::expect(found[0] == found[1] && found[0].back() == kUntouched, "certificates depend on threads");
    for (std::int64_t copy : {0, 1}) {
        const double* certificate = found[0].data() + 3 * copy;
        const double off = violation(problem, thresholds, solved.solution.data());
        check::expect(std::fabs(certificate[0] - solved.result.objective) <= 1e-12 * problem.energy,
                      "objective %g, not %g", certificate[0], solved.result.objective);
        check::expect(std::fabs(certificate[1] - solved.result.duality_gap) <= 1e-12 * problem.energy,
                      "gap %g, not %g", certificate[1], solved.result.duality_gap);
        // All thresholds are equal here, and rounding is of the gradient's size.
        check::expect(std::fabs(certificate[2] - std::max(0.0, off) * thresholds[0]) <=
                          1e-12 * std::sqrt(problem.energy) * d,
                      "off by %g, not %g", certificate[2], off * thresholds[0]);
    }
}

void test(const std::vector<std::int64_t>& sizes, std::int64_t outputs, unsigned seed) {
    const Problem problem = make_problem(sizes, outputs, seed);
    double top = 0;
    for (std::size_t g = 0; g < sizes.size(); ++g)
        top = std::max(top, norm_of(problem.linear.data(), problem, g));
    for (double share : {1.0, 0.5, 0.1, 1e-3}) {
        const std::vector<double> thresholds(sizes.size(), share * top);
        const Solved one = solve(problem, thresholds, true, 1, 10000);
        check::expect(one.result.duality_gap <= kTol * one.result.objective, "gap %g of %g",
                      one.result.duality_gap, one.result.objective);
        check::expect(violation(problem, thresholds, one.solution.data()) < 1e-4, "share %g is not optimal",
                      share);
        const bool zero = std::ranges::all_of(one.solution, [](double m) { return m == 0; });
        check::expect(zero == (share == 1), "share %g: %s", share, zero ? "zero" : "not zero");
        check::expect(solve(problem, thresholds, true, 3, 10000).solution == one.solution,
                      "threads change the result");
        const Solved other = solve(problem, thresholds, false, 1, 10000);
        check::expect(std::fabs(other.result.objective - one.result.objective) <= 1e-9 * problem.energy,
                      "with and without a weight: %g and %g", one.result.objective, other.result.objective);
        expect_certified(problem, thresholds, one, true);
        expect_certified(problem, thresholds, other, false);
        const Solved cut = solve(problem, thresholds, true, 1, 1);
        check::expect(cut.result.sweeps <= 1, "%lld sweeps", static_cast<long long>(cut.result.sweeps));
    }
}

}  // namespace

int main() {
    unsigned seed = 0;
    // Around the rows (3) and the columns (4, 8, 16, 24, 32) that the gradient takes at once, and its tasks
    // (12).
    for (std::int64_t outputs : {4, 8, 12, 16, 20, 24, 28, 32, 36, 44}) {
        test({1}, outputs, seed += 2);
        test({1, 2, 3, 4, 5, 6, 7}, outputs, seed += 2);
        test(std::vector<std::int64_t>(25, 1), outputs, seed += 2);
    }
    const Problem nothing{
        .inputs = 0, .outputs = 4, .starts = {0}, .curvature = {}, .weight = {}, .linear = {}};
    check::expect(solve(nothing, {}, true, 1, 5).result.objective == 0, "nothing costs nothing");
    return check::failures > 0;
}
