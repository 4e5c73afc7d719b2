// What bindings.cpp exposes of the factored layers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "cpu/packed_factors.h"
#include "dispatch.h"
#include "ops/lowrank_conv2d.h"
#include "ops/lowrank_linear.h"
#include "tensor_view.h"

namespace lrc {

// Both axes' stride, padding and dilation come as pairs.
using Pair = std::array<std::int64_t, 2>;

// Pixels, columns and bytes, as lowrank_tile returns them.
using Tile = std::array<std::int64_t, 3>;

inline Tile bind_lowrank_tile(std::int64_t pixels, std::int64_t groups, std::int64_t rank,
                              std::int64_t entry_bytes, std::int64_t shared_limit,
                              std::int64_t multiprocessors) {
    const LowrankTile tile = choose_tile(pixels, groups, rank, entry_bytes, shared_limit, multiprocessors);
    return {tile.pixels, tile.columns, tile.shared_bytes};
}

// Calls f(device), or f(device, tile) of a CUDA twin, where there is one for entries of type T.
template <class T, class F> void dispatch_lowrank(const TensorView& input, const Tile& tile, const F& f) {
    dispatch(input, [&](auto device) {
        constexpr bool kCpu = std::is_same_v<decltype(device), Cpu>;
        if constexpr (kCpu && !std::is_same_v<T, Half>) {
            f(device);
        } else if constexpr (!kCpu) {
            f(device, LowrankTile{static_cast<int>(tile[0]), static_cast<int>(tile[1]), tile[2]});
        } else {
            throw std::invalid_argument("factored layers in float16 have no CPU kernel");
        }
    });
}

template <class T>
void call_lowrank_conv2d(const TensorView& input, const TensorView& encoder, const TensorView& decoder,
                         const std::optional<TensorView>& bias, const TensorView& out, const Pair& stride,
                         const Pair& padding, const Pair& dilation, std::int64_t groups, int activation,
                         bool channels_last, bool encoder_last, int threads, PackedFactors* packed,
                         const Tile& tile, int algorithm) {
    const auto axis = [&](int i) {
        return ConvAxis{.in = input.shape[2 + i],
                        .out = out.shape[2 + i],
                        .kernel = encoder.shape[2 + i],
                        .stride = stride[i],
                        .padding = padding[i],
                        .dilation = dilation[i]};
    };
    const LowrankConv2dArgs<T> args{.input = input.as<const T>(channels_last),
                                    .encoder = encoder.as<const T>(encoder_last),
                                    .encoder_last = encoder_last,
                                    .decoder = decoder.as<const T>(),
                                    .bias = bias ? bias->as<const T>() : nullptr,
                                    .out = out.as<T>(channels_last),
                                    .channels_last = channels_last,
                                    .batch = input.shape[0],
                                    .channels = input.shape[1],
                                    .filters = decoder.shape[0],
                                    .groups = groups,
                                    .rank = encoder.shape[0] / groups,
                                    .rows = axis(0),
                                    .columns = axis(1),
                                    .activation = static_cast<Activation>(activation),
                                    .threads = threads,
                                    .packed = packed,
                                    .algorithm = static_cast<ConvEncoder>(algorithm)};
    dispatch_lowrank<T>(input, tile,
                        [&](auto device, auto... tile) { lowrank_conv2d(device, args, tile...); });
}

template <class... Rest> void bind_lowrank_conv2d(const TensorView& input, Rest... rest) {
    if (input.holds<float>()) return call_lowrank_conv2d<float>(input, rest...);
    if (input.holds<Half>()) return call_lowrank_conv2d<Half>(input, rest...);
    call_lowrank_conv2d<Bfloat16>(input, rest...);
}

template <class T>
void call_lowrank_linear(const TensorView& input, const TensorView& encoder, const TensorView& decoder,
                         const std::optional<TensorView>& bias, const TensorView& out,
                         const TensorView& hidden, std::int64_t groups, int activation, int threads,
                         const Tile& tile) {
    const LowrankLinearArgs<T> args{.input = input.as<const T>(),
                                    .encoder = encoder.as<const T>(),
                                    .decoder = decoder.as<const T>(),
                                    .bias = bias ? bias->as<const T>() : nullptr,
                                    .out = out.as<T>(),
                                    .hidden = hidden.as<float>(),
                                    .rows = input.shape[0],
                                    .inside = encoder.shape[1],
                                    .groups = groups,
                                    .rank = encoder.shape[0] / groups,
                                    .filters = decoder.shape[0],
                                    .activation = static_cast<Activation>(activation),
                                    .threads = threads};
    dispatch_lowrank<T>(input, tile,
                        [&](auto device, auto... tile) { lowrank_linear(device, args, tile...); });
}

inline bool linear_takes_many_rows(std::int64_t rows, std::int64_t rank, std::int64_t inside) {
    LowrankLinearArgs<Bfloat16> args{};
    args.rows = rows;
    args.inside = inside;
    args.groups = 1;
    args.rank = rank;
    return takes_many_rows(args);
}

template <class... Rest> void bind_lowrank_linear(const TensorView& input, Rest... rest) {
    if (input.holds<float>()) return call_lowrank_linear<float>(input, rest...);
    if (input.holds<Half>()) return call_lowrank_linear<Half>(input, rest...);
    call_lowrank_linear<Bfloat16>(input, rest...);
}

inline void bind_lowrank(py::module_& m) {
    // Copies and pickles start empty.
    py::class_<PackedFactors>(m, "PackedFactors")
        .def(py::init<>())
        .def("__reduce__",
             [](const py::object& self) { return py::make_tuple(py::type::of(self), py::tuple()); });
    m.def("lowrank_conv2d",
          &bind_lowrank_conv2d<const TensorView&, const TensorView&, const std::optional<TensorView>&,
                               const TensorView&, const Pair&, const Pair&, const Pair&, std::int64_t, int,
                               bool, bool, int, PackedFactors*, const Tile&, int>,
          py::arg("input"), py::arg("encoder"), py::arg("decoder"), py::arg("bias"), py::arg("out"),
          py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
          py::arg("activation"), py::arg("channels_last"), py::arg("encoder_last"), py::arg("threads"),
          py::arg("packed") = nullptr, py::arg("tile") = Tile{}, py::arg("algorithm") = 0);
    m.def("linear_takes_many_rows", &linear_takes_many_rows, py::arg("rows"), py::arg("rank"),
          py::arg("inside"));
    m.def("lowrank_linear",
          &bind_lowrank_linear<const TensorView&, const TensorView&, const std::optional<TensorView>&,
                               const TensorView&, const TensorView&, std::int64_t, int, int, const Tile&>,
          py::arg("input"), py::arg("encoder"), py::arg("decoder"), py::arg("bias"), py::arg("out"),
          py::arg("hidden"), py::arg("groups"), py::arg("activation"), py::arg("threads"),
          py::arg("tile") = Tile{});
    m.attr("MAX_CUDA_ROWS") = kMaxCudaRows;
    m.def("linear_hidden_size", &linear_hidden_size, py::arg("rows"), py::arg("groups"), py::arg("rank"),
          py::arg("inside"));
    m.def("lowrank_tile", &bind_lowrank_tile, py::arg("pixels"), py::arg("groups"), py::arg("rank"),
          py::arg("entry_bytes"), py::arg("shared_limit"), py::arg("multiprocessors"));
}

}  // namespace lrc
