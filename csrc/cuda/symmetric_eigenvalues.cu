#include <cmath>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "math/householder.h"
#include "math/scaling.h"
#include "math/sturm.h"
#include "ops/symmetric_eigenvalues.h"

// One block a matrix, which stays in shared memory: both triangles, so that a thread works along its own row,
// at an odd row stride, so that the rows of a warp fall on different banks. As in the CPU twin the last row
// is eliminated first, and one pass applies the last rank-2 update and multiplies by the new Householder
// vector.

namespace lrc {
namespace {

constexpr int kRows = kMaxCudaSide;
constexpr int kParts = 4;  // threads a row: they share its columns, and hide each other's latency
constexpr int kThreads = kRows * kParts;

// The block's shared memory.
struct Shared {
    double* matrix;        // [side, stride]
    double* row;           // [kRows]: the row being eliminated
    double* u;             // [kRows]: the pending update A - u w^T - w u^T
    double* w;             // [kRows]
    double* next_u;        // [kRows]
    double* products;      // [kParts, kRows]: shares of A next_u
    double* diagonal;      // [kRows]
    double* off_diagonal;  // [kRows]
    double* scratch;       // [kWarpSize]
    int stride;
};

constexpr std::size_t kVectorEntries = (6 + kParts) * kRows + kWarpSize;

__host__ __device__ constexpr int odd_stride(int side) { return side | 1; }

__host__ constexpr std::size_t shared_bytes(int side) {
    return (kVectorEntries + static_cast<std::size_t>(side) * odd_stride(side)) * sizeof(double);
}

static_assert(shared_bytes(kMaxCudaSide) <= 163 * 1024, "a block on sm_80 has 163 KB");

__device__ Shared carve_shared(int side) {
    double* p = dynamic_shared<double>();
    return {.matrix = p + kVectorEntries,
            .row = p,
            .u = p + kRows,
            .w = p + 2 * kRows,
            .next_u = p + 3 * kRows,
            .products = p + 4 * kRows,
            .diagonal = p + (4 + kParts) * kRows,
            .off_diagonal = p + (5 + kParts) * kRows,
            .scratch = p + (6 + kParts) * kRows,
            .stride = odd_stride(side)};
}

// Copies both triangles from the lower one; returns the largest magnitude, infinite if an entry is not
// finite.
__device__ double load_matrix(const double* from, std::int64_t row_stride, int side, const Shared& shared) {
    double largest = 0;
    for (int at = threadIdx.x; at < side * side; at += kThreads) {
        const int i = at / side;
        const int j = at % side;
        if (j > i) continue;
        const double x = from[i * row_stride + j];
        largest = fmax(largest, std::isfinite(x) ? fabs(x) : INFINITY);
        shared.matrix[i * shared.stride + j] = x;
        shared.matrix[j * shared.stride + i] = x;
    }
    return block_max(largest, shared.scratch);
}

// x . y over the first `size` <= kRows entries, computed by every warp for itself.
__device__ double warp_dot(const double* x, const double* y, int size) {
    double total = 0;
    for (int j = threadIdx.x % kWarpSize; j < size; j += kWarpSize) total += x[j] * y[j];
    return warp_sum(total);
}

// products[part] = this thread's columns of (A - u w^T - w u^T) next_u in its row; stores the updated A.
__device__ void update_and_multiply(const Shared& shared, int length, double scale) {
    const int r = threadIdx.x % kRows;
    const int part = threadIdx.x / kRows;
    if (r >= length) return;
    double* row = shared.matrix + r * shared.stride;
    const double u = shared.u[r];
    const double w = shared.w[r];
    double product = 0;
    for (int j = part; j < length; j += kParts) {
        const double a = row[j] * scale - u * shared.w[j] - w * shared.u[j];
        row[j] = a;
        product += a * shared.next_u[j];
    }
    shared.products[threadIdx.x] = product;
}

// Reduces the matrix, times `scale`, to diagonal and off_diagonal, which the next barrier makes visible.
__device__ void tridiagonalize(Shared& shared, int side, double scale) {
    const int thread = threadIdx.x;
    if (thread < kRows) shared.u[thread] = shared.w[thread] = 0;
    for (int length = side - 1; length > 0; --length) {
        __syncthreads();
        if (thread <= length) {
            shared.row[thread] = shared.matrix[length * shared.stride + thread] * scale -
                                 shared.u[length] * shared.w[thread] - shared.w[length] * shared.u[thread];
        }
        __syncthreads();
        const Reflector reflector =
            make_reflector(shared.row[length - 1], warp_dot(shared.row, shared.row, length - 1));
        if (thread < length - 1) shared.next_u[thread] = reflector.identity ? 0 : shared.row[thread];
        if (thread == length - 1) {
            shared.next_u[thread] = reflector.pivot;
            shared.diagonal[length] = shared.row[length];
            shared.off_diagonal[length] = reflector.beta;
        }
        __syncthreads();
        update_and_multiply(shared, length, scale);
        scale = 1;  // the pass has applied it
        __syncthreads();
        if (thread < length) {
            double product = 0;
            for (int part = 0; part < kParts; ++part) product += shared.products[part * kRows + thread];
            shared.row[thread] = product;
        }
        __syncthreads();
        const double half =
            warp_dot(shared.next_u, shared.row, length) / (2 * reflector.scale * reflector.scale);
        if (thread < length) {
            shared.w[thread] = shared.row[thread] / reflector.scale - half * shared.next_u[thread];
        }
        double* last_u = shared.u;
        shared.u = shared.next_u;
        shared.next_u = last_u;
    }
    if (thread == 0) {
        // Row 0 belongs to this thread, and the reflector of length 1 is the identity: nothing is pending.
        shared.diagonal[0] = shared.matrix[0] * scale;
        shared.off_diagonal[0] = 0;
    }
}

// The eigenvalue of rank threadIdx.x of the tridiagonal matrix; ranks beyond the last give garbage.
__device__ double bisect(const Shared& shared, int side) {
    const int i = threadIdx.x;
    const bool inside = i < side;
    const double bound =
        block_max(inside ? gershgorin_row(shared.diagonal, shared.off_diagonal, side, i) : 0, shared.scratch);
    if (inside && i > 0) shared.off_diagonal[i] = coupling_square(shared.off_diagonal[i], bound);
    __syncthreads();
    const Tridiagonal matrix{shared.diagonal, shared.off_diagonal, side, bound};
    double low[1] = {-bound};
    double half = 2 * bound;
    if (!inside) return 0;
    for (int step = bisection_steps(2); step > 0; --step) {
        half *= 0.5;
        double middle[1] = {low[0] + half};
        std::uint64_t below[1] = {0};
        count_below(matrix, middle, below);
        if (below[0] <= static_cast<std::uint64_t>(i)) low[0] = middle[0];
    }
    return low[0] + 0.5 * half;
}

__global__ void __launch_bounds__(kThreads) symmetric_eigenvalues_kernel(SymmetricEigenvaluesArgs args) {
    const EigenProblem problem = args.problems[blockIdx.x];
    const int side = static_cast<int>(problem.side);
    if (side == 0) return;
    double* value = args.values + problem.value_offset + threadIdx.x;
    const bool inside = threadIdx.x < static_cast<unsigned>(side);
    Shared shared = carve_shared(side);
    const double largest = load_matrix(args.matrices + problem.offset, problem.row_stride, side, shared);
    if (largest == 0 || std::isinf(largest)) {
        if (inside) *value = largest == 0 ? 0 : NAN;
        return;
    }
    const int exponent = scale_exponent(largest);
    tridiagonalize(shared, side, std::ldexp(1.0, -exponent));
    const double scaled = bisect(shared, side);
    if (inside) *value = std::ldexp(scaled, exponent);
}

}  // namespace

void symmetric_eigenvalues(Cuda device, const SymmetricEigenvaluesArgs& args) {
    if (args.count == 0) return;
    if (args.max_side > kMaxCudaSide) throw std::invalid_argument("a matrix is larger than kMaxCudaSide");
    launch(device, symmetric_eigenvalues_kernel, static_cast<unsigned>(args.count), kThreads,
           shared_bytes(static_cast<int>(args.max_side)), args);
}

}  // namespace lrc
