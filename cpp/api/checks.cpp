#include "api/checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/format.h"

namespace flexq::api {
namespace {

// Sizes of everything derived from a tensor of `rows` x `k` stay below this, so no later product can overflow.
constexpr int64_t kMaxElements = int64_t{1} << 46;
// Where all of K is summed before scaling, |sum| <= 2^(bits - 1) * 127 * k must fit in int32.
constexpr int64_t max_channel_k(int bits) { return std::numeric_limits<int32_t>::max() / (code_offset(bits) * 127); }
constexpr int kFewestBits = 4;

// of: what the fields are of, as "gate_up.", or nothing.
void check_bits(const char* of, int32_t weight_bits) {
  if (!is_weight_bits(weight_bits)) {
    fail(FLEXQ_UNSUPPORTED, of, "weight_bits must be 4, 5, 6 or 8, got ", weight_bits);
  }
}

// bits: the weight's, or the fewest there are for an activation by itself.
void check_format(const char* of, int bits, const char* k_name, int64_t k, flexq_scheme scheme,
                  flexq_rotation rotation) {
  require(scheme == FLEXQ_SCHEME_GROUP || scheme == FLEXQ_SCHEME_CHANNEL, of,
          "scheme must be 0 (group) or 1 (channel), got ", scheme);
  require(rotation == FLEXQ_ROTATION_NONE || rotation == FLEXQ_ROTATION_HADAMARD128, of,
          "rotation must be 0 (none) or 1 (hadamard128), got ", rotation);
  if (scheme == FLEXQ_SCHEME_CHANNEL && padded_k(k) > max_channel_k(bits)) {
    fail(FLEXQ_UNSUPPORTED, "scheme channel sums all of K in int32: with weights of ", bits, " bits, ", k_name,
         " must be at most ", max_channel_k(bits) / kGroup * kGroup, ", got ", k, "; use scheme group");
  }
}

void check_shape(int bits, int64_t rows, const char* rows_name, int64_t k, flexq_scheme scheme,
                 flexq_rotation rotation) {
  require(rows >= 0, rows_name, " must be 0 or more, got ", rows);
  require(k >= 1, "k must be 1 or more, got ", k);
  require(k <= kMaxElements, "k must be at most 2^46, got ", k);
  require(rows <= kMaxElements / padded_k(k), rows_name, " * k is too large: ", rows, " * ", k,
          " (at most 2^46 elements)");
  check_format("", bits, "k", k, scheme, rotation);
}

void check_act_bits(const char* of, int32_t act_bits) {
  if (act_bits != 6 && act_bits != 8) fail(FLEXQ_UNSUPPORTED, of, "act_bits must be 6 or 8, got ", act_bits);
}

void check_alignment(const void* p, const char* name, size_t alignment) {
  require(reinterpret_cast<uintptr_t>(p) % alignment == 0, name, " must be aligned to ", alignment, " bytes, got ", p);
}

// A caller's struct, as far as this version knows it.
template <typename Struct>
Struct read_struct(const Struct* given, const char* name) {
  require(given != nullptr, name, " must not be null");
  const size_t size = struct_size_of(given, name, sizeof(Struct));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char b) { return b != 0; })) {
    fail(FLEXQ_UNSUPPORTED, name, " was made for a later version: of its ", size, " bytes this one knows ",
         sizeof(Struct), ", and the rest is not zero");
  }
  return *given;
}

void check_reserved(int32_t reserved, const char* name) {
  if (reserved != 0) fail(FLEXQ_UNSUPPORTED, name, ".reserved must be 0 in this version, got ", reserved);
}

}  // namespace

size_t struct_size_of(const void* given, const char* name, size_t known) {
  constexpr size_t kMaxStructBytes = 4096;  // so that nothing far behind a struct without its size set is read
  size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  require(size >= known && size <= kMaxStructBytes, name, ".struct_size must be sizeof the struct, ", known,
          " bytes in this version; its FLEXQ_..._INIT sets it; got ", size);
  return size;
}

Target target_of(const flexq_stream* given) {
  const flexq_stream stream = read_struct(given, "stream");
  if (stream.device == FLEXQ_CPU) {
    require(stream.handle == nullptr, "stream.handle must be null for the CPU, got ",
            static_cast<const void*>(stream.handle));
    if (stream.executor != nullptr) {
      const flexq_executor executor = read_struct(stream.executor, "executor");
      check_reserved(executor.reserved, "executor");
      require(executor.num_threads >= 1, "executor.num_threads must be 1 or more, got ", executor.num_threads);
      require(executor.parallel_for != nullptr, "executor.parallel_for must not be null");
    }
    cpu_backend().check_available(stream.device_index);
    const char* isa = cpu_backend().isa(0);
    require(stream.kernel == nullptr || std::strcmp(stream.kernel, isa) == 0, "stream.kernel must be null or ", isa,
            " on this CPU, got ", stream.kernel == nullptr ? "" : stream.kernel);
    return {stream, cpu_backend()};
  }
  require(stream.device == FLEXQ_CUDA, "device must be 0 (cpu) or 1 (cuda), got ", stream.device);
  require(stream.executor == nullptr, "stream.executor must be null for CUDA, got ",
          static_cast<const void*>(stream.executor));
  const Backend* cuda = cuda_backend();
  if (cuda == nullptr) fail(FLEXQ_UNAVAILABLE, "this build of libflexq has no CUDA; build it with FLEXQ_CUDA=ON");
  cuda->check_available(stream.device_index);
  return {stream, *cuda};
}

flexq_stream cpu_stream_of(const flexq_stream* stream, const char* function) {
  const Target target = target_of(stream);
  if (target.stream.device != FLEXQ_CPU) {
    fail(FLEXQ_UNSUPPORTED, function, " works on host memory: stream.device must be 0 (cpu), got 1 (cuda)");
  }
  return target.stream;
}

flexq_weight_desc weight_of(const flexq_weight_desc* given) {
  const flexq_weight_desc desc = read_struct(given, "desc");
  check_reserved(desc.reserved, "desc");
  check_bits("", desc.weight_bits);
  check_shape(desc.weight_bits, desc.n, "n", desc.k, desc.scheme, desc.rotation);
  return desc;
}

flexq_activation_desc activation_of(const flexq_activation_desc* given) {
  const flexq_activation_desc desc = read_struct(given, "activation desc");
  check_reserved(desc.reserved, "activation desc");
  check_shape(kFewestBits, desc.m, "m", desc.k, desc.scheme, desc.rotation);
  check_act_bits("", desc.act_bits);
  return desc;
}

flexq_activation_desc activation_of(const flexq_weight_desc& weight, int32_t act_bits, int64_t m) {
  const flexq_activation_desc desc{
      sizeof(flexq_activation_desc), m, weight.k, act_bits, weight.scheme, weight.rotation, 0};
  return activation_of(&desc);
}

flexq_experts_desc experts_of(const flexq_experts_desc* given) {
  const flexq_experts_desc desc = read_struct(given, "desc");
  check_reserved(desc.reserved, "desc");
  const auto check_size = [](const char* name, int64_t size) {
    require(size >= 1, name, " must be 1 or more, got ", size);
    require(size <= kMaxElements / kGroup, name, " must be at most 2^39, got ", size);
  };
  check_size("experts", desc.experts);
  check_size("hidden", desc.hidden);
  check_size("intermediate", desc.intermediate);
  const int64_t of_an_expert = 2 * padded_k(desc.intermediate);
  require(of_an_expert <= kMaxElements / padded_k(desc.hidden) &&
              desc.experts <= kMaxElements / (of_an_expert * padded_k(desc.hidden)),
          "experts * 2 * intermediate * hidden is too large: ", desc.experts, " * 2 * ", desc.intermediate, " * ",
          desc.hidden, " (at most 2^46 elements)");
  for (const flexq_projection projection : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
    const bool up = projection == FLEXQ_GATE_UP;
    const flexq_projection_format& format = format_of(desc, projection);
    const char* of = up ? "gate_up." : "down.";
    check_bits(of, format.weight_bits);
    check_format(of, format.weight_bits, up ? "hidden" : "intermediate", up ? desc.hidden : desc.intermediate,
                 format.scheme, format.rotation);
    check_act_bits(of, format.act_bits);
  }
  require(desc.layout == FLEXQ_GATE_UP_CONCATENATED || desc.layout == FLEXQ_GATE_UP_INTERLEAVED,
          "layout must be 0 (concatenated) or 1 (interleaved), got ", desc.layout);
  require(desc.function == FLEXQ_GATE_SILU || desc.function == FLEXQ_GATE_GELU || desc.function == FLEXQ_GATE_GELU_TANH,
          "function must be 0 (silu), 1 (gelu) or 2 (gelu_tanh), got ", desc.function);
  require(std::isfinite(desc.alpha), "alpha must be finite, got ", desc.alpha);
  require(desc.limit >= 0.0f, "limit must be 0 (none) or more, got ", desc.limit);
  require(std::isfinite(desc.up_offset), "up_offset must be finite, got ", desc.up_offset);
  return desc;
}

flexq_routing routing_of(const flexq_routing* given) {
  const flexq_routing routing = read_struct(given, "routing");
  check_reserved(routing.reserved, "routing");
  require(routing.ids_type == FLEXQ_I32 || routing.ids_type == FLEXQ_I64,
          "ids_type must be 0 (int32) or 1 (int64), got ", routing.ids_type);
  check_dtype(routing.weights_dtype, "weights_dtype");
  require(routing.weights_on_input == 0 || routing.weights_on_input == 1, "weights_on_input must be 0 or 1, got ",
          routing.weights_on_input);
  require(routing.map_size >= 0, "map_size must be 0 or more, got ", routing.map_size);
  require((routing.expert_map == nullptr) == (routing.map_size == 0), "expert_map and map_size go together: one is ",
          routing.expert_map == nullptr ? "null" : "given", ", the other is ", routing.map_size);
  if (routing.expert_map != nullptr) check_alignment(routing.expert_map, "expert_map", sizeof(int32_t));
  return routing;
}

void check_projection(flexq_projection projection) {
  require(projection == FLEXQ_GATE_UP || projection == FLEXQ_DOWN, "projection must be 0 (gate_up) or 1 (down), got ",
          projection);
}

void check_pairs(const flexq_experts_desc& desc, int64_t m, int64_t top_k) {
  constexpr int64_t kMaxTopK = 65536;
  require(m >= 0, "m must be 0 or more, got ", m);
  require(top_k >= 1 && top_k <= kMaxTopK, "top_k must be 1 to ", kMaxTopK, ", got ", top_k);
  const int64_t of_a_pair = padded_k(std::max(desc.hidden, 2 * desc.intermediate));
  require(m <= kMaxElements / (of_a_pair * top_k),
          "m * top_k * the larger of hidden and 2 * intermediate is too large: ", m, " * ", top_k, " * ",
          std::max(desc.hidden, 2 * desc.intermediate), " (at most 2^46 elements)");
}

void check_output_shape(int64_t m, int64_t n) {
  require(n == 0 || m <= kMaxElements / n, "m * n is too large: ", m, " * ", n, " (at most 2^46 elements)");
}

void check_dtype(flexq_dtype dtype, const char* name) {
  require(dtype == FLEXQ_F32 || dtype == FLEXQ_F16 || dtype == FLEXQ_BF16, name,
          " must be 0 (f32), 1 (f16) or 2 (bf16), got ", dtype);
}

void check_matrix(const void* p, const char* name, int64_t rows, int64_t cols, int64_t ld, const char* ld_name,
                  size_t element_size) {
  require(ld >= cols, ld_name, " must be at least the row length ", cols, ", got ", ld);
  require(rows == 0 || ld <= kMaxElements / rows, ld_name, " is too large: ", rows, " rows of ", ld,
          " elements (at most 2^46)");
  if (rows == 0 || cols == 0) return;
  require(p != nullptr, name, " must not be null");
  check_alignment(p, name, element_size);
}

void check_array(const void* p, const char* name, size_t count, size_t element_size) {
  if (count == 0) return;
  require(p != nullptr, name, " must not be null");
  check_alignment(p, name, element_size);
}

void check_buffer(const void* p, const char* name, size_t given, size_t needed) {
  require(given >= needed, name, " must have at least ", needed, " bytes, got ", given);
  if (needed == 0) return;
  require(p != nullptr, name, " must not be null");
  check_alignment(p, name, FLEXQ_ALIGNMENT);
}

void check_result(const void* p, const char* name) { require(p != nullptr, name, " must not be null"); }

}  // namespace flexq::api
