#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "ops/gram.h"

// One block a tile of a lower triangle. Its rows and its columns, both of them rows of A, are staged in
// shared memory a few terms at a time, as float64, and each thread adds up a square of products in registers.

namespace lrc {
namespace {

constexpr int kTile = kGramTile;
constexpr int kTerms = 16;         // staged at once
constexpr int kThreadsASide = 16;  // of the tile
constexpr int kPerThread = kTile / kThreadsASide;
constexpr int kThreads = kThreadsASide * kThreadsASide;
constexpr int kStride = kTile + 1;  // odd, so that the terms of a row fall on different banks
constexpr int kStaged = kTerms * kStride;
constexpr std::size_t kSharedBytes = 2 * kStaged * sizeof(double);

// The last problem whose tiles begin at or before `tile`: those before it that begin there have none.
template <class T> __device__ const GramProblem<T>& problem_of(const GramArgs<T>& args, std::int64_t tile) {
    std::int64_t low = 0;
    std::int64_t high = args.count;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        if (args.problems[middle].tile_offset <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return args.problems[low];
}

// Terms from `term` on of the rows from `row` on, zeros outside the matrix. Neighbouring threads read
// neighbouring entries of either layout.
template <class T>
__device__ void stage(const GramProblem<T>& problem, std::int64_t row, std::int64_t term,
                      double* to) {  // [kTerms, kStride]
    const bool along_terms = problem.column_stride == 1;
    for (int at = threadIdx.x; at < kTile * kTerms; at += kThreads) {
        const int i = along_terms ? at / kTerms : at % kTile;
        const int k = along_terms ? at % kTerms : at / kTile;
        const bool inside = row + i < problem.side && term + k < problem.terms;
        const T* from = problem.matrix + (row + i) * problem.row_stride + (term + k) * problem.column_stride;
        to[k * kStride + i] = inside ? static_cast<double>(*from) : 0;
    }
}

// Thread (y, x) owns rows y, y + kThreadsASide, ... and columns x, x + kThreadsASide, ... of the tile.
__device__ void add_products(const double* rows, const double* columns,
                             double (&sums)[kPerThread][kPerThread]) {
    const int y = threadIdx.x / kThreadsASide;
    const int x = threadIdx.x % kThreadsASide;
    for (int k = 0; k < kTerms; ++k) {
        double row[kPerThread], column[kPerThread];
        for (int i = 0; i < kPerThread; ++i) {
            row[i] = rows[k * kStride + y + i * kThreadsASide];
            column[i] = columns[k * kStride + x + i * kThreadsASide];
        }
        for (int i = 0; i < kPerThread; ++i) {
            for (int j = 0; j < kPerThread; ++j) sums[i][j] += row[i] * column[j];
        }
    }
}

template <class T> __global__ void __launch_bounds__(kThreads) gram_kernel(GramArgs<T> args) {
    const GramProblem<T> problem = problem_of(args, blockIdx.x);
    std::int64_t tile_row = 0;
    std::int64_t tile_column = blockIdx.x - problem.tile_offset;
    while (tile_column > tile_row) tile_column -= ++tile_row;
    const std::int64_t row = tile_row * kTile;
    const std::int64_t column = tile_column * kTile;
    double* rows = dynamic_shared<double>();
    double* columns = rows + kStaged;
    double sums[kPerThread][kPerThread] = {};
    for (std::int64_t term = 0; term < problem.terms; term += kTerms) {
        stage(problem, row, term, rows);
        stage(problem, column, term, columns);
        __syncthreads();
        add_products(rows, columns, sums);
        __syncthreads();
    }
    for (int i = 0; i < kPerThread; ++i) {
        for (int j = 0; j < kPerThread; ++j) {
            const std::int64_t to_row = row + threadIdx.x / kThreadsASide + i * kThreadsASide;
            const std::int64_t to_column = column + threadIdx.x % kThreadsASide + j * kThreadsASide;
            if (to_row >= problem.side || to_column > to_row) continue;
            args.out[problem.out_offset + to_row * problem.side + to_column] = sums[i][j];
        }
    }
}

}  // namespace

template <class T> void gram(Cuda device, const GramArgs<T>& args) {
    if (args.tiles == 0) return;
    launch(device, gram_kernel<T>, static_cast<unsigned>(args.tiles), kThreads, kSharedBytes, args);
}

template void gram(Cuda, const GramArgs<float>&);
template void gram(Cuda, const GramArgs<double>&);

}  // namespace lrc
