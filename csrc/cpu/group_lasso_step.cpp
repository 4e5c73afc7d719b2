#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "math/momentum.h"
#include "ops/group_lasso.h"

namespace lrc {
namespace {

struct Entries {
    std::int64_t at;      // in iterates and products
    std::int64_t shared;  // in what all penalties share
};

struct Forward {
    Vec point;
    Vec stepped;
};

// The extrapolated point, and the gradient step from it.
LRC_INLINE Forward forward(const GroupLassoStepArgs& args, Entries at, double beta) {
    const Vec m = load_any(args.current + at.at), product = load_any(args.current_product + at.at);
    const Vec point = m + beta * (m - load_any(args.other + at.at));
    const Vec point_product = product + beta * (product - load_any(args.other_product + at.at));
    return {point, point - args.step * (point_product - load_any(args.linear + at.shared))};
}

template <class F>
LRC_INLINE void for_each_entry(const GroupLassoStepArgs& args, std::int64_t penalty, std::int64_t group,
                               const F& f) {
    for (std::int64_t row = args.starts[group]; row < args.starts[group + 1]; ++row) {
        for (std::int64_t column = 0; column < args.outputs; column += kLanes) {
            f(Entries{(row * args.penalties + penalty) * args.outputs + column, row * args.outputs + column});
        }
    }
}

LRC_MULTIVERSION void step_group(const GroupLassoStepArgs& args, std::int64_t penalty, std::int64_t group) {
    const double beta = args.momentum[penalty * kMomentum + kBeta];
    Vec stepped_square{}, square{}, slope_square{}, along_iterate{}, along_target{};
    for_each_entry(args, penalty, group, [&](Entries at) __attribute__((always_inline)) {
        const Vec m = load_any(args.current + at.at);
        const Vec linear = load_any(args.linear + at.shared);
        const Vec slope = load_any(args.current_product + at.at) - linear;
        const Vec stepped = forward(args, at, beta).stepped;
        stepped_square += stepped * stepped;
        square += m * m;
        slope_square += slope * slope;
        along_iterate += slope * m;
        along_target += args.weight != nullptr ? slope * load_any(args.weight + at.shared) : m * linear;
    });
    const double threshold = args.thresholds[penalty * args.groups + group];
    const double factor = shrinkage(std::sqrt(sum(stepped_square)), threshold * args.step);
    Vec uphill{};
    for_each_entry(args, penalty, group, [&](Entries at) __attribute__((always_inline)) {
        const auto [point, stepped] = forward(args, at, beta);
        const Vec next = factor * stepped;
        uphill += (point - next) * (next - load_any(args.current + at.at));
        store_any(args.other + at.at, next);
    });
    set_terms(threshold, std::sqrt(sum(square)), std::sqrt(sum(slope_square)), sum(along_iterate),
              sum(along_target), sum(uphill), args.terms + (penalty * args.groups + group) * kStepTerms);
}

void conclude_penalty(const GroupLassoStepArgs& args, std::int64_t penalty) {
    double totals[kStepTerms] = {};
    totals[kExcess] = 1;
    for (std::int64_t group = 0; group < args.groups; ++group) {
        const double* terms = args.terms + (penalty * args.groups + group) * kStepTerms;
        for (int i = 0; i < kExcess; ++i) totals[i] += terms[i];
        totals[kExcess] = std::max(totals[kExcess], terms[kExcess]);
    }
    conclude(totals, args.weight != nullptr, args.energy, args.tol, args.momentum + penalty * kMomentum,
             args.state + penalty * kState);
}

}  // namespace

void group_lasso_step(Cpu, const GroupLassoStepArgs& args) {
    // A task a group: its rows of all penalties lie side by side.
    parallel_for(args.threads, args.groups, [&](int, std::int64_t group) noexcept {
        for (std::int64_t penalty = 0; penalty < args.penalties; ++penalty) {
            if (args.state[penalty * kState + kRunning] != 0) step_group(args, penalty, group);
        }
    });
    for (std::int64_t penalty = 0; penalty < args.penalties; ++penalty) {
        if (args.groups > 0 && args.state[penalty * kState + kRunning] != 0) conclude_penalty(args, penalty);
    }
}

}  // namespace lrc
