// The part of cuSOLVER that lrcompress calls, on host memory: Jacobi rotations in the place of the GPU's
// solver.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

constexpr int kNoVector = 0;
constexpr int kUpper = 1;
constexpr int kDouble = 1;
constexpr int kInvalid = 3;
constexpr std::size_t kDeviceBytes = 64;
constexpr std::size_t kHostBytes = 16;
int handles = 0;

// Diagonalises one matrix, column-major with its upper triangle given; eigenvectors replace its columns.
void solve(double* A, double* W, std::int64_t n, bool vectors) {
    std::vector<double> S(n * n), V(n * n);
    for (std::int64_t j = 0; j < n; ++j) {
        V[j * n + j] = 1;
        for (std::int64_t i = 0; i <= j; ++i) S[j * n + i] = S[i * n + j] = A[j * n + i];
    }
    for (int sweep = 0; sweep < 30; ++sweep)
        for (std::int64_t p = 0; p < n; ++p)
            for (std::int64_t q = p + 1; q < n; ++q) {
                if (S[q * n + p] == 0) continue;
                const double theta = (S[q * n + q] - S[p * n + p]) / (2 * S[q * n + p]);
                const double t = std::copysign(1 / (std::abs(theta) + std::hypot(theta, 1.0)), theta);
                const double c = 1 / std::hypot(t, 1.0), s = t * c;
                for (std::int64_t k = 0; k < n; ++k) {
                    const double a = S[p * n + k], b = S[q * n + k];
                    S[p * n + k] = c * a - s * b, S[q * n + k] = s * a + c * b;
                    const double v = V[p * n + k], w = V[q * n + k];
                    V[p * n + k] = c * v - s * w, V[q * n + k] = s * v + c * w;
                }
                for (std::int64_t k = 0; k < n; ++k) {
                    const double a = S[k * n + p], b = S[k * n + q];
                    S[k * n + p] = c * a - s * b, S[k * n + q] = s * a + c * b;
                }
            }
    std::vector<std::int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](auto i, auto j) { return S[i * n + i] < S[j * n + j]; });
    for (std::int64_t j = 0; j < n; ++j) {
        W[j] = S[order[j] * n + order[j]];
        if (vectors) std::copy_n(&V[order[j] * n], n, &A[j * n]);
    }
}

}  // namespace

extern "C" {

int stub_handles() { return handles; }

int cusolverDnCreate(void** handle) {
    *handle = &handles;
    ++handles;
    return 0;
}

int cusolverDnDestroy(void*) {
    --handles;
    return 0;
}

int cusolverDnSetStream(void* handle, void*) { return handle == &handles ? 0 : kInvalid; }

int cusolverDnXsyevBatched_bufferSize(void*, void*, int, int, std::int64_t, int, const void*, std::int64_t,
                                      int, const void*, int, std::size_t* device, std::size_t* host,
                                      std::int64_t) {
    *device = kDeviceBytes;
    *host = kHostBytes;
    return 0;
}

int cusolverDnXsyevBatched(void* handle, void* params, int mode, int uplo, std::int64_t n, int type, void* A,
                           std::int64_t stride, int type_of_values, void* W, int compute, void* buffer,
                           std::size_t device, void* host_buffer, std::size_t host, int* info,
                           std::int64_t batch) {
    const bool sane = handle == &handles && !params && uplo == kUpper && type == kDouble && stride == n &&
                      type_of_values == kDouble && compute == kDouble && buffer && device == kDeviceBytes &&
                      host_buffer && host == kHostBytes;
    if (!sane) return kInvalid;
    for (std::int64_t i = 0; i < batch; ++i) {
        auto* matrix = static_cast<double*>(A) + i * n * n;
        const bool finite = std::all_of(matrix, matrix + n * n, [](double x) { return std::isfinite(x); });
        info[i] = finite ? 0 : 1;
        if (finite) solve(matrix, static_cast<double*>(W) + i * n, n, mode != kNoVector);
    }
    return 0;
}

}  // extern "C"
