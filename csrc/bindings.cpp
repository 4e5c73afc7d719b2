// The Python module: one m.def an op. Shapes and dtypes are explained in lrcompress/ops, which is its only
// caller.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

#include "cpu/amx.h"
#include "dispatch.h"
#include "lowrank_bindings.h"
#include "math/momentum.h"
#include "ops/autocorrelation.h"
#include "ops/gram.h"
#include "ops/group_lasso.h"
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
    info["amx"] = has_amx();
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

using Sizes = std::array<std::int64_t, 6>;
using Tables = std::array<TensorView, 4>;

// The images come by address, as they have more axes than a TensorView, and the tables as one row an item.
template <class T>
AutocorrelationArgs<T> autocorrelation_args(std::uintptr_t x, const Sizes& shape, const Sizes& strides,
                                            const std::array<std::int64_t, 3>& step, const Tables& tables,
                                            const TensorView& products) {
    static_assert(sizeof(PatchOffset) == 7 * sizeof(std::int64_t));
    static_assert(sizeof(PatchCell) == 6 * sizeof(std::int64_t));
    static_assert(sizeof(PatchWindow) == 4 * sizeof(std::int64_t));
    AutocorrelationArgs<T> args{
        .x = reinterpret_cast<const T*>(x),
        .batch = shape[0],
        .groups = shape[1],
        .channels = shape[2],
        .sizes = {shape[3], shape[4], shape[5]},
        .strides = {},
        .step = {step[0], step[1], step[2]},
        .area = shape[2] == 0 ? 0 : products.shape[1] / shape[2],
        .offsets = reinterpret_cast<const PatchOffset*>(tables[0].as<const std::int64_t>()),
        .offset_count = tables[0].shape[0],
        .cells = reinterpret_cast<const PatchCell*>(tables[1].as<const std::int64_t>()),
        .windows = reinterpret_cast<const PatchWindow*>(tables[2].as<const std::int64_t>()),
        .parts = tables[3].as<const std::int64_t>(),
        .products = products.as<double>(),
        .sums = nullptr,
        .threads = 1};
    std::copy(strides.begin(), strides.end(), args.strides);
    return args;
}

void bind_autocorrelation(std::uintptr_t x, int bits, const Sizes& shape, const Sizes& strides,
                          const std::array<std::int64_t, 3>& step, const Tables& tables,
                          const TensorView& products, const TensorView& sums, int threads) {
    const auto call = [&]<class T>(AutocorrelationArgs<T> args) {
        args.sums = sums.as<double>();
        args.threads = threads;
        dispatch(products, [&](auto device) {
            if constexpr (std::is_same_v<decltype(device), Cpu>) {
                autocorrelation(device, args);
            } else {
                throw std::invalid_argument("on CUDA, autocorrelation is added round by round");
            }
        });
    };
    if (bits == 32) return call(autocorrelation_args<float>(x, shape, strides, step, tables, products));
    if (bits == 64) return call(autocorrelation_args<double>(x, shape, strides, step, tables, products));
    throw std::invalid_argument("expected images of 32-bit or 64-bit floats");
}

// First and end of the cells, then of the windows.
using Ranges = std::array<std::int64_t, 4>;

void bind_autocorrelation_round(std::uintptr_t x, const std::string& dtype, const Sizes& shape,
                                const Sizes& strides, const std::array<std::int64_t, 3>& step,
                                const Tables& tables, const TensorView& products, const Ranges& round,
                                std::int64_t splits, const TensorView& workspace) {
    const PatchRound patches{.first_cell = round[0],
                             .end_cell = round[1],
                             .first_window = round[2],
                             .end_window = round[3],
                             .splits = splits,
                             .workspace = workspace.as<double>()};
    const auto call = [&]<class T>(const AutocorrelationArgs<T>& args) {
        dispatch(products, [&](auto device) {
            if constexpr (std::is_same_v<decltype(device), Cuda>) {
                autocorrelation(device, args, patches);
            } else {
                throw std::invalid_argument("on the CPU, autocorrelation has no rounds");
            }
        });
    };
    if (dtype == "float32")
        return call(autocorrelation_args<float>(x, shape, strides, step, tables, products));
    if (dtype == "bfloat16")
        return call(autocorrelation_args<Bfloat16>(x, shape, strides, step, tables, products));
    if (dtype == "float16")
        return call(autocorrelation_args<Half>(x, shape, strides, step, tables, products));
    throw std::invalid_argument("expected float32, bfloat16 or float16, got " + dtype);
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

// `buffers` and `products` are of M and of the iterate before it.
void bind_group_lasso_step(const std::array<TensorView, 2>& buffers,
                           const std::array<TensorView, 2>& products, const TensorView& linear,
                           const std::optional<TensorView>& weight, const TensorView& starts,
                           const TensorView& thresholds, double energy, double step, double tol,
                           const TensorView& terms, const TensorView& momentum, const TensorView& state,
                           int threads) {
    const GroupLassoStepArgs args{.current = buffers[0].as<const double>(),
                                  .other = buffers[1].as<double>(),
                                  .current_product = products[0].as<const double>(),
                                  .other_product = products[1].as<const double>(),
                                  .linear = linear.as<const double>(),
                                  .weight = weight ? weight->as<const double>() : nullptr,
                                  .starts = starts.as<const std::int64_t>(),
                                  .thresholds = thresholds.as<const double>(),
                                  .energy = energy,
                                  .step = step,
                                  .tol = tol,
                                  .inputs = linear.shape[0],
                                  .penalties = thresholds.shape[0],
                                  .outputs = linear.shape[1],
                                  .groups = thresholds.shape[1],
                                  .terms = terms.as<double>(),
                                  .momentum = momentum.as<double>(),
                                  .state = state.as<std::int64_t>(),
                                  .threads = threads};
    dispatch(linear, [&](auto device) { group_lasso_step(device, args); });
}

void bind_group_lasso_certificate(const TensorView& solution, const TensorView& gradient,
                                  const TensorView& target, bool is_weight, double energy,
                                  const TensorView& group, const TensorView& thresholds,
                                  const TensorView& certificates, int threads) {
    const GroupLassoCertificateArgs args{.solution = solution.as<const double>(),
                                         .gradient = gradient.as<const double>(),
                                         .target = target.as<const double>(),
                                         .is_weight = is_weight,
                                         .energy = energy,
                                         .group = group.as<const std::int64_t>(),
                                         .thresholds = thresholds.as<const double>(),
                                         .penalties = solution.shape[0],
                                         .outputs = solution.shape[1],
                                         .inputs = solution.shape[2],
                                         .groups = thresholds.shape[1],
                                         .certificates = certificates.as<double>(),
                                         .threads = threads};
    dispatch(solution, [&](auto device) {
        if constexpr (std::is_same_v<decltype(device), Cpu>) {
            group_lasso_certificate(device, args);
        } else {
            throw std::invalid_argument("group_lasso_certificate runs on CPU tensors only");
        }
    });
}

}  // namespace
}  // namespace lrc

PYBIND11_MODULE(_C, m) {
    namespace py = pybind11;
    m.def("build_info", &lrc::build_info, "How this extension was built.");
    m.attr("MAX_CUDA_SIDE") = lrc::kMaxCudaSide;
    m.def("autocorrelation", &lrc::bind_autocorrelation, py::arg("x"), py::arg("bits"), py::arg("shape"),
          py::arg("strides"), py::arg("step"), py::arg("tables"), py::arg("products"), py::arg("sums"),
          py::arg("threads"));
    m.def("autocorrelation_round", &lrc::bind_autocorrelation_round, py::arg("x"), py::arg("dtype"),
          py::arg("shape"), py::arg("strides"), py::arg("step"), py::arg("tables"), py::arg("products"),
          py::arg("round"), py::arg("splits"), py::arg("workspace"));
    m.def("gram_tiles", &lrc::gram_tiles, py::arg("side"));
    m.def("gram", &lrc::bind_gram, py::arg("problems"), py::arg("out"), py::arg("tiles"), py::arg("bits"),
          py::arg("threads"));
    lrc::bind_lowrank(m);
    m.def("group_lasso", &lrc::bind_group_lasso, py::arg("curvature"), py::arg("linear"), py::arg("weight"),
          py::arg("starts"), py::arg("thresholds"), py::arg("energy"), py::arg("tol"), py::arg("max_sweeps"),
          py::arg("max_work"), py::arg("solution"), py::arg("gradient"), py::arg("threads"));
    m.attr("STEP_TERMS") = static_cast<int>(lrc::kStepTerms);
    m.def("group_lasso_step", &lrc::bind_group_lasso_step, py::arg("buffers"), py::arg("products"),
          py::arg("linear"), py::arg("weight"), py::arg("starts"), py::arg("thresholds"), py::arg("energy"),
          py::arg("step"), py::arg("tol"), py::arg("terms"), py::arg("momentum"), py::arg("state"),
          py::arg("threads"));
    m.def("group_lasso_certificate", &lrc::bind_group_lasso_certificate, py::arg("solution"),
          py::arg("gradient"), py::arg("target"), py::arg("is_weight"), py::arg("energy"), py::arg("group"),
          py::arg("thresholds"), py::arg("certificates"), py::arg("threads"));
    m.def("symmetric_eigenvalues", &lrc::bind_symmetric_eigenvalues, py::arg("matrices"), py::arg("problems"),
          py::arg("values"), py::arg("max_side"), py::arg("threads"));
}
