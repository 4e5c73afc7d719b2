// Matrices of small integers, whose products A A^T are exact in any order of summation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "ops/gram.h"

namespace products {

enum class Layout { kRows, kColumns, kNeither };

inline constexpr double kUntouched = -12345.5;  // no sum of integers

// A [side, terms], NaN wherever the op must not read.
template <class T> struct Case {
    std::int64_t side;
    std::int64_t terms;
    std::int64_t row_stride;
    std::int64_t column_stride;
    std::vector<T> matrix;

    Case(std::int64_t side, std::int64_t terms, Layout layout, unsigned seed)
        : side(side),
          terms(terms),
          row_stride(layout == Layout::kColumns ? 1 : 2 * terms + 1),
          column_stride(layout == Layout::kColumns ? side + 2
                        : layout == Layout::kRows  ? 1
                                                   : 2) {
        const bool empty = side == 0 || terms == 0;
        matrix.assign(empty ? 0 : (side - 1) * row_stride + (terms - 1) * column_stride + 1,
                      std::numeric_limits<T>::quiet_NaN());
        std::mt19937 random(seed);
        for (std::int64_t i = 0; i < side; ++i) {
            for (std::int64_t k = 0; k < terms; ++k) {
                matrix[i * row_stride + k * column_stride] = static_cast<T>(random() % 19) - 9;
            }
        }
    }

    double expected(std::int64_t i, std::int64_t j) const {
        double sum = 0;
        for (std::int64_t k = 0; k < terms; ++k) {
            sum += static_cast<double>(matrix[i * row_stride + k * column_stride]) *
                   static_cast<double>(matrix[j * row_stride + k * column_stride]);
        }
        return sum;
    }
};

// Around the vectors (4), the panels (12), the tiles (64) and the blocks (192) of rows, and around the chunks
// of terms (16 and 128).
template <class T> std::vector<Case<T>> small_cases(std::int64_t max_side) {
    std::vector<Case<T>> cases;
    unsigned seed = 0;
    for (std::int64_t side : {0, 1, 3, 4, 5, 11, 12, 13, 31, 63, 64, 65, 97, 191, 192, 193, 205}) {
        if (side > max_side) continue;
        for (Layout layout : {Layout::kRows, Layout::kColumns, Layout::kNeither}) {
            for (std::int64_t terms : {0, 1, 9, 16, 17, 37}) cases.emplace_back(side, terms, layout, ++seed);
        }
        for (std::int64_t terms : {127, 128, 129, 263})
            cases.emplace_back(side, terms, Layout::kRows, ++seed);
    }
    return cases;
}

// The products of all cases in one workspace.
template <class T, class Device>
std::vector<double> multiply(Device device, const std::vector<Case<T>>& cases, int threads = 1) {
    std::vector<lrc::GramProblem<T>> problems;
    std::int64_t size = 0;
    std::int64_t tiles = 0;
    for (const Case<T>& one : cases) {
        problems.push_back(
            {one.matrix.data(), one.row_stride, one.column_stride, one.side, one.terms, size, tiles});
        size += one.side * one.side;
        tiles += lrc::gram_tiles(one.side);
    }
    std::vector<double> out(size, kUntouched);
    lrc::gram(device, lrc::GramArgs<T>{.problems = problems.data(),
                                       .count = static_cast<std::int64_t>(problems.size()),
                                       .tiles = tiles,
                                       .out = out.data(),
                                       .threads = threads});
    return out;
}

template <class T>
void expect_products(const char* who, const std::vector<Case<T>>& cases, const std::vector<double>& out) {
    const double* entry = out.data();
    for (const Case<T>& one : cases) {
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < one.side; ++i) {
            for (std::int64_t j = 0; j < one.side; ++j) {
                wrong += *entry++ != (j <= i ? one.expected(i, j) : kUntouched);
            }
        }
        check::expect(wrong == 0, "%s: %lld entries of [%lld, %lld] at strides (%lld, %lld) are wrong", who,
                      static_cast<long long>(wrong), static_cast<long long>(one.side),
                      static_cast<long long>(one.terms), static_cast<long long>(one.row_stride),
                      static_cast<long long>(one.column_stride));
    }
}

}  // namespace products
