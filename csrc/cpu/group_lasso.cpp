#include "ops/group_lasso.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/anderson.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

// The gradient of a group is computed when its turn comes, from the rows of M that are not zero: that reads M
// and writes one group, where updating all gradients after each step would read and write all of them.

namespace lrc {
namespace {

// Rows of the gradient that parallel_for hands out at once.
constexpr std::int64_t kRowsATask = 12;
// Of the tolerance: what a sweep may leave for the working set to count as solved.
constexpr double kInnerShare = 0.5;
// Sweeps that shrink the gap by as much while they do the work they were given are given it again.
constexpr double kFast = 0.1;
constexpr int kMaxNormSteps = 60;

// The rows of M that are not zero, in order.
using Support = std::vector<std::int64_t>;

// gradient = A M - B for `Rows` rows and `Vectors` vectors of columns.
template <int Rows, int Vectors>
LRC_INLINE void gradient_tile(const GroupLassoArgs& args, const std::int64_t* support, std::int64_t count,
                              std::int64_t row, std::int64_t column) {
    Vec sums[Rows][Vectors];
    const double* linear = args.linear + row * args.outputs + column;
    const double* curvature = args.curvature + row * args.inputs;
    LRC_UNROLL
    for (int r = 0; r < Rows; ++r) {
        LRC_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[r][v] = -load_any(linear + r * args.outputs + v * kLanes);
    }
    for (std::int64_t s = 0; s < count; ++s) {
        const std::int64_t j = support[s];
        const double* from = args.solution + j * args.outputs + column;
        LRC_UNROLL
        for (int r = 0; r < Rows; ++r) {
            LRC_UNROLL
            for (int v = 0; v < Vectors; ++v) {
                sums[r][v] += curvature[r * args.inputs + j] * load_any(from + v * kLanes);
            }
        }
    }
    LRC_UNROLL
    for (int r = 0; r < Rows; ++r) {
        LRC_UNROLL
        for (int v = 0; v < Vectors; ++v) {
            store_any(args.gradient + (row + r) * args.outputs + column + v * kLanes, sums[r][v]);
        }
    }
}

// As many columns at a time as the registers hold: `Vectors` times `Rows` sums.
template <int Rows, int Vectors>
LRC_INLINE void gradient_rows(const GroupLassoArgs& args, const std::int64_t* support, std::int64_t count,
                              std::int64_t row) {
    std::int64_t column = 0;
    for (; column + Vectors * kLanes <= args.outputs; column += Vectors * kLanes) {
        gradient_tile<Rows, Vectors>(args, support, count, row, column);
    }
    for (; column + 2 * kLanes <= args.outputs; column += 2 * kLanes) {
        gradient_tile<Rows, 2>(args, support, count, row, column);
    }
    for (; column < args.outputs; column += kLanes) gradient_tile<Rows, 1>(args, support, count, row, column);
}

LRC_INLINE void gradient_range(const GroupLassoArgs& args, const std::int64_t* support, std::int64_t count,
                               std::int64_t begin, std::int64_t end) {
    std::int64_t row = begin;
    for (; row + 3 <= end; row += 3) gradient_rows<3, 4>(args, support, count, row);
    if (row + 2 == end) return gradient_rows<2, 6>(args, support, count, row);
    if (row + 1 == end) gradient_rows<1, 8>(args, support, count, row);
}

LRC_MULTIVERSION void compute_gradient(const GroupLassoArgs& args, const std::int64_t* support,
                                       std::int64_t count, std::int64_t begin, std::int64_t end) {
    gradient_range(args, support, count, begin, end);
}

LRC_INLINE double dot(const double* a, const double* b, std::int64_t size) {
    Vec total{};
    for (std::int64_t i = 0; i < size; i += kLanes) total += load_any(a + i) * load_any(b + i);
    return sum(total);
}

// The n > 0 with sum_i squares[i] / (curvatures[i] n + threshold)^2 = 1, given that sum squares >
// threshold^2. Newton on (sum ...)^(-1/2) = 1, concave and rising: from the left it never oversteps, and a
// step from the right lands on the left.
LRC_INLINE double block_norm(const double* squares, const double* curvatures, std::int64_t size,
                             double threshold, double norm) {
    if (size == 1) return (std::sqrt(squares[0]) - threshold) / curvatures[0];
    for (int step = 0; step < kMaxNormSteps; ++step) {
        double value = 0, slope = 0;
        for (std::int64_t i = 0; i < size; ++i) {
            const double inverse = 1 / (curvatures[i] * norm + threshold);
            const double term = squares[i] * inverse * inverse;
            value += term;
            slope += term * curvatures[i] * inverse;
        }
        const double root = std::sqrt(value);
        const double next = std::max(0.0, norm + (root - 1) * value / slope);
        const double moved = std::fabs(next - norm);
        norm = next;
        if (moved <= 4 * std::numeric_limits<double>::epsilon() * norm) break;
    }
    return norm;
}

// What is known of M, and what a block step needs.
struct Iterate {
    std::vector<double> norms;       // [groups]
    Support support;                 // of the norms
    double objective;                // kept up to date by each step
    std::vector<double> squares;     // [rows of the largest group]
    std::vector<double> curvatures;  // as many
};

void collect_support(const GroupLassoArgs& args, Iterate& iterate) {
    iterate.support.clear();
    for (std::int64_t g = 0; g < args.groups; ++g) {
        if (iterate.norms[g] == 0) continue;
        for (std::int64_t row = args.starts[g]; row < args.starts[g + 1]; ++row)
            iterate.support.push_back(row);
    }
}

// Minimises f over one group whose gradient is fresh, and returns by how much its optimality condition was
// violated before, relative to the threshold.
LRC_INLINE double step(const GroupLassoArgs& args, std::int64_t group, Iterate& iterate) {
    double& norm = iterate.norms[group];
    const std::int64_t begin = args.starts[group];
    const std::int64_t size = args.starts[group + 1] - begin;
    const double threshold = args.thresholds[group];
    const double shrinkage = norm > 0 ? threshold / norm : 0;
    double violation = 0, total = 0, before = threshold * norm;
    for (std::int64_t i = 0; i < size; ++i) {
        const double own = args.curvature[(begin + i) * args.inputs + begin + i];
        double* m = args.solution + (begin + i) * args.outputs;
        const double* gradient = args.gradient + (begin + i) * args.outputs;
        Vec square{}, violated{}, value{};
        for (std::int64_t j = 0; j < args.outputs; j += kLanes) {
            const Vec slope = load_any(gradient + j), old = load_any(m + j);
            const Vec pull = own * old - slope, excess = slope + shrinkage * old;
            square += pull * pull;
            violated += excess * excess;
            value += (slope - 0.5 * own * old) * old;
            store_any(m + j, pull);
        }
        iterate.curvatures[i] = own;
        iterate.squares[i] = sum(square);
        total += iterate.squares[i];
        violation += sum(violated);
        before += sum(value);
    }
    violation = std::sqrt(violation);
    if (norm == 0) violation = std::max(0.0, violation - threshold);
    if (total <= threshold * threshold) {
        std::fill_n(args.solution + begin * args.outputs, size * args.outputs, 0.0);
        norm = 0;
        iterate.objective -= before;
        return violation / threshold;
    }
    norm = block_norm(iterate.squares.data(), iterate.curvatures.data(), size, threshold, norm);
    double after = threshold * norm;
    for (std::int64_t i = 0; i < size; ++i) {
        const double factor = norm / (iterate.curvatures[i] * norm + threshold);
        after += (0.5 * iterate.curvatures[i] * factor - 1) * factor * iterate.squares[i];
        double* m = args.solution + (begin + i) * args.outputs;
        for (std::int64_t j = 0; j < args.outputs; j += kLanes) store_any(m + j, factor * load_any(m + j));
    }
    iterate.objective += after - before;
    return violation / threshold;
}

// Visits each of the groups once and returns the largest violation met.
LRC_MULTIVERSION double sweep(const GroupLassoArgs& args, const std::vector<std::int64_t>& groups,
                              Iterate& iterate) {
    double largest = 0;
    for (const std::int64_t g : groups) {
        gradient_range(args, iterate.support.data(), static_cast<std::int64_t>(iterate.support.size()),
                       args.starts[g], args.starts[g + 1]);
        const bool was_zero = iterate.norms[g] == 0;
        largest = std::max(largest, step(args, g, iterate));
        if (was_zero != (iterate.norms[g] == 0)) collect_support(args, iterate);
    }
    return largest;
}

struct Residual {
    double square;
    double aligned;
};

class Solver {
  public:
    explicit Solver(const GroupLassoArgs& args)
        : args_(args), iterate_{std::vector<double>(args.groups), {}, 0, {}, {}}, anderson_(args.outputs) {
        std::int64_t largest = 0;
        for (std::int64_t g = 0; g < args.groups; ++g) {
            largest = std::max(largest, args.starts[g + 1] - args.starts[g]);
            iterate_.norms[g] = std::sqrt(square_of(args.solution, g));
        }
        iterate_.squares.resize(largest);
        iterate_.curvatures.resize(largest);
        collect_support(args, iterate_);
    }

    GroupLassoResult run() {
        GroupLassoResult result{};
        double share = kInnerShare;
        double work = 0;
        double last_gap = 0;  // when the work was counted from zero
        const auto spent = [&] { return result.sweeps >= args_.max_sweeps || work >= args_.max_work; };
        for (;;) {
            measure(result);
            result.support = static_cast<std::int64_t>(iterate_.support.size());
            const bool fast = result.duality_gap <= kFast * last_gap;
            if (work == 0 || (spent() && fast)) {
                work = 0;
                last_gap = result.duality_gap;
            }
            if (result.duality_gap <= args_.tol * result.objective || spent()) return result;
            collect_violated();
            iterate_.objective = result.objective;
            anderson_.clear();
            for (;;) {
                const double violation = sweep(args_, working_, iterate_);
                ++result.sweeps;
                work += work_of_sweep();
                collect_active();
                // A violation v of all conditions is a gap of v times the penalty's part of the objective.
                if (violation * penalty_ <= share * args_.tol * result.objective || spent()) break;
                if (anderson_.push(args_.solution, iterate_.support)) {
                    work += work_of_sweep();
                    extrapolate();
                }
            }
            share *= kInnerShare;
            refresh_gradient();
        }
    }

  private:
    double square_of(const double* matrix, std::int64_t group) const {
        const std::int64_t begin = args_.starts[group] * args_.outputs;
        const double* rows = matrix + begin;
        return dot(rows, rows, args_.starts[group + 1] * args_.outputs - begin);
    }

    double work_of_sweep() const {
        std::int64_t rows = 0;
        for (const std::int64_t g : working_) rows += args_.starts[g + 1] - args_.starts[g];
        return static_cast<double>(rows) * iterate_.support.size() * args_.outputs;
    }

    // Combines the last iterates, all of them of the working set, where that makes the objective smaller.
    void extrapolate() {
        if (!anderson_.combine(args_.solution)) return;
        double objective = args_.energy / 2;
        for (const std::int64_t g : working_) {
            compute_gradient(args_, iterate_.support.data(),
                             static_cast<std::int64_t>(iterate_.support.size()), args_.starts[g],
                             args_.starts[g + 1]);
            objective += args_.thresholds[g] * std::sqrt(square_of(args_.solution, g));
            for (std::int64_t i = args_.starts[g] * args_.outputs; i < args_.starts[g + 1] * args_.outputs;
                 i += args_.outputs) {
                objective += (dot(args_.gradient + i, args_.solution + i, args_.outputs) -
                              dot(args_.linear + i, args_.solution + i, args_.outputs)) /
                             2;
            }
        }
        if (!(objective < iterate_.objective)) return anderson_.restore(args_.solution);
        iterate_.objective = objective;
        for (const std::int64_t g : working_) iterate_.norms[g] = std::sqrt(square_of(args_.solution, g));
        anderson_.push(args_.solution, iterate_.support);
    }

    // The groups that are not zero, and those that should not be.
    void collect_violated() {
        working_.clear();
        for (std::int64_t g = 0; g < args_.groups; ++g) {
            const double threshold = args_.thresholds[g];
            if (iterate_.norms[g] > 0 || square_of(args_.gradient, g) > threshold * threshold)
                working_.push_back(g);
        }
    }

    void collect_active() {
        std::erase_if(working_, [&](std::int64_t g) { return iterate_.norms[g] == 0; });
    }

    void refresh_gradient() {
        const std::int64_t tasks = (args_.inputs + kRowsATask - 1) / kRowsATask;
        parallel_for(args_.threads, tasks, [&](int, std::int64_t task) noexcept {
            compute_gradient(args_, iterate_.support.data(),
                             static_cast<std::int64_t>(iterate_.support.size()), task * kRowsATask,
                             std::min((task + 1) * kRowsATask, args_.inputs));
        });
    }

    // The squared length of the residual y - M x, <M - W, G> or energy - <B, M> + <G, M>, and its product
    // with y, -<G, W> or energy - <B, M>. What needs W does not cancel where the residual is small.
    Residual residual() const {
        double slope = 0, fitted = 0;
        for (const std::int64_t row : iterate_.support) {
            const double* m = args_.solution + row * args_.outputs;
            slope += dot(args_.gradient + row * args_.outputs, m, args_.outputs);
            if (args_.weight == nullptr) fitted += dot(args_.linear + row * args_.outputs, m, args_.outputs);
        }
        const double aligned = args_.weight == nullptr
                                   ? args_.energy - fitted
                                   : -dot(args_.gradient, args_.weight, args_.inputs * args_.outputs);
        return {std::max(0.0, aligned + slope), aligned};
    }

    // The dual point is the residual, scaled until all groups are feasible.
    void measure(GroupLassoResult& result) {
        double scale = 1;
        penalty_ = 0;
        for (std::int64_t g = 0; g < args_.groups; ++g) {
            penalty_ += args_.thresholds[g] * iterate_.norms[g];
            const double norm = std::sqrt(square_of(args_.gradient, g));
            if (norm * scale > args_.thresholds[g]) scale = args_.thresholds[g] / norm;
        }
        const auto [square, aligned] = residual();
        if (square > 0) scale = std::clamp(aligned / square, 0.0, scale);
        result.objective = square / 2 + penalty_;
        result.duality_gap = result.objective - scale * aligned + scale * scale * square / 2;
    }

    const GroupLassoArgs& args_;
    Iterate iterate_;
    Anderson anderson_;
    std::vector<std::int64_t> working_;
    double penalty_ = 0;  // sum_g thresholds[g] |M_g|
};

}  // namespace

GroupLassoResult group_lasso(Cpu, const GroupLassoArgs& args) { return Solver(args).run(); }

}  // namespace lrc
