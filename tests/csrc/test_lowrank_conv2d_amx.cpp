// The convolution, and the linear layer as one, on tiles that run on the host: the same bits as exact sums of
// small integers, and within the derived bound for normal numbers. Then the instructions themselves, where
// the processor has none carried out by a signal handler.
#include <limits>

#include "check.h"
#include "cpu/lowrank_conv2d_amx.h"
#include "cpu/lowrank_linear_amx.h"
#include "emulation/host_tiles.h"
#include "lowrank.h"

namespace {

using lowrank::Buffer;
using lowrank::numbers;
using lowrank::Sum;
using lowrank::widen;
using lrc::Activation;
using lrc::Bfloat16;
using Args = lrc::LowrankConv2dArgs<Bfloat16>;

struct Case {
    std::int64_t batch, groups, inside, rank, filters;
    lrc::ConvAxis rows, columns;
    Activation activation = Activation::kNone;
    bool biased = true;
    int range = 9;  // of the integers: z is to be rounded; 0 for normal numbers
};

lrc::ConvAxis axis(std::int64_t in, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                   std::int64_t dilation) {
    return {in,      (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1, kernel, stride, padding,
            dilation};
}

struct HostKernel {
    static void pack(const lrc::tiled::ConvArgs& args, const lrc::tiled::Layout& layout,
                     lrc::tiled::Factors& factors) {
        lrc::tiled::pack_factors(args, layout, factors);
    }
    static void run(const lrc::tiled::ConvArgs& args, const lrc::tiled::Layout& layout,
                    const lrc::tiled::Factors& factors, std::int64_t task,
                    const lrc::tiled::Scratch& scratch) {
        lrc::tiled::run_task<emulation::HostTiles>(args, layout, factors, task, scratch);
    }
};

void run_on_host(const Args& args) { lrc::tiled::run_all<HostKernel>(args); }

std::int64_t place(bool channels_last, std::int64_t image, std::int64_t channels, std::int64_t channel,
                   std::int64_t pixels, std::int64_t pixel) {
    return channels_last ? (image * pixels + pixel) * channels + channel
                         : (image * channels + channel) * pixels + pixel;
}

// z of one pixel, by the formula of the contract.
Sum encoded(const Args& args, std::int64_t image, std::int64_t q, std::int64_t row, std::int64_t column) {
    const std::int64_t inside = args.channels / args.groups, pixels = args.rows.in * args.columns.in;
    const Bfloat16* weight = args.encoder + q * inside * args.rows.kernel * args.columns.kernel;
    Sum sum;
    for (std::int64_t i = 0; i < inside; ++i) {
        for (std::int64_t a = 0; a < args.rows.kernel; ++a) {
            for (std::int64_t b = 0; b < args.columns.kernel; ++b, ++weight) {
                const std::int64_t y = row * args.rows.stride + a * args.rows.dilation - args.rows.padding;
                const std::int64_t x =
                    column * args.columns.stride + b * args.columns.dilation - args.columns.padding;
                if (y < 0 || y >= args.rows.in || x < 0 || x >= args.columns.in) continue;
                const std::int64_t from = place(args.channels_last, image, args.channels,
                                                q / args.rank * inside + i, pixels, y * args.columns.in + x);
                sum.add(widen(*weight), widen(args.input[from]));
            }
        }
    }
    return sum;
}

std::int64_t wrong_outputs(const Args& args, bool exact) {
    const std::int64_t inner = args.groups * args.rank, pixels = args.rows.out * args.columns.out;
    const std::int64_t terms = inner + args.channels / args.groups * args.rows.kernel * args.columns.kernel;
    std::int64_t wrong = 0;
    std::vector<Sum> z(inner);
    std::vector<Bfloat16> found(args.filters);
    for (std::int64_t image = 0; image < args.batch; ++image) {
        for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
            for (std::int64_t q = 0; q < inner; ++q)
                z[q] = encoded(args, image, q, pixel / args.columns.out, pixel % args.columns.out);
            for (std::int64_t f = 0; f < args.filters; ++f)
                found[f] = args.out[place(args.channels_last, image, args.filters, f, pixels, pixel)];
            wrong += lowrank::wrong_outputs<Bfloat16>(args, z, found.data(), exact, terms);
        }
    }
    return wrong;
}

// Buffers of one case, filled.
struct Problem {
    Buffer<Bfloat16> input, encoder, decoder, bias;
    Case one;

    explicit Problem(const Case& one)
        : input(numbers<Bfloat16>(one.batch * one.groups * one.inside * one.rows.in * one.columns.in,
                                  one.range, 1)),
          encoder(numbers<Bfloat16>(one.groups * one.rank * one.inside * one.rows.kernel * one.columns.kernel,
                                    one.range, 2)),
          decoder(numbers<Bfloat16>(one.filters * one.groups * one.rank, one.range, 3)),
          bias(numbers<Bfloat16>(one.filters, one.range, 4)),
          one(one) {}
    std::int64_t out_size() const { return one.batch * one.filters * one.rows.out * one.columns.out; }
    Args args(Buffer<Bfloat16>& out, bool channels_last, int threads) {
        return {.input = input.data(),
                .encoder = encoder.data(),
                .decoder = decoder.data(),
                .bias = one.biased ? bias.data() : nullptr,
                .out = out.data(),
                .channels_last = channels_last,
                .batch = one.batch,
                .channels = one.groups * one.inside,
                .filters = one.filters,
                .groups = one.groups,
                .rank = one.rank,
                .rows = one.rows,
                .columns = one.columns,
                .activation = one.activation,
                .threads = threads};
    }
};

template <class Run> void test(const Case& one, const Run& run) {
    Problem problem(one);
    for (bool channels_last : {true, false}) {
        Buffer<Bfloat16> first(problem.out_size());
        for (int threads : {1, 3}) {
            Buffer<Bfloat16> out(problem.out_size());
            const Args args = problem.args(out, channels_last, threads);
            run(args);
            check::expect(out.untouched_around(), "a write outside of the output");
            if (threads == 1) {
                const std::int64_t wrong = wrong_outputs(args, one.range > 0);
                check::expect(wrong == 0,
                              "%lld x %lld channels, rank %lld, %lld filters, %lld x %lld pixels, "
                              "channels %s: %lld wrong",
                              static_cast<long long>(one.groups), static_cast<long long>(one.inside),
                              static_cast<long long>(one.rank), static_cast<long long>(one.filters),
                              static_cast<long long>(one.rows.in), static_cast<long long>(one.columns.in),
                              channels_last ? "last" : "first", static_cast<long long>(wrong));
                std::copy_n(out.data(), problem.out_size(), first.data());
            }
            for (std::int64_t i = 0; i < problem.out_size(); ++i)
                check::expect(out[i].bits == first[i].bits, "%d threads change the bits", threads);
        }
    }
}

void test_shapes() {
    const auto host = run_on_host;
    test({0, 2, 4, 3, 5, axis(4, 3, 1, 1, 1), axis(4, 3, 1, 1, 1)}, host);
    test({1, 2, 4, 3, 0, axis(4, 3, 1, 1, 1), axis(4, 3, 1, 1, 1)}, host);
    test({1, 1, 1, 1, 1, axis(1, 1, 1, 0, 1), axis(1, 1, 1, 0, 1)}, host);
    // No rank and no channels: the bias, activated.
    test({1, 1, 3, 0, 5, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), Activation::kRelu}, host);
    test({1, 2, 0, 3, 5, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1), Activation::kRelu}, host);
    // Any strides, paddings and dilations; rows and columns that are padding only; fewer columns than a
    // block.
    for (std::int64_t stride : {1, 2, 3}) {
        for (std::int64_t dilation : {1, 2}) {
            for (std::int64_t kernel : {1, 2, 3}) {
                test({2, 2, 3, 2, 7, axis(8, kernel, stride, 1, dilation),
                      axis(7, kernel, stride, 2, dilation), Activation::kRelu, false},
                     host);
                test({1, 1, 6, 5, 3, axis(7, 3, stride, 0, 1), axis(19, kernel, stride, 1, dilation)}, host);
            }
        }
    }
    test({2, 1, 2, 2, 3, axis(1, 1, 2, 3, 1), axis(1, 2, 3, 3, 1)}, host);
    // Around tiles: of pixels and of a block's columns, of ranks, filters and terms.
    for (std::int64_t width : {7, 8, 9, 15, 16, 17, 33})
        test({1, 1, 16, 4, 5, axis(3, 3, 1, 1, 1), axis(width, 3, 1, 1, 1)}, host);
    for (std::int64_t size : {15, 16, 17, 31, 32, 33, 65, 97})
        test({1, 1, size, size, size, axis(2, 1, 1, 0, 1), axis(5, 1, 1, 0, 1)}, host);
    for (std::int64_t size : {10, 11, 21, 22, 37})
        test({1, 2, size, 17, 33, axis(4, 3, 1, 1, 1), axis(9, 3, 1, 1, 1)}, host);
    // An image cut into several tasks.
    test({1, 4, 2, 40, 2, axis(21, 3, 2, 1, 1), axis(60, 3, 1, 1, 1)}, host);
}

void test_numbers() {
    for (Activation activation :
         {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
        test({2, 2, 13, 19, 35, axis(9, 3, 2, 1, 1), axis(11, 3, 1, 1, 1), activation, true, 0}, run_on_host);
    }
}

// The bits of an image are those it has alone.
void test_batch() {
    Problem problem({3, 2, 5, 6, 9, axis(6, 3, 1, 1, 1), axis(7, 3, 1, 1, 1), Activation::kSilu, true, 0});
    Buffer<Bfloat16> all(problem.out_size()), alone(problem.out_size() / 3);
    run_on_host(problem.args(all, true, 1));
    Args one = problem.args(alone, true, 1);
    one.batch = 1;
    one.input += 2 * one.channels * one.rows.in * one.columns.in;
    run_on_host(one);
    for (std::int64_t i = 0; i < problem.out_size() / 3; ++i)
        check::expect(all[2 * problem.out_size() / 3 + i].bits == alone[i].bits,
                      "the batch changes the bits");
}

// One infinite entry: with positive factors an output is infinite where it reads it, and nowhere else
// changed.
void test_infinity(std::int64_t inside, std::int64_t rank, std::int64_t channel,
                   const lrc::ConvAxis& columns) {
    Problem problem({1, 2, inside, rank, 5, axis(5, 3, 1, 1, 1), columns, Activation::kNone, false, 1});
    for (std::int64_t i = 0; i < 2 * rank * inside * 3 * columns.kernel; ++i)
        problem.encoder[i] = lowrank::round_to<Bfloat16>(1);
    for (std::int64_t i = 0; i < 5 * 2 * rank; ++i) problem.decoder[i] = lowrank::round_to<Bfloat16>(1);
    const std::int64_t in = 5 * columns.in, y = 2, x = columns.in / 2;
    for (bool channels_last : {true, false}) {
        for (double value : {std::numeric_limits<double>::infinity(), std::nan("")}) {
            Buffer<Bfloat16> clean(problem.out_size()), out(problem.out_size());
            run_on_host(problem.args(clean, channels_last, 1));
            const std::int64_t poisoned =
                place(channels_last, 0, 2 * inside, channel, in, y * columns.in + x);
            const Bfloat16 kept = problem.input[poisoned];
            problem.input[poisoned] = lowrank::round_to<Bfloat16>(value);
            const Args args = problem.args(out, channels_last, 1);
            run_on_host(args);
            problem.input[poisoned] = kept;
            for (std::int64_t pixel = 0; pixel < 5 * columns.out; ++pixel) {
                const std::int64_t tap = x + columns.padding - pixel % columns.out * columns.stride;
                const bool reads = std::abs(pixel / columns.out - y) <= 1 && tap >= 0 &&
                                   tap % columns.dilation == 0 && tap / columns.dilation < columns.kernel;
                for (std::int64_t f = 0; f < 5; ++f) {
                    const std::int64_t i = place(channels_last, 0, 5, f, 5 * columns.out, pixel);
                    const double found = widen(out[i]);
                    const bool same = std::isnan(value) ? std::isnan(found) : found == value;
                    check::expect(reads ? same : out[i].bits == clean[i].bits,
                                  "%lld channels: %g at pixel %lld", static_cast<long long>(inside), found,
                                  static_cast<long long>(pixel));
                }
            }
        }
    }
}

// Many rows of a linear layer.
void test_rows(std::int64_t rows, std::int64_t inside, std::int64_t groups, std::int64_t rank,
               std::int64_t filters) {
    auto input = numbers<Bfloat16>(rows * groups * inside, 9, 1);
    auto encoder = numbers<Bfloat16>(groups * rank * inside, 9, 2);
    auto decoder = numbers<Bfloat16>(filters * groups * rank, 9, 3);
    auto bias = numbers<Bfloat16>(filters, 9, 4);
    for (int threads : {1, 3}) {
        Buffer<Bfloat16> out(rows * filters);
        const lrc::LowrankLinearArgs<Bfloat16> args{.input = input.data(),
                                                    .encoder = encoder.data(),
                                                    .decoder = decoder.data(),
                                                    .bias = bias.data(),
                                                    .out = out.data(),
                                                    .hidden = nullptr,
                                                    .rows = rows,
                                                    .inside = inside,
                                                    .groups = groups,
                                                    .rank = rank,
                                                    .filters = filters,
                                                    .activation = Activation::kRelu,
                                                    .threads = threads};
        run_on_host(lrc::as_image(args));
        std::int64_t wrong = 0;
        for (std::int64_t m = 0; m < rows; ++m) {
            std::vector<Sum> z(groups * rank);
            for (std::int64_t q = 0; q < groups * rank; ++q) {
                for (std::int64_t i = 0; i < inside; ++i)
                    z[q].add(widen(encoder[q * inside + i]),
                             widen(input[(m * groups + q / rank) * inside + i]));
            }
            wrong += lowrank::wrong_outputs<Bfloat16>(args, z, out.data() + m * filters, true, inside);
        }
        check::expect(wrong == 0 && out.untouched_around(), "%lld rows of %lld features: %lld wrong",
                      static_cast<long long>(rows), static_cast<long long>(groups * inside),
                      static_cast<long long>(wrong));
    }
}

void test_choice() {
    const auto fills = [](std::int64_t groups, std::int64_t inside, std::int64_t rank, std::int64_t kernel) {
        Problem problem({1, groups, inside, rank, 8, axis(8, kernel, 1, 1, 1), axis(8, kernel, 1, 1, 1)});
        Buffer<Bfloat16> out(problem.out_size());
        return lrc::fills_tiles(problem.args(out, true, 1));
    };
    check::expect(fills(2, 8, 5, 3), "3 steps of 24 terms and 5 ranks: 360 products");
    check::expect(fills(1, 16, 7, 1) && !fills(1, 15, 7, 1), "kTileProducts of one step, or fewer");
    check::expect(!fills(8, 2, 5, 3), "3 steps of 6 terms and 5 ranks: 90 products");
}

void test_instructions() {
#ifdef LRC_WITH_AMX
    emulation::provide_amx();
    const auto amx = lrc::lowrank_conv2d_amx;
    test({2, 2, 21, 18, 35, axis(5, 3, 1, 1, 1), axis(9, 3, 1, 1, 1)}, amx);
    test({1, 1, 40, 49, 70, axis(4, 1, 1, 0, 1), axis(9, 1, 1, 0, 1), Activation::kRelu}, amx);
    test({1, 3, 4, 5, 7, axis(7, 3, 2, 2, 2), axis(18, 3, 2, 1, 1), Activation::kGelu, true, 0}, amx);
    test({1, 1, 3, 0, 5, axis(3, 3, 1, 1, 1), axis(5, 3, 1, 1, 1)}, amx);
#endif
}

}  // namespace

int main() {
    test_shapes();
    test_numbers();
    test_batch();
    for (std::int64_t inside : {1, 3, 10, 11, 21}) {
        for (std::int64_t channel : {inside - 1, 2 * inside - 1}) {  // the last of a group
            test_infinity(inside, 3, channel, axis(9, 3, 1, 1, 1));
            test_infinity(inside, 17, channel, axis(18, 3, 2, 1, 2));
            test_infinity(inside, 3, channel, axis(11, 1, 2, 0, 1));
        }
    }
    for (std::int64_t rows : {0, 63, 64, 65, 131}) {
        test_rows(rows, 40, 1, 17, 33);
        test_rows(rows, 9, 3, 5, 8);
    }
    test_rows(600, 64, 1, 3, 5);
    test_choice();
    test_instructions();
    return check::failures > 0;
}
