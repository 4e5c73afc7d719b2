// What the threads of one block do together.
#pragma once

#include <cuda_runtime.h>

namespace lrc {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// The block's dynamic shared memory. The emulation on the CPU declares the bytes as an array of its own.
template <class T> __device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
#endif
    return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// The sum, or maximum, over the warp's lanes, the same bits in every lane.
__device__ inline double warp_sum(double x) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(kWholeWarp, x, distance);
    return x;
}

__device__ inline double warp_max(double x) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        x = fmax(x, __shfl_xor_sync(kWholeWarp, x, distance));
    }
    return x;
}

// The maximum over the block's threads, a multiple of kWarpSize; x >= 0 in every thread.
__device__ inline double block_max(double x, double* scratch) {  // [kWarpSize], for block_max alone
    const int warps = blockDim.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    x = warp_max(x);
    __syncthreads();  // the last call's values have been read
    if (lane == 0) scratch[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : 0);
}

}  // namespace lrc
