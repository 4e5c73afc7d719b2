// A factored linear layer for few rows: both products in one call, what is between them in the cache.
#pragma once

#include <cstdint>

#include "device.h"
#include "math/activation.h"
#include "math/floats.h"

namespace lrc {

// z[m, g rank + r] = sum_i V[g rank + r, i] x[m, g inside + i]
// y[m, o] = activation(sum_q U[o, q] z[m, q] + bias[o])
// All tensors are contiguous and on one device. Sums are of float32; z stays in float32, or is rounded to T
// where the second product runs on tensor cores. The terms of a sum are added in an order that does not
// depend on `threads`.
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
// For T = Bfloat16 and Half.
template <class T> void lowrank_linear(Cuda device, const LowrankLinearArgs<T>& args);

}  // namespace lrc
