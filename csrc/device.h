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

// Before a short loop of constant length, to keep arrays that it indexes in registers. clang, and nvcc for
// the host, unroll those by themselves and do not know the pragma. And before a loop whose body is large
// enough.
#if defined(__CUDA_ARCH__)
#define LRC_UNROLL _Pragma("unroll")
#define LRC_KEEP_LOOP _Pragma("unroll 1")
#elif defined(__CUDACC__) || defined(__clang__)
#define LRC_UNROLL
#define LRC_KEEP_LOOP
#else
#define LRC_UNROLL _Pragma("GCC unroll 16")
#define LRC_KEEP_LOOP
#endif
