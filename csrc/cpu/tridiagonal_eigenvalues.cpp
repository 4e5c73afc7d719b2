#include "cpu/tridiagonal_eigenvalues.h"

#include <algorithm>

#include "cpu/simd.h"
#include "math/sturm.h"

// Bisection, one eigenvalue a vector lane. It does more arithmetic than the QL iteration, about 45 terms an
// entry of the matrix against one, but QL's terms are a chain of divisions (36 cycles each on a Zen 3 core)
// and these take 0.7 cycles each. And it always ends.

namespace lrc {
namespace {

// Shifts in flight: enough to fill the latency of the sequences, and their state fits the 16 registers of
// AVX2.
constexpr int kVectors = 3;
constexpr std::int64_t kBatch = kVectors * kLanes;

// One shift and its count for each lane.
struct Batch {
    Vec shifts[kVectors];
    VecBits counts[kVectors];

    LRC_INLINE double& shift(std::int64_t lane) { return reinterpret_cast<double*>(shifts)[lane]; }
    LRC_INLINE std::int64_t count(std::int64_t lane) const { return counts[lane / kLanes][lane % kLanes]; }
    LRC_INLINE void evaluate(const Tridiagonal& matrix) {
        for (VecBits& count : counts) count = VecBits{};
        count_below(matrix, shifts, counts);
    }
};

// Cuts [-bound, bound] into equal cells, about as many as there are eigenvalues, and writes for each
// eigenvalue the lower end of its cell: for the cost of one step this saves log2(side). Returns a cell's
// width.
LRC_MULTIVERSION double locate(const Tridiagonal& matrix, double* lows) {
    const std::int64_t inner_points = (matrix.side + kBatch - 1) / kBatch * kBatch;
    const double width = 2 * matrix.bound / static_cast<double>(inner_points + 1);
    std::int64_t located = 0;
    double low = -matrix.bound;
    for (std::int64_t point = 1; point <= inner_points; point += kBatch) {
        Batch batch;
        for (std::int64_t lane = 0; lane < kBatch; ++lane) {
            batch.shift(lane) = static_cast<double>(point + lane) * width - matrix.bound;
        }
        batch.evaluate(matrix);
        for (std::int64_t lane = 0; lane < kBatch; ++lane) {
            for (; located < std::min(batch.count(lane), matrix.side); ++located) lows[located] = low;
            low = batch.shift(lane);
        }
    }
    std::fill(lows + located, lows + matrix.side, low);
    return width;
}

// Replaces the lower ends of brackets of one width by the eigenvalues within.
LRC_MULTIVERSION void bisect(const Tridiagonal& matrix, double width, double* values) {
    const int steps = bisection_steps(width / matrix.bound);
    for (std::int64_t begin = 0; begin < matrix.side; begin += kBatch) {
        const std::int64_t size = std::min(kBatch, matrix.side - begin);
        Batch low{};
        std::copy_n(values + begin, size, &low.shift(0));
        double half = width;
        for (int step = 0; step < steps; ++step) {
            half *= 0.5;
            Batch middle;
            for (int v = 0; v < kVectors; ++v) middle.shifts[v] = low.shifts[v] + half;
            middle.evaluate(matrix);
            for (int v = 0; v < kVectors; ++v) {
                const std::uint64_t first = begin + v * kLanes;
                const VecBits index{first, first + 1, first + 2, first + 3};
                low.shifts[v] = middle.counts[v] > index ? low.shifts[v] : middle.shifts[v];
            }
        }
        for (std::int64_t lane = 0; lane < size; ++lane) values[begin + lane] = low.shift(lane) + 0.5 * half;
    }
}

}  // namespace

void tridiagonal_eigenvalues(const double* diagonal, double* off_diagonal, std::int64_t side,
                             double* values) {
    double bound = 0;
    for (std::int64_t i = 0; i < side; ++i) {
        bound = std::max(bound, gershgorin_row(diagonal, off_diagonal, side, i));
    }
    for (std::int64_t i = 1; i < side; ++i) off_diagonal[i] = coupling_square(off_diagonal[i], bound);
    const Tridiagonal matrix{diagonal, off_diagonal, side, bound};
    bisect(matrix, locate(matrix, values), values);
}

}  // namespace lrc
