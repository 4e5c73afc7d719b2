// The CPU twin against exact sums of small integers, its output surrounded by numbers that must stay.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/lowrank_conv2d.h"
#include "cpu/packed_factors.h"
#include "cpu/simd.h"
#include "ops/lowrank_conv2d.h"

namespace {

constexpr float kUntouched = -12345.5F;  // no sum of integers

std::vector<float> integers(std::int64_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<float> values(size);
    for (float& value : values) value = static_cast<float>(random() % 7) - 3;
    return values;
}

lrc::ConvAxis axis(std::int64_t in, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                   std::int64_t dilation) {
    const std::int64_t out = (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    return {in, out, kernel, stride, padding, dilation};
}

std::int64_t input_index(const lrc::LowrankConv2dArgs<float>& args, std::int64_t plane, std::int64_t y,
                         std::int64_t x) {
    if (!args.channels_last) return (plane * args.rows.in + y) * args.columns.in + x;
    const std::int64_t pixel = (plane / args.channels * args.rows.in + y) * args.columns.in + x;
    return pixel * args.channels + plane % args.channels;
}

// z of one pixel, by the formula of the contract.
double encoded(const lrc::LowrankConv2dArgs<float>& args, std::int64_t image, std::int64_t q,
               std::int64_t row, std::int64_t column) {
    const std::int64_t inside = args.channels / args.groups;
    double sum = 0;
    const float* weight = args.encoder + q * inside * args.rows.kernel * args.columns.kernel;
    for (std::int64_t i = 0; i < inside; ++i) {
        const std::int64_t plane = image * args.channels + q / args.rank * inside + i;
        for (std::int64_t a = 0; a < args.rows.kernel; ++a) {
            for (std::int64_t b = 0; b < args.columns.kernel; ++b, ++weight) {
                const std::int64_t y = row * args.rows.stride + a * args.rows.dilation - args.rows.padding;
                const std::int64_t x =
                    column * args.columns.stride + b * args.columns.dilation - args.columns.padding;
                if (y < 0 || y >= args.rows.in || x < 0 || x >= args.columns.in) continue;
                sum += *weight * args.input[input_index(args, plane, y, x)];
            }
        }
    }
    return sum;
}

std::vector<float> expected(const lrc::LowrankConv2dArgs<float>& args) {
    const std::int64_t inner = args.groups * args.rank;
    const std::int64_t pixels = args.rows.out * args.columns.out;
    std::vector<float> out(args.batch * args.filters * pixels);
    for (std::int64_t image = 0; image < args.batch; ++image) {
        for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
            std::vector<double> z(inner);
            for (std::int64_t q = 0; q < inner; ++q) {
                z[q] = encoded(args, image, q, pixel / args.columns.out, pixel % args.columns.out);
            }
            for (std::int64_t f = 0; f < args.filters; ++f) {
                double sum = args.bias == nullptr ? 0 : args.bias[f];
                for (std::int64_t q = 0; q < inner; ++q) sum += args.decoder[f * inner + q] * z[q];
                const std::int64_t index = args.channels_last ? (image * pixels + pixel) * args.filters + f
                                                              : (image * args.filters + f) * pixels + pixel;
                out[index] = static_cast<float>(std::max(sum, 0.0));
            }
        }
    }
    return out;
}

// [lines, inside, taps] as [lines, taps, inside].
std::vector<float> the_other_way_round(const std::vector<float>& values, std::int64_t lines,
                                       std::int64_t inside, std::int64_t taps) {
    std::vector<float> turned(values.size());
    for (std::int64_t q = 0; q < lines; ++q) {
        for (std::int64_t i = 0; i < inside; ++i) {
            for (std::int64_t t = 0; t < taps; ++t)
                turned[(q * taps + t) * inside + i] = values[(q * inside + i) * taps + t];
        }
    }
    return turned;
}

// Several threads, whose factors differ, keep them in one place.
void test_sharing() {
    lrc::PackedFactors packed;
    const std::vector<float> input = integers(4 * 25, 1), encoder = integers(6 * 2 * 9, 2);
    std::vector<std::jthread> pool;
    std::array<bool, 4> same{};
    for (unsigned number = 0; number < same.size(); ++number) {
        pool.emplace_back([&, number] {
            const std::vector<float> decoder = integers(3 * 6, 3 + number % 2);
            std::vector<float> out(3 * 25);
            const lrc::LowrankConv2dArgs<float> args{.input = input.data(),
                                                     .encoder = encoder.data(),
                                                     .decoder = decoder.data(),
                                                     .bias = nullptr,
                                                     .out = out.data(),
                                                     .channels_last = true,
                                                     .batch = 1,
                                                     .channels = 4,
                                                     .filters = 3,
                                                     .groups = 2,
                                                     .rank = 3,
                                                     .rows = axis(5, 3, 1, 1, 1),
                                                     .columns = axis(5, 3, 1, 1, 1),
                                                     .activation = lrc::Activation::kRelu,
                                                     .threads = 1,
                                                     .packed = &packed};
            const std::vector<float> truth = expected(args);
            same[number] = true;
            for (int call = 0; call < 50; ++call) {
                std::fill(out.begin(), out.end(), kUntouched);
                lrc::lowrank_conv2d(lrc::Cpu{}, args);
                same[number] = same[number] && out == truth;
            }
        });
    }
    pool.clear();
    for (bool one : same) check::expect(one, "threads that share what is kept");
}

void test(std::int64_t batch, std::int64_t groups, std::int64_t inside, std::int64_t rank,
          std::int64_t filters, const lrc::ConvAxis& rows, const lrc::ConvAxis& columns) {
    const std::int64_t channels = groups * inside;
    const std::vector<float> input = integers(batch * channels * rows.in * columns.in, 1);
    const std::vector<float> encoder = integers(groups * rank * inside * rows.kernel * columns.kernel, 2);
    const std::vector<float> decoder = integers(filters * groups * rank, 3);
    const std::vector<float> bias = integers(filters, 4);
    const std::vector<float> other = integers(filters * groups * rank, 5);  // a U
    const std::vector<float> encoder_last =
        the_other_way_round(encoder, groups * rank, inside, rows.kernel * columns.kernel);
    for (int threads : {1, 2, 5, -1, -2, -5}) {  // negative: channels side by side
        const bool last = threads < 0;
        std::vector<float> out(batch * filters * rows.out * columns.out, kUntouched);
        const lrc::LowrankConv2dArgs<float> args{.input = input.data(),
                                                 .encoder = encoder.data(),
                                                 .decoder = decoder.data(),
                                                 .bias = std::abs(threads) == 2 ? nullptr : bias.data(),
                                                 .out = out.data(),
                                                 .channels_last = last,
                                                 .batch = batch,
                                                 .channels = channels,
                                                 .filters = filters,
                                                 .groups = groups,
                                                 .rank = rank,
                                                 .rows = rows,
                                                 .columns = columns,
                                                 .activation = lrc::Activation::kRelu,
                                                 .threads = std::abs(threads)};
        const std::vector<float> truth = expected(args);
        lrc::LowrankConv2dArgs<float> with_other = args;
        with_other.decoder = other.data();
        const std::vector<float> changed = expected(with_other);
        const auto check = [&](const char* which) {
            check::expect(out == truth, "%s: %lld groups of rank %lld, %lld by %lld pixels, %d threads",
                          which, static_cast<long long>(groups), static_cast<long long>(rank),
                          static_cast<long long>(rows.in), static_cast<long long>(columns.in), threads);
            std::fill(out.begin(), out.end(), kUntouched);
        };
        lrc::lowrank_conv2d(lrc::Cpu{}, args);
        check("chosen");
        lrc::LowrankConv2dArgs<float> other_way = args;
        for (const lrc::ConvEncoder algorithm : {lrc::ConvEncoder::kDirect, lrc::ConvEncoder::kWinograd}) {
            other_way.algorithm = algorithm;
            lrc::lowrank_conv2d(lrc::Width<8>{}, other_way);
            check(algorithm == lrc::ConvEncoder::kDirect ? "8 wide, direct" : "8 wide, Winograd");
            if (lrc::kNeedsAvx512 && !lrc::has_avx512()) continue;
            lrc::lowrank_conv2d(lrc::Width<16>{}, other_way);
            check(algorithm == lrc::ConvEncoder::kDirect ? "16 wide, direct" : "16 wide, Winograd");
        }
        // V the other way round, then the factors kept from the call before, then others.
        lrc::PackedFactors packed;
        lrc::LowrankConv2dArgs<float> kept = args;
        kept.encoder = encoder_last.data();
        kept.encoder_last = true;
        kept.packed = &packed;
        for (const char* which : {"V the other way round", "kept"}) {
            lrc::lowrank_conv2d(lrc::Cpu{}, kept);
            check(which);
        }
        kept.decoder = other.data();
        lrc::lowrank_conv2d(lrc::Cpu{}, kept);
        check::expect(out == changed, "a changed U, %d threads", threads);
        std::fill(out.begin(), out.end(), kUntouched);
    }
}

}  // namespace

int main() {
    test(0, 2, 1, 1, 3, axis(4, 3, 1, 1, 1), axis(4, 3, 1, 1, 1));
    test(1, 1, 1, 1, 1, axis(1, 1, 1, 0, 1), axis(1, 1, 1, 0, 1));
    // Around the vectors (8) and the pixels (16) of a block.
    for (std::int64_t width : {7, 8, 9, 15, 16, 17, 33}) {
        for (std::int64_t stride : {1, 2, 3}) {
            test(2, 3, 2, 3, 7, axis(5, 3, stride, 1, 1), axis(width, 3, stride, 1, 1));
            test(1, 2, 1, 2, 5, axis(9, 3, 1, 3, 2), axis(width, 5, stride, 3, 2));
        }
    }
    for (std::int64_t rank : {1, 2, 3, 4, 5, 7, 9, 13})
        test(1, 2, 1, rank, rank, axis(6, 3, 1, 0, 1), axis(11, 1, 2, 1, 1));
    // Blocks of 8 channels by 8 columns: too few of either, one that moves back, and zeros of the first
    // groups that serve the next; strips of U that are gone through one by one.
    for (std::int64_t width : {3, 7, 8, 11}) {
        test(1, 3, 9, 2, 3, axis(4, 3, 1, 1, 1), axis(width, 3, 1, 1, 1));
        test(1, 18, 1, 1, 9, axis(5, 3, 2, 2, 1), axis(2 * width, 3, 2, 2, 1));
    }
    // Input of a group that the L1 cache does not hold.
    for (std::int64_t rank : {4, 5, 7}) test(1, 2, 12, rank, 3, axis(20, 3, 1, 1, 1), axis(21, 3, 1, 1, 1));
    test(1, 2, 5, 65, 33, axis(3, 2, 1, 1, 1), axis(6, 2, 1, 0, 1));
    // Winograd's squares: one, odd sides, borders of several, no padding and more than the kernel's; channels
    // that are no whole vectors; blocks that are not full; ranks of one, two, three and five vectors.
    for (std::int64_t height : {3, 4, 5, 8, 11}) {
        test(2, 2, 17, 40, 6, axis(height, 3, 1, 1, 1), axis(9, 3, 1, 1, 1));
        test(1, 1, 9, 17, 3, axis(height, 3, 1, 0, 1), axis(17, 3, 1, 2, 1));
        test(1, 3, 8, 3, 17, axis(height, 3, 1, 3, 1), axis(4, 3, 1, 0, 1));
    }
    for (std::int64_t rank : {8, 9, 16, 24, 25}) {
        for (std::int64_t width : {7, 8, 16, 28})
            test(1, 2, 8 + rank % 9, rank, 8, axis(6, 3, 1, 1, 1), axis(width, 3, 1, 1, 1));
    }
    // What is behind z, were a row too many of it written.
    test(1, 1, 8, 60, 3, axis(3, 3, 1, 1, 1), axis(80, 3, 1, 1, 1));
    // Images that no cache holds: memory is fetched ahead.
    test(2, 1, 2, 1, 17, axis(180, 3, 1, 1, 1), axis(180, 3, 1, 1, 1));
    test(2, 1, 3, 2, 65, axis(180, 3, 2, 1, 1), axis(181, 3, 2, 0, 1));
    // Several tiles of rows; more than the stack holds.
    test(1, 2, 17, 60, 8, axis(23, 3, 1, 1, 1), axis(70, 3, 1, 1, 1));
    test(1, 1, 130, 20, 8, axis(9, 3, 1, 1, 1), axis(60, 3, 1, 1, 1));
    // An image whose z is cut into several tiles, and rows that are padding only.
    test(1, 16, 1, 4, 2, axis(21, 3, 2, 1, 1), axis(120, 3, 1, 1, 1));
    test(2, 1, 2, 2, 3, axis(1, 1, 2, 3, 1), axis(1, 2, 3, 3, 1));
    test_sharing();
    return check::failures > 0;
}
