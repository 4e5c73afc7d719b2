// Images packed for the CPU twin of autocorrelation, and the products of their pixels. The channels of a
// group lie in panels, pixel after pixel: [panel][image][pixel][channel of the panel].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"
#include "device.h"
#include "ops/autocorrelation.h"

namespace lrc::patches {

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(32), may_alias));
};
template <> struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(32), may_alias));
};

inline constexpr std::int64_t kFewRows = 4;  // of the kernel, at least
inline constexpr std::int64_t kVectors =
    2;  // columns of the kernel: with 5 or 6 rows they fill AVX2's registers
template <class T> inline constexpr std::int64_t kWidth = 32 / sizeof(T);
template <class T> inline constexpr std::int64_t kPanel = kVectors * kWidth<T>;
constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T> using Buffer = std::unique_ptr<T, Free>;

template <class T> Buffer<T> make_buffer(std::int64_t size) {
    void* p = std::aligned_alloc(64, divide_up(size * sizeof(T), 64) * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

// One panel of one image; channels that do not exist become zeros.
template <class T>
LRC_INLINE void pack_image(const AutocorrelationArgs<T>& args, std::int64_t group, std::int64_t channel,
                           std::int64_t image, T* to) {
    const std::int64_t* strides = args.strides;
    const T* from = args.x + image * strides[0] + group * strides[1] + channel * strides[2];
    const std::int64_t width = std::min(kPanel<T>, args.channels - channel);
    for (std::int64_t z = 0; z < args.sizes[0]; ++z) {
        for (std::int64_t y = 0; y < args.sizes[1]; ++y) {
            const T* row = from + z * strides[3] + y * strides[4];
            for (std::int64_t x = 0; x < args.sizes[2]; ++x, to += kPanel<T>) {
                const T* pixel = row + x * strides[5];
                for (std::int64_t i = 0; i < width; ++i) to[i] = pixel[i * strides[2]];
                for (std::int64_t i = width; i < kPanel<T>; ++i) to[i] = 0;
            }
        }
    }
}

template <class T> Buffer<T> pack(const AutocorrelationArgs<T>& args, std::int64_t panels) {
    const std::int64_t size = args.sizes[0] * args.sizes[1] * args.sizes[2] * kPanel<T>;
    const std::int64_t images = args.groups * panels * args.batch;
    Buffer<T> pixels = make_buffer<T>(images * size);
    parallel_for(args.threads, images, [&](int, std::int64_t index) noexcept {
        const std::int64_t panel = index / args.batch;
        pack_image(args, panel / panels, panel % panels * kPanel<T>, index % args.batch,
                   pixels.get() + index * size);
    });
    return pixels;
}

// Lists the pixels of a cell in all images, a run at a time.
class Runs {
  public:
    template <class T>
    LRC_INLINE Runs(const AutocorrelationArgs<T>& args, const PatchCell& cell)
        : step_(args.step), sizes_(args.sizes), cell_(cell), batch_(args.batch) {}

    // Fills at[0, kPatchRun) with entries of a panel; returns how many.
    template <std::int64_t kScale> LRC_INLINE std::int64_t next(std::int64_t* at) {
        std::int64_t filled = 0;
        while (filled < kPatchRun && image_ < batch_) {
            const std::int64_t z = cell_.start[0] + z_ * step_[0];
            const std::int64_t y = cell_.start[1] + y_ * step_[1];
            const std::int64_t x = cell_.start[2] + x_ * step_[2];
            const std::int64_t first = ((image_ * sizes_[0] + z) * sizes_[1] + y) * sizes_[2] + x;
            const std::int64_t count = std::min(kPatchRun - filled, cell_.count[2] - x_);
            for (std::int64_t i = 0; i < count; ++i) at[filled + i] = (first + i * step_[2]) * kScale;
            filled += count;
            x_ += count;
            if (x_ < cell_.count[2]) continue;
            x_ = 0;
            if (++y_ < cell_.count[1]) continue;
            y_ = 0;
            if (++z_ < cell_.count[0]) continue;
            z_ = 0;
            ++image_;
        }
        return filled;
    }

  private:
    const std::int64_t* step_;
    const std::int64_t* sizes_;
    const PatchCell& cell_;
    std::int64_t batch_;
    std::int64_t image_ = 0, z_ = 0, y_ = 0, x_ = 0;
};

// sums[kRows, kPanel] += the outer products of kRows channels from `a` with a panel from `b`, over a run.
template <std::int64_t kRows, class T>
LRC_INLINE void multiply(const T* a, const T* b, const std::int64_t* at, std::int64_t count, double* sums) {
    using Vector = typename Lanes<T>::Vector;
    Vector run[kRows][kVectors];
    LRC_UNROLL
    for (std::int64_t i = 0; i < kRows; ++i) {
        LRC_UNROLL
        for (std::int64_t v = 0; v < kVectors; ++v) run[i][v] = Vector{};
    }
    for (std::int64_t k = 0; k < count; ++k) {
        const T* left = a + at[k];
        const Vector* right = reinterpret_cast<const Vector*>(b + at[k]);
        LRC_UNROLL
        for (std::int64_t i = 0; i < kRows; ++i) {
            LRC_UNROLL
            for (std::int64_t v = 0; v < kVectors; ++v) run[i][v] += left[i] * right[v];
        }
    }
    const T* from = reinterpret_cast<const T*>(run);
    for (std::int64_t i = 0; i < kRows * kPanel<T>; ++i) sums[i] += from[i];
}

// The same for the channels of a strip, and for some that follow where that fills the registers.
template <class T>
LRC_INLINE void multiply_rows(std::int64_t rows, const T* a, const T* b, const std::int64_t* at,
                              std::int64_t count, double* sums) {
    if (rows > 12) {
        multiply<6>(a, b, at, count, sums);
        multiply<5>(a + 6, b, at, count, sums + 6 * kPanel<T>);
        multiply<5>(a + 11, b, at, count, sums + 11 * kPanel<T>);
    } else if (rows > 8) {
        multiply<6>(a, b, at, count, sums);
        multiply<6>(a + 6, b, at, count, sums + 6 * kPanel<T>);
    } else {
        for (std::int64_t i = 0; i < rows; i += kFewRows)
            multiply<kFewRows>(a + i, b, at, count, sums + i * kPanel<T>);
    }
}

}  // namespace lrc::patches
