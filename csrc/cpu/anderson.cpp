#include "cpu/anderson.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/simd.h"

namespace lrc {
namespace {

// <a[1] - a[0], b[1] - b[0]> of iterates `size` entries long, a multiple of kLanes.
LRC_MULTIVERSION double product_of_moves(const double* a, const double* b, std::int64_t size) {
    Vec total{};
    for (std::int64_t i = 0; i < size; i += kLanes) {
        total += (load_any(a + size + i) - load_any(a + i)) * (load_any(b + size + i) - load_any(b + i));
    }
    return sum(total);
}

LRC_MULTIVERSION void add_multiple(const double* from, double factor, std::int64_t size, double* to) {
    for (std::int64_t i = 0; i < size; i += kLanes)
        store_any(to + i, load_any(to + i) + factor * load_any(from + i));
}

}  // namespace

bool Anderson::push(const double* solution, const std::vector<std::int64_t>& support) {
    if (count_ == kMoves + 1) count_ = 0;
    if (count_ == 0 || support != support_) {
        support_ = support;
        size_ = static_cast<std::int64_t>(support.size()) * outputs_;
        iterates_.resize((kMoves + 1) * size_);
        count_ = 0;
    }
    double* to = iterates_.data() + count_++ * size_;
    for (const std::int64_t row : support_) to = std::copy_n(solution + row * outputs_, outputs_, to);
    return count_ == kMoves + 1;
}

// Solves C w = 1 for the moves' Gram matrix C, by elimination; the weights are then scaled to add up to 1.
bool Anderson::weights(double (&weights)[kMoves]) const {
    double system[kMoves][kMoves + 1];
    for (int i = 0; i < kMoves; ++i) {
        for (int j = 0; j <= i; ++j)
            system[i][j] = system[j][i] = product_of_moves(iterate(i), iterate(j), size_);
        system[i][kMoves] = 1;
    }
    const double largest = system[0][0];
    for (int k = 0; k < kMoves; ++k) {
        int pivot = k;
        for (int i = k + 1; i < kMoves; ++i) {
            if (std::fabs(system[i][k]) > std::fabs(system[pivot][k])) pivot = i;
        }
        if (!(std::fabs(system[pivot][k]) > std::numeric_limits<double>::epsilon() * largest)) return false;
        std::swap(system[k], system[pivot]);
        for (int i = k + 1; i < kMoves; ++i) {
            const double factor = system[i][k] / system[k][k];
            for (int j = k; j <= kMoves; ++j) system[i][j] -= factor * system[k][j];
        }
    }
    double total = 0;
    for (int k = kMoves - 1; k >= 0; --k) {
        double value = system[k][kMoves];
        for (int j = k + 1; j < kMoves; ++j) value -= system[k][j] * weights[j];
        total += weights[k] = value / system[k][k];
    }
    for (double& weight : weights) weight /= total;
    return std::isfinite(total) && total != 0;
}

bool Anderson::combine(double* solution) const {
    double factors[kMoves] = {};
    if (!weights(factors)) return false;
    std::vector<double> rows(size_, 0);
    for (int k = 0; k < kMoves; ++k) add_multiple(iterate(k + 1), factors[k], size_, rows.data());
    scatter(rows.data(), solution);
    return true;
}

void Anderson::restore(double* solution) const { scatter(iterate(count_ - 1), solution); }

void Anderson::scatter(const double* rows, double* solution) const {
    for (const std::int64_t row : support_) {
        std::copy_n(rows, outputs_, solution + row * outputs_);
        rows += outputs_;
    }
}

}  // namespace lrc
