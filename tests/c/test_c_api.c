/* flexq.h from C99: a linear layer end to end, and errors as statuses. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flexq/flexq.h"

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, flexq_last_error()); \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

static void* allocate(size_t bytes, void** block) {
  *block = malloc(bytes + FLEXQ_ALIGNMENT);
  CHECK(*block != NULL);
  return (char*)*block + (FLEXQ_ALIGNMENT - (uintptr_t)*block % FLEXQ_ALIGNMENT) % FLEXQ_ALIGNMENT;
}

int main(void) {
  enum { N = 5, K = 200, M = 3 };
  const flexq_stream cpu = FLEXQ_STREAM_INIT;
  flexq_weight_desc desc = FLEXQ_WEIGHT_DESC_INIT;
  flexq_activation_desc act = FLEXQ_ACTIVATION_DESC_INIT;
  flexq_experts_desc experts = FLEXQ_EXPERTS_DESC_INIT;
  const flexq_routing routing = FLEXQ_ROUTING_INIT;
  flexq_executor executor = FLEXQ_EXECUTOR_INIT;
  flexq_kernel_info info = FLEXQ_KERNEL_INFO_INIT;
  int32_t count = 0;
  float w[N * K], back[N * K], x[M * K], y[M * N];
  size_t planes_bytes = 0, scales_bytes = 0, packed_bytes = 0, workspace_bytes = 0;
  void *blocks[2], *packed, *workspace;
  uint8_t* planes;
  uint16_t* scales;
  const char* isa = NULL;
  const char* table = NULL;
  const char* text = NULL;
  int i, j, k;

  desc.n = N;
  desc.k = K;
  act.m = M;
  act.k = K;

  CHECK(flexq_version_number() == FLEXQ_VERSION_MAJOR * 10000 + FLEXQ_VERSION_MINOR * 100 + FLEXQ_VERSION_PATCH);
  CHECK(strlen(flexq_version()) >= 5);
  CHECK(flexq_device_isa(FLEXQ_CPU, 0, &isa) == FLEXQ_OK && isa != NULL);
  CHECK(flexq_cost_table(&cpu, &table, &text) == FLEXQ_OK && strcmp(table, "none") == 0 && strcmp(text, "") == 0);
  CHECK(flexq_cost_table(&cpu, NULL, &text) == FLEXQ_INVALID_ARGUMENT);

  for (i = 0; i < N * K; ++i) w[i] = (float)sin(i * 0.7) * 0.1f;
  for (i = 0; i < M * K; ++i) x[i] = (float)cos(i * 0.3);

  CHECK(flexq_weight_size(&desc, &planes_bytes, &scales_bytes) == FLEXQ_OK);
  CHECK(planes_bytes == N * 2 * 96 && scales_bytes == N * 2 * 2);
  planes = (uint8_t*)malloc(planes_bytes);
  scales = (uint16_t*)malloc(scales_bytes);
  CHECK(flexq_quantize_weight(&cpu, &desc, w, FLEXQ_F32, K, planes, scales, NULL) == FLEXQ_OK);
  CHECK(flexq_dequantize_weight(&cpu, &desc, planes, scales, back, FLEXQ_F32, K) == FLEXQ_OK);

  CHECK(flexq_prepack_size(&cpu, &desc, &packed_bytes) == FLEXQ_OK);
  packed = allocate(packed_bytes, &blocks[0]);
  CHECK(flexq_prepack(&cpu, &desc, planes, scales, packed, packed_bytes) == FLEXQ_OK);
  CHECK(flexq_linear_workspace_size(&cpu, &desc, 8, M, &workspace_bytes) == FLEXQ_OK);
  workspace = allocate(workspace_bytes, &blocks[1]);
  CHECK(flexq_linear(&cpu, &desc, packed, packed_bytes, 8, M, x, FLEXQ_F32, K, NULL, FLEXQ_F32, y, FLEXQ_F32, N,
                     workspace, workspace_bytes) == FLEXQ_OK);
  for (i = 0; i < M; ++i) {
    for (j = 0; j < N; ++j) {
      double expected = 0;
      for (k = 0; k < K; ++k) expected += (double)x[i * K + k] * back[j * K + k];
      CHECK(fabs(y[i * N + j] - expected) < 0.05); /* the activations' 8 bits */
    }
  }

  CHECK(flexq_activation_size(&cpu, &act, &workspace_bytes) == FLEXQ_OK && workspace_bytes >= M * 256);
  CHECK(executor.struct_size == sizeof executor && executor.num_threads == 1);
  CHECK(flexq_gemm_kernels(&cpu, &desc, 8, M, &info, 1, &count) == FLEXQ_OK && count == 1);
  CHECK(strcmp(info.name, isa) == 0);

  CHECK(experts.struct_size == sizeof experts && experts.down.weight_bits == FLEXQ_WEIGHT_BITS);
  CHECK(experts.gate_up.act_bits == 8 && experts.alpha == 1.0f && experts.limit == 0.0f);
  CHECK(routing.struct_size == sizeof routing && routing.top_k == 1);
  experts.experts = 3;
  experts.hidden = K;
  experts.intermediate = N;
  CHECK(flexq_experts_prepack_size(&cpu, &experts, FLEXQ_DOWN, &packed_bytes) == FLEXQ_OK && packed_bytes > 0);
  CHECK(flexq_experts_workspace_size(&cpu, &experts, M, 2, FLEXQ_F16, &workspace_bytes) == FLEXQ_OK);
  CHECK(workspace_bytes >= M * 2 * K * sizeof(float));

  desc.weight_bits = 7;
  CHECK(flexq_prepack_size(&cpu, &desc, &packed_bytes) == FLEXQ_UNSUPPORTED);
  CHECK(strstr(flexq_last_error(), "weight_bits must be 4, 5, 6 or 8, got 7") != NULL);
  desc.weight_bits = FLEXQ_WEIGHT_BITS;
  desc.struct_size = 0;
  CHECK(flexq_prepack_size(&cpu, &desc, &packed_bytes) == FLEXQ_INVALID_ARGUMENT);
  CHECK(strstr(flexq_last_error(), "desc.struct_size must be") != NULL);
  CHECK(flexq_weight_size(NULL, &planes_bytes, &scales_bytes) == FLEXQ_INVALID_ARGUMENT);
  CHECK(strcmp(flexq_status_name(FLEXQ_BAD_VALUE), "bad value") == 0);
  flexq_thread_pool_destroy(NULL);

  free(planes);
  free(scales);
  free(blocks[0]);
  free(blocks[1]);
  return 0;
}
