// A torch.Tensor borrowed for the duration of one call: no torch header, no torch ABI.
#pragma once

#include <dlpack.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "math/floats.h"

namespace lrc {

namespace py = pybind11;

inline constexpr int kMaxDims = 4;

struct TensorView {
    void* data;
    DLDevice device;
    DLDataType dtype;
    int ndim;
    std::array<std::int64_t, kMaxDims> shape;
    std::array<std::int64_t, kMaxDims> strides;

    bool is_contiguous() const {
        std::int64_t expected = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }

    // Whether [batch, channels, rows, columns] lies as [batch, rows, columns, channels].
    bool is_channels_last() const {
        if (ndim != 4) return false;
        std::int64_t expected = 1;
        for (int i : {1, 3, 2, 0}) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }

    template <class T> bool holds() const {
        constexpr int code = std::is_same_v<std::remove_const_t<T>, Bfloat16> ? kDLBfloat
                             : std::is_integral_v<T>                          ? kDLInt
                                                                              : kDLFloat;
        return dtype.code == code && dtype.bits == 8 * sizeof(T) && dtype.lanes == 1;
    }

    // The entries, once their type and layout are what the caller takes them for. A tensor without entries
    // has any layout.
    template <class T> T* as(bool channels_last = false) const {
        static_assert(std::is_floating_point_v<T> || std::is_integral_v<T> ||
                      std::is_same_v<std::remove_const_t<T>, Bfloat16> ||
                      std::is_same_v<std::remove_const_t<T>, Half>);
        const bool empty = std::find(shape.begin(), shape.begin() + ndim, 0) != shape.begin() + ndim;
        if (!holds<T>() || !(empty || (channels_last ? is_channels_last() : is_contiguous()))) {
            throw std::invalid_argument("expected a contiguous tensor of " + std::to_string(8 * sizeof(T)) +
                                        "-bit " + (std::is_integral_v<T> ? "integers" : "floats"));
        }
        return static_cast<T*>(data);
    }
};

inline py::handle tensor_type() {
    static const py::handle type = py::object(py::module_::import("torch").attr("Tensor")).release();
    return type;
}

// torch's table of DLPack functions (torch >= 2.10), or null where torch has none or one of another major
// version.
inline const DLPackExchangeAPI* exchange_api() {
    static const DLPackExchangeAPI* api = [] {
        py::object capsule = py::getattr(tensor_type(), "__dlpack_c_exchange_api__", py::none());
        if (capsule.is_none()) return static_cast<const DLPackExchangeAPI*>(nullptr);
        const void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
        if (table == nullptr) throw py::error_already_set();
        const auto* found = static_cast<const DLPackExchangeAPI*>(table);
        return found->header.version.major == DLPACK_MAJOR_VERSION ? found : nullptr;
    }();
    return api;
}

inline TensorView view_through_dlpack(py::handle tensor) {
    DLTensor from;
    if (exchange_api()->dltensor_from_py_object_no_sync(tensor.ptr(), &from) != 0)
        throw py::error_already_set();
    if (from.ndim > kMaxDims) throw std::invalid_argument("a tensor has too many dimensions");
    TensorView view{
        static_cast<char*>(from.data) + from.byte_offset, from.device, from.dtype, from.ndim, {}, {}};
    for (int i = 0; i < from.ndim; ++i) {
        view.shape[i] = from.shape[i];
        view.strides[i] = from.strides[i];
    }
    return view;
}

// The same from Python attributes: some microseconds slower, and independent of any table.
inline TensorView view_through_attributes(py::handle tensor) {
    const auto ndim = tensor.attr("ndim").cast<int>();
    if (ndim > kMaxDims) throw std::invalid_argument("a tensor has too many dimensions");
    const auto device = tensor.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    const auto bytes = tensor.attr("element_size")().cast<int>();
    const auto is_float = tensor.attr("is_floating_point")().cast<bool>();
    TensorView view{
        reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>()),
        {static_cast<DLDeviceType>(device.first), device.second},
        {static_cast<std::uint8_t>(is_float ? kDLFloat : kDLInt), static_cast<std::uint8_t>(8 * bytes), 1},
        ndim,
        {},
        {}};
    for (int i = 0; i < ndim; ++i) {
        view.shape[i] = tensor.attr("size")(i).cast<std::int64_t>();
        view.strides[i] = tensor.attr("stride")(i).cast<std::int64_t>();
    }
    return view;
}

// torch's current stream on the tensor's device.
inline void* current_stream(const TensorView& tensor) {
    if (exchange_api() == nullptr) {
        const auto stream = py::module_::import("torch.cuda").attr("current_stream")(tensor.device.device_id);
        return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<std::uintptr_t>());
    }
    void* stream = nullptr;
    if (exchange_api()->current_work_stream(tensor.device.device_type, tensor.device.device_id, &stream) !=
        0) {
        throw py::error_already_set();
    }
    return stream;
}

}  // namespace lrc

namespace pybind11::detail {

template <> struct type_caster<lrc::TensorView> {
    PYBIND11_TYPE_CASTER(lrc::TensorView, const_name("torch.Tensor"));
    bool load(handle source, bool) {
        if (!isinstance(source, lrc::tensor_type())) return false;
        value = lrc::exchange_api() ? lrc::view_through_dlpack(source) : lrc::view_through_attributes(source);
        return true;
    }
};

}  // namespace pybind11::detail
