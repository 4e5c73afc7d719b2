#include "ops/autocorrelation.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

// The channels of a group are packed in panels, pixel after pixel: [panel][image][pixel][channel of the
// panel]. A task multiplies two panels at one distance: it lists the pixels of a cell, a run at a time, and
// adds up the outer products of a pixel's channels with those of the pixel at that distance, so that a strip
// along the border costs what its pixels cost. Blocks of the result are collected for some pairs of panels,
// and then added row by row: entries of one block are as far apart as there are kernel positions.

namespace lrc {
namespace {

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(32), may_alias));
};
template <> struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(32), may_alias));
};

constexpr std::int64_t kRows = 4;     // of the kernel: with kVectors columns half of the registers of AVX2,
constexpr std::int64_t kVectors = 2;  // and as many independent sums as two units with four cycles need
template <class T> constexpr std::int64_t kWidth = 32 / sizeof(T);
template <class T> constexpr std::int64_t kPanel = kVectors * kWidth<T>;
template <class T> constexpr std::int64_t kTile = kPanel<T> * kPanel<T>;
template <class T> constexpr std::int64_t kBlock = kTile<T> + 8;  // blocks: one entry of all, on many sets
constexpr std::int64_t kBlocksSize = 1 << 17;                     // doubles of blocks collected at once

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

// What all tasks share.
template <class T> struct Packed {
    const AutocorrelationArgs<T>& args;
    const T* pixels;
    std::int64_t panels;          // of a group
    std::int64_t panel_size;      // entries
    const std::int64_t* windows;  // [area, area]: where u <= v stands in args.windows
};

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
template <class T>
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

// sums[kPanel] += the channels of the pixels of a cell.
template <class T>
LRC_INLINE void add_pixels(const Packed<T>& packed, const T* panel, const PatchCell& cell, double* sums) {
    using Vector = typename Lanes<T>::Vector;
    std::int64_t at[kPatchRun];
    Runs runs(packed.args, cell);
    while (const std::int64_t count = runs.template next<kPanel<T>>(at)) {
        Vector run[kVectors] = {};
        for (std::int64_t k = 0; k < count; ++k) {
            const Vector* pixel = reinterpret_cast<const Vector*>(panel + at[k]);
            LRC_UNROLL
            for (std::int64_t v = 0; v < kVectors; ++v) run[v] += pixel[v];
        }
        const T* from = reinterpret_cast<const T*>(run);
        for (std::int64_t i = 0; i < kPanel<T>; ++i) sums[i] += from[i];
    }
}

// Two panels of one group and the distance at which they are multiplied.
struct Task {
    std::int64_t group;
    std::int64_t rows;     // panel of x[q]
    std::int64_t columns;  // panel of x[q + distance]
    const PatchOffset* offset;
};

template <class T>
LRC_INLINE void multiply_cells(const Packed<T>& packed, const Task& task, double* tiles) {
    const AutocorrelationArgs<T>& args = packed.args;
    const PatchOffset& offset = *task.offset;
    const std::int64_t shift =
        (offset.distance[0] * args.sizes[1] + offset.distance[1]) * args.sizes[2] + offset.distance[2];
    const T* group = packed.pixels + task.group * packed.panels * packed.panel_size;
    const T* a = group + task.rows * packed.panel_size;
    const T* b = group + task.columns * packed.panel_size + shift * kPanel<T>;
    const std::int64_t rows = std::min(kPanel<T>, args.channels - task.rows * kPanel<T>);
    std::int64_t at[kPatchRun];
    for (std::int64_t cell = offset.first_cell; cell < offset.end_cell; ++cell, tiles += kTile<T>) {
        std::fill_n(tiles, kTile<T>, 0.0);
        Runs runs(args, args.cells[cell]);
        while (const std::int64_t count = runs.template next<kPanel<T>>(at)) {
            for (std::int64_t i = 0; i < rows; i += kRows)
                multiply(a + i, b, at, count, tiles + i * kPanel<T>);
        }
    }
}

// Adds row `index` of the pair's blocks to the result, and row `index` of their transposes across the
// diagonal.
template <class T>
LRC_INLINE void add_rows(const Packed<T>& packed, const Task& pair, const double* blocks,
                         std::int64_t index) {
    const AutocorrelationArgs<T>& args = packed.args;
    const std::int64_t area = args.area, side = args.channels * area;
    const std::int64_t row = pair.rows * kPanel<T>, column = pair.columns * kPanel<T>;
    const std::int64_t rows = std::min(kPanel<T>, args.channels - row);
    const std::int64_t columns = std::min(kPanel<T>, args.channels - column);
    double* out = args.products + pair.group * side * side;
    // Of u == v, both panels' pairs have the same block; the one on the diagonal is its own transpose.
    const std::int64_t above = row > column, below = row >= column;
    for (std::int64_t u = 0; u < area && index < rows; ++u) {
        double* to = out + ((row + index) * area + u) * side + column * area;
        const std::int64_t* windows = packed.windows + u * area;
        for (std::int64_t j = 0; j < columns; ++j) {
            const double* from = blocks + index * kPanel<T> + j;
            for (std::int64_t v = u + above; v < area; ++v) to[j * area + v] += from[windows[v] * kBlock<T>];
        }
    }
    for (std::int64_t v = 0; v < area && index < columns; ++v) {
        double* to = out + ((column + index) * area + v) * side + row * area;
        const std::int64_t* windows = packed.windows + v;
        for (std::int64_t i = 0; i < rows; ++i) {
            const double* from = blocks + i * kPanel<T> + index;
            for (std::int64_t u = 0; u <= v - below; ++u)
                to[i * area + u] += from[windows[u * area] * kBlock<T>];
        }
    }
}

template <class T> LRC_INLINE void add_sums(const Packed<T>& packed, const Task& task, double* cells) {
    const AutocorrelationArgs<T>& args = packed.args;
    const PatchOffset& offset = *task.offset;
    const T* panel = packed.pixels + (task.group * packed.panels + task.rows) * packed.panel_size;
    for (std::int64_t cell = offset.first_cell; cell < offset.end_cell; ++cell) {
        double* to = cells + (cell - offset.first_cell) * kPanel<T>;
        std::fill_n(to, kPanel<T>, 0.0);
        add_pixels(packed, panel, args.cells[cell], to);
    }
    const std::int64_t channel = task.rows * kPanel<T>;
    const std::int64_t width = std::min(kPanel<T>, args.channels - channel);
    double* sums = args.sums + (task.group * args.channels + channel) * args.area;
    for (std::int64_t w = offset.first_window; w < offset.end_window; ++w) {
        const PatchWindow& window = args.windows[w];
        for (std::int64_t part = window.first_part; part < window.end_part; ++part) {
            const double* from = cells + (args.parts[part] - offset.first_cell) * kPanel<T>;
            for (std::int64_t i = 0; i < width; ++i) sums[i * args.area + window.u] += from[i];
        }
    }
}

template <class T>
LRC_INLINE void run_task(const Packed<T>& packed, const Task& task, double* tiles, double* blocks) {
    const AutocorrelationArgs<T>& args = packed.args;
    const PatchOffset& offset = *task.offset;
    const std::int64_t* distance = offset.distance;
    if (distance[0] == 0 && distance[1] == 0 && distance[2] == 0) {
        if (task.rows > task.columns) return;  // the transpose of another task's
        if (task.rows == task.columns) add_sums(packed, task, tiles);
    }
    multiply_cells(packed, task, tiles);
    for (std::int64_t w = offset.first_window; w < offset.end_window; ++w) {
        const PatchWindow& window = args.windows[w];
        double* block = blocks + w * kBlock<T>;
        std::fill_n(block, kTile<T>, 0.0);
        for (std::int64_t part = window.first_part; part < window.end_part; ++part) {
            const double* from = tiles + (args.parts[part] - offset.first_cell) * kTile<T>;
            for (std::int64_t i = 0; i < kTile<T>; ++i) block[i] += from[i];
        }
    }
}

LRC_MULTIVERSION void run(const Packed<float>& packed, const Task& task, double* tiles, double* blocks) {
    run_task(packed, task, tiles, blocks);
}

LRC_MULTIVERSION void run(const Packed<double>& packed, const Task& task, double* tiles, double* blocks) {
    run_task(packed, task, tiles, blocks);
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

}  // namespace

template <class T> void autocorrelation(Cpu, const AutocorrelationArgs<T>& args) {
    const std::int64_t panels = divide_up(args.channels, kPanel<T>);
    const Buffer<T> pixels = pack(args, panels);
    std::int64_t most_cells = 0, window_count = 0;
    std::vector<std::int64_t> windows(args.area * args.area);
    for (std::int64_t o = 0; o < args.offset_count; ++o) {
        const PatchOffset& offset = args.offsets[o];
        most_cells = std::max(most_cells, offset.end_cell - offset.first_cell);
        window_count = std::max(window_count, offset.end_window);
        for (std::int64_t w = offset.first_window; w < offset.end_window; ++w)
            windows[args.windows[w].u * args.area + args.windows[w].v] = w;
    }
    const std::int64_t panel_size = args.batch * args.sizes[0] * args.sizes[1] * args.sizes[2] * kPanel<T>;
    const Packed<T> packed{args, pixels.get(), panels, panel_size, windows.data()};
    const std::int64_t pairs = args.groups * panels * panels;
    const std::int64_t blocks_size = window_count * kBlock<T>;
    const std::int64_t at_once = std::clamp<std::int64_t>(kBlocksSize / blocks_size, 1, pairs);
    const Buffer<double> blocks = make_buffer<double>(at_once * blocks_size);
    std::vector<Buffer<double>> tiles;
    for (int worker = 0; worker < worker_count(args.threads, at_once * args.offset_count); ++worker)
        tiles.push_back(make_buffer<double>(most_cells * kTile<T>));
    const auto task = [&](std::int64_t pair, const PatchOffset* offset) {
        return Task{pair / (panels * panels), pair / panels % panels, pair % panels, offset};
    };
    for (std::int64_t first = 0; first < pairs; first += at_once) {
        const std::int64_t count = std::min(at_once, pairs - first);
        parallel_for(args.threads, count * args.offset_count, [&](int worker, std::int64_t index) noexcept {
            const std::int64_t pair = index / args.offset_count;
            const PatchOffset* offset = args.offsets + index % args.offset_count;
            run(packed, task(first + pair, offset), tiles[worker].get(), blocks.get() + pair * blocks_size);
        });
        parallel_for(args.threads, count * kPanel<T>, [&](int, std::int64_t index) noexcept {
            const std::int64_t pair = index / kPanel<T>;
            add_rows(packed, task(first + pair, nullptr), blocks.get() + pair * blocks_size,
                     index % kPanel<T>);
        });
    }
}

template void autocorrelation(Cpu, const AutocorrelationArgs<float>&);
template void autocorrelation(Cpu, const AutocorrelationArgs<double>&);

}  // namespace lrc
