#include "cpu/tridiagonalize.h"

#include <algorithm>

#include "math/householder.h"

// The last row is eliminated first, so that the part still to be reduced is always the leading block: its
// rows start aligned and only their ends move. A step maps A to H A H = A - u w^T - w u^T with
//     p = A u / scale,   w = p - (u.p / 2 scale) u          (Golub & Van Loan 2013, algorithm 8.3.1)
// Vectors are zero from their length on up to padded(side), so loops run over whole vectors.
//
// Memory traffic decides how the rank-2 updates are applied. Up to kFusedSide the matrix stays in the L2
// cache, and one pass applies the last update and multiplies by the new u. Above it, an update waits until
// kPanel of them are applied together, and a step only reads the matrix (Dongarra, Hammarling & Sorensen
// 1989; LAPACK's dlatrd).

namespace lrc {
namespace {

constexpr std::int64_t kFusedSide = 256;
constexpr std::int64_t kPanel = 16;

LRC_INLINE double dot(const double* x, const double* y, std::int64_t size) {
    Vec total{};
    for (std::int64_t j = 0; j < size; j += kLanes) total += load(x + j) * load(y + j);
    return sum(total);
}

LRC_INLINE void clear(double* x, std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) x[j] = 0;
}

// x -= a y + b z
LRC_INLINE void subtract_pair(double* x, double a, const double* y, double b, const double* z,
                              std::int64_t size) {
    const Vec a_lanes = splat(a);
    const Vec b_lanes = splat(b);
    for (std::int64_t j = 0; j < size; j += kLanes) {
        store(x + j, load(x + j) - a_lanes * load(y + j) - b_lanes * load(z + j));
    }
}

// Turns u, which holds row `length` of the matrix up to the diagonal, into the reflector's vector [length].
LRC_INLINE Reflector reflect(double* u, std::int64_t length) {
    const std::int64_t end = padded(length + 1);
    const double alpha = u[length - 1];
    clear(u, length - 1, end);
    const Reflector reflector = make_reflector(alpha, dot(u, u, end));
    if (reflector.identity) clear(u, 0, length);
    u[length - 1] = reflector.pivot;
    return reflector;
}

// Turns w, which holds A u, into the w of the rank-2 update.
LRC_INLINE void finish_update(double* w, const double* u, double scale, std::int64_t length) {
    const std::int64_t end = padded(length);
    clear(w, length, end);
    const double half = dot(u, w, end) / (2 * scale * scale);
    const Vec inverse_scale = splat(1 / scale);
    for (std::int64_t j = 0; j < end; j += kLanes) {
        store(w + j, load(w + j) * inverse_scale - splat(half) * load(u + j));
    }
}

struct Update {
    const double* u;
    const double* w;
};

// Rows r and r + 1 of A -= u w^T + w u^T and y += A x, from column 0 to the end of their diagonal block.
LRC_INLINE void update_and_multiply_rows(double* row0, double* row1, std::int64_t r, Update last,
                                         const double* x, double* y) {
    const Vec u0 = splat(last.u[r]), u1 = splat(last.u[r + 1]);
    const Vec w0 = splat(last.w[r]), w1 = splat(last.w[r + 1]);
    const Vec x0 = splat(x[r]), x1 = splat(x[r + 1]);
    Vec sum0{}, sum1{};
    const std::int64_t block = r / kLanes * kLanes;
    for (std::int64_t j = 0; j <= block; j += kLanes) {
        const Vec u = load(last.u + j), w = load(last.w + j);
        const Vec a0 = load(row0 + j) - u0 * w - w0 * u;
        const Vec a1 = load(row1 + j) - u1 * w - w1 * u;
        store(row0 + j, a0);
        store(row1 + j, a1);
        sum0 += a0 * load(x + j);
        sum1 += a1 * load(x + j);
        // The diagonal block is stored whole: its columns are their own mirror.
        if (j < block) store(y + j, load(y + j) + a0 * x0 + a1 * x1);
    }
    y[r] = sum(sum0);
    y[r + 1] = sum(sum1);
}

// y = (A - u w^T - w u^T) x over the leading `length` rows, storing the updated A.
LRC_INLINE void update_and_multiply(double* matrix, std::int64_t stride, std::int64_t length, Update last,
                                    const double* x, double* y) {
    for (std::int64_t r = 0; r < length; r += 2) {
        double* row = matrix + r * stride;
        update_and_multiply_rows(row, row + stride, r, last, x, y);
    }
}

// y = A x over the leading `length` rows; four rows share each load of x and y.
LRC_INLINE void multiply(const double* matrix, std::int64_t stride, std::int64_t length, const double* x,
                         double* y) {
    for (std::int64_t r = 0; r < length; r += kLanes) {
        const double* row = matrix + r * stride;
        const Vec x0 = splat(x[r]), x1 = splat(x[r + 1]), x2 = splat(x[r + 2]), x3 = splat(x[r + 3]);
        Vec sum0{}, sum1{}, sum2{}, sum3{};
        for (std::int64_t j = 0; j < r; j += kLanes) {
            const Vec a0 = load(row + j), a1 = load(row + stride + j);
            const Vec a2 = load(row + 2 * stride + j), a3 = load(row + 3 * stride + j);
            const Vec xj = load(x + j);
            sum0 += a0 * xj;
            sum1 += a1 * xj;
            sum2 += a2 * xj;
            sum3 += a3 * xj;
            store(y + j, load(y + j) + (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3));
        }
        const Vec xr = load(x + r);
        y[r] = sum(sum0 + load(row + r) * xr);
        y[r + 1] = sum(sum1 + load(row + stride + r) * xr);
        y[r + 2] = sum(sum2 + load(row + 2 * stride + r) * xr);
        y[r + 3] = sum(sum3 + load(row + 3 * stride + r) * xr);
    }
}

// The panel's updates: vector t of u at us + t * stride, likewise w. `packed` regroups them for apply_panel:
// for each four columns, the u of every update and then the w of every update.
struct Panel {
    double* us;
    double* ws;
    double* packed;
    std::int64_t stride;
};

// A 4 x (4 kGroups) tile: A[row.., column..] -= sum_t u_t[row] w_t[column] + w_t[row] u_t[column].
template <int kGroups>
LRC_INLINE void update_tile(double* tile, std::int64_t stride, const double* rows, const double* columns) {
    constexpr std::int64_t kGroupSize = 2 * kPanel * kLanes;
    Vec acc[kLanes][kGroups];
    for (int r = 0; r < kLanes; ++r) {
        for (int g = 0; g < kGroups; ++g) acc[r][g] = load(tile + r * stride + g * kLanes);
    }
    for (std::int64_t t = 0; t < 2 * kPanel; ++t) {
        const double* row = rows + t * kLanes;
        const double* column = columns + (t < kPanel ? t + kPanel : t - kPanel) * kLanes;
        for (int r = 0; r < kLanes; ++r) {
            const Vec left = splat(row[r]);
            for (int g = 0; g < kGroups; ++g) acc[r][g] -= left * load(column + g * kGroupSize);
        }
    }
    for (int r = 0; r < kLanes; ++r) {
        for (int g = 0; g < kGroups; ++g) store(tile + r * stride + g * kLanes, acc[r][g]);
    }
}

// Applies the panel's updates to the leading `length` rows.
LRC_INLINE void apply_panel(double* matrix, std::int64_t stride, std::int64_t length, const Panel& panel) {
    constexpr std::int64_t kGroupSize = 2 * kPanel * kLanes;
    const std::int64_t groups = padded(length) / kLanes;
    for (std::int64_t g = 0; g < groups; ++g) {
        double* to = panel.packed + g * kGroupSize;
        for (std::int64_t t = 0; t < kPanel; ++t) {
            store(to + t * kLanes, load(panel.us + t * panel.stride + g * kLanes));
            store(to + (t + kPanel) * kLanes, load(panel.ws + t * panel.stride + g * kLanes));
        }
    }
    for (std::int64_t row = 0; row < groups; ++row) {
        const double* rows = panel.packed + row * kGroupSize;
        double* tile = matrix + row * kLanes * stride;
        std::int64_t column = 0;
        for (; column + 3 <= row + 1; column += 3) {
            update_tile<3>(tile + column * kLanes, stride, rows, panel.packed + column * kGroupSize);
        }
        for (; column <= row; ++column) {
            update_tile<1>(tile + column * kLanes, stride, rows, panel.packed + column * kGroupSize);
        }
    }
}

// Reduces rows last, last - 1, ..., last - kPanel + 1 with delayed updates.
LRC_MULTIVERSION void reduce_panel(double* matrix, std::int64_t stride, std::int64_t last, const Panel& panel,
                                   double* diagonal, double* off_diagonal) {
    for (std::int64_t step = 0; step < kPanel; ++step) {
        const std::int64_t length = last - step;
        const std::int64_t end = padded(length + 1);
        double* u = panel.us + step * panel.stride;
        double* w = panel.ws + step * panel.stride;
        std::copy_n(matrix + length * stride, end, u);
        for (std::int64_t t = 0; t < step; ++t) {
            const double* ut = panel.us + t * panel.stride;
            const double* wt = panel.ws + t * panel.stride;
            subtract_pair(u, ut[length], wt, wt[length], ut, end);
        }
        diagonal[length] = u[length];
        const Reflector reflector = reflect(u, length);
        off_diagonal[length] = reflector.beta;
        multiply(matrix, stride, length, u, w);
        for (std::int64_t t = 0; t < step; ++t) {
            const double* ut = panel.us + t * panel.stride;
            const double* wt = panel.ws + t * panel.stride;
            subtract_pair(w, dot(wt, u, end), ut, dot(ut, u, end), wt, padded(length));
        }
        finish_update(w, u, reflector.scale, length);
    }
    apply_panel(matrix, stride, last - kPanel + 1, panel);
}

// Reduces the leading `side` rows with fused updates. `vectors` holds two pairs (u, w): the last one and the
// new one.
LRC_MULTIVERSION void reduce_fused(double* matrix, std::int64_t stride, std::int64_t side, double* vectors,
                                   double* diagonal, double* off_diagonal) {
    const std::int64_t size = padded(side);
    std::fill_n(vectors, 4 * size, 0.0);
    double* u = vectors;
    double* w = vectors + size;
    double* next_u = vectors + 2 * size;
    double* next_w = vectors + 3 * size;
    for (std::int64_t length = side - 1; length > 0; --length) {
        const std::int64_t end = padded(length + 1);
        std::copy_n(matrix + length * stride, end, next_u);
        subtract_pair(next_u, u[length], w, w[length], u, end);
        diagonal[length] = next_u[length];
        const Reflector reflector = reflect(next_u, length);
        off_diagonal[length] = reflector.beta;
        update_and_multiply(matrix, stride, length, {u, w}, next_u, next_w);
        finish_update(next_w, next_u, reflector.scale, length);
        std::swap(u, next_u);
        std::swap(w, next_w);
    }
    // The reflector of length 1 is the identity: nothing is pending for the first entry.
    diagonal[0] = matrix[0];
    off_diagonal[0] = 0;
}

}  // namespace

std::int64_t tridiagonalize_scratch(std::int64_t side) {
    return side > kFusedSide ? 4 * kPanel * padded(side) : 4 * padded(side);
}

void tridiagonalize(double* matrix, std::int64_t side, double* diagonal, double* off_diagonal,
                    double* scratch) {
    const std::int64_t stride = dense_stride(side);
    const std::int64_t size = padded(side);
    const Panel panel{
        .us = scratch, .ws = scratch + kPanel * size, .packed = scratch + 2 * kPanel * size, .stride = size};
    while (side > kFusedSide) {
        reduce_panel(matrix, stride, side - 1, panel, diagonal, off_diagonal);
        side -= kPanel;
    }
    reduce_fused(matrix, stride, side, scratch, diagonal, off_diagonal);
}

}  // namespace lrc
