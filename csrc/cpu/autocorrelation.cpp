#include "ops/autocorrelation.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/patch_panels.h"
#include "cpu/simd.h"

// A task multiplies two panels at one distance: it lists the pixels of a cell, a run at a time, and adds up
// the outer products of a pixel's channels with those of the pixel at that distance, so that a strip along
// the border costs what its pixels cost. The products of a pair of panels are collected for as many distances
// as there is room for; then each row of the result is added at once, and its mirror image with it: entries
// of one product are as far apart there as there are kernel positions.

namespace lrc {
namespace {

using namespace patches;

constexpr std::int64_t kLeastRows = kFewRows;  // of a strip
constexpr std::int64_t kBundle = 8;  // rows of the result added at once: a cache line of its mirror image
constexpr std::int64_t kLeastRoom = 1 << 15, kMostRoom = 1 << 16;  // doubles of collected products

// What all tasks share.
template <class T> struct Packed {
    const AutocorrelationArgs<T>& args;
    const T* pixels;
    std::int64_t panels;          // of a group
    std::int64_t panel_size;      // entries
    const std::int64_t* windows;  // [area, area]: where u <= v stands in args.windows
    std::int64_t rows;            // channels of a strip
    std::int64_t tile;            // entries of a cell's product: [rows, kPanel]
};

// Some channels of one panel by all of another, or of the same one.
struct Strip {
    std::int64_t group;
    std::int64_t left;   // panel of the rows
    std::int64_t right;  // panel of the columns, not before the other
    std::int64_t first;  // of the rows in their panel
    std::int64_t count;  // rows that exist
};

// Neighbouring offsets whose products are collected together. A strip's are [2, cells, tile]: forward, then
// backward.
struct Round {
    const PatchOffset* first;
    const PatchOffset* end;
    std::int64_t cells() const { return (end - 1)->end_cell - first->first_cell; }
    bool has(std::int64_t window) const {
        return window >= first->first_window && window < (end - 1)->end_window;
    }
};

// Functions of their own, or the registers of their loops are spilled.
LRC_MULTIVERSION void multiply_run(std::int64_t rows, const float* a, const float* b, const std::int64_t* at,
                                   std::int64_t count, double* sums) {
    multiply_rows(rows, a, b, at, count, sums);
}

LRC_MULTIVERSION void multiply_run(std::int64_t rows, const double* a, const double* b,
                                   const std::int64_t* at, std::int64_t count, double* sums) {
    multiply_rows(rows, a, b, at, count, sums);
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

// Of each cell: forward, the strip's rows at x[q] by its columns at x[q + distance]; backward, unless null,
// the rows at x[q + distance] by the columns at x[q].
template <class T>
LRC_INLINE void multiply_cells(const Packed<T>& packed, const Strip& strip, const PatchOffset& offset,
                               double* forward, double* backward) {
    const std::int64_t* sizes = packed.args.sizes;
    const std::int64_t* distance = offset.distance;
    const std::int64_t shift = ((distance[0] * sizes[1] + distance[1]) * sizes[2] + distance[2]) * kPanel<T>;
    const T* group = packed.pixels + strip.group * packed.panels * packed.panel_size;
    const T* a = group + strip.left * packed.panel_size + strip.first;
    const T* b = group + strip.right * packed.panel_size;
    std::int64_t at[kPatchRun];
    for (std::int64_t cell = offset.first_cell; cell < offset.end_cell; ++cell) {
        std::fill_n(forward, packed.tile, 0.0);
        if (backward) std::fill_n(backward, packed.tile, 0.0);
        Runs runs(packed.args, packed.args.cells[cell]);
        while (const std::int64_t count = runs.template next<kPanel<T>>(at)) {
            multiply_run(strip.count, a, b + shift, at, count, forward);
            if (backward) multiply_run(strip.count, a + shift, b, at, count, backward);
        }
        forward += packed.tile;
        if (backward) backward += packed.tile;
    }
}

// The sums of patches of the panel on the diagonal.
template <class T>
LRC_INLINE void add_sums(const Packed<T>& packed, const Strip& strip, const PatchOffset& offset,
                         double* cells) {  // [cells of the offset, kPanel]
    const AutocorrelationArgs<T>& args = packed.args;
    const T* panel = packed.pixels + (strip.group * packed.panels + strip.left) * packed.panel_size;
    for (std::int64_t cell = offset.first_cell; cell < offset.end_cell; ++cell) {
        double* to = cells + (cell - offset.first_cell) * kPanel<T>;
        std::fill_n(to, kPanel<T>, 0.0);
        add_pixels(packed, panel, args.cells[cell], to);
    }
    const std::int64_t channel = strip.left * kPanel<T>;
    const std::int64_t width = std::min(kPanel<T>, args.channels - channel);
    double* sums = args.sums + (strip.group * args.channels + channel) * args.area;
    for (std::int64_t w = offset.first_window; w < offset.end_window; ++w) {
        const PatchWindow& window = args.windows[w];
        for (std::int64_t part = window.first_part; part < window.end_part; ++part) {
            const double* from = cells + (args.parts[part] - offset.first_cell) * kPanel<T>;
            for (std::int64_t i = 0; i < width; ++i) sums[i * args.area + window.u] += from[i];
        }
    }
}

template <class T>
LRC_INLINE void collect_offset(const Packed<T>& packed, const Round& round, const Strip& strip,
                               const PatchOffset& offset, double* tiles) {
    const std::int64_t* distance = offset.distance;
    const bool zero = distance[0] == 0 && distance[1] == 0 && distance[2] == 0;
    const bool diagonal = strip.left == strip.right;
    double* forward = tiles + (offset.first_cell - round.first->first_cell) * packed.tile;
    double* backward = forward + round.cells() * packed.tile;
    if (zero && diagonal && strip.first == 0) add_sums(packed, strip, offset, forward);
    multiply_cells(packed, strip, offset, forward, zero || diagonal ? nullptr : backward);
}

// row[j, v] = what the round has of entry (i, u), (j, v) of the result, from v on.
template <class T>
LRC_INLINE void make_row(const Packed<T>& packed, const Round& round, const double* tiles, std::int64_t i,
                         std::int64_t u, std::int64_t v, double* row) {
    constexpr std::int64_t kVecs = kPanel<T> / kLanes;
    const AutocorrelationArgs<T>& args = packed.args;
    const double* forward = tiles + i * kPanel<T> - round.first->first_cell * packed.tile;
    const double* backward = forward + round.cells() * packed.tile;
    for (; v < args.area; ++v) {
        Vec sums[kVecs] = {};
        const std::int64_t index = packed.windows[std::min(u, v) * args.area + std::max(u, v)];
        if (round.has(index)) {
            const PatchWindow& window = args.windows[index];
            for (std::int64_t part = window.first_part; part < window.end_part; ++part) {
                const double* from = (u <= v ? forward : backward) + args.parts[part] * packed.tile;
                LRC_UNROLL
                for (std::int64_t k = 0; k < kVecs; ++k) sums[k] += load(from + k * kLanes);
            }
        }
        const double* from = reinterpret_cast<const double*>(sums);
        for (std::int64_t j = 0; j < kPanel<T>; ++j) row[j * args.area + v] = from[j];
    }
}

// Adds kBundle rows of a strip, from row `first` on, to the result, and their mirror image. Of a panel by
// itself only u <= v is made: the other half is the mirror image.
template <class T>
LRC_INLINE void add_bundle(const Packed<T>& packed, const Round& round, const Strip& strip,
                           const double* tiles, std::int64_t first,
                           double* rows) {  // [kBundle, kPanel * area]
    const AutocorrelationArgs<T>& args = packed.args;
    const std::int64_t area = args.area, side = args.channels * area, stride = kPanel<T> * area;
    const std::int64_t channel = strip.right * kPanel<T>;
    const std::int64_t columns = area * std::min(kPanel<T>, args.channels - channel);
    const std::int64_t count = std::min(kBundle, strip.count * area - first);
    const std::int64_t row = (strip.left * kPanel<T> + strip.first) * area + first, column = channel * area;
    double* out = args.products + strip.group * side * side;
    // Each line of the mirror image is on a page of its own.
    for (std::int64_t k = 0; k < columns; ++k) __builtin_prefetch(out + (column + k) * side + row, 1);
    for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t i = (first + r) / area, u = (first + r) % area;
        double* from = rows + r * stride;
        double* to = out + (row + r) * side + column;
        if (strip.left != strip.right) {
            make_row(packed, round, tiles, i, u, 0, from);
            for (std::int64_t k = 0; k < columns; ++k) to[k] += from[k];
            continue;
        }
        make_row(packed, round, tiles, i, u, u, from);
        for (std::int64_t j = 0; j < columns; j += area) {
            for (std::int64_t v = j + u; v < j + area; ++v) to[v] += from[v];
            for (std::int64_t v = j + u + 1; v < j + area; ++v) out[(column + v) * side + row + r] += from[v];
        }
    }
    if (strip.left == strip.right) return;
    for (std::int64_t k = 0; k < columns; ++k) {
        double* to = out + (column + k) * side + row;
        for (std::int64_t r = 0; r < count; ++r) to[r] += rows[r * stride + k];
    }
}

LRC_MULTIVERSION void collect(const Packed<float>& packed, const Round& round, const Strip& strip,
                              const PatchOffset& offset, double* tiles) {
    collect_offset(packed, round, strip, offset, tiles);
}

LRC_MULTIVERSION void collect(const Packed<double>& packed, const Round& round, const Strip& strip,
                              const PatchOffset& offset, double* tiles) {
    collect_offset(packed, round, strip, offset, tiles);
}

LRC_MULTIVERSION void add(const Packed<float>& packed, const Round& round, const Strip& strip,
                          const double* tiles, std::int64_t first, double* rows) {
    add_bundle(packed, round, strip, tiles, first, rows);
}

LRC_MULTIVERSION void add(const Packed<double>& packed, const Round& round, const Strip& strip,
                          const double* tiles, std::int64_t first, double* rows) {
    add_bundle(packed, round, strip, tiles, first, rows);
}

// Strips of all pairs of panels, those of one pair one after another.
template <class T> std::vector<Strip> list_strips(const Packed<T>& packed) {
    std::vector<Strip> strips;
    for (std::int64_t group = 0; group < packed.args.groups; ++group) {
        for (std::int64_t left = 0; left < packed.panels; ++left) {
            const std::int64_t rows = std::min(kPanel<T>, packed.args.channels - left * kPanel<T>);
            for (std::int64_t right = left; right < packed.panels; ++right) {
                for (std::int64_t first = 0; first < rows; first += packed.rows)
                    strips.push_back({group, left, right, first, std::min(packed.rows, rows - first)});
            }
        }
    }
    return strips;
}

// Collects and adds all offsets of some strips, as many offsets at a time as there is room for, at least one.
template <class T>
void add_strips(const Packed<T>& packed, const Strip* strips, std::int64_t count, std::int64_t room,
                const Buffer<double>& tiles, const std::vector<Buffer<double>>& rows) {
    const AutocorrelationArgs<T>& args = packed.args;
    const PatchOffset* last = args.offsets + args.offset_count;
    const std::int64_t bundles = divide_up(packed.rows * args.area, kBundle);
    for (Round round{args.offsets, args.offsets}; round.end < last; round.first = round.end) {
        do ++round.end;
        while (round.end < last &&
               2 * count * packed.tile * (round.end->end_cell - round.first->first_cell) <= room);
        const std::int64_t size = 2 * packed.tile * round.cells(), offsets = round.end - round.first;
        parallel_for(args.threads, count * offsets, [&](int, std::int64_t index) noexcept {
            const std::int64_t strip = index / offsets;
            collect(packed, round, strips[strip], round.first[index % offsets], tiles.get() + strip * size);
        });
        parallel_for(args.threads, count * bundles, [&](int worker, std::int64_t index) noexcept {
            const std::int64_t strip = index / bundles, first = index % bundles * kBundle;
            if (first < strips[strip].count * args.area)
                add(packed, round, strips[strip], tiles.get() + strip * size, first, rows[worker].get());
        });
    }
}

}  // namespace

template <class T> void autocorrelation(Cpu, const AutocorrelationArgs<T>& args) {
    const std::int64_t panels = divide_up(args.channels, kPanel<T>);
    const std::int64_t pixels_count = args.batch * args.sizes[0] * args.sizes[1] * args.sizes[2];
    std::vector<std::int64_t> windows(args.area * args.area);
    std::int64_t cells = 0, most_cells = 0;
    for (std::int64_t o = 0; o < args.offset_count; ++o) {
        const PatchOffset& offset = args.offsets[o];
        cells += offset.end_cell - offset.first_cell;
        most_cells = std::max(most_cells, offset.end_cell - offset.first_cell);
        for (std::int64_t w = offset.first_window; w < offset.end_window; ++w)
            windows[args.windows[w].u * args.area + args.windows[w].v] = w;
    }
    // Half of what the images take, so that small images with large kernels need little memory.
    const std::int64_t images = pixels_count * args.groups * args.channels * sizeof(T);
    const std::int64_t room = std::clamp<std::int64_t>(images / 2 / sizeof(double), kLeastRoom, kMostRoom);
    std::int64_t rows = kPanel<T>;
    while (rows > kLeastRows && 2 * cells * rows * kPanel<T> > room) rows /= 2;
    const std::int64_t tile = rows * kPanel<T>;
    const Buffer<T> pixels = pack(args, panels);
    const Packed<T> packed{args, pixels.get(), panels, pixels_count * kPanel<T>, windows.data(), rows, tile};
    const std::vector<Strip> strips = list_strips(packed);
    const auto all = static_cast<std::int64_t>(strips.size());
    const std::int64_t at_once = std::clamp<std::int64_t>(room / (2 * cells * tile), 1, all);
    const Buffer<double> tiles =
        make_buffer<double>(2 * tile * std::max(most_cells, std::min(at_once * cells, room / (2 * tile))));
    std::vector<Buffer<double>> bundles;
    const std::int64_t bundle_count = at_once * divide_up(rows * args.area, kBundle);
    for (int worker = 0; worker < worker_count(args.threads, bundle_count); ++worker)
        bundles.push_back(make_buffer<double>(kBundle * kPanel<T> * args.area));
    for (std::int64_t first = 0; first < all; first += at_once)
        add_strips(packed, &strips[first], std::min(at_once, all - first), room, tiles, bundles);
}

template void autocorrelation(Cpu, const AutocorrelationArgs<float>&);
template void autocorrelation(Cpu, const AutocorrelationArgs<double>&);

}  // namespace lrc
