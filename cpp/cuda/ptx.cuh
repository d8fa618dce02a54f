// Inline PTX, one thin function for each instruction.
#pragma once

#include <cstdint>

// wgmma and setmaxnreg belong to sm_90a alone: kernels with them have a body only where this is 1.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLEXQ_SM90A 1
#else
#define FLEXQ_SM90A 0
#endif

namespace flexq::cuda::ptx {

// ---- Conversions to 16 bits, of two values. That of a single one is eight times slower on Hopper (F2F) ----

__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// ---- cp.async (sm_80): 16 bytes from global to shared memory, past L1 ----

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// L2 cache policies: what is read once is evicted first.
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t evict_normal_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void cp_async_16(uint32_t shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "l"(policy)
               : "memory");
}

__device__ inline void prefetch_to_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Copies `bytes` of 16 and fills the rest with zeros.
__device__ inline void cp_async_16_zfill(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Flags between CTAs of the whole GPU ----

__device__ inline void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ inline uint64_t load_acquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}

// ---- Tensor cores: a warp's mma.sync (sm_80) ----

// d += a * b for a 16x32 (row-major) and b 32x8 (column-major) of int8.
__device__ inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += popcount(a & b) for a 16x128 (row-major) and b 128x8 (column-major) of single bits.
__device__ inline void mma_m16n8k128_b1(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// Four matrices of 8 rows x 16 bytes; lane i has the address of row i % 8 of matrix i / 8, and gets bytes
// 4 * (lane % 4) ... + 3 of row lane / 4 of each.
__device__ inline void ldmatrix_x4(uint32_t* d, uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// The larger magnitude, or NaN if there is one.
__device__ inline float max_magnitude(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(fabsf(a)), "f"(fabsf(b)));
  return largest;
}

// `threads` threads meet at one of the CTA's 16 hardware barriers.
__device__ inline void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Programmatic dependent launch (sm_90; elsewhere kernels simply run one after the other) ----

// The next kernel in the stream may start now.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one has finished and its writes are visible.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if FLEXQ_SM90A

// Four matrices of 8x8 elements of 16 bits as MMAs leave them, a lane with two neighbours of row lane / 4 of each,
// transposed: lane i has the address of column i % 8 of matrix i / 8, 16 bytes.
__device__ inline void stmatrix_x4_trans(uint32_t shared, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(d[0]),
               "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
}

// ---- mbarriers in shared memory: they count arrivals and, for bulk copies, bytes ----

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialized barriers visible to the cluster and to the copy engine.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At an mbarrier of any CTA of the cluster, by its remote_address. Cluster scope would cost a fence of the whole GPU
// and is not needed: only the copy engine writes what the arrival frees.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity has completed.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- Bulk copies from global to shared memory, which report their bytes to an mbarrier ----

__device__ inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// To the same shared address of every CTA of the cluster in `mask`, and to the mbarrier of each.
__device__ inline void bulk_copy_multicast(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                           uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}

// ---- Clusters ----

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster meet, and see what the others wrote before.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// They meet, without a fence.
__device__ inline void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// The same shared address in CTA `rank`.
__device__ inline uint32_t remote_address(uint32_t shared, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}

// The word at the same shared address in CTA `rank`. Not by way of remote_address: the compiler unrolls worse then.
__device__ inline uint32_t load_remote(uint32_t shared, uint32_t rank) {
  uint32_t value;
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %1, %2;\n\t"
      "ld.shared::cluster.u32 %0, [remote];\n\t}"
      : "=r"(value)
      : "r"(shared), "r"(rank)
      : "memory");
  return value;
}

// A word to the shared memory of any CTA of the cluster, whose mbarrier counts its bytes; both are remote_addresses.
__device__ inline void store_async(uint32_t remote, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote),
               "r"(value), "r"(barrier)
               : "memory");
}

// ---- Tensor cores: a warpgroup's asynchronous wgmma ----

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first wgmma after registers that it uses were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The value, opaque to the compiler, which would otherwise compute it again in every iteration of a loop.
__device__ inline int keep_in_register(int value) {
  return __shfl_sync(~0u, value, static_cast<int>(threadIdx.x % 32));
}

// Keeps the compiler from moving register accesses across a wgmma fence or wait.
template <int kCount>
__device__ inline void fence_registers(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// d += a * b, or d = a * b without kAdd, for a 64x32 in registers and b 32xN in shared memory, int8; kCount = N / 2 is
// a thread's part of d. d is read even without kAdd:
// else the compiler gives a product that starts while its old sums are still in use registers of its own, and spills.
template <bool kAdd, int kCount>
__device__ void wgmma_s8(int32_t (&d)[kCount], const uint32_t (&a)[4], uint64_t b);

#define FLEXQ_D4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define FLEXQ_D8(d, i) FLEXQ_D4(d, i), FLEXQ_D4(d, i + 4)
#define FLEXQ_D16(d, i) FLEXQ_D8(d, i), FLEXQ_D8(d, i + 8)
#define FLEXQ_D32(d, i) FLEXQ_D16(d, i), FLEXQ_D16(d, i + 16)
#define FLEXQ_D64(d, i) FLEXQ_D32(d, i), FLEXQ_D32(d, i + 32)
#define FLEXQ_D128(d, i) FLEXQ_D64(d, i), FLEXQ_D64(d, i + 64)
#define FLEXQ_R4 "%0,%1,%2,%3"
#define FLEXQ_R8 FLEXQ_R4 ",%4,%5,%6,%7"
#define FLEXQ_R16 FLEXQ_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FLEXQ_R32 FLEXQ_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLEXQ_R64                                                    \
  FLEXQ_R32                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FLEXQ_R128                                                               \
  FLEXQ_R64                                                                      \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"             \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define FLEXQ_WGMMA_CASE(kAdd, n, count, a0, a1, a2, a3, b, p)                                               \
  template <>                                                                                                \
  __device__ inline void wgmma_s8<kAdd, count>(int32_t (&d)[count], const uint32_t (&a)[4], uint64_t desc) { \
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #p                                             \
                 ", 0;\n\t"                                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" FLEXQ_R##count                     \
                 "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", add;\n\t}"                              \
                 : FLEXQ_D##count(d, 0)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "n"(kAdd));                        \
  }
#define FLEXQ_WGMMA(...)              \
  FLEXQ_WGMMA_CASE(true, __VA_ARGS__) \
  FLEXQ_WGMMA_CASE(false, __VA_ARGS__)
FLEXQ_WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
FLEXQ_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
FLEXQ_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
FLEXQ_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
FLEXQ_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
FLEXQ_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

#undef FLEXQ_WGMMA_CASE
#undef FLEXQ_WGMMA
#undef FLEXQ_R4
#undef FLEXQ_R8
#undef FLEXQ_R16
#undef FLEXQ_R32
#undef FLEXQ_R64
#undef FLEXQ_R128
#undef FLEXQ_D4
#undef FLEXQ_D8
#undef FLEXQ_D16
#undef FLEXQ_D32
#undef FLEXQ_D64
#undef FLEXQ_D128

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::ptx
