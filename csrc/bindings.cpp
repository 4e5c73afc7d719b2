// The Python module: one m.def an op. Shapes and dtypes are explained in lrcompress/ops, which is its only
// caller.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>

#include "dispatch.h"
#include "ops/gram.h"
#include "ops/group_lasso.h"
#include "ops/lowrank_conv2d.h"
#include "ops/symmetric_eigenvalues.h"
#include "tensor_view.h"

namespace lrc {
namespace {

py::dict build_info() {
    const std::string archs = LRC_BUILD_CUDA_ARCHS;
    const std::string nvcc = LRC_BUILD_NVCC_VERSION;
#ifdef _OPENMP
    const bool openmp = true;
#else
    const bool openmp = false;
#endif
    py::dict info;
    info["cuda"] = kWithCuda;
    info["cuda_archs"] = archs.empty() ? py::list() : py::list(py::str(archs).attr("split")(";"));
    info["nvcc"] = nvcc.empty() ? py::object(py::none()) : py::str(nvcc);
    info["compiler"] = __VERSION__;
    info["openmp"] = openmp;
    return info;
}

void bind_symmetric_eigenvalues(const TensorView& matrices, const TensorView& problems,
                                const TensorView& values, std::int64_t max_side, int threads) {
    static_assert(sizeof(EigenProblem) == 4 * sizeof(std::int64_t));
    const SymmetricEigenvaluesArgs args{
        .matrices = matrices.as<const double>(),
        .problems = reinterpret_cast<const EigenProblem*>(problems.as<const std::int64_t>()),
        .count = problems.shape[0],
        .max_side = max_side,
        .values = values.as<double>(),
        .threads = threads};
    dispatch(matrices, [&](auto device) { symmetric_eigenvalues(device, args); });
}

// The matrices are known by their addresses in the table, so their type comes as its number of bits.
template <class T>
void call_gram(const TensorView& problems, const TensorView& out, std::int64_t tiles, int threads) {
    static_assert(sizeof(GramProblem<T>) == 7 * sizeof(std::int64_t));
    const GramArgs<T> args{
        .problems = reinterpret_cast<const GramProblem<T>*>(problems.as<const std::int64_t>()),
        .count = problems.shape[0],
        .tiles = tiles,
        .out = out.as<double>(),
        .threads = threads};
    dispatch(out, [&](auto device) { gram(device, args); });
}

void bind_gram(const TensorView& problems, const TensorView& out, std::int64_t tiles, int bits, int threads) {
    if (bits == 32) return call_gram<float>(problems, out, tiles, threads);
    if (bits == 64) return call_gram<double>(problems, out, tiles, threads);
    throw std::invalid_argument("expected matrices of 32-bit or 64-bit floats");
}

// Both axes' stride, padding and dilation come as pairs.
using Pair = std::array<std::int64_t, 2>;

void bind_lowrank_conv2d(const TensorView& input, const TensorView& encoder, const TensorView& decoder,
                         const std::optional<TensorView>& bias, const TensorView& out, const Pair& stride,
                         const Pair& padding, const Pair& dilation, std::int64_t groups, int threads) {
    const auto axis = [&](int i) {
        return ConvAxis{.in = input.shape[2 + i],
                        .out = out.shape[2 + i],
                        .kernel = encoder.shape[2 + i],
                        .stride = stride[i],
                        .padding = padding[i],
                        .dilation = dilation[i]};
    };
    const LowrankConv2dArgs args{.input = input.as<const float>(),
                                 .encoder = encoder.as<const float>(),
                                 .decoder = decoder.as<const float>(),
                                 .bias = bias ? bias->as<const float>() : nullptr,
                                 .out = out.as<float>(),
                                 .batch = input.shape[0],
                                 .channels = input.shape[1],
                                 .filters = decoder.shape[0],
                                 .groups = groups,
                                 .rank = encoder.shape[0] / groups,
                                 .rows = axis(0),
                                 .columns = axis(1),
                                 .threads = threads};
    dispatch(input, [&](auto device) {
        if constexpr (std::is_same_v<decltype(device), Cpu>) {
            lowrank_conv2d(device, args);
        } else {
            throw std::invalid_argument("lowrank_conv2d runs on CPU tensors only");
        }
    });
}

py::tuple bind_group_lasso(const TensorView& curvature, const TensorView& linear,
                           const std::optional<TensorView>& weight, const TensorView& starts,
                           const TensorView& thresholds, double energy, double tol, std::int64_t max_sweeps,
                           double max_work, const TensorView& solution, const TensorView& gradient,
                           int threads) {
    const GroupLassoArgs args{.curvature = curvature.as<const double>(),
                              .linear = linear.as<const double>(),
                              .weight = weight ? weight->as<const double>() : nullptr,
                              .starts = starts.as<const std::int64_t>(),
                              .thresholds = thresholds.as<const double>(),
                              .energy = energy,
                              .inputs = linear.shape[0],
                              .outputs = linear.shape[1],
                              .groups = thresholds.shape[0],
                              .tol = tol,
                              .max_sweeps = max_sweeps,
                              .max_work = max_work,
                              .solution = solution.as<double>(),
                              .gradient = gradient.as<double>(),
                              .threads = threads};
    GroupLassoResult result{};
    dispatch(curvature, [&](auto device) {
        if constexpr (std::is_same_v<decltype(device), Cpu>) {
            result = group_lasso(device, args);
        } else {
            throw std::invalid_argument("block coordinate descent runs on CPU tensors only");
        }
    });
    return py::make_tuple(result.objective, result.duality_gap, result.sweeps, result.support);
}

}  // namespace
}  // namespace lrc

PYBIND11_MODULE(_C, m) {
    namespace py = pybind11;
    m.def("build_info", &lrc::build_info, "How this extension was built.");
    m.attr("MAX_CUDA_SIDE") = lrc::kMaxCudaSide;
    m.def("gram_tiles", &lrc::gram_tiles, py::arg("side"));
    m.def("gram", &lrc::bind_gram, py::arg("problems"), py::arg("out"), py::arg("tiles"), py::arg("bits"),
          py::arg("threads"));
    m.def("group_lasso", &lrc::bind_group_lasso, py::arg("curvature"), py::arg("linear"), py::arg("weight"),
          py::arg("starts"), py::arg("thresholds"), py::arg("energy"), py::arg("tol"), py::arg("max_sweeps"),
          py::arg("max_work"), py::arg("solution"), py::arg("gradient"), py::arg("threads"));
    m.def("lowrank_conv2d", &lrc::bind_lowrank_conv2d, py::arg("input"), py::arg("encoder"),
          py::arg("decoder"), py::arg("bias"), py::arg("out"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("groups"), py::arg("threads"));
    m.def("symmetric_eigenvalues", &lrc::bind_symmetric_eigenvalues, py::arg("matrices"), py::arg("problems"),
          py::arg("values"), py::arg("max_side"), py::arg("threads"));
}
