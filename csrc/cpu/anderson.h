// Anderson acceleration: extrapolates a sequence of iterates.
#pragma once

#include <cstdint>
#include <vector>

namespace lrc {

// Of iterates M_0 ... M_K of a fixed-point iteration, the affine combination of M_1 ... M_K whose moves
// M_k+1 - M_k add up to as little as can be (Anderson 1965; Bertrand & Massias 2021 for coordinate descent).
class Anderson {
  public:
    explicit Anderson(std::int64_t outputs) : outputs_(outputs) {}

    void clear() { count_ = 0; }

    // Keeps the rows of M that `support` names, in place of all that is kept where they are others than
    // before; true when there are enough to combine.
    bool push(const double* solution, const std::vector<std::int64_t>& support);

    // Overwrites the rows with the combination; false where the moves do not determine one.
    bool combine(double* solution) const;

    // Overwrites the rows with the iterate that was pushed last.
    void restore(double* solution) const;

  private:
    static constexpr int kMoves = 5;

    const double* iterate(int k) const { return iterates_.data() + k * size_; }
    bool weights(double (&weights)[kMoves]) const;
    void scatter(const double* rows, double* solution) const;

    std::int64_t outputs_;
    std::int64_t size_ = 0;  // entries of the rows
    int count_ = 0;
    std::vector<std::int64_t> support_;
    std::vector<double> iterates_;  // [kMoves + 1, size_]
};

}  // namespace lrc
