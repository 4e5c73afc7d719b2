// A factored linear layer, mostly for few rows: both products in one call, what is between them in the cache.
#pragma once

#include <cstdint>

#include "device.h"
#include "math/activation.h"
#include "math/floats.h"
#include "ops/lowrank_tile.h"

namespace lrc {

// z[m, g rank + r] = sum_i V[g rank + r, i] x[m, g inside + i]
// y[m, o] = activation(sum_q U[o, q] z[m, q] + bias[o])
// All tensors are contiguous and on one device. Sums are of float32; z stays in float32, or is rounded to T
// where the second product runs on tensor cores or on the tiles of AMX. The terms of a sum are added in an
// order that does not depend on `threads`.
template <class T> struct LowrankLinearArgs {
    const T* input;        // [rows, groups inside]
    const T* encoder;      // V [groups rank, inside]
    const T* decoder;      // U [filters, groups rank]
    const T* bias;         // [filters], or null
    T* out;                // [rows, filters], aliases nothing
    float* hidden;         // [rows, groups rank], workspace: z; aliases nothing
    std::int64_t rows;     // >= 0
    std::int64_t inside;   // >= 0, input features of a group
    std::int64_t groups;   // >= 1
    std::int64_t rank;     // >= 0, of a group; with 0, as with no features, y is activation(bias)
    std::int64_t filters;  // >= 0
    Activation activation;
    int threads;  // of the CPU twin; the CUDA twin ignores it
};

// For T = float and Bfloat16.
template <class T> void lowrank_linear(Cpu device, const LowrankLinearArgs<T>& args);
// Whether the CPU twin for Bfloat16 is made for so many rows: this processor has AMX, and these sizes fill
// its tiles. `args` needs no pointers.
bool takes_many_rows(const LowrankLinearArgs<Bfloat16>& args);
// The CUDA twin reads each weight once for up to this many rows; more of them are a convolution of as many
// images of one pixel.
inline constexpr std::int64_t kMaxCudaRows = 16;

inline constexpr std::int64_t kLinearFilters = 8;  // of V, a block of the CUDA twin
inline constexpr std::int64_t kLinearTerms = 512;  // of a block, at least: 16 for each of its threads

// How many blocks of the CUDA twin share the sums of one filter of V: enough to occupy a large device,
// whatever the device is, so that the bits of a result do not depend on it.
constexpr std::int64_t linear_splits(std::int64_t groups, std::int64_t rank, std::int64_t inside) {
    constexpr std::int64_t kBlocks = 128;
    const std::int64_t tiles = groups * ((rank + kLinearFilters - 1) / kLinearFilters);
    const std::int64_t wanted = tiles == 0 ? 1 : kBlocks / tiles;
    const std::int64_t possible = inside / kLinearTerms;
    const std::int64_t splits = wanted < possible ? wanted : possible;
    return splits < 1 ? 1 : splits;
}

// Entries of a row of `hidden`: whole pieces of 8.
constexpr std::int64_t linear_hidden_stride(std::int64_t inner) { return (inner + 7) / 8 * 8; }

constexpr std::int64_t linear_hidden_size(std::int64_t rows, std::int64_t groups, std::int64_t rank,
                                          std::int64_t inside) {
    return rows > kMaxCudaRows
               ? 0
               : linear_splits(groups, rank, inside) * rows * linear_hidden_stride(groups * rank);
}

// For T = float, Bfloat16 and Half, z rounded to T, and `hidden` [linear_splits(), rows,
// linear_hidden_stride()] for up to kMaxCudaRows rows, aligned to 16 bytes. More rows need no `hidden`, but
// the tile that choose_tile gives for as many pixels. The terms of a sum are added in the same order in every
// call of these sizes.
template <class T>
void lowrank_linear(Cuda device, const LowrankLinearArgs<T>& args, const LowrankTile& tile);

}  // namespace lrc
