// What the tests of the factored layers' CUDA and AMX kernels share: small integers, whose sums are exact in
// float32, and normal numbers, for which the tolerance law is to hold.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/ptx.cuh"
#include "math/activation.h"

namespace lowrank {

template <class T> T round_to(double x) { return lrc::round_to<T>(static_cast<float>(x)); }
template <class T> double widen(T x) { return lrc::to_float(x); }

// 16-byte aligned unless `shift` entries of it are left out; not a number wherever the op must not read.
template <class T> class Buffer {
  public:
    explicit Buffer(std::int64_t size, std::int64_t shift = 0)
        : size_(size), shift_(shift), words_((size + shift) / lrc::kWideEntries<T> + 2) {
        for (auto& word : words_) word.word[0] = word.word[1] = word.word[2] = word.word[3] = kUntouched;
    }
    T* data() { return reinterpret_cast<T*>(words_.data()) + shift_; }
    T& operator[](std::int64_t i) { return data()[i]; }
    bool untouched_around() {
        const T* all = reinterpret_cast<T*>(words_.data());
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(words_.size()) * lrc::kWideEntries<T>; ++i) {
            const bool outside = i < shift_ || i >= shift_ + size_;
            if (outside && lrc::bits_of(all[i]) != kUntouched >> (32 - 8 * sizeof(T))) return false;
        }
        return true;
    }

  private:
    static constexpr std::uint32_t kUntouched = 0x7fff7fff;  // not a number of any type
    std::int64_t size_;
    std::int64_t shift_;
    std::vector<lrc::Words4> words_;
};

// Integers in [-range, range], or with range 0 normal deviates, rounded to T.
template <class T>
Buffer<T> numbers(std::int64_t size, int range, unsigned seed, std::int64_t shift = 0) {
    Buffer<T> values(size, shift);
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < size; ++i) {
        values[i] = round_to<T>(range == 0 ? normal(random)
                                           : static_cast<double>(random() % (2 * range + 1)) - range);
    }
    return values;
}

// Half the distance of 1 and the next T.
template <class T> constexpr double unit() {
    return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, lrc::Half> ? 0x1p-11 : 0x1p-8;
}
// Of a float32 product in pieces: those left out, and what is cut off.
template <class T> constexpr double kLost = std::is_same_v<T, float> ? 0x1p-21 : 0;
// Of z, rounded to T, and of a sum of `terms` float32 products.
template <class T> double relative_bound(std::int64_t terms) {
    return 2 * (unit<T>() + kLost<T>)+terms * 0x1p-23;
}

// A sum, the sum of its terms' magnitudes, and what plain float32 makes of it.
struct Sum {
    double value = 0;
    double size = 0;
    float plain = 0;
    void add(double x, double y) {
        value += x * y;
        size += std::fabs(x * y);
        plain += static_cast<float>(x) * static_cast<float>(y);
    }
};

inline double activate(lrc::Activation activation, double x) {
    switch (activation) {
        case lrc::Activation::kRelu:
            return x < 0 ? 0 : x;
        case lrc::Activation::kGelu:
            return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
        case lrc::Activation::kSilu:
            return x / (1 + std::exp(-x));
        default:
            return x;
    }
}

// The largest errors of outputs and of their plain sums in the same type, against float64.
struct Law {
    double ours = 0, plain = 0, largest = 0;

    // One row of outputs, given its codes z.
    template <class T, class Args>
    void add(const Args& args, const std::vector<Sum>& z, const T* found) {
        for (std::int64_t f = 0; f < args.filters; ++f) {
            const double bias = args.bias == nullptr ? 0 : widen(args.bias[f]);
            Sum exact, same;
            for (std::size_t q = 0; q < z.size(); ++q) {
                const double u = widen(args.decoder[f * z.size() + q]);
                exact.add(u, z[q].value);
                same.add(u, widen(round_to<T>(z[q].plain)));
            }
            const double truth = activate(args.activation, exact.value + bias);
            const float y = lrc::activate(args.activation, same.plain + static_cast<float>(bias));
            ours = std::fmax(ours, std::fabs(widen(found[f]) - truth));
            plain = std::fmax(plain, std::fabs(widen(round_to<T>(y)) - truth));
            largest = std::fmax(largest, std::fabs(truth));
        }
    }
    template <class T> void expect(const char* order) const {
        check::expect(ours <= 2 * plain + 2 * unit<T>() * largest,
                      "%s: an error of %g, of plain sums %g, of outputs up to %g", order, ours, plain,
                      largest);
    }
};

// Count the wrong filters of one row of outputs, given its codes z: equal to the last bit where all sums are
// exact, else within the error of sums of `terms` products.
template <class T, class Args>
std::int64_t wrong_outputs(const Args& args, const std::vector<Sum>& z, const T* found, bool exact,
                           std::int64_t terms) {
    const auto inner = static_cast<std::int64_t>(z.size());
    std::int64_t wrong = 0;
    for (std::int64_t f = 0; f < args.filters; ++f) {
        Sum sum;
        sum.value = args.bias == nullptr ? 0 : widen(args.bias[f]);
        for (std::int64_t q = 0; q < inner; ++q) {
            const double u = widen(args.decoder[f * inner + q]);
            sum.value += u * (exact ? widen(round_to<T>(z[q].value)) : z[q].value);
            sum.size += std::fabs(u) * z[q].size;
        }
        const float y = lrc::activate(args.activation, static_cast<float>(sum.value));
        if (exact) {
            wrong += widen(found[f]) != widen(round_to<T>(y));
        } else {
            // No activation is steeper than 1.13.
            const double error = std::fabs(widen(found[f]) - static_cast<double>(y));
            const double allowed = 1.13 * sum.size * relative_bound<T>(terms);
            wrong += !(error <= allowed + 2 * unit<T>() * std::fabs(y));
        }
    }
    return wrong;
}

}  // namespace lowrank
