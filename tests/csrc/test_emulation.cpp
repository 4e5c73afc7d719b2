// The emulation itself: what it must accept, and what it must not miss. Given a name, runs that broken
// kernel, which must end the program.
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "cuda/block.cuh"
#include "cuda/launch.cuh"

namespace {

constexpr unsigned kThreads = 96;

// out[i] = in[kThreads - 1 - i] + the sum over the warp, through shared memory.
template <bool kBarrier> void mirror_kernel(const double* in, double* out) {
    double* shared = lrc::dynamic_shared<double>();
    shared[threadIdx.x] = in[threadIdx.x];
    if (kBarrier) __syncthreads();
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x] + lrc::warp_sum(in[threadIdx.x]);
}

void divergent_kernel() {
    if (threadIdx.x % 2 == 0) __syncthreads();
}

void overrun_kernel() { lrc::dynamic_shared<double>()[kThreads + threadIdx.x] = 0; }

std::vector<double> mirror(void (*kernel)(const double*, double*), emulation::Order order) {
    const std::vector<double> in = check::normal_vector(kThreads, 1);
    std::vector<double> out(kThreads, std::numeric_limits<double>::quiet_NaN());
    emulation::Block::instance().order = order;
    const double* from = in.data();
    double* to = out.data();
    lrc::launch(lrc::Cuda{nullptr}, kernel, 1, kThreads, kThreads * sizeof(double), from, to);
    return out;
}

bool same_in_all_orders(void (*kernel)(const double*, double*)) {
    const std::vector<double> forward = mirror(kernel, emulation::Order::kForward);
    for (emulation::Order order : {emulation::Order::kReverse, emulation::Order::kRandom}) {
        const std::vector<double> other = mirror(kernel, order);
        if (std::memcmp(forward.data(), other.data(), kThreads * sizeof(double)) != 0) return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string broken = argc > 1 ? argv[1] : "";
    if (broken == "divergence") lrc::launch(lrc::Cuda{nullptr}, divergent_kernel, 1, kThreads, 0);
    if (broken == "overrun") {
        lrc::launch(lrc::Cuda{nullptr}, overrun_kernel, 1, kThreads, kThreads * sizeof(double));
    }
    if (!broken.empty()) return 0;
    check::expect(same_in_all_orders(mirror_kernel<true>),
                  "a correct kernel depends on the order of its threads");
    check::expect(!same_in_all_orders(mirror_kernel<false>), "a missing barrier went unnoticed");
    return check::failures > 0;
}
