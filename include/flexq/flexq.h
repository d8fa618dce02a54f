/* FlexQ: weights of 4, 5, 6 or 8 bits with 6- or 8-bit activations (W6A6, W6A8, ...).
 *
 * This header is the whole public C API, usable from C99 and C++.
 *
 * Words used throughout
 *   M tokens, N output features, K input features. A linear layer is y[M,N] = x[M,K] * w[N,K]^T + bias[N].
 *   group   128 consecutive input features. G = ceil(K / 128) groups; the last one is padded with zeros, Kp = 128 * G.
 *   codes   the integers of a quantized tensor, one int8 each. Weights of b bits: -2^(b-1) .. 2^(b-1) - 1, which are
 *           -8..7, -16..15, -32..31 or -128..127. Activations: -31..31 or -127..127.
 *   planes  the canonical form of weight codes of b bits: bit planes, uint8 [N][G][b][16]. Bit (k % 8) of byte (k / 8)
 *           of plane p is bit p of the two's complement code k of that row and group.
 *   scales  of a weight: fp16 bit patterns, uint16 [N][G] (scheme group) or [N][1] (scheme channel).
 *   prepack what a backend's kernels read, made once at load from planes and scales. Its layout is private, and another
 *           on other machines and in other versions: store planes and scales.
 *
 * Conventions
 *   Every function that can fail returns a flexq_status. On anything but FLEXQ_OK nothing was written to any output,
 *   and flexq_last_error() of the same thread says what was given and what is accepted. After FLEXQ_DEVICE_ERROR
 *   outputs in device memory are undefined.
 *   On a CUDA stream a call queues its work and returns, and may be captured, unless it says that it waits. What it
 *   was given must stay until that work is done; what goes wrong in it, the CUDA runtime reports later.
 *   No function keeps a pointer after it returns (queued work aside), allocates in a hot call, or touches global
 *   mutable state; all functions may be called from several threads at once.
 *   Matrices are row-major; `ld*` is the distance between rows in elements, at least the row length. Types of inputs,
 *   biases and outputs are chosen independently of each other. Outputs overlap nothing else, except where they may.
 *   A tensor without elements (m or n is 0) and a buffer of 0 bytes may be NULL, and there is nothing to do. The type
 *   of a bias that is NULL is not looked at.
 *   Structs begin with their size, so that later versions can append to them: start from FLEXQ_WEIGHT_DESC_INIT and
 *   the like. One of a newer header is taken while what this version does not know of it is zero, and refused as
 *   FLEXQ_UNSUPPORTED otherwise.
 *   Pointers are aligned to their element type; prepacked weights, quantized activations and workspaces to
 *   FLEXQ_ALIGNMENT bytes. Device memory for a CUDA stream, host memory for a CPU stream.
 */
#ifndef FLEXQ_FLEXQ_H
#define FLEXQ_FLEXQ_H

#include <stddef.h>
#include <stdint.h>

#define FLEXQ_VERSION_MAJOR 0
#define FLEXQ_VERSION_MINOR 1
#define FLEXQ_VERSION_PATCH 0

#define FLEXQ_GROUP_SIZE 128
#define FLEXQ_WEIGHT_BITS 6 /* what the ..._INIT macros start from */
#define FLEXQ_ALIGNMENT 64

#if defined(FLEXQ_STATIC)
#define FLEXQ_API
#elif defined(_WIN32)
#if defined(FLEXQ_BUILDING)
#define FLEXQ_API __declspec(dllexport)
#else
#define FLEXQ_API __declspec(dllimport)
#endif
#else
#define FLEXQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Status and version ------------------------------------------------------------------------------------- */

/* Enumerations are passed as int32_t, so that any value may be: unknown ones are refused. */
typedef int32_t flexq_status;
enum {
  FLEXQ_OK = 0,
  FLEXQ_INVALID_ARGUMENT = 1, /* a null, negative, misaligned, too small or unknown argument */
  FLEXQ_UNSUPPORTED = 2,      /* well formed, but not something this version does (weight_bits 7, ...) */
  FLEXQ_BAD_VALUE = 3,        /* data that cannot be quantized: NaN, Inf, a scale beyond fp16's range */
  FLEXQ_UNAVAILABLE = 4,      /* the device or backend is missing from this build or machine */
  FLEXQ_OUT_OF_MEMORY = 5,    /* no memory or threads are left; only from functions that create objects */
  FLEXQ_DEVICE_ERROR = 6,     /* the device's driver reported an error */
  FLEXQ_INTERNAL = 7          /* a bug in this library */
};

/* The name of a status, e.g. "invalid argument"; "unknown status" for any other number. Never NULL. A static string. */
FLEXQ_API const char* flexq_status_name(flexq_status status);

/* What went wrong in the last failed call of this thread; "" if none failed yet. Valid until its next failed call. */
FLEXQ_API const char* flexq_last_error(void);

/* Version of the library that is loaded, e.g. "0.1.0", and as major * 10000 + minor * 100 + patch. */
FLEXQ_API const char* flexq_version(void);
FLEXQ_API int32_t flexq_version_number(void);

/* ---- Types -------------------------------------------------------------------------------------------------- */

typedef int32_t flexq_dtype;
enum { FLEXQ_F32 = 0, FLEXQ_F16 = 1, FLEXQ_BF16 = 2 };

typedef int32_t flexq_device;
enum { FLEXQ_CPU = 0, FLEXQ_CUDA = 1 };

/* Which elements share a scale. group: a row (token) and 128 inputs. channel: a whole row (token). */
typedef int32_t flexq_scheme;
enum { FLEXQ_SCHEME_GROUP = 0, FLEXQ_SCHEME_CHANNEL = 1 };

/* What is done to each group before it is quantized. hadamard128: the orthonormal 128-point Hadamard transform
 * (natural order), applied alike to weights and activations, so that products stay as they were. */
typedef int32_t flexq_rotation;
enum { FLEXQ_ROTATION_NONE = 0, FLEXQ_ROTATION_HADAMARD128 = 1 };

/* A quantized weight. */
typedef struct flexq_weight_desc {
  size_t struct_size;      /* sizeof(flexq_weight_desc) */
  int64_t n;               /* output features, >= 0 */
  int64_t k;               /* input features, >= 1 */
  int32_t weight_bits;     /* 4, 5, 6 or 8 */
  flexq_scheme scheme;     /* of the weight's scales and of the activations it is multiplied with */
  flexq_rotation rotation; /* of the weight and of the activations it is multiplied with */
  int32_t reserved;        /* 0 */
} flexq_weight_desc;

#define FLEXQ_WEIGHT_DESC_INIT \
  {sizeof(flexq_weight_desc), 0, 0, FLEXQ_WEIGHT_BITS, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_HADAMARD128, 0}

/* A quantized activation. Its k, scheme and rotation equal those of the weights it meets. */
typedef struct flexq_activation_desc {
  size_t struct_size;      /* sizeof(flexq_activation_desc) */
  int64_t m;               /* tokens, >= 0 */
  int64_t k;               /* input features, >= 1 */
  int32_t act_bits;        /* 6 or 8 */
  flexq_scheme scheme;     /* one scale per token and group, or one per token */
  flexq_rotation rotation; /* as the weight's */
  int32_t reserved;        /* 0 */
} flexq_activation_desc;

#define FLEXQ_ACTIVATION_DESC_INIT \
  {sizeof(flexq_activation_desc), 0, 0, 8, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_HADAMARD128, 0}

/* Runs task(arg, 0) ... task(arg, count - 1), each once, in any order, on up to num_threads threads, and returns when
 * all are done. Tasks never throw, never wait for one another, and never call parallel_for. It is called from every
 * thread whose stream has the executor, perhaps from several at once. */
typedef void (*flexq_task)(void* arg, int64_t index);
typedef struct flexq_executor {
  size_t struct_size; /* sizeof(flexq_executor) */
  void* context;
  int32_t num_threads; /* >= 1 */
  int32_t reserved;    /* 0 */
  void (*parallel_for)(void* context, int64_t count, flexq_task task, void* arg);
} flexq_executor;

#define FLEXQ_EXECUTOR_INIT {sizeof(flexq_executor), NULL, 1, 0, NULL}

/* Where the work happens. Read during the call alone: it may be made anew for each. */
typedef struct flexq_stream {
  size_t struct_size; /* sizeof(flexq_stream) */
  flexq_device device;
  int32_t device_index;           /* CUDA device ordinal; 0 for the CPU */
  void* handle;                   /* CUDA: the cudaStream_t, NULL being the legacy default stream. CPU: NULL */
  const flexq_executor* executor; /* CPU: the threads to use, NULL for the calling thread alone. CUDA: NULL */
  const char* kernel;             /* NULL for the library's choice; for measurements, a name of flexq_gemm_kernels */
} flexq_stream;

/* The CPU, on the calling thread. */
#define FLEXQ_STREAM_INIT {sizeof(flexq_stream), FLEXQ_CPU, 0, NULL, NULL, NULL}

/* FLEXQ_OK if `device` can be used in this build on this machine, else FLEXQ_UNAVAILABLE, or FLEXQ_INVALID_ARGUMENT
 * if it is no flexq_device; flexq_last_error() has the reason. */
FLEXQ_API flexq_status flexq_device_available(flexq_device device, int32_t device_index);

/* The instruction set or architecture that `device` runs on here, e.g. "avx2" or "sm_90". A static string. */
FLEXQ_API flexq_status flexq_device_isa(flexq_device device, int32_t device_index, const char** isa);

/* ---- Threads (CPU) ------------------------------------------------------------------------------------------ */

/* A pool that implements flexq_executor, for callers without threads of their own. One caller uses the workers at a
 * time; others that come meanwhile run their tasks themselves. After fork() the child has none of the workers: there
 * the pool's work runs on the calling thread, and destroying it only frees memory. */
typedef struct flexq_thread_pool flexq_thread_pool;

/* num_threads counts the calling thread: 1..1024. Destroy it only when no call uses it. */
FLEXQ_API flexq_status flexq_thread_pool_create(int32_t num_threads, flexq_thread_pool** pool);
FLEXQ_API void flexq_thread_pool_destroy(flexq_thread_pool* pool);

/* The executor to put into a flexq_stream; it lives as long as the pool. NULL for NULL. */
FLEXQ_API const flexq_executor* flexq_thread_pool_executor(const flexq_thread_pool* pool);

/* ---- Weights ------------------------------------------------------------------------------------------------ */

/* Bytes of the canonical planes, and bytes of the canonical scales. */
FLEXQ_API flexq_status flexq_weight_size(const flexq_weight_desc* desc, size_t* planes_bytes, size_t* scales_bytes);

/* Round to nearest, after the rotation: per row and group (or row) s = fp16(share * absmax / max), max being the
 * largest code, with the share that gives the least squared error, and code = clamp(rint(w / s), -max - 1, max). Shares
 * are 1, .975, ... .85 for 6 and 8 bits, 1, .95, ... .7 for 5 and 1, .95, ... .55 for 4. All-zero groups get scale 0
 * and codes 0, and so do those whose absmax / max vanishes in fp16 (with 6 bits: absmax up to 9.2e-7). FLEXQ_BAD_VALUE
 * if a weight is NaN or Inf, or a scale overflows fp16. On CUDA the same bits, in device memory; the call waits for its
 * stream, and cannot be captured.
 *   w: [n][k] of `dtype`, rows ldw apart.  planes, scales: canonical, written.
 *   vanished: gets the number of scales that vanished, or is NULL. */
FLEXQ_API flexq_status flexq_quantize_weight(const flexq_stream* stream, const flexq_weight_desc* desc, const void* w,
                                             flexq_dtype dtype, int64_t ldw, uint8_t* planes, uint16_t* scales,
                                             int64_t* vanished);

/* w = code * scale with the rotation undone, rounded to `dtype`: [n][k], rows ldw apart. CPU streams. */
FLEXQ_API flexq_status flexq_dequantize_weight(const flexq_stream* stream, const flexq_weight_desc* desc,
                                               const uint8_t* planes, const uint16_t* scales, void* w,
                                               flexq_dtype dtype, int64_t ldw);

/* codes int8 [n][Kp], rows ldc >= Kp apart <-> canonical planes. Codes that the bits do not hold are
 * FLEXQ_BAD_VALUE. Packing on CUDA waits for its stream, as flexq_quantize_weight; unpacking is for CPU streams. */
FLEXQ_API flexq_status flexq_pack_codes(const flexq_stream* stream, const flexq_weight_desc* desc, const int8_t* codes,
                                        int64_t ldc, uint8_t* planes);
FLEXQ_API flexq_status flexq_unpack_codes(const flexq_stream* stream, const flexq_weight_desc* desc,
                                          const uint8_t* planes, int8_t* codes, int64_t ldc);

/* Bytes of the prepacked weight on `stream`'s device. */
FLEXQ_API flexq_status flexq_prepack_size(const flexq_stream* stream, const flexq_weight_desc* desc, size_t* bytes);

/* Canonical -> prepacked, and back without loss. `bytes` is the size of `prepacked`, at least flexq_prepack_size.
 * On CPU streams flexq_prepack refuses scales that are NaN, Inf or negative as FLEXQ_BAD_VALUE; -0.0 counts as 0. On
 * CUDA streams, where scales are device memory, it does not look at them. */
FLEXQ_API flexq_status flexq_prepack(const flexq_stream* stream, const flexq_weight_desc* desc, const uint8_t* planes,
                                     const uint16_t* scales, void* prepacked, size_t bytes);
FLEXQ_API flexq_status flexq_unprepack(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                                       size_t bytes, uint8_t* planes, uint16_t* scales);

/* ---- Activations -------------------------------------------------------------------------------------------- */

/* Bytes of a quantized activation on `stream`'s device. */
FLEXQ_API flexq_status flexq_activation_size(const flexq_stream* stream, const flexq_activation_desc* desc,
                                             size_t* bytes);

/* scale = absmax / qmax per token and group (or token), code = clamp(rint(x * (qmax / absmax)), -qmax, qmax), all in
 * fp32 and after the rotation, of which codes do without the 1 / sqrt(128); qmax is 31 or 127. Where scale would be
 * below the smallest normal float, scale and codes are 0. A NaN or Inf makes every output of its token NaN, and so do
 * values that the rotation adds up to an Inf (of 2.66e36 and more).
 *   x: [m][k] of `dtype`, rows ldx apart.  quantized: private layout, written. */
FLEXQ_API flexq_status flexq_quantize_activation(const flexq_stream* stream, const flexq_activation_desc* desc,
                                                 const void* x, flexq_dtype dtype, int64_t ldx, void* quantized,
                                                 size_t bytes);

/* flexq_quantize_activation of what comes before a linear layer in a transformer, in one pass; each step is rounded to
 * `dtype` where separate operations would store it.
 *   rms_norm: h = x + residual (or x if `residual` is NULL), quantized is h / sqrt(mean(h^2) + eps) * weight. `sum`
 * gets h, or is NULL; it may be x or residual. weight: [k] of `dtype`; eps >= 0, finite.  silu_mul: quantized is
 * silu(gate) * up. x, residual, sum, gate, up: [m][k] of `dtype`, rows ld* apart. */
FLEXQ_API flexq_status flexq_rms_norm_quantize(const flexq_stream* stream, const flexq_activation_desc* desc,
                                               const void* x, int64_t ldx, const void* residual, int64_t ld_residual,
                                               const void* weight, float eps, flexq_dtype dtype, void* sum,
                                               int64_t ld_sum, void* quantized, size_t bytes);
FLEXQ_API flexq_status flexq_silu_mul_quantize(const flexq_stream* stream, const flexq_activation_desc* desc,
                                               const void* gate, int64_t ld_gate, const void* up, int64_t ld_up,
                                               flexq_dtype dtype, void* quantized, size_t bytes);

/* The private layout in plain form: codes int8 [m][Kp], scales fp32 [m][G] (group) or [m] (channel). */
FLEXQ_API flexq_status flexq_activation_export(const flexq_stream* stream, const flexq_activation_desc* desc,
                                               const void* quantized, size_t bytes, int8_t* codes, float* scales);

/* ---- Linear ------------------------------------------------------------------------------------------------- */

/* A kernel that could run a GEMM. */
typedef struct flexq_kernel_info {
  size_t struct_size;            /* sizeof(flexq_kernel_info) */
  char name[48];                 /* e.g. "wgmma-s8 128x32 split2 cast2", for flexq_stream.kernel */
  double estimated_microseconds; /* by the library's model of cost; 0 where it has none */
} flexq_kernel_info;

#define FLEXQ_KERNEL_INFO_INIT {sizeof(flexq_kernel_info), {0}, 0.0}

/* The kernels that could run a GEMM of this shape, the one that flexq_gemm chooses first: up to `capacity` of them into
 * `infos`, and how many there are, which may be more, into `count`. infos[0].struct_size says how large each one is;
 * `infos` may be NULL if `capacity` is 0. */
FLEXQ_API flexq_status flexq_gemm_kernels(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits,
                                          int64_t m, flexq_kernel_info* infos, int32_t capacity, int32_t* count);

/* Bytes of workspace for flexq_gemm and for flexq_linear on m tokens; may be 0. Ask for each m: fewer tokens may take
 * more. It holds anything before and after; calls that may run at the same time (on other streams) need one each. */
FLEXQ_API flexq_status flexq_gemm_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc,
                                                 int32_t act_bits, int64_t m, size_t* bytes);
FLEXQ_API flexq_status flexq_linear_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc,
                                                   int32_t act_bits, int64_t m, size_t* bytes);

/* y = quantized * weight^T + bias. One quantized activation can serve several weights. Group sums are exact int32;
 * their scaling, the sum over groups and the bias are fp32, rounded once to `y_dtype`.
 *   bias: [n] of `bias_dtype`, or NULL.  y: [m][n] of `y_dtype`, rows ldy apart, written. */
FLEXQ_API flexq_status flexq_gemm(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                                  size_t prepacked_bytes, const flexq_activation_desc* act_desc, const void* quantized,
                                  size_t quantized_bytes, const void* bias, flexq_dtype bias_dtype, void* y,
                                  flexq_dtype y_dtype, int64_t ldy, void* workspace, size_t workspace_bytes);

/* flexq_quantize_activation and flexq_gemm in one call.  x: [m][k] of `x_dtype`, rows ldx apart. */
FLEXQ_API flexq_status flexq_linear(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                                    size_t prepacked_bytes, int32_t act_bits, int64_t m, const void* x,
                                    flexq_dtype x_dtype, int64_t ldx, const void* bias, flexq_dtype bias_dtype, void* y,
                                    flexq_dtype y_dtype, int64_t ldy, void* workspace, size_t workspace_bytes);

/* The cost table by which the device's GEMM kernels are chosen.
 *   name: "sm_90" for one fitted on an H100 (on others of the kind L2's costs are in proportion to their memory's
 * bandwidth), "sm_89 derived" for one derived from the device's properties,
 * "FLEXQ_COSTS" for the file that this environment variable names, "none" where there is nothing to choose.
 *   text: lines `name = value`, the format of such a file. Both strings are the library's. */
FLEXQ_API flexq_status flexq_cost_table(const flexq_stream* stream, const char** name, const char** text);

/* ---- Experts ------------------------------------------------------------------------------------------------ */

/* A mixture-of-experts layer: E experts, of which a router gives each token top_k with a weight for each. A pair is a
 * token and one of its experts.
 *   u = x * gate_up[e]^T + gate_up_bias[e]              [2I], rounded to x's type
 *   h = f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)    [I], of the two halves of u
 *   y = sum over the token's pairs, in their order, of router weight * (h * down[e]^T + down_bias[e])    [H]
 * Each projection is a flexq_linear with the numerics of one: x is quantized once for all experts, h once for each
 * pair. The sum is fp32 and rounded once to y's type; docs/how-it-works/numerics.md has every step.
 *
 * Canonical weights are those of single experts one after another: planes [E][N][G][b][16] and scales [E][N][G] or
 * [E][N][1], with N = 2I, K = H for gate_up and N = H, K = I for down. All experts of a projection are one prepacked
 * object. */

/* How one projection is quantized, as the fields of a flexq_weight_desc. Part of flexq_experts_desc, of fixed size. */
typedef struct flexq_projection_format {
  int32_t weight_bits;     /* 4, 5, 6 or 8 */
  flexq_scheme scheme;     /* of the weight's scales and of the activations it is multiplied with */
  flexq_rotation rotation; /* of the weight and of the activations it is multiplied with */
  int32_t act_bits;        /* 6 or 8 */
} flexq_projection_format;

#define FLEXQ_PROJECTION_FORMAT_INIT {FLEXQ_WEIGHT_BITS, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_HADAMARD128, 8}

/* Which projection of the experts. */
typedef int32_t flexq_projection;
enum { FLEXQ_GATE_UP = 0, FLEXQ_DOWN = 1 };

/* f. silu: g * sigmoid(alpha * g). gelu: g * Phi(g), Phi by erf. gelu_tanh: its approximation by tanh. */
typedef int32_t flexq_gate_function;
enum { FLEXQ_GATE_SILU = 0, FLEXQ_GATE_GELU = 1, FLEXQ_GATE_GELU_TANH = 2 };

/* The order of the 2I rows of gate_up. concatenated: the gate's I, then up's I. interleaved: the gate's at even rows,
 * up's at odd ones. */
typedef int32_t flexq_gate_layout;
enum { FLEXQ_GATE_UP_CONCATENATED = 0, FLEXQ_GATE_UP_INTERLEAVED = 1 };

typedef struct flexq_experts_desc {
  size_t struct_size;   /* sizeof(flexq_experts_desc) */
  int64_t experts;      /* E, those of the prepacked weights, >= 1 */
  int64_t hidden;       /* H, features of x and y, >= 1 */
  int64_t intermediate; /* I, features of h, >= 1 */
  flexq_projection_format gate_up;
  flexq_projection_format down;
  flexq_gate_layout layout;     /* of gate_up's rows and of its bias */
  flexq_gate_function function; /* f */
  float alpha;                  /* 1; of silu. 1.702 in gpt-oss */
  float limit;                  /* 0: none; else gates are clamped from above, ups to both sides. 7 in gpt-oss */
  float up_offset;              /* 0; added to clamped ups. 1 in gpt-oss */
  int32_t reserved;             /* 0 */
} flexq_experts_desc;

/* clang-format off */
#define FLEXQ_EXPERTS_DESC_INIT                                                                       \
  {sizeof(flexq_experts_desc), 0, 0, 0, FLEXQ_PROJECTION_FORMAT_INIT, FLEXQ_PROJECTION_FORMAT_INIT, \
   FLEXQ_GATE_UP_CONCATENATED, FLEXQ_GATE_SILU, 1.0f, 0.0f, 0.0f, 0}
/* clang-format on */

/* Bytes of one projection of all experts, prepacked on `stream`'s device. Its layout may depend on everything in `desc`
 * but act_bits, alpha, limit and up_offset. */
FLEXQ_API flexq_status flexq_experts_prepack_size(const flexq_stream* stream, const flexq_experts_desc* desc,
                                                  flexq_projection projection, size_t* bytes);

/* Canonical -> prepacked, and back without loss, of the experts [first, first + count): a loader may fill the object
 * one expert at a time, in any order. planes and scales are those of these experts alone; `prepacked` is the whole
 * object of `bytes`, of which the other experts stay as they are. Scales are looked at as by flexq_prepack. */
FLEXQ_API flexq_status flexq_experts_prepack(const flexq_stream* stream, const flexq_experts_desc* desc,
                                             flexq_projection projection, int64_t first, int64_t count,
                                             const uint8_t* planes, const uint16_t* scales, void* prepacked,
                                             size_t bytes);
FLEXQ_API flexq_status flexq_experts_unprepack(const flexq_stream* stream, const flexq_experts_desc* desc,
                                               flexq_projection projection, int64_t first, int64_t count,
                                               const void* prepacked, size_t bytes, uint8_t* planes, uint16_t* scales);

typedef int32_t flexq_index_type;
enum { FLEXQ_I32 = 0, FLEXQ_I64 = 1 };

/* What a router decided. A token may name its experts in any order, and one of them more than once.
 * Without a map, ids are 0..E-1. With one, they are indices of it: expert_map[id] is 0..E-1, or -1 for an expert that
 * is not here, whose pairs add nothing to y. Other ids and map entries are FLEXQ_INVALID_ARGUMENT on CPU streams; on
 * CUDA streams, where ids are device memory, they count as not here. */
typedef struct flexq_routing {
  size_t struct_size;  /* sizeof(flexq_routing) */
  int64_t m;           /* tokens, >= 0 */
  int64_t top_k;       /* experts of each token, 1..65536 */
  const void* ids;     /* [m][top_k] of ids_type */
  const void* weights; /* [m][top_k] of weights_dtype */
  flexq_index_type ids_type;
  flexq_dtype weights_dtype;
  const int32_t* expert_map; /* [map_size], or NULL */
  int64_t map_size;          /* experts of all devices together; 0 without a map */
  int32_t weights_on_input;  /* 1: the router's weights multiply x * gate_up[e]^T instead (Llama 4). Else 0 */
  int32_t reserved;          /* 0 */
} flexq_routing;

#define FLEXQ_ROUTING_INIT {sizeof(flexq_routing), 0, 1, NULL, NULL, FLEXQ_I32, FLEXQ_F32, NULL, 0, 0, 0}

/* Bytes of workspace for flexq_experts_forward on m tokens of x_dtype with top_k experts each, wherever they go. */
FLEXQ_API flexq_status flexq_experts_workspace_size(const flexq_stream* stream, const flexq_experts_desc* desc,
                                                    int64_t m, int64_t top_k, flexq_dtype x_dtype, size_t* bytes);

/* The layer. A token's result depends on nothing but that token: a NaN or Inf in x poisons its own row of y alone, and
 * results are the same bits on every run and for any number of threads; on the CPU also whichever tokens come together,
 * while on a GPU how many do decides the order of float sums, and so the last bits, and whether a pair's product is
 * rounded to x_dtype before it is added.
 *   gate_up, down: prepacked.  x: [m][hidden] of `x_dtype`, rows ldx apart.  gate_up_bias: [E][2I] in the order of
 * gate_up's rows, down_bias: [E][H], both of `bias_dtype`, each may be NULL.  y: [m][hidden] of `y_dtype`, rows ldy
 * apart, written; it may be x, if types and strides agree. */
FLEXQ_API flexq_status flexq_experts_forward(const flexq_stream* stream, const flexq_experts_desc* desc,
                                             const void* gate_up, size_t gate_up_bytes, const void* down,
                                             size_t down_bytes, const flexq_routing* routing, const void* x,
                                             flexq_dtype x_dtype, int64_t ldx, const void* gate_up_bias,
                                             const void* down_bias, flexq_dtype bias_dtype, void* y,
                                             flexq_dtype y_dtype, int64_t ldy, void* workspace, size_t workspace_bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FLEXQ_FLEXQ_H */
