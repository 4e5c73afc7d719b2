#include "ops/gram.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

// A block of rows is multiplied by all rows up to its last, a chunk of terms at a time. Its chunk is packed
// once, as float64, and stays in the L2 cache; the other rows are packed one panel after another into the L1
// cache and are used at once (Goto & van de Geijn 2008). Both sides are panels of the same layout, of which
// the kernel reads one as vectors and one as numbers to broadcast.

namespace lrc {
namespace {

constexpr std::int64_t kRows = 4;     // of the kernel: with kPanel columns it fills the 16 registers of AVX2
constexpr std::int64_t kPanel = 12;   // rows of A side by side, term by term: [terms, kPanel]
constexpr std::int64_t kTerms = 128;  // two panels of a chunk fit the L1 cache
constexpr std::int64_t kBlock = 192;  // rows: a multiple of kPanel, whose chunk fits the L2 cache
constexpr std::int64_t kVectors = kPanel / kLanes;
constexpr std::int64_t kPanelSize = kTerms * kPanel;
// Multiplications that are worth handing out on their own: some microseconds.
constexpr std::int64_t kGrain = 1 << 16;

// Rows [begin, end) of one problem's product.
struct Task {
    std::int64_t problem;
    std::int64_t begin;
    std::int64_t end;
    std::int64_t work;  // multiplications
};

typedef float FloatVec __attribute__((vector_size(16), aligned(4), may_alias));
typedef double LooseVec __attribute__((vector_size(32), aligned(8), may_alias));
typedef std::int64_t Lanes __attribute__((vector_size(32)));

LRC_INLINE Vec load_as_double(const float* p) {
    return __builtin_convertvector(*reinterpret_cast<const FloatVec*>(p), Vec);
}
LRC_INLINE Vec load_as_double(const double* p) { return *reinterpret_cast<const LooseVec*>(p); }

// Four terms of four rows, each row contiguous.
template <class T> LRC_INLINE void pack_transposed(const T* from, std::int64_t row_stride, double* to) {
    const Vec a = load_as_double(from), b = load_as_double(from + row_stride);
    const Vec c = load_as_double(from + 2 * row_stride), d = load_as_double(from + 3 * row_stride);
    const Vec ab_even = __builtin_shuffle(a, b, Lanes{0, 4, 2, 6});
    const Vec ab_odd = __builtin_shuffle(a, b, Lanes{1, 5, 3, 7});
    const Vec cd_even = __builtin_shuffle(c, d, Lanes{0, 4, 2, 6});
    const Vec cd_odd = __builtin_shuffle(c, d, Lanes{1, 5, 3, 7});
    store(to, __builtin_shuffle(ab_even, cd_even, Lanes{0, 1, 4, 5}));
    store(to + kPanel, __builtin_shuffle(ab_odd, cd_odd, Lanes{0, 1, 4, 5}));
    store(to + 2 * kPanel, __builtin_shuffle(ab_even, cd_even, Lanes{2, 3, 6, 7}));
    store(to + 3 * kPanel, __builtin_shuffle(ab_odd, cd_odd, Lanes{2, 3, 6, 7}));
}

// Rows [row, row + kPanel) and terms [term, term + terms) of A; rows from `side` on become zeros.
template <class T>
LRC_INLINE void pack(const GramProblem<T>& problem, std::int64_t row, std::int64_t term, std::int64_t terms,
                     double* to) {
    if (terms == 0) return;  // a matrix without entries may have no memory
    const T* from = problem.matrix + row * problem.row_stride + term * problem.column_stride;
    const std::int64_t rows = std::min(kPanel, problem.side - row);
    if (rows < kPanel) std::fill_n(to, terms * kPanel, 0.0);
    if (rows == kPanel && problem.row_stride == 1) {
        for (std::int64_t k = 0; k < terms; ++k) {
            for (std::int64_t i = 0; i < kPanel; i += kLanes) {
                store(to + k * kPanel + i, load_as_double(from + k * problem.column_stride + i));
            }
        }
        return;
    }
    std::int64_t packed = 0;
    if (problem.column_stride == 1) {
        packed = rows / kLanes * kLanes;
        for (std::int64_t i = 0; i < packed; i += kLanes) {
            const T* quad = from + i * problem.row_stride;
            std::int64_t k = 0;
            for (; k + kLanes <= terms; k += kLanes) {
                pack_transposed(quad + k, problem.row_stride, to + k * kPanel + i);
            }
            for (; k < terms; ++k) {
                for (std::int64_t r = 0; r < kLanes; ++r)
                    to[k * kPanel + i + r] = quad[r * problem.row_stride + k];
            }
        }
    }
    for (std::int64_t i = packed; i < rows; ++i) {
        for (std::int64_t k = 0; k < terms; ++k) {
            to[k * kPanel + i] = from[i * problem.row_stride + k * problem.column_stride];
        }
    }
}

// What a chunk adds to kRows rows and kPanel columns of the product.
struct Sums {
    Vec rows[kRows][kVectors];
};

LRC_INLINE Sums multiply(const double* rows, const double* columns, std::int64_t terms) {
    Sums sums{};
    for (std::int64_t k = 0; k < terms; ++k) {
        LRC_UNROLL
        for (std::int64_t i = 0; i < kRows; ++i) {
            LRC_UNROLL
            for (std::int64_t v = 0; v < kVectors; ++v) {
                // A number times a vector: the compiler then broadcasts as it loads, which `splat` prevents.
                sums.rows[i][v] += rows[k * kPanel + i] * load(columns + k * kPanel + v * kLanes);
            }
        }
    }
    return sums;
}

// Adds, or for the first chunk assigns, the part of `sums` on and below the diagonal. `out` is the product's
// entry (row, column).
LRC_INLINE void write(const Sums& sums, double* out, std::int64_t side, std::int64_t row, std::int64_t column,
                      bool first) {
    for (std::int64_t i = 0; i < std::min(kRows, side - row); ++i) {
        const double* from = reinterpret_cast<const double*>(sums.rows[i]);
        double* to = out + i * side;
        const std::int64_t width = std::min(kPanel, row + i + 1 - column);
        if (first) {
            std::copy_n(from, std::max<std::int64_t>(width, 0), to);
        } else if (width == kPanel) {
            for (std::int64_t j = 0; j < kPanel; ++j) to[j] += from[j];
        } else {
            for (std::int64_t j = 0; j < width; ++j) to[j] += from[j];
        }
    }
}

// One panel of columns of the product, from the diagonal or row `begin` down to row `end`.
LRC_INLINE void multiply_panel(const double* block, const double* columns, std::int64_t column,
                               const Task& task, std::int64_t side, std::int64_t terms, double* out,
                               bool first) {
    for (std::int64_t row = std::max(task.begin, column); row < task.end; row += kRows) {
        const std::int64_t inside = row - task.begin;
        const double* rows = block + inside / kPanel * kPanelSize + inside % kPanel;
        write(multiply(rows, columns, terms), out + row * side + column, side, row, column, first);
    }
}

template <class T>
LRC_INLINE void multiply_block(const GramProblem<T>& problem, const Task& task, double* scratch,
                               double* out) {
    double* block = scratch + kPanelSize;
    // At least once: without terms the product is zero.
    for (std::int64_t term = 0; term == 0 || term < problem.terms; term += kTerms) {
        const std::int64_t terms = std::min(kTerms, problem.terms - term);
        for (std::int64_t row = task.begin; row < task.end; row += kPanel) {
            pack(problem, row, term, terms, block + (row - task.begin) * kTerms);
        }
        for (std::int64_t column = 0; column < task.end; column += kPanel) {
            const double* columns = scratch;
            if (column < task.begin) {
                pack(problem, column, term, terms, scratch);
            } else {
                columns = block + (column - task.begin) * kTerms;
            }
            multiply_panel(block, columns, column, task, problem.side, terms, out, term == 0);
        }
    }
}

LRC_MULTIVERSION void run(const GramProblem<float>& problem, const Task& task, double* scratch, double* out) {
    multiply_block(problem, task, scratch, out);
}

LRC_MULTIVERSION void run(const GramProblem<double>& problem, const Task& task, double* scratch,
                          double* out) {
    multiply_block(problem, task, scratch, out);
}

template <class T> std::vector<Task> make_tasks(const GramArgs<T>& args) {
    std::vector<Task> tasks;
    for (std::int64_t i = 0; i < args.count; ++i) {
        const GramProblem<T>& problem = args.problems[i];
        for (std::int64_t begin = 0; begin < problem.side; begin += kBlock) {
            const std::int64_t end = std::min(begin + kBlock, problem.side);
            tasks.push_back({i, begin, end, (end - begin) * (end + kPanel) * problem.terms});
        }
    }
    // The largest first: the small ones then fill the gaps at the end.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.work > b.work; });
    return tasks;
}

// Where runs of tasks worth handing out begin, and the end of the last.
std::vector<std::size_t> cut_into_runs(const std::vector<Task>& tasks) {
    std::vector<std::size_t> cuts{0};
    std::int64_t work = 0;
    for (std::size_t i = 0; i < tasks.size(); ++i) {
        work += tasks[i].work;
        if (work < kGrain && i + 1 < tasks.size()) continue;
        cuts.push_back(i + 1);
        work = 0;
    }
    return cuts;
}

struct Free {
    void operator()(double* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<double, Free>;

Scratch make_scratch() {
    void* p = std::aligned_alloc(sizeof(Vec), (kPanelSize + kTerms * kBlock) * sizeof(double));
    if (p == nullptr) throw std::bad_alloc();
    return Scratch(static_cast<double*>(p));
}

}  // namespace

template <class T> void gram(Cpu, const GramArgs<T>& args) {
    const std::vector<Task> tasks = make_tasks(args);
    const std::vector<std::size_t> cuts = cut_into_runs(tasks);
    const auto runs = static_cast<std::int64_t>(cuts.size()) - 1;
    std::vector<Scratch> scratch;
    for (int worker = 0; worker < worker_count(args.threads, runs); ++worker)
        scratch.push_back(make_scratch());
    parallel_for(args.threads, runs, [&](int worker, std::int64_t index) noexcept {
        for (std::size_t i = cuts[index]; i < cuts[index + 1]; ++i) {
            const GramProblem<T>& problem = args.problems[tasks[i].problem];
            run(problem, tasks[i], scratch[worker].get(), args.out + problem.out_offset);
        }
    });
}

template void gram(Cpu, const GramArgs<float>&);
template void gram(Cpu, const GramArgs<double>&);

}  // namespace lrc
