// Instructions of compute capability 9.0 that sparse_tc.cuh needs beyond ptx.cuh, as functions.
#pragma once
#include "ptx.cuh"

// How the copy engine sees a tensor.
struct __align__(64) TensorMap {
  u64 opaque[16];
};

// ------------------------------------------------------------------------------------------------------ clusters ----
// A barrier of this block in another block of the cluster, as an address there.
__device__ u32 barrier_of(u32 barrier, u32 block) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(barrier), "r"(block));
  return remote;
}
__device__ void barrier_arrive_remotely(u32 remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
// The same with what was written or read before, for those who wait in other blocks.
__device__ void barrier_arrive_in_cluster(u32 remote) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
__device__ void barrier_wait_in_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done; WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; "
      "@!done bra WAIT; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// What a block of the cluster has at a place of its shared memory.
__device__ void load_of_block(u32 own, u32 block, float4& v) {
  asm volatile(
      "{ .reg .b32 at; mapa.shared::cluster.u32 at, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at]; }"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(own), "r"(block)
      : "memory");
}
// Whether the phase of that parity has ended, without a wait.
__device__ u32 barrier_test(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}
__device__ void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Blocks of a cluster have all come this far; memory is ordered by barriers and fences of its own.
__device__ void meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Whether this lane is the one of its warp that acts for it. The compiler knows that there is one only.
__device__ bool is_elected() {
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected;
}

template <int REGISTERS>
__device__ void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// -------------------------------------------------------------------------------------------------------- copies ----
// Some bytes to the same place of all blocks of the cluster; not CLUSTERED: of this block.
template <bool CLUSTERED>
__device__ void load_to_cluster(u32 to, const u8* from, int bytes, int blocks, u32 barrier) {
  if constexpr (!CLUSTERED)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<u16>((1 << blocks) - 1))
        : "memory");
}
__device__ void load_box(u32 to, const TensorMap& map, int c, int w, int h, int n, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
// tap: in its low half how many columns it lies to the right, in the other how many rows down.
__device__ void load_im2col(u32 to, const TensorMap& map, int c, int w, int h, int n, u32 tap, u32 barrier) {
  asm volatile(
      "{ .reg .b16 right, down; mov.b32 {right, down}, %7; "
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {right, down}; }" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "r"(tap)
      : "memory");
}
__device__ void store_box(const TensorMap& map, int c, int w, int h, int n, u32 from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c), "r"(w), "r"(h), "r"(n)
               : "memory");
}
__device__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ----------------------------------------------------------------------------------------------------- registers ----
__device__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT>
__device__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// A use of a register, so that it holds its value until here. It is a store that is never done, since the compiler may
// move calculations to before a wait for the tensor cores.
__device__ void keep(u32 value, u32 never, u32 unused) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.volatile.shared.b32 [%2], %0; }" ::"r"(value), "r"(never),
               "r"(unused)
               : "memory");
}
// From here on a register may hold any value.
__device__ void forget(float& v) { asm volatile("" : "=f"(v)); }
__device__ void forget(u32& v) { asm volatile("" : "=r"(v)); }
// From here on the compiler knows nothing of a value.
__device__ void obscure(int& v) { asm volatile("" : "+r"(v)); }

// ------------------------------------------------------------------------------------------- 16-bit elements in pairs
#if STORAGE == 1
#define TYPE "f16x2"
#elif STORAGE == 2
#define TYPE "bf16x2"
#endif

#if STORAGE
// Rounded; NOT_NEGATIVE: negative ones become 0. A NaN stays one, here and below.
template <bool NOT_NEGATIVE>
__device__ u32 pack(float low, float high) {
  u32 pair;
  if constexpr (NOT_NEGATIVE)
    asm("cvt.rn.relu." TYPE ".f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn." TYPE ".f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ u32 larger(u32 pair, u32 other) {
  asm("max.NaN." TYPE " %0, %0, %1;" : "+r"(pair) : "r"(other));
  return pair;
}
__device__ u32 smaller(u32 pair, u32 other) {
  asm("min.NaN." TYPE " %0, %0, %1;" : "+r"(pair) : "r"(other));
  return pair;
}
#endif

__device__ float at_least_0(float v) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
  return v;
}
__device__ float at_most_6(float v) {
  asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(v));
  return v;
}

// ------------------------------------------------------------------------------------------------- shared memory ----
__device__ void load_shared(u32 from, u16& v) {
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
}
__device__ void load_shared(u32 from, u32& v) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
}
// The register holds its old value until then.
__device__ void load_shared_if(u32 condition, u32 from, u32& v) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.shared.u32 %0, [%2]; }"
               : "+r"(v)
               : "r"(condition), "r"(from)
               : "memory");
}
__device__ void load_shared(u32 from, uint2& v) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
}
__device__ void load_shared(u32 from, uint4& v) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
}
__device__ void load_shared(u32 from, float& v) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
}
__device__ void load_shared(u32 from, float4& v) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
}
__device__ void store_shared(u32 to, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory"); }
// Added to four numbers. As one statement, which nothing moves to where the sums are used.
__device__ void add_shared(u32 from, float* d) {
  asm volatile(
      "{ .reg .f32 a, b, c, d; ld.shared.v4.f32 {a, b, c, d}, [%4]; "
      "add.f32 %0, %0, a; add.f32 %1, %1, b; add.f32 %2, %2, c; add.f32 %3, %3, d; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(from)
      : "memory");
}
__device__ void store_shared(u32 to, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ void store_shared(u32 to, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(v.x), "f"(v.y) : "memory");
}

// Matrices of 8 x 8 elements of 16 bits between shared memory and a warp's registers. Lanes 8 i to 8 i + 7 have the
// addresses of the rows of matrix i. In registers a lane has two neighbours of a row; TRANSPOSED, of a column.
template <int COUNT>
__device__ void load_transposed(u32 from, u32* v) {
  if constexpr (COUNT == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1])
                 : "r"(from)
                 : "memory");
}
template <int COUNT, bool TRANSPOSED>
__device__ void store_matrices(u32 to, const u32* v) {
  if constexpr (COUNT == 4 && TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else if constexpr (COUNT == 4)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  else if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(v[0]), "r"(v[1])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(v[0]), "r"(v[1]) : "memory");
}
