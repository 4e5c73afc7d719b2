// The CPU twin against exact sums of small integers.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/lowrank_linear.h"
#include "cpu/simd.h"
#include "ops/lowrank_linear.h"

namespace {

constexpr float kUntouched = -12345.5F;  // no sum of integers

template <class T> std::vector<T> integers(std::int64_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<T> values(size);
    for (T& value : values) value = lrc::from_float<T>(static_cast<float>(random() % 3) - 1);
    return values;
}

template <class T> float expected(const lrc::LowrankLinearArgs<T>& args, std::int64_t row,
                                  std::int64_t filter) {
    double sum = args.bias == nullptr ? 0 : lrc::to_float(args.bias[filter]);
    const std::int64_t inner = args.groups * args.rank;
    for (std::int64_t q = 0; q < inner; ++q) {
        double z = 0;
        for (std::int64_t i = 0; i < args.inside; ++i) {
            z += lrc::to_float(args.encoder[q * args.inside + i]) *
                 lrc::to_float(args.input[(row * args.groups + q / args.rank) * args.inside + i]);
        }
        sum += lrc::to_float(args.decoder[filter * inner + q]) * z;
    }
    return lrc::to_float(lrc::from_float<T>(static_cast<float>(std::max(sum, 0.0))));
}

template <class T>
void test(std::int64_t rows, std::int64_t inside, std::int64_t groups, std::int64_t rank,
          std::int64_t filters) {
    const std::vector<T> input = integers<T>(rows * groups * inside, 1);
    const std::vector<T> encoder = integers<T>(groups * rank * inside, 2);
    const std::vector<T> decoder = integers<T>(filters * groups * rank, 3);
    const std::vector<T> bias = integers<T>(filters, 4);
    for (int threads : {1, 2, 5}) {
        std::vector<T> out(rows * filters, lrc::from_float<T>(kUntouched));
        std::vector<float> hidden(rows * groups * rank, kUntouched);
        const lrc::LowrankLinearArgs<T> args{.input = input.data(),
                                             .encoder = encoder.data(),
                                             .decoder = decoder.data(),
                                             .bias = threads == 2 ? nullptr : bias.data(),
                                             .out = out.data(),
                                             .hidden = hidden.data(),
                                             .rows = rows,
                                             .inside = inside,
                                             .groups = groups,
                                             .rank = rank,
                                             .filters = filters,
                                             .activation = lrc::Activation::kRelu,
                                             .threads = threads};
        const auto check = [&](const char* which) {
            bool same = true;
            for (std::int64_t m = 0; m < rows; ++m) {
                for (std::int64_t f = 0; f < filters; ++f)
                    same = same && lrc::to_float(out[m * filters + f]) == expected(args, m, f);
            }
            check::expect(same, "%s: %lld rows, %lld groups of rank %lld, %lld filters, %d threads", which,
                          static_cast<long long>(rows), static_cast<long long>(groups),
                          static_cast<long long>(rank), static_cast<long long>(filters), threads);
            std::fill(out.begin(), out.end(), lrc::from_float<T>(kUntouched));
        };
        lrc::lowrank_linear(lrc::Cpu{}, args);
        check("chosen");
        lrc::lowrank_linear(lrc::Width<8>{}, args);
        check("8 wide");
        if (lrc::kNeedsAvx512 && !lrc::has_avx512()) continue;
        lrc::lowrank_linear(lrc::Width<16>{}, args);
        check("16 wide");
    }
}

}  // namespace

int main() {
    for (std::int64_t rows : {0, 1, 2, 3, 4, 5, 63, 64, 65}) {
        test<float>(rows, 9, 2, 3, 7);
        test<lrc::Bfloat16>(rows, 9, 2, 3, 7);
    }
    // Around the lines of a task (24) and the floats of a vector (8 or 16).
    for (std::int64_t size : {0, 1, 7, 8, 15, 16, 17, 23, 24, 25, 49}) {
        test<float>(3, size, 1, 5, size);
        test<lrc::Bfloat16>(1, 8, 3, size, 11);
    }
    return check::failures > 0;
}
