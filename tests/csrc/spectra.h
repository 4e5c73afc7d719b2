// Symmetric matrices of known eigenvalues.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "check.h"
#include "ops/symmetric_eigenvalues.h"

namespace spectra {

struct Case {
    std::int64_t side;
    std::int64_t row_stride;
    std::vector<double> matrix;  // [side, row_stride], NaN wherever the op must not read
    std::vector<double> values;  // [side], ascending
};

inline constexpr double kUnread = std::numeric_limits<double>::quiet_NaN();

template <class Entry>
Case make_case(std::int64_t side, std::int64_t row_stride, std::vector<double> values, const Entry& entry) {
    Case made{side, row_stride, std::vector<double>(side * row_stride, kUnread), std::move(values)};
    for (std::int64_t i = 0; i < side; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) made.matrix[i * row_stride + j] = entry(i, j);
    }
    std::sort(made.values.begin(), made.values.end());
    return made;
}

// 2 on the diagonal, -1 beside it: lambda_k = 2 - 2 cos(k pi / (side + 1)).
inline Case second_difference(std::int64_t side, std::int64_t row_stride, double scale = 1) {
    std::vector<double> values(side);
    for (std::int64_t k = 0; k < side; ++k) {
        values[k] =
            scale *
            (2 - 2 * std::cos(static_cast<double>(k + 1) * std::numbers::pi / static_cast<double>(side + 1)));
    }
    return make_case(side, row_stride, std::move(values), [&](auto i, auto j) {
        return i == j ? 2 * scale : i == j + 1 ? -scale : 0;
    });
}

// H_2 H_1 diag(values) H_1 H_2 with two random reflections H.
inline Case rotated(std::vector<double> values, std::int64_t row_stride, unsigned seed) {
    const auto side = static_cast<std::int64_t>(values.size());
    std::vector<double> a(side * side);
    for (std::int64_t i = 0; i < side; ++i) a[i * side + i] = values[i];
    for (unsigned pass = 0; pass < 2; ++pass) {
        const std::vector<double> v = check::normal_vector(side, seed + pass);
        double square = 0;
        for (double x : v) square += x * x;
        const auto reflect = [&](std::int64_t start, std::int64_t step) {
            double dot = 0;
            for (std::int64_t k = 0; k < side; ++k) dot += v[k] * a[start + k * step];
            for (std::int64_t k = 0; k < side; ++k) a[start + k * step] -= 2 * dot / square * v[k];
        };
        for (std::int64_t i = 0; i < side; ++i) reflect(i * side, 1);
        for (std::int64_t j = 0; j < side; ++j) reflect(j, side);
    }
    return make_case(side, row_stride, std::move(values), [&](auto i, auto j) { return a[i * side + j]; });
}

// Every entry the same: what is left after the first step falls by eps at each of the others.
inline Case constant(std::int64_t side, std::int64_t row_stride, double value) {
    std::vector<double> values(side, 0.0);
    values.back() = value * static_cast<double>(side);
    return make_case(side, row_stride, std::move(values), [=](auto, auto) { return value; });
}

// Largest |lambda - expected|, in units of eps max|expected|.
inline double error_in_eps(const Case& tested, const double* values) {
    double largest = 0;
    double error = 0;
    for (std::int64_t k = 0; k < tested.side; ++k) {
        largest = std::max(largest, std::fabs(tested.values[k]));
        const double distance = std::fabs(values[k] - tested.values[k]);
        error = distance <= error ? error : distance;  // lets NaN through
    }
    return error == 0 ? 0 : error / (largest * std::numeric_limits<double>::epsilon());
}

// What rounding may do to one case: side - 1 reflections of the matrix, each a few roundings, and bisection
// in a bracket of 3 max|lambda|. The matrix itself is built with as many roundings.
inline double error_bound_in_eps(std::int64_t side) { return 8 + static_cast<double>(side) / 2; }

inline std::vector<Case> small_cases(std::int64_t max_side) {
    std::vector<Case> cases;
    for (std::int64_t side : {1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 61, 127, 128, 129, 257}) {
        if (side > max_side) continue;
        cases.push_back(second_difference(side, side));
        cases.push_back(second_difference(side, side + 3, 1e150));
        cases.push_back(second_difference(side, side, 1e-150));
        cases.push_back(constant(side, side, 3.7));
        std::vector<double> values(side);
        for (std::int64_t k = 0; k < side; ++k)
            values[k] = static_cast<double>(k % 5) - 2;  // clustered, indefinite
        cases.push_back(rotated(values, side, 1));
        for (std::int64_t k = 0; k < side; ++k)
            values[k] = k < side / 2 ? 0 : std::exp2(-0.5 * k);  // rank-deficient
        cases.push_back(rotated(values, side + 1, 2));
        std::fill(values.begin(), values.end(), 0.0);
        cases.push_back(rotated(values, side, 3));
    }
    cases.push_back({0, 0, {}, {}});
    return cases;
}

// All cases in one workspace, as the op takes them.
struct Batch {
    std::vector<double> matrices;
    std::vector<lrc::EigenProblem> problems;
    std::int64_t max_side = 0;
    std::int64_t value_count = 0;

    explicit Batch(const std::vector<Case>& cases) {
        for (const Case& one : cases) {
            problems.push_back(
                {static_cast<std::int64_t>(matrices.size()), one.row_stride, one.side, value_count});
            matrices.insert(matrices.end(), one.matrix.begin(), one.matrix.end());
            max_side = std::max(max_side, one.side);
            value_count += one.side;
        }
    }

    template <class Device> std::vector<double> solve(Device device, int threads = 1) const {
        std::vector<double> values(value_count, kUnread);
        lrc::symmetric_eigenvalues(device, {.matrices = matrices.data(),
                                            .problems = problems.data(),
                                            .count = static_cast<std::int64_t>(problems.size()),
                                            .max_side = max_side,
                                            .values = values.data(),
                                            .threads = threads});
        return values;
    }
};

// Compares a batch's values with the spectra of its cases.
inline void expect_spectra(const char* who, const std::vector<Case>& cases, const Batch& batch,
                           const std::vector<double>& values) {
    for (std::size_t i = 0; i < cases.size(); ++i) {
        const double error = error_in_eps(cases[i], values.data() + batch.problems[i].value_offset);
        check::expect(error <= error_bound_in_eps(cases[i].side),
                      "%s: case %zu of side %lld is off by %.1f eps", who, i,
                      static_cast<long long>(cases[i].side), error);
    }
}

// One entry that is not finite makes every value of its matrix NaN, and leaves the neighbours alone.
template <class Device> void expect_nan_contained(const char* who, Device device) {
    for (double bad : {std::numeric_limits<double>::infinity(), kUnread}) {
        std::vector<Case> cases{second_difference(9, 9), second_difference(33, 33), second_difference(9, 9)};
        cases[1].matrix[20 * 33 + 7] = bad;
        const Batch batch(cases);
        const std::vector<double> values = batch.solve(device);
        const auto middle = values.begin() + 9;
        check::expect(std::all_of(middle, middle + 33, [](double x) { return std::isnan(x); }),
                      "%s: not every value is NaN", who);
        check::expect(error_in_eps(cases[2], &values[9 + 33]) <= error_bound_in_eps(9),
                      "%s: a neighbour suffered", who);
    }
}

}  // namespace spectra
