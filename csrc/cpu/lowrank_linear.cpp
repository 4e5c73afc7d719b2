#include "ops/lowrank_linear.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/lowrank_linear.h"
#include "cpu/lowrank_linear_amx.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/wide.h"

// With few rows the time is that of reading the factors, each once. A task is some lines of a factor times
// all rows of the input: the lines are read as long streams, a few of them side by side, and the rows, some
// at a time, come from the cache.

namespace lrc {
namespace {

constexpr std::int64_t kTask = 24;  // lines of a task: whole blocks of 8, 6, 4 and 3, and whole vectors
constexpr std::int64_t kRows = 4;   // at most, of a block
constexpr std::int64_t kTile = 64;  // rows whose sums are kept until the epilogue
constexpr std::int64_t kManyRows = 4 * kTileSide;  // for which tiles load the factors once

// One of the two products: out[m, g lines + n] = activation(sum_k x[m, g terms + k] w[g lines + n, k] +
// bias).
template <class T, class Y> struct Product {
    const float* x;  // [rows, groups terms]
    const T* w;      // [groups lines, terms]
    const T* bias;   // [groups lines], or null
    Y* out;          // [rows, groups lines]
    std::int64_t rows;
    std::int64_t groups;
    std::int64_t lines;
    std::int64_t terms;
    Activation activation;

    std::int64_t tasks() const { return groups * tasks_of_group(); }
    std::int64_t tasks_of_group() const { return (lines + kTask - 1) / kTask; }
};

LRC_INLINE float total_of(Floats<8> s) {
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
LRC_INLINE float total_of(Floats<16> s) {
    return total_of(__builtin_shufflevector(s, s, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(s, s, 8, 9, 10, 11, 12, 13, 14, 15));
}

// sums[m, n] = x[m] . w[n], a sum in registers for each; sums has rows of kTask.
template <int kWidth, int kCount, int kLines, class T>
LRC_INLINE void multiply(const float* x, std::int64_t x_row, const T* w, std::int64_t terms, float* sums) {
    Floats<kWidth> parts[kCount][kLines] = {};
    std::int64_t k = 0;
    for (; k + kWidth <= terms; k += kWidth) {
        Floats<kWidth> rows[kCount];
        LRC_UNROLL
        for (int m = 0; m < kCount; ++m) rows[m] = load_floats<kWidth>(x + m * x_row + k);
        LRC_UNROLL
        for (int n = 0; n < kLines; ++n) {
            const Floats<kWidth> line = load_floats<kWidth>(w + n * terms + k);
            LRC_UNROLL
            for (int m = 0; m < kCount; ++m) parts[m][n] += rows[m] * line;
        }
    }
    for (int m = 0; m < kCount; ++m) {
        for (int n = 0; n < kLines; ++n) {
            float total = total_of(parts[m][n]);
            for (std::int64_t rest = k; rest < terms; ++rest)
                total += x[m * x_row + rest] * to_float(w[n * terms + rest]);
            sums[m * kTask + n] = total;
        }
    }
}

// `lines` lines and kCount rows, kLines lines at a time.
template <int kWidth, int kCount, int kLines, class T>
LRC_INLINE void multiply_lines(const float* x, std::int64_t x_row, const T* w, std::int64_t terms,
                               std::int64_t lines, float* sums) {
    std::int64_t n = 0;
    for (; n + kLines <= lines; n += kLines)
        multiply<kWidth, kCount, kLines>(x, x_row, w + n * terms, terms, sums + n);
    for (; n < lines; ++n) multiply<kWidth, kCount, 1>(x, x_row, w + n * terms, terms, sums + n);
}

// Bias, activation and rounding of `rows` rows of sums.
template <class T, class Y>
LRC_INLINE void finish(const Product<T, Y>& product, const float* sums, std::int64_t row, std::int64_t rows,
                       std::int64_t line, std::int64_t lines) {
    float bias[kTask] = {};
    for (std::int64_t n = 0; product.bias != nullptr && n < lines; ++n)
        bias[n] = to_float(product.bias[line + n]);
    for (std::int64_t m = 0; m < rows; ++m) {
        Y* out = product.out + (row + m) * product.groups * product.lines + line;
        for (std::int64_t n = 0; n < lines; n += kWide) {
            const Wide sum = load_wide(sums + m * kTask + n) + load_wide(bias + n);
            store_some(out + n, activate(product.activation, sum), std::min(kWide, lines - n));
        }
    }
}

template <int kWidth, class T, class Y>
LRC_INLINE void run_task(const Product<T, Y>& product, std::int64_t task) {
    const std::int64_t group = task / product.tasks_of_group();
    const std::int64_t first = task % product.tasks_of_group() * kTask;
    const std::int64_t lines = std::min(kTask, product.lines - first);
    const std::int64_t line = group * product.lines + first;
    const std::int64_t terms = product.terms;
    const std::int64_t x_row = product.groups * terms;
    const T* w = product.w + line * terms;
    float sums[kTile * kTask] = {};
    for (std::int64_t tile = 0; tile < product.rows; tile += kTile) {
        const std::int64_t rows = std::min(kTile, product.rows - tile);
        for (std::int64_t m = 0; m < rows; m += kRows) {
            const float* x = product.x + (tile + m) * x_row + group * terms;
            float* to = sums + m * kTask;
            switch (std::min(kRows, rows - m)) {
                case 1:
                    multiply_lines<kWidth, 1, 8>(x, x_row, w, terms, lines, to);
                    break;
                case 2:
                    multiply_lines<kWidth, 2, 6>(x, x_row, w, terms, lines, to);
                    break;
                case 3:
                    multiply_lines<kWidth, 3, 4>(x, x_row, w, terms, lines, to);
                    break;
                default:
                    multiply_lines<kWidth, 4, 3>(x, x_row, w, terms, lines, to);
            }
        }
        finish(product, sums, tile, rows, line, lines);
    }
}

// One a type: the compiler clones no template.
LRC_MULTIVERSION void run(Width<8>, const Product<float, float>& product, std::int64_t task) {
    run_task<8>(product, task);
}
LRC_MULTIVERSION void run(Width<8>, const Product<Bfloat16, float>& product, std::int64_t task) {
    run_task<8>(product, task);
}
LRC_MULTIVERSION void run(Width<8>, const Product<Bfloat16, Bfloat16>& product, std::int64_t task) {
    run_task<8>(product, task);
}
LRC_AVX512 void run(Width<16>, const Product<float, float>& product, std::int64_t task) {
    run_task<16>(product, task);
}
LRC_AVX512 void run(Width<16>, const Product<Bfloat16, float>& product, std::int64_t task) {
    run_task<16>(product, task);
}
LRC_AVX512 void run(Width<16>, const Product<Bfloat16, Bfloat16>& product, std::int64_t task) {
    run_task<16>(product, task);
}

template <int kWidth, class T, class Y>
void run_all(Width<kWidth> width, const Product<T, Y>& product, int threads) {
    parallel_for(threads, product.tasks(),
                 [&](int, std::int64_t task) noexcept { run(width, product, task); });
}

}  // namespace

template <int kWidth, class T> void lowrank_linear(Width<kWidth> width, const LowrankLinearArgs<T>& args) {
    std::vector<float> converted;
    const float* input;
    if constexpr (std::is_same_v<T, float>) {
        input = args.input;
    } else {
        converted.resize(args.rows * args.groups * args.inside);
        std::transform(args.input, args.input + converted.size(), converted.begin(),
                       [](T x) { return to_float(x); });
        input = converted.data();
    }
    const Product<T, float> encoder{.x = input,
                                    .w = args.encoder,
                                    .bias = nullptr,
                                    .out = args.hidden,
                                    .rows = args.rows,
                                    .groups = args.groups,
                                    .lines = args.rank,
                                    .terms = args.inside,
                                    .activation = Activation::kNone};
    const Product<T, T> decoder{.x = args.hidden,
                                .w = args.decoder,
                                .bias = args.bias,
                                .out = args.out,
                                .rows = args.rows,
                                .groups = 1,
                                .lines = args.filters,
                                .terms = args.groups * args.rank,
                                .activation = args.activation};
    run_all(width, encoder, args.threads);
    run_all(width, decoder, args.threads);
}

template void lowrank_linear(Width<8>, const LowrankLinearArgs<float>&);
template void lowrank_linear(Width<16>, const LowrankLinearArgs<float>&);
template void lowrank_linear(Width<8>, const LowrankLinearArgs<Bfloat16>&);
template void lowrank_linear(Width<16>, const LowrankLinearArgs<Bfloat16>&);

bool takes_many_rows(const LowrankLinearArgs<Bfloat16>& args) {
    return has_amx() && args.rows >= kManyRows && fills_tiles(as_image(args));
}

template <class T> void lowrank_linear(Cpu, const LowrankLinearArgs<T>& args) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (takes_many_rows(args)) return lowrank_conv2d_amx(as_image(args));
    }
    if (has_avx512()) {
        lowrank_linear(Width<16>{}, args);
    } else {
        lowrank_linear(Width<8>{}, args);
    }
}

template void lowrank_linear(Cpu, const LowrankLinearArgs<float>&);
template void lowrank_linear(Cpu, const LowrankLinearArgs<Bfloat16>&);

}  // namespace lrc
