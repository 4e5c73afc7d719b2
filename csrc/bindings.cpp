// The Python module: one m.def an op. Shapes and dtypes are explained in lrcompress/ops, which is its only
// caller.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

#include "cpu/amx.h"
#include "dispatch.h"
#include "math/momentum.h"
#include "ops/autocorrelation.h"
#include "ops/gram.h"
#include "ops/group_lasso.h"
#include "ops/lowrank_conv2d.h"
#include "ops/lowrank_linear.h"
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

// Both axes' stride, padding and dilation come as pairs.
using Pair = std::array<std::int64_t, 2>;

// Pixels, columns and bytes, as lowrank_tile returns them.
using Tile = std::array<std::int64_t, 3>;

Tile bind_lowrank_tile(std::int64_t pixels, std::int64_t groups, std::int64_t rank, std::int64_t shared_limit,
                       std::int64_t multiprocessors) {
    const LowrankTile tile = choose_tile(pixels, groups, rank, shared_limit, multiprocessors);
    return {tile.pixels, tile.columns, tile.shared_bytes};
}

// Calls f(device), or f(device, tile) of a CUDA twin, where there is one for entries of type T.
template <class T, class F> void dispatch_lowrank(const TensorView& input, const Tile& tile, const F& f) {
    dispatch(input, [&](auto device) {
        constexpr bool kCpu = std::is_same_v<decltype(device), Cpu>;
        if constexpr (kCpu && !std::is_same_v<T, Half>) {
            f(device);
        } else if constexpr (!kCpu && !std::is_same_v<T, float>) {
            f(device, LowrankTile{static_cast<int>(tile[0]), static_cast<int>(tile[1]), tile[2]});
        } else {
            throw std::invalid_argument(kCpu ? "factored layers in float16 have no CPU kernel"
                                             : "factored layers in float32 have no CUDA kernel");
        }
    });
}

template <class T>
void call_lowrank_conv2d(const TensorView& input, const TensorView& encoder, const TensorView& decoder,
                         const std::optional<TensorView>& bias, const TensorView& out, const Pair& stride,
                         const Pair& padding, const Pair& dilation, std::int64_t groups, int activation,
                         bool channels_last, int threads, const Tile& tile) {
    const auto axis = [&](int i) {
        return ConvAxis{.in = input.shape[2 + i],
                        .out = out.shape[2 + i],
                        .kernel = encoder.shape[2 + i],
                        .stride = stride[i],
                        .padding = padding[i],
                        .dilation = dilation[i]};
    };
    const LowrankConv2dArgs<T> args{.input = input.as<const T>(channels_last),
                                    .encoder = encoder.as<const T>(input.device.device_type != kDLCPU),
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
                                    .threads = threads};
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

bool linear_takes_many_rows(std::int64_t rows, std::int64_t rank, std::int64_t inside) {
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
    m.def("lowrank_conv2d",
          &lrc::bind_lowrank_conv2d<const lrc::TensorView&, const lrc::TensorView&,
                                    const std::optional<lrc::TensorView>&, const lrc::TensorView&,
                                    const lrc::Pair&, const lrc::Pair&, const lrc::Pair&, std::int64_t, int,
                                    bool, int, const lrc::Tile&>,
          py::arg("input"), py::arg("encoder"), py::arg("decoder"), py::arg("bias"), py::arg("out"),
          py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
          py::arg("activation"), py::arg("channels_last"), py::arg("threads"), py::arg("tile") = lrc::Tile{});
    m.def("linear_takes_many_rows", &lrc::linear_takes_many_rows, py::arg("rows"), py::arg("rank"),
          py::arg("inside"));
    m.def("lowrank_linear",
          &lrc::bind_lowrank_linear<const lrc::TensorView&, const lrc::TensorView&,
                                    const std::optional<lrc::TensorView>&, const lrc::TensorView&,
                                    const lrc::TensorView&, std::int64_t, int, int, const lrc::Tile&>,
          py::arg("input"), py::arg("encoder"), py::arg("decoder"), py::arg("bias"), py::arg("out"),
          py::arg("hidden"), py::arg("groups"), py::arg("activation"), py::arg("threads"),
          py::arg("tile") = lrc::Tile{});
    m.attr("MAX_CUDA_ROWS") = lrc::kMaxCudaRows;
    m.def("linear_hidden_size", &lrc::linear_hidden_size, py::arg("rows"), py::arg("groups"), py::arg("rank"),
          py::arg("inside"));
    m.def("lowrank_tile", &lrc::bind_lowrank_tile, py::arg("pixels"), py::arg("groups"), py::arg("rank"),
          py::arg("shared_limit"), py::arg("multiprocessors"));
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
