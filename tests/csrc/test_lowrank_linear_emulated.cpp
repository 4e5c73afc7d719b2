// The CUDA twin, emulated on the CPU: the same bits as exact sums of small integers, and within the derived
// bound and the tolerance law for normal numbers. An argument leaves out all but the cases that need every
// barrier.
#include "emulation/cuda_runtime.h"
#include "lowrank.h"
#include "ops/lowrank_linear.h"

namespace {

using lowrank::numbers;
using lowrank::Sum;
using lowrank::widen;
using lrc::Activation;

struct Case {
    std::int64_t rows, groups, inside, rank, filters;
    Activation activation = Activation::kNone;
    bool biased = true;
    int range = 2;           // of the integers, 0 for normal numbers
    std::int64_t shift = 0;  // of every buffer, in entries
};

template <class T>
void compare(const lrc::LowrankLinearArgs<T>& args, bool exact, const char* order) {
    const std::int64_t inner = args.groups * args.rank;
    std::int64_t wrong = 0;
    lowrank::Law law;
    const T* found = args.out;
    for (std::int64_t row = 0; row < args.rows; ++row) {
        std::vector<Sum> z(inner);
        for (std::int64_t q = 0; q < inner; ++q) {
            const T* x = args.input + (row * args.groups + q / args.rank) * args.inside;
            for (std::int64_t i = 0; i < args.inside; ++i)
                z[q].add(widen(args.encoder[q * args.inside + i]), widen(x[i]));
        }
        wrong += lowrank::wrong_outputs<T>(args, z, found, exact, inner + args.inside);
        if (!exact) law.add(args, z, found);
        found += args.filters;
    }
    check::expect(wrong == 0, "%s: %lld rows, %lld groups of %lld and rank %lld, %lld filters: %lld wrong",
                  order, static_cast<long long>(args.rows), static_cast<long long>(args.groups),
                  static_cast<long long>(args.inside), static_cast<long long>(args.rank),
                  static_cast<long long>(args.filters), static_cast<long long>(wrong));
    law.expect<T>(order);
}

template <class T> void test(const Case& one) {
    const std::int64_t inner = one.groups * one.rank;
    auto input = numbers<T>(one.rows * one.groups * one.inside, one.range, 1, one.shift);
    auto encoder = numbers<T>(inner * one.inside, one.range, 2, one.shift);
    auto decoder = numbers<T>(one.filters * inner, one.range, 3, one.shift);
    auto bias = numbers<T>(one.filters, one.range, 4, one.shift);
    const auto tile = lrc::choose_tile(one.rows, one.groups, one.rank, sizeof(T), 163 << 10, 108);
    const std::int64_t size = lrc::linear_hidden_size(one.rows, one.groups, one.rank, one.inside);
    const char* names[] = {"forward", "reverse", "random"};
    using emulation::Order;
    for (Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
        lowrank::Buffer<T> out(one.rows * one.filters, one.shift);
        std::vector<float> hidden(size + 4, NAN);
        const lrc::LowrankLinearArgs<T> args{.input = input.data(),
                                             .encoder = encoder.data(),
                                             .decoder = decoder.data(),
                                             .bias = one.biased ? bias.data() : nullptr,
                                             .out = out.data(),
                                             .hidden = hidden.data(),
                                             .rows = one.rows,
                                             .inside = one.inside,
                                             .groups = one.groups,
                                             .rank = one.rank,
                                             .filters = one.filters,
                                             .activation = one.activation,
                                             .threads = 1};
        emulation::Block::instance().order = order;
        lrc::lowrank_linear(lrc::Cuda{nullptr}, args, tile);
        compare(args, one.range > 0, names[static_cast<int>(order)]);
        check::expect(out.untouched_around(), "a write outside of the output");
        check::expect(std::isnan(hidden[size]), "a write outside of the workspace");
    }
}

template <class T> void test_shapes() {
    test<T>({0, 1, 8, 8, 8});
    test<T>({1, 1, 8, 8, 0});
    test<T>({1, 1, 1, 1, 1});
    // No rank and no features: the bias, activated.
    test<T>({3, 2, 5, 0, 7, Activation::kGelu});
    test<T>({3, 2, 0, 5, 7, Activation::kSilu});
    for (std::int64_t rows : {1, 2, 7, 8, 9, 15, 16}) test<T>({rows, 1, 40, 16, 24, Activation::kRelu});
    // Groups, also of ranks that fill no tile.
    test<T>({5, 2, 24, 9, 17, Activation::kSilu});
    test<T>({3, 4, 13, 3, 31, Activation::kGelu, false});
    test<T>({2, 11, 1, 1, 5});
    // Around the tiles of filters and the chunks of terms, with 1, 2 and several splits and rounds.
    for (std::int64_t size : {7, 8, 9, 15, 16, 17, 31, 32, 33}) test<T>({2, 1, size, size, size});
    for (std::int64_t inside : {1023, 1024, 1536, 2080})
        test<T>({2, 1, inside, 8, 16, Activation::kNone, true, 1});
    test<T>({1, 1, 16, 1040, 9, Activation::kNone, true, 1});
    test<T>({3, 1, 64, 16, 24, Activation::kNone, true, 2, 3});
    test<T>({3, 2, 64, 16, 24, Activation::kGelu, true, 0});
    test<T>({5, 1, 2080, 72, 40, Activation::kNone, true, 0});
    // More rows: as images of one pixel.
    for (std::int64_t rows : {17, 65}) test<T>({rows, 2, 24, 16, 24, Activation::kSilu});
    test<T>({17, 1, 520, 16, 24, Activation::kNone, true, 0});
}

// A float32 goes through the tensor cores in pieces. Not a number must stay it, whatever its bits, infinity
// may become it, and no other row may see either.
void test_special_numbers() {
    constexpr std::int64_t kRows = 3, kSide = 8;
    auto encoder = numbers<float>(kSide * kSide, 2, 2), decoder = numbers<float>(kSide * kSide, 2, 3);
    for (std::uint32_t bits :
         {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0x7fc00000u, 0x7f800000u, 0xff800000u}) {
        auto input = numbers<float>(kRows * kSide, 2, 1);
        input[kSide + 5] = std::bit_cast<float>(bits);
        std::vector<float> out(kRows * kSide), hidden(kRows * kSide);
        const lrc::LowrankLinearArgs<float> args{.input = input.data(),
                                                 .encoder = encoder.data(),
                                                 .decoder = decoder.data(),
                                                 .bias = nullptr,
                                                 .out = out.data(),
                                                 .hidden = hidden.data(),
                                                 .rows = kRows,
                                                 .inside = kSide,
                                                 .groups = 1,
                                                 .rank = kSide,
                                                 .filters = kSide,
                                                 .activation = Activation::kNone,
                                                 .threads = 1};
        lrc::lowrank_linear(lrc::Cuda{nullptr}, args, {});
        for (std::int64_t i = 0; i < kRows * kSide; ++i) {
            const bool finite = i / kSide != 1;
            check::expect(std::isfinite(out[i]) == finite, "%x: entry %lld", bits, static_cast<long long>(i));
        }
    }
}

}  // namespace

int main(int argc, char**) {
    test<float>({3, 1, 1024, 16, 24});
    test<lrc::Bfloat16>({3, 1, 1024, 16, 24});
    if (argc > 1) return check::failures > 0;
    test_shapes<float>();
    test_shapes<lrc::Bfloat16>();
    test_shapes<lrc::Half>();
    test_special_numbers();
    return check::failures > 0;
}
