#include "ops/symmetric_eigenvalues.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tridiagonal_eigenvalues.h"
#include "cpu/tridiagonalize.h"
#include "math/scaling.h"

namespace lrc {
namespace {

// What one worker needs for a matrix of at most `max_side`, carved from one aligned allocation.
class Scratch {
  public:
    explicit Scratch(std::int64_t max_side)
        : matrix_size_(padded(max_side) * dense_stride(max_side)),
          vector_size_(padded(max_side)),
          data_(allocate(matrix_size_ + 2 * vector_size_ + tridiagonalize_scratch(max_side))) {}

    double* matrix() const { return data_.get(); }
    double* diagonal() const { return matrix() + matrix_size_; }
    double* off_diagonal() const { return diagonal() + vector_size_; }
    double* rest() const { return off_diagonal() + vector_size_; }

  private:
    struct Free {
        void operator()(double* p) const { std::free(p); }
    };
    static double* allocate(std::int64_t size) {
        void* p = std::aligned_alloc(sizeof(Vec), size * sizeof(double));
        if (p == nullptr) throw std::bad_alloc();
        return static_cast<double*>(p);
    }
    std::int64_t matrix_size_;
    std::int64_t vector_size_;
    std::unique_ptr<double, Free> data_;
};

// The largest magnitude in the lower triangle, NaN if an entry is not finite.
double largest_entry(const double* matrix, std::int64_t row_stride, std::int64_t side) {
    double largest = 0;
    double poison = 0;  // stays 0 but for Inf * 0 and NaN * 0
    for (std::int64_t i = 0; i < side; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            const double x = matrix[i * row_stride + j];
            largest = std::max(largest, std::fabs(x));
            poison += x * 0;
        }
    }
    return largest + poison;
}

// Copies the lower triangle, times `scale`, to the layout of `tridiagonalize`.
void load_scaled(const double* matrix, std::int64_t row_stride, std::int64_t side, double scale, double* to) {
    const std::int64_t stride = dense_stride(side);
    for (std::int64_t i = 0; i < padded(side); ++i) {
        const std::int64_t filled = i < side ? i + 1 : 0;
        for (std::int64_t j = 0; j < filled; ++j) to[i * stride + j] = matrix[i * row_stride + j] * scale;
        std::fill(to + i * stride + filled, to + i * stride + padded(i + 1), 0.0);
    }
    for (std::int64_t i = 0; i < side; ++i) {
        const std::int64_t block = i / kLanes * kLanes;
        for (std::int64_t j = block; j < i; ++j) to[j * stride + i] = to[i * stride + j];
    }
}

void solve(const double* matrix, std::int64_t row_stride, std::int64_t side, const Scratch& scratch,
           double* values) {
    const double largest = largest_entry(matrix, row_stride, side);
    if (!std::isfinite(largest)) {
        std::fill_n(values, side, std::numeric_limits<double>::quiet_NaN());
        return;
    }
    if (largest == 0) {
        std::fill_n(values, side, 0.0);
        return;
    }
    const int exponent = scale_exponent(largest);
    load_scaled(matrix, row_stride, side, std::ldexp(1.0, -exponent), scratch.matrix());
    double* diagonal = scratch.diagonal();
    double* off_diagonal = scratch.off_diagonal();
    tridiagonalize(scratch.matrix(), side, diagonal, off_diagonal, scratch.rest());
    tridiagonal_eigenvalues(diagonal, off_diagonal, side, values);
    for (std::int64_t i = 0; i < side; ++i) values[i] = std::ldexp(values[i], exponent);
}

}  // namespace

void symmetric_eigenvalues(Cpu, const SymmetricEigenvaluesArgs& args) {
    // The largest first: the small ones then fill the gaps at the end.
    std::vector<std::int64_t> order(args.count);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return args.problems[a].side > args.problems[b].side;
    });
    std::vector<Scratch> scratch;
    for (int worker = 0; worker < worker_count(args.threads, args.count); ++worker)
        scratch.emplace_back(args.max_side);
    parallel_for(args.threads, args.count, [&](int worker, std::int64_t index) noexcept {
        const EigenProblem& problem = args.problems[order[index]];
        if (problem.side == 0) return;
        solve(args.matrices + problem.offset, problem.row_stride, problem.side, scratch[worker],
              args.values + problem.value_offset);
    });
}

}  // namespace lrc
