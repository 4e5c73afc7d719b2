// Device tags: every op is declared once per tag, and defined once per device.
#pragma once

struct CUstream_st;  // cudaStream_t without a CUDA header

namespace lrc {

struct Cpu {};

struct Cuda {
    CUstream_st* stream;
};

}  // namespace lrc

#ifdef __CUDACC__
#define LRC_HOST_DEVICE __host__ __device__
#else
#define LRC_HOST_DEVICE
#endif

#define LRC_INLINE inline __attribute__((always_inline))

// Before a short loop of constant length. nvcc and clang unroll those by themselves and do not know the
// pragma.
#if defined(__CUDACC__) || defined(__clang__)
#define LRC_UNROLL
#else
#define LRC_UNROLL _Pragma("GCC unroll 16")
#endif
