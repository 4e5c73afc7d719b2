#include <limits>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "ops/autocorrelation.h"

// One grid multiplies: a block a share of the pixels of a cell, and a tile of channels by a tile of channels.
// Pixels are the terms of the sums: they are staged [channel, pixel], so that a shifted image is the same one
// read at other addresses. A float32 is three bfloat16 numbers, of whose nine products the six that matter
// are added: the error of a term is 2^-24 of it, as that of a float32 product. Tensor cores round toward
// zero, so sums leave them after a few terms, in double. A second grid adds cells to the result, shares in
// ascending order: each pair of mirrored entries belongs to one thread.

namespace lrc {
namespace {

constexpr int kTile = 64;             // channels of either side, of a block
constexpr int kWarpTile = kTile / 2;  // of a warp
constexpr int kThreads = 4 * kWarpSize;
constexpr int kChunk = 32;           // pixels staged at once
constexpr int kStride = kChunk + 8;  // entries: eight rows of ldmatrix fall on different banks
constexpr int kAddThreads = 256;

template <class T> struct Pieces {
    using Entry = T;
    static constexpr int kCount = 1;
    static constexpr int kChunks = kPatchRun / kChunk;  // whose sums stay in the tensor cores
};
template <> struct Pieces<float> {
    using Entry = Bfloat16;
    static constexpr int kCount = 3;
    static constexpr int kChunks = 1;
};
template <class T> using Entry = typename Pieces<T>::Entry;
template <class T> constexpr int kStaged = Pieces<T>::kCount * kTile * kStride;  // entries of one side

template <class T> struct Shared {
    std::int64_t at[2][kChunk];  // of this chunk and the next: a pixel's first entry in x, or -1
    Words4 rows[kStaged<T> / 8];
    Words4 columns[kStaged<T> / 8];
};

// Of a warp: 16 x 8 entries a time, as multiply_add lays them out.
template <class Number> using Sums = Number[kWarpTile / 16][kWarpTile / 8][4];

// What a block multiplies.
struct Share {
    std::int64_t group, cell, row, column;  // of the round; channels
    std::int64_t first, end;                // pixels of all images, numbered within the cell
};

template <class T> __device__ Share share_of(const AutocorrelationArgs<T>& args, const PatchRound& round) {
    const std::int64_t tiles = (args.channels + kTile - 1) / kTile;
    const std::int64_t cells = round.end_cell - round.first_cell;
    std::int64_t index = blockIdx.x;
    Share share{};
    share.column = index % tiles * kTile;
    index /= tiles;
    share.row = index % tiles * kTile;
    index /= tiles;
    share.group = index % args.groups;
    index /= args.groups;
    share.cell = index % cells;
    const std::int64_t split = index / cells;
    const PatchCell& cell = args.cells[round.first_cell + share.cell];
    const std::int64_t pixels = args.batch * cell.count[0] * cell.count[1] * cell.count[2];
    const std::int64_t chunks = (pixels + kChunk - 1) / kChunk;
    share.first = split * chunks / round.splits * kChunk;
    share.end = (split + 1) * chunks / round.splits * kChunk;
    share.end = share.end < pixels ? share.end : pixels;
    return share;
}

// The last offset whose cells begin at or before `cell`: those before it that begin there have none.
template <class T>
__device__ const PatchOffset& offset_of(const AutocorrelationArgs<T>& args, std::int64_t cell) {
    std::int64_t low = 0;
    std::int64_t high = args.offset_count;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        (args.offsets[middle].first_cell <= cell ? low : high) = middle;
    }
    return args.offsets[low];
}

// The first warp finds the pixels of a chunk.
template <class T>
__device__ void list_pixels(const AutocorrelationArgs<T>& args, const PatchCell& cell, std::int64_t first,
                            std::int64_t end, std::int64_t* at) {
    if (threadIdx.x >= kChunk) return;
    std::int64_t pixel = first + threadIdx.x;
    std::int64_t entry = 0;
    LRC_KEEP_LOOP
    for (int axis = 2; axis >= 0 && pixel < end; --axis) {
        const std::int64_t place = pixel % cell.count[axis];
        pixel /= cell.count[axis];
        entry += (cell.start[axis] + place * args.step[axis]) * args.strides[3 + axis];
    }
    at[threadIdx.x] = first + threadIdx.x < end ? entry + pixel * args.strides[0] : -1;
}

// An entry as the sum of its pieces, the largest first.
template <class T> __device__ void store_pieces(T value, Entry<T>* to) {
    if constexpr (Pieces<T>::kCount == 1) {
        *to = value;
    } else {
        LRC_UNROLL
        for (int piece = 0; piece < Pieces<T>::kCount; ++piece) {
            const Entry<T> part{static_cast<std::uint16_t>(pack<Entry<T>>(value, 0))};
            to[piece * kTile * kStride] = part;
            value -= to_float(part);
        }
    }
}

// Zeros where there is no channel or no pixel. Neighbouring threads read neighbouring entries of either
// layout.
template <class T>
__device__ void stage(const T* from, std::int64_t channel_stride, std::int64_t existing,
                      const std::int64_t* at, Entry<T>* to) {  // [pieces, kTile, kStride]
    const bool along_channels = channel_stride == 1;
    LRC_KEEP_LOOP
    for (int i = threadIdx.x; i < kTile * kChunk; i += kThreads) {
        const int channel = along_channels ? i % kTile : i / kChunk;
        const int pixel = along_channels ? i / kTile : i % kChunk;
        const bool exists = channel < existing && at[pixel] >= 0;
        store_pieces(exists ? from[at[pixel] + channel * channel_stride] : T{},
                     to + channel * kStride + pixel);
    }
}

// sums[0] += the products of the largest pieces, sums[1] += those of the others, over one chunk.
template <class T, int kSums>
__device__ void add_products(const Entry<T>* rows, const Entry<T>* columns, Sums<float> (&sums)[kSums]) {
    constexpr int kCount = Pieces<T>::kCount;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    rows += (warp / 2 * kWarpTile + lane % 16) * kStride + lane / 16 * 8;
    columns += (warp % 2 * kWarpTile + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
    LRC_KEEP_LOOP
    for (int k = 0; k < kChunk; k += 16) {
        Words4 a[kCount][kWarpTile / 16];
        LRC_UNROLL
        for (int piece = 0; piece < kCount; ++piece) {
            LRC_UNROLL
            for (int i = 0; i < kWarpTile / 16; ++i)
                a[piece][i] = load_matrices(rows + (piece * kTile + i * 16) * kStride + k);
        }
        LRC_UNROLL
        for (int j = 0; j < kWarpTile / 16; ++j) {
            LRC_UNROLL
            for (int right = 0; right < kCount; ++right) {
                const Words4 b = load_matrices(columns + (right * kTile + j * 16) * kStride + k);
                LRC_UNROLL
                for (int left = 0; left < kCount - right; ++left) {
                    LRC_UNROLL
                    for (int i = 0; i < kWarpTile / 16; ++i) {
                        auto& to = sums[left + right > 0][i];
                        multiply_add<Entry<T>>(to[2 * j], a[left][i], b.word[0], b.word[1]);
                        multiply_add<Entry<T>>(to[2 * j + 1], a[left][i], b.word[2], b.word[3]);
                    }
                }
            }
        }
    }
}

// Calls f(i, j, entry) for each entry of a warp's tile that a thread owns.
template <class F> __device__ void for_each_entry(const F& f) {
    LRC_UNROLL
    for (int i = 0; i < kWarpTile / 16; ++i) {
        LRC_UNROLL
        for (int j = 0; j < kWarpTile / 8; ++j) {
            LRC_UNROLL
            for (int entry = 0; entry < 4; ++entry) f(i, j, entry);
        }
    }
}

template <class T> __device__ double* cell_product(const AutocorrelationArgs<T>& args,
                                                   const PatchRound& round, std::int64_t split,
                                                   std::int64_t cell,
                                                   std::int64_t group) {  // [channels, channels]
    const std::int64_t at = (split * (round.end_cell - round.first_cell) + cell) * args.groups + group;
    return round.workspace + at * args.channels * args.channels;
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    autocorrelation_cells_kernel(AutocorrelationArgs<T> args, PatchRound round) {
    constexpr int kSums = Pieces<T>::kCount > 1 ? 2 : 1;
    Shared<T>* shared = dynamic_shared<Shared<T>>();
    auto* rows = reinterpret_cast<Entry<T>*>(shared->rows);
    auto* columns = reinterpret_cast<Entry<T>*>(shared->columns);
    const Share share = share_of(args, round);
    const PatchOffset& offset = offset_of(args, round.first_cell + share.cell);
    const PatchCell& cell = args.cells[round.first_cell + share.cell];
    const std::int64_t* distance = offset.distance;
    // A product with itself is symmetric.
    if (share.column < share.row && distance[0] == 0 && distance[1] == 0 && distance[2] == 0) return;
    const std::int64_t shift =
        distance[0] * args.strides[3] + distance[1] * args.strides[4] + distance[2] * args.strides[5];
    const T* x = args.x + share.group * args.strides[1];
    Sums<float> sums[kSums] = {};
    Sums<double> totals = {};
    list_pixels(args, cell, share.first, share.end, shared->at[0]);
    __syncthreads();
    int chunk = 0;
    for (std::int64_t first = share.first; first < share.end; first += kChunk, ++chunk) {
        const std::int64_t* at = shared->at[chunk % 2];
        stage(x + share.row * args.strides[2], args.strides[2], args.channels - share.row, at, rows);
        stage(x + share.column * args.strides[2] + shift, args.strides[2], args.channels - share.column, at,
              columns);
        list_pixels(args, cell, first + kChunk, share.end, shared->at[(chunk + 1) % 2]);
        __syncthreads();
        add_products<T>(rows, columns, sums);
        __syncthreads();  // nobody uses this chunk any more
        if ((chunk + 1) % Pieces<T>::kChunks != 0 && first + kChunk < share.end) continue;
        for_each_entry([&](int i, int j, int entry) {
            LRC_UNROLL
            for (int which = 0; which < kSums; ++which) {
                totals[i][j][entry] += sums[which][i][j][entry];
                sums[which][i][j][entry] = 0;
            }
        });
    }
    const std::int64_t split = blockIdx.x / (gridDim.x / round.splits);
    double* out = cell_product(args, round, split, share.cell, share.group);
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    for_each_entry([&](int i, int j, int entry) {
        const std::int64_t row = share.row + warp / 2 * kWarpTile + i * 16 + entry / 2 * 8 + lane / 4;
        const std::int64_t column = share.column + warp % 2 * kWarpTile + j * 8 + lane % 4 * 2 + entry % 2;
        if (row < args.channels && column < args.channels)
            out[row * args.channels + column] = totals[i][j][entry];
    });
}

// A thread an entry of a window's block, and its mirror image; of u == v those on and above the diagonal.
template <class T> __global__ void __launch_bounds__(kAddThreads)
    autocorrelation_windows_kernel(AutocorrelationArgs<T> args, PatchRound round) {
    const std::int64_t channels = args.channels, side = channels * args.area;
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    const std::int64_t j = index % channels;
    index /= channels;
    const std::int64_t i = index % channels;
    index /= channels;
    const std::int64_t group = index % args.groups;
    const std::int64_t at = round.first_window + index / args.groups;
    if (at >= round.end_window) return;
    const PatchWindow& window = args.windows[at];
    if (window.u == window.v && i > j) return;
    double sum = 0;
    for (std::int64_t split = 0; split < round.splits; ++split) {
        for (std::int64_t part = window.first_part; part < window.end_part; ++part) {
            const std::int64_t cell = args.parts[part] - round.first_cell;
            sum += cell_product(args, round, split, cell, group)[i * channels + j];
        }
    }
    double* out = args.products + group * side * side;
    const std::int64_t row = i * args.area + window.u, column = j * args.area + window.v;
    out[row * side + column] += sum;
    if (row != column) out[column * side + row] += sum;
}

unsigned to_blocks(std::int64_t count) {
    if (count > std::numeric_limits<int>::max())
        throw std::invalid_argument("autocorrelation: too many blocks for one grid: " +
                                    std::to_string(count));
    return static_cast<unsigned>(count);
}

}  // namespace

template <class T>
void autocorrelation(Cuda device, const AutocorrelationArgs<T>& args, const PatchRound& round) {
    const std::int64_t tiles = (args.channels + kTile - 1) / kTile;
    const std::int64_t cells = round.end_cell - round.first_cell;
    const std::int64_t shares = round.splits * cells * args.groups * tiles * tiles;
    const std::int64_t entries =
        (round.end_window - round.first_window) * args.groups * args.channels * args.channels;
    if (shares > 0)
        launch(device, autocorrelation_cells_kernel<T>, to_blocks(shares), kThreads, sizeof(Shared<T>), args,
               round);
    if (entries > 0)
        launch(device, autocorrelation_windows_kernel<T>,
               to_blocks((entries + kAddThreads - 1) / kAddThreads), kAddThreads, 0, args, round);
}

template void autocorrelation(Cuda, const AutocorrelationArgs<float>&, const PatchRound&);
template void autocorrelation(Cuda, const AutocorrelationArgs<Bfloat16>&, const PatchRound&);
template void autocorrelation(Cuda, const AutocorrelationArgs<Half>&, const PatchRound&);

}  // namespace lrc
