// The few lines the test programs share: expectations that count, and seeded numbers.
#pragma once

#include <cstdio>
#include <random>
#include <vector>

namespace check {

inline int failures = 0;

// Prints and counts an expectation that does not hold.
template <class... Args> void expect(bool holds, const char* format, Args... args) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: ");
    std::fprintf(stderr, format, args...);
    std::fprintf(stderr, "\n");
}

inline std::vector<double> normal_vector(std::size_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::vector<double> values(size);
    for (double& value : values) value = normal(random);
    return values;
}

}  // namespace check
