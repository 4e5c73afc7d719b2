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

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...), for any amount of shared memory the device has.
template <class... Args>
void launch(Cuda device, void (*kernel)(Args...), unsigned blocks, unsigned threads, std::size_t shared_bytes,
            const Args&... args) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = device.stream;
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

}  // namespace lrc
