#include "core/backend.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/executor.h"
#include "core/quantize_weight.h"
#include "cpu/activation.h"
#include "cpu/experts.h"
#include "cpu/kernels.h"
#include "cpu/prepack.h"

namespace flexq {
namespace cpu {
namespace {

class CpuBackend final : public Backend {
 public:
  void check_available(int32_t device_index) const override {
    if (device_index != 0) fail(FLEXQ_UNAVAILABLE, "device_index must be 0 for the CPU, got ", device_index);
    require_wanted_isa();
  }
  const char* isa(int32_t) const override { return kernels().isa; }

  int64_t quantize_weight(const flexq_stream& stream, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                          int64_t ldw, uint8_t* planes, uint16_t* scales) const override {
    return flexq::quantize_weight(stream.executor, desc, w, dtype, ldw, planes, scales);
  }
  void pack_codes(const flexq_stream& stream, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                  uint8_t* planes) const override {
    flexq::pack_codes(stream.executor, desc, codes, ldc, planes);
  }

  size_t prepack_size(const flexq_weight_desc& desc) const override { return cpu::prepack_size(desc); }
  void prepack(const flexq_stream& stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
               void* prepacked) const override {
    cpu::prepack(stream.executor, desc, planes, scales, prepacked);
  }
  void unprepack(const flexq_stream& stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
                 uint16_t* scales) const override {
    cpu::unprepack(stream.executor, desc, prepacked, planes, scales);
  }

  size_t activation_size(const flexq_activation_desc& desc) const override { return ActivationLayout(desc).size; }

  void quantize_activation(const flexq_stream& stream, const flexq_activation_desc& desc,
                           const ActivationSource& source, void* quantized) const override {
    const QuantizeArgs args{desc, source, ActivationLayout(desc).at(quantized)};
    // Below this many values, waking a thread costs more than it saves.
    constexpr int64_t kValuesWorthAThread = 16384;
    const int64_t at_least = ceil_div(kValuesWorthAThread, padded_k(desc.k));
    parallel_ranges(stream.executor, desc.m, balanced_grain(stream.executor, desc.m, at_least),
                    [&](int64_t begin, int64_t end) { kernels().quantize(args, begin, end); });
  }

  void activation_export(const flexq_stream&, const flexq_activation_desc& desc, const void* quantized, int8_t* codes,
                         float* scales) const override {
    const Activation act = ActivationLayout(desc).at(const_cast<void*>(quantized));
    const int64_t groups = num_groups(desc.k);
    const int64_t token_scales = scales_per_token(desc);
    for (int64_t t = 0; t < desc.m; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(codes + (t * groups + g) * kGroup, act.codes + (g * desc.m + t) * kGroup, kGroup);
      }
      for (int64_t g = 0; g < token_scales; ++g) scales[t * token_scales + g] = act.scales[g * desc.m + t];
    }
  }

  size_t gemm_workspace_size(const flexq_stream&, const flexq_weight_desc&, int32_t, int64_t) const override {
    return 0;
  }

  int32_t gemm_kernels(const flexq_stream&, const flexq_weight_desc&, int32_t, int64_t, flexq_kernel_info* infos,
                       int32_t capacity) const override {
    if (capacity > 0) {
      infos[0] = {};
      std::strncpy(infos[0].name, kernels().isa, sizeof infos[0].name - 1);
    }
    return 1;
  }

  void gemm(const flexq_stream& stream, const GemmCall& call) const override {
    const GemmArgs args{call.desc,
                        packed_weight(call.desc, call.prepacked),
                        call.act_desc.m,
                        call.act_desc.act_bits,
                        ActivationLayout(call.act_desc).at(const_cast<void*>(call.quantized)),
                        call.bias,
                        call.bias_dtype,
                        call.y,
                        call.y_dtype,
                        call.ldy};
    const int64_t blocks = ceil_div(call.desc.n, kBlockRows);
    // A piece is some blocks of rows for some tokens. Rows are split first, tokens only where rows are too few.
    constexpr int64_t kProductsWorthAThread = 1 << 16;
    const int64_t block_products = kBlockRows * padded_k(call.desc.k) * std::max<int64_t>(args.m, 1);
    const int64_t grain = balanced_grain(stream.executor, blocks, ceil_div(kProductsWorthAThread, block_products));
    const int64_t row_pieces = std::max<int64_t>(ceil_div(blocks, grain), 1);
    const int64_t row_grain = std::max<int64_t>(ceil_div(blocks, row_pieces), 1);  // alike, so that no thread waits
    const int64_t threads = stream.executor == nullptr ? 1 : stream.executor->num_threads;
    constexpr int64_t kTokenGrain = 64;
    const int64_t token_pieces =
        row_pieces >= threads ? 1 : std::min(ceil_div(threads, row_pieces), ceil_div(args.m, kTokenGrain));
    const int64_t token_grain =
        ceil_div(ceil_div(args.m, std::max<int64_t>(token_pieces, 1)), kTokenGrain) * kTokenGrain;
    const int64_t columns = token_grain == 0 ? 0 : ceil_div(args.m, token_grain);
    parallel_ranges(stream.executor, row_pieces * columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t row = piece / columns * row_grain;
        const int64_t token = piece % columns * token_grain;
        kernels().gemm(args, row, std::min(blocks, row + row_grain), token, std::min(args.m, token + token_grain));
      }
    });
  }

  void experts_prepack(const flexq_stream& stream, const flexq_experts_desc& desc, flexq_projection projection,
                       int64_t first, int64_t count, const uint8_t* planes, const uint16_t* scales,
                       void* prepacked) const override {
    check_expert_scales(desc, projection, first, count, scales);  // all of them, before anything is written
    Backend::experts_prepack(stream, desc, projection, first, count, planes, scales, prepacked);
  }

  size_t experts_workspace_size(const flexq_stream&, const flexq_experts_desc& desc, int64_t m, int64_t top_k,
                                flexq_dtype x_dtype) const override {
    return cpu::experts_workspace_size(desc, m, top_k, x_dtype);
  }
  void experts_forward(const flexq_stream& stream, const ExpertsCall& call) const override {
    cpu::experts_forward(stream.executor, call, expert_bytes(call.desc, FLEXQ_GATE_UP),
                         expert_bytes(call.desc, FLEXQ_DOWN));
  }
};

}  // namespace
}  // namespace cpu

const Backend& cpu_backend() {
  static const cpu::CpuBackend backend;
  return backend;
}

}  // namespace flexq
