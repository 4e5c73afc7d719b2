// The way every kernel is launched, and how the run time's errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "device.h"

namespace lrc {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaLaunchConfig_t launch_config(Cuda device, unsigned blocks, unsigned threads,
                                        std::size_t shared_bytes) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = device.stream;
    return config;
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...), for any amount of shared memory the device has.
template <class... Args>
void launch(Cuda device, void (*kernel)(Args...), unsigned blocks, unsigned threads, std::size_t shared_bytes,
            const Args&... args) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
    const cudaLaunchConfig_t config = launch_config(device, blocks, threads, shared_bytes);
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

// The same, of a kernel that calls wait_for_last_grid() before it reads what the grid before it writes: it
// may start while that grid runs. Code for older architectures, where that call is empty, starts afterwards.
template <class... Args>
void launch_overlapping(Cuda device, void (*kernel)(Args...), unsigned blocks, unsigned threads,
                        std::size_t shared_bytes, const Args&... args) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = launch_config(device, blocks, threads, shared_bytes);
    config.attrs = &overlap;
    config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

}  // namespace lrc
