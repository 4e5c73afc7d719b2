// Stands in for the CUDA run time when g++ compiles a .cu file for the CPU. It models what the kernels use
// and no more: blocks one after another, barriers, shuffles of whole warps and dynamic shared memory. Memory
// that a kernel has not written reads as poison, and writes past the shared memory it asked for are found. It
// does not model the memory model, bank conflicts or time.
#pragma once

#include <cmath>

#include "block.h"
#include "instructions.h"

#define __global__
#define __host__
#define __device__
#define __launch_bounds__(...)

using std::fabs;
using std::fmax;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(128) inline unsigned char dynamic_shared_bytes[emulation::kMaxSharedBytes];

inline void __syncthreads() { emulation::Block::instance().block_barrier(); }
inline void __syncwarp() { emulation::Block::instance().warp_barrier(); }

// Blocks run one after another and threads one at a time: all that is written can be seen, and nothing comes
// between the two halves of an addition.
inline void __threadfence() {}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) {
    const unsigned long long before = *to;
    *to += x;
    return before;
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    if (mask != 0xffffffffu) emulation::fail("only shuffles of whole warps are modelled");
    return emulation::Block::instance().shuffle(value, threadIdx.x ^ static_cast<unsigned>(lane_mask));
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct cudaFuncAttributes {
    int ptxVersion;
};

inline const char* cudaGetErrorString(cudaError_t) { return "refused by the emulation"; }

template <class... Args> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes,
                                                           void (*)(Args...)) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

template <class... Args> cudaError_t cudaFuncSetAttribute(void (*)(Args...), cudaFuncAttribute, int bytes) {
    return static_cast<std::size_t>(bytes) <= emulation::kMaxSharedBytes ? cudaSuccess
                                                                         : cudaErrorInvalidValue;
}

template <class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...),
                               const Args&... args) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    if (gridDim.y * gridDim.z * blockDim.y * blockDim.z != 1) return cudaErrorInvalidValue;
    const auto poisoned = [](unsigned char byte) { return byte == emulation::kPoison; };
    for (unsigned block = 0; block < gridDim.x; ++block) {
        blockIdx.x = block;
        std::fill(std::begin(dynamic_shared_bytes), std::end(dynamic_shared_bytes), emulation::kPoison);
        emulation::Copies::instance().groups.clear();
        emulation::Block::instance().run(
            blockDim.x, [&] { kernel(args...); }, [](unsigned thread) { threadIdx.x = thread; });
        if (!std::all_of(dynamic_shared_bytes + config->dynamicSmemBytes, std::end(dynamic_shared_bytes),
                         poisoned)) {
            emulation::fail("a write past the end of shared memory");
        }
    }
    return cudaSuccess;
}
