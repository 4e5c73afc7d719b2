// The run-time device of a tensor -> the compile-time device tag. The only #ifdef LRC_WITH_CUDA in the tree.
#pragma once

#include <stdexcept>

#include "device.h"
#include "tensor_view.h"

namespace lrc {

#ifdef LRC_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

// Calls f(Cpu{}) or f(Cuda{torch's current stream}), with the GIL released.
template <class F> void dispatch(const TensorView& tensor, const F& f) {
    const auto call = [&](auto device) {
        py::gil_scoped_release without_gil;
        f(device);
    };
    if (tensor.device.device_type == kDLCPU) return call(Cpu{});
#ifdef LRC_WITH_CUDA
    if (tensor.device.device_type == kDLCUDA)
        return call(Cuda{static_cast<CUstream_st*>(current_stream(tensor))});
    throw std::invalid_argument("lrcompress runs on CPU and CUDA tensors");
#else
    throw std::invalid_argument(
        "lrcompress was built without CUDA: install it where nvcc is on the PATH or CUDA_HOME points to a "
        "toolkit, "
        "or pass CPU tensors");
#endif
}

}  // namespace lrc
