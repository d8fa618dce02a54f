// Which kernel runs a GEMM.
#pragma once

#include <array>
#include <string>

#include "cuda/kernels.h"

namespace flexq::cuda {

struct Candidate {
  GemmPlan plan;
  double microseconds;  // by the model of cost: in a linear layer, its quantizer not counted
};

// The plans that could run a GEMM, cheapest first; plainly bad ones are left out. Every call makes this: no allocation.
class Candidates {
 public:
  Candidates(const Device& device, const flexq_weight_desc& desc, int32_t act_bits, int64_t m);

  const Candidate* begin() const { return items_.data(); }
  const Candidate* end() const { return items_.data() + count_; }
  const Candidate& best() const { return items_[0]; }
  // The candidate of this name; throws FLEXQ_INVALID_ARGUMENT.
  const Candidate& named(const char* name) const;

 private:
  std::array<Candidate, 64> items_;  // room for every config and way to split
  size_t count_ = 0;
};

// E.g. "wgmma-s8 128x32 split2 cast2": the instruction, a tile's rows x tokens, parts of K, CTAs that share
// activations. "wgmma-s8 128x128 stream": stream-K.
struct PlanName {
  char text[48];
};
PlanName name_of(const GemmPlan& plan);

}  // namespace flexq::cuda
