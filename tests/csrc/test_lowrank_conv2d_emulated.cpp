// The CUDA twin, emulated on the CPU: the same bits as exact sums of small integers, and within the derived
// bound and the tolerance law for normal numbers. An argument leaves out all but the cases that need every
// barrier.
#include <stdexcept>

#include "emulation/cuda_runtime.h"
#include "lowrank.h"
#include "ops/lowrank_conv2d.h"

namespace {

using lowrank::numbers;
using lowrank::Sum;
using lowrank::widen;
using lrc::Activation;

constexpr std::int64_t kSharedLimit = 163 << 10;  // of a block on sm_80

struct Case {
    std::int64_t batch, groups, inside, rank, filters;
    lrc::ConvAxis rows, columns;
    std::int64_t multiprocessors = 1000;  // few of them choose a tile of 128 pixels
    Activation activation = Activation::kNone;
    bool biased = true;
    int range = 2;           // of the integers, 0 for normal numbers
    std::int64_t shift = 0;  // of every buffer, in entries
};

lrc::ConvAxis axis(std::int64_t in, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                   std::int64_t dilation) {
    return {in,      (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1, kernel, stride, padding,
            dilation};
}

// z of one pixel, by the formula of the contract.
template <class T>
Sum encoded(const lrc::LowrankConv2dArgs<T>& args, std::int64_t image, std::int64_t q, std::int64_t row,
            std::int64_t column) {
    const std::int64_t inside = args.channels / args.groups;
    const T* weight = args.encoder + q * inside * args.rows.kernel * args.columns.kernel;
    Sum sum;
    for (std::int64_t a = 0; a < args.rows.kernel; ++a) {
        for (std::int64_t b = 0; b < args.columns.kernel; ++b) {
            const std::int64_t y = row * args.rows.stride + a * args.rows.dilation - args.rows.padding;
            const std::int64_t x =
                column * args.columns.stride + b * args.columns.dilation - args.columns.padding;
            for (std::int64_t i = 0; i < inside; ++i, ++weight) {
                if (y < 0 || y >= args.rows.in || x < 0 || x >= args.columns.in) continue;
                const std::int64_t pixel = (image * args.rows.in + y) * args.columns.in + x;
                sum.add(widen(*weight),
                        widen(args.input[pixel * args.channels + q / args.rank * inside + i]));
            }
        }
    }
    return sum;
}

template <class T> void compare(const lrc::LowrankConv2dArgs<T>& args, bool exact, const char* order) {
    const std::int64_t inner = args.groups * args.rank;
    const std::int64_t terms = inner + args.channels / args.groups * args.rows.kernel * args.columns.kernel;
    std::int64_t wrong = 0;
    lowrank::Law law;
    std::vector<Sum> z(inner);
    const T* found = args.out;
    for (std::int64_t pixel = 0; pixel < args.batch * args.rows.out * args.columns.out; ++pixel) {
        const std::int64_t row = pixel / args.columns.out;
        for (std::int64_t q = 0; q < inner; ++q)
            z[q] = encoded(args, row / args.rows.out, q, row % args.rows.out, pixel % args.columns.out);
        wrong += lowrank::wrong_outputs<T>(args, z, found, exact, terms);
        if (!exact) law.add(args, z, found);
        found += args.filters;
    }
    check::expect(wrong == 0, "%s: %lld groups of rank %lld, %lld filters, %lld x %lld pixels: %lld wrong",
                  order, static_cast<long long>(args.groups), static_cast<long long>(args.rank),
                  static_cast<long long>(args.filters), static_cast<long long>(args.rows.in),
                  static_cast<long long>(args.columns.in), static_cast<long long>(wrong));
    law.expect<T>(order);
}

template <class T> void test(const Case& one) {
    const std::int64_t channels = one.groups * one.inside;
    const std::int64_t inner = one.groups * one.rank;
    const std::int64_t pixels = one.batch * one.rows.out * one.columns.out;
    auto input = numbers<T>(one.batch * channels * one.rows.in * one.columns.in, one.range, 1, one.shift);
    auto encoder =
        numbers<T>(inner * one.inside * one.rows.kernel * one.columns.kernel, one.range, 2, one.shift);
    auto decoder = numbers<T>(one.filters * inner, one.range, 3, one.shift);
    auto bias = numbers<T>(one.filters, one.range, 4, one.shift);
    const auto tile =
        lrc::choose_tile(pixels, one.groups, one.rank, sizeof(T), kSharedLimit, one.multiprocessors);
    using emulation::Landing;
    using emulation::Order;
    const char* names[] = {"forward", "reverse", "random"};
    for (Landing landing : {Landing::kAtOnce, Landing::kWhenWaitedFor}) {
        for (Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
            lowrank::Buffer<T> out(pixels * one.filters, one.shift);
            const lrc::LowrankConv2dArgs<T> args{.input = input.data(),
                                                 .encoder = encoder.data(),
                                                 .encoder_last = true,
                                                 .decoder = decoder.data(),
                                                 .bias = one.biased ? bias.data() : nullptr,
                                                 .out = out.data(),
                                                 .channels_last = true,
                                                 .batch = one.batch,
                                                 .channels = channels,
                                                 .filters = one.filters,
                                                 .groups = one.groups,
                                                 .rank = one.rank,
                                                 .rows = one.rows,
                                                 .columns = one.columns,
                                                 .activation = one.activation,
                                                 .threads = 1};
            emulation::Block::instance().order = order;
            emulation::Copies::instance().landing = landing;
            lrc::lowrank_conv2d(lrc::Cuda{nullptr}, args, tile);
            compare(args, one.range > 0, names[static_cast<int>(order)]);
            check::expect(out.untouched_around(), "a write outside of the output");
        }
    }
}

template <class T> void test_barriers() {
    // Several chunks, tiles of columns and groups, in each of the three kernels.
    test<T>({1, 2, 24, 70, 72, axis(9, 3, 1, 1, 1), axis(9, 3, 1, 1, 1)});
    test<T>({1, 1, 72, 40, 130, axis(9, 1, 1, 0, 1), axis(16, 1, 1, 0, 1), 1});
    test<T>({1, 1, 136, 130, 136, axis(9, 1, 1, 0, 1), axis(15, 1, 1, 0, 1), 1});
}

template <class T> void test_shapes() {
    test<T>({0, 2, 8, 4, 8, axis(4, 3, 1, 1, 1), axis(4, 3, 1, 1, 1)});
    test<T>({1, 2, 8, 4, 0, axis(4, 3, 1, 1, 1), axis(4, 3, 1, 1, 1)});
    test<T>({1, 1, 1, 1, 1, axis(1, 1, 1, 0, 1), axis(1, 1, 1, 0, 1)});
    // No rank and no channels: the bias, activated.
    test<T>({1, 1, 3, 0, 5, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), 1000, Activation::kGelu});
    test<T>({1, 1, 0, 3, 5, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), 1000, Activation::kSilu});
    // Any groups, strides, paddings and dilations; rows that are padding only.
    test<T>({2, 4, 3, 2, 7, axis(7, 3, 2, 1, 1), axis(6, 2, 3, 2, 2), 1000, Activation::kRelu});
    test<T>({1, 4, 8, 5, 16, axis(8, 3, 2, 2, 2), axis(7, 3, 1, 1, 1), 1000, Activation::kSilu});
    test<T>({1, 12, 1, 1, 11, axis(5, 3, 1, 1, 1), axis(5, 5, 1, 2, 1), 1000, Activation::kGelu});
    test<T>({2, 1, 2, 2, 3, axis(1, 1, 2, 3, 1), axis(1, 2, 3, 3, 1)});
    // Around the tiles: pixels, columns, terms, and what 16 bytes hold.
    for (std::int64_t width : {63, 64, 65})
        test<T>({1, 1, 8, 8, 8, axis(1, 1, 1, 0, 1), axis(width, 1, 1, 0, 1)});
    for (std::int64_t size : {31, 32, 33, 63, 64, 65})
        test<T>({1, 1, size, size, size, axis(1, 1, 1, 0, 1), axis(3, 1, 1, 0, 1), 1000, Activation::kNone,
                 false});
    test<T>({1, 2, 8, 8, 16, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), 1000, Activation::kNone, true, 2, 3});
    test<T>({1, 2, 16, 8, 24, axis(5, 3, 1, 1, 1), axis(7, 3, 1, 1, 1), 1000, Activation::kGelu, true, 0});
    test<T>({1, 1, 130, 40, 24, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), 1000, Activation::kNone, true, 0});
}

void test_choice() {
    const auto pixels = [](std::int64_t count, std::int64_t groups, std::int64_t rank,
                           std::int64_t entry_bytes = 2) {
        return lrc::choose_tile(count, groups, rank, entry_bytes, kSharedLimit, 108).pixels;
    };
    check::expect(pixels(1 << 20, 4, 64) == 128, "many pixels");
    check::expect(pixels(64 * 108, 4, 64) == 64, "one tile for each multiprocessor");
    check::expect(pixels(1 << 20, 1, 1024) == 64, "a z that 128 pixels have no room for");
    check::expect(pixels(1 << 20, 8, 136) == 0, "a z that has no room");
    check::expect(pixels(1 << 20, 1, 256) == 128, "256 codes of 16 bits");
    check::expect(pixels(1 << 20, 1, 256, 4) == 64, "the same in float32");
    check::expect(pixels(1 << 20, 1, 1024, 4) == 0, "a z of float32 that has no room");
    bool refused = false;
    try {
        const auto tile = lrc::choose_tile(1, 8, 136, 2, kSharedLimit, 108);
        lrc::LowrankConv2dArgs<lrc::Half> args{};
        args.batch = args.groups = args.filters = args.rows.out = args.columns.out = 1;
        args.channels_last = true;
        lrc::lowrank_conv2d(lrc::Cuda{nullptr}, args, tile);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    check::expect(refused, "what does not fit was launched");
}

}  // namespace

int main(int argc, char**) {
    test_barriers<float>();
    test_barriers<lrc::Bfloat16>();
    if (argc > 1) return check::failures > 0;
    test_barriers<lrc::Half>();
    test_shapes<float>();
    test_shapes<lrc::Bfloat16>();
    test_shapes<lrc::Half>();
    test_choice();
    return check::failures > 0;
}
