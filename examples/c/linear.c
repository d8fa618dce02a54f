/* A linear layer with 6-bit weights in C: quantize a weight, keep it in its canonical form, prepack it, run it. */
#include <flexq/flexq.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Every function of FlexQ returns a status; flexq_last_error() says what was wrong. */
static void check(flexq_status status) {
  if (status == FLEXQ_OK) return;
  fprintf(stderr, "flexq: %s: %s\n", flexq_status_name(status), flexq_last_error());
  exit(1);
}

/* Prepacked weights and workspaces must be aligned to FLEXQ_ALIGNMENT bytes. */
static void* allocate(size_t bytes) {
  const size_t rounded = (bytes + FLEXQ_ALIGNMENT) / FLEXQ_ALIGNMENT * FLEXQ_ALIGNMENT;
  void* memory = aligned_alloc(FLEXQ_ALIGNMENT, rounded);
  if (memory == NULL) exit(1);
  return memory;
}

/* Numbers from -1 to 1. */
static float next(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

int main(void) {
  enum { M = 4, N = 96, K = 1024 };
  float* w = allocate(sizeof(float) * N * K);
  float* x = allocate(sizeof(float) * M * K);
  float* y = allocate(sizeof(float) * M * N);
  uint32_t random = 1;
  for (int i = 0; i < N * K; ++i) w[i] = next(&random);
  for (int i = 0; i < M * K; ++i) x[i] = next(&random);

  /* Where the work is done: the CPU, with a pool of two threads. */
  flexq_thread_pool* pool = NULL;
  check(flexq_thread_pool_create(2, &pool));
  flexq_stream stream = FLEXQ_STREAM_INIT;
  stream.executor = flexq_thread_pool_executor(pool);

  /* From float to planes and scales: what a file holds. */
  flexq_weight_desc desc = FLEXQ_WEIGHT_DESC_INIT; /* 6 bits, a scale per group of 128, rotated */
  desc.n = N;
  desc.k = K;
  size_t planes_bytes = 0, scales_bytes = 0;
  check(flexq_weight_size(&desc, &planes_bytes, &scales_bytes));
  uint8_t* planes = allocate(planes_bytes);
  uint16_t* scales = allocate(scales_bytes);
  check(flexq_quantize_weight(&stream, &desc, w, FLEXQ_F32, K, planes, scales, NULL));

  /* Once, at load: the form that this machine's kernels read. Planes and scales are not needed afterwards. */
  size_t packed_bytes = 0;
  check(flexq_prepack_size(&stream, &desc, &packed_bytes));
  void* packed = allocate(packed_bytes);
  check(flexq_prepack(&stream, &desc, planes, scales, packed, packed_bytes));

  /* y = x * w^T with 8-bit activations. */
  size_t workspace_bytes = 0;
  check(flexq_linear_workspace_size(&stream, &desc, 8, M, &workspace_bytes));
  void* workspace = allocate(workspace_bytes);
  check(flexq_linear(&stream, &desc, packed, packed_bytes, 8, M, x, FLEXQ_F32, K, NULL, FLEXQ_F32, y, FLEXQ_F32, N,
                     workspace, workspace_bytes));

  double error = 0, norm = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double exact = 0;
      for (int k = 0; k < K; ++k) exact += (double)x[m * K + k] * w[n * K + k];
      error += (y[m * N + n] - exact) * (y[m * N + n] - exact);
      norm += exact * exact;
    }
  }
  printf("%d x %d weights in %zu bytes, relative error %.4f\n", N, K, planes_bytes + scales_bytes, sqrt(error / norm));

  flexq_thread_pool_destroy(pool);
  free(workspace), free(packed), free(scales), free(planes), free(y), free(x), free(w);
  return error < 0.01 * norm ? 0 : 1;
}
