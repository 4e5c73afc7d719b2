#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "math/momentum.h"
#include "ops/group_lasso.h"

// A block a group of a penalty. It goes over its entries twice, as the proximal step needs the group's norm:
// the second time they come from the cache, and computing the step again saves storing it. The last block of
// a penalty to arrive adds up all groups in their order and chooses the momentum: so one kernel is all there
// is between two products, and its bits do not depend on the order of blocks.

namespace lrc {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLengths = 5;  // sums of the first pass

struct Scratch {
    double lengths[kWarps * kLengths];
    double uphill[kWarps];
    double terms[kWarps * kStepTerms];
    double excess[kWarpSize];
    bool is_last;
};

// The sums over the block's threads, the same bits in every thread.
template <int kCount>
__device__ void block_sums(double (&sums)[kCount], double* scratch) {  // [kWarps, kCount], for this call
    for (int i = 0; i < kCount; ++i) {
        sums[i] = warp_sum(sums[i]);
        if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize * kCount + i] = sums[i];
    }
    __syncthreads();
    for (int i = 0; i < kCount; ++i) {
        sums[i] = 0;
        for (int warp = 0; warp < kWarps; ++warp) sums[i] += scratch[warp * kCount + i];
    }
}

// Where an entry of the block's group lies.
struct Entry {
    std::int64_t at;      // in iterates and products
    std::int64_t shared;  // in what all penalties share
};

__device__ Entry entry_of(const GroupLassoStepArgs& args, std::int64_t penalty, std::int64_t row,
                          std::int64_t column) {
    return {(row * args.penalties + penalty) * args.outputs + column, row * args.outputs + column};
}

// The extrapolated point, and the gradient step from it.
struct Forward {
    double point;
    double stepped;
};

__device__ Forward forward(const GroupLassoStepArgs& args, Entry entry, double beta) {
    const double m = args.current[entry.at], product = args.current_product[entry.at];
    const double point = m + beta * (m - args.other[entry.at]);
    const double point_product = product + beta * (product - args.other_product[entry.at]);
    return {point, point - args.step * (point_product - args.linear[entry.shared])};
}

// Calls f(entry) for the thread's share of the group's entries.
template <class F>
__device__ void for_each_entry(const GroupLassoStepArgs& args, std::int64_t penalty, std::int64_t group,
                               const F& f) {
    const std::int64_t begin = args.starts[group];
    const auto width = static_cast<unsigned>(args.outputs);
    const auto count = static_cast<unsigned>((args.starts[group + 1] - begin) * args.outputs);
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
        f(entry_of(args, penalty, begin + i / width, i % width));
    }
}

// Adds up the terms of all groups, which other blocks have written.
__device__ void total_terms(const GroupLassoStepArgs& args, const double* terms, Scratch& scratch,
                            double (&totals)[kStepTerms]) {
    double excess = 1;
    for (std::int64_t g = threadIdx.x; g < args.groups; g += kThreads) {
        for (int i = 0; i < kExcess; ++i) totals[i] += terms[g * kStepTerms + i];
        excess = fmax(excess, terms[g * kStepTerms + kExcess]);
    }
    block_sums(totals, scratch.terms);
    totals[kExcess] = block_max(excess, scratch.excess);
}

__global__ void __launch_bounds__(kThreads) group_lasso_step_kernel(GroupLassoStepArgs args) {
    Scratch& scratch = *dynamic_shared<Scratch>();
    const std::int64_t penalty = blockIdx.x / args.groups;
    const std::int64_t group = blockIdx.x % args.groups;
    std::int64_t* state = args.state + penalty * kState;
    double* momentum = args.momentum + penalty * kMomentum;
    if (state[kRunning] == 0) return;
    const double beta = momentum[kBeta];
    double lengths[kLengths] = {};
    for_each_entry(args, penalty, group, [&](Entry entry) {
        const double m = args.current[entry.at];
        const double slope = args.current_product[entry.at] - args.linear[entry.shared];
        const double stepped = forward(args, entry, beta).stepped;
        lengths[0] += stepped * stepped;
        lengths[1] += m * m;
        lengths[2] += slope * slope;
        lengths[3] += slope * m;
        lengths[4] +=
            args.weight != nullptr ? slope * args.weight[entry.shared] : m * args.linear[entry.shared];
    });
    block_sums(lengths, scratch.lengths);

    const double threshold = args.thresholds[penalty * args.groups + group];
    const double factor = shrinkage(sqrt(lengths[0]), threshold * args.step);
    double uphill[1] = {};
    for_each_entry(args, penalty, group, [&](Entry entry) {
        const auto [point, stepped] = forward(args, entry, beta);
        const double next = factor * stepped;
        uphill[0] += (point - next) * (next - args.current[entry.at]);
        args.other[entry.at] = next;
    });
    block_sums(uphill, scratch.uphill);

    double* terms = args.terms + penalty * args.groups * kStepTerms;
    if (threadIdx.x == 0) {
        set_terms(threshold, sqrt(lengths[1]), sqrt(lengths[2]), lengths[3], lengths[4], uphill[0],
                  terms + group * kStepTerms);
        __threadfence();
        auto* ticket = reinterpret_cast<unsigned long long*>(state + kTicket);
        scratch.is_last = atomicAdd(ticket, 1ull) == static_cast<unsigned long long>(args.groups - 1);
    }
    __syncthreads();
    if (!scratch.is_last) return;
    __threadfence();
    double totals[kStepTerms] = {};
    total_terms(args, terms, scratch, totals);
    if (threadIdx.x != 0) return;
    state[kTicket] = 0;
    conclude(totals, args.weight != nullptr, args.energy, args.tol, momentum, state);
}

}  // namespace

void group_lasso_step(Cuda device, const GroupLassoStepArgs& args) {
    if (args.penalties * args.groups == 0) return;
    launch(device, group_lasso_step_kernel, static_cast<unsigned>(args.penalties * args.groups), kThreads,
           sizeof(Scratch), args);
}

}  // namespace lrc
