// 1x2x6x6 -> 3, kernel 3x3, fp16 on cpu, padding (1, 1, 1, 1), then bias+relu6
// out_channels=3, consumers=1, producers=1, channel_block=2, stages=2, sums=2
// 1 parts in 1 slices, 4 multiply-adds among 11 steps
#define STORAGE 1
#define COLUMNS 2
#define SAMPLES 1
#define CHANNELS 2
#define HEIGHT 6
#define WIDTH 6
#define PITCH 4
#define SAMPLE_ROWS 7
#define TOP 1
#define LEFT 2
#define ARRANGED 0
#define BULK 0
#define CONSUMERS 1
#define PRODUCERS 1
#define PREFETCH_WARPS 0
#define THREADS 64
#define OCCUPANCY 1
#define PARTS 1
#define PARTS_PER_GROUP 1
#define SPLIT 1
#define MULTICAST 1
#define CHUNKS 2
#define CHANNEL_BLOCK 2
#define STAGES 2
#define START_POINTS 1
#define COPY 1
#define GROUP_CHANNELS 2
#define SLICE_CHANNELS 2
#define OUT_CHANNELS 3
#define OUT_HEIGHT 6
#define OUT_WIDTH 6
#define CHANNEL_WORDS 44
#define STAGE_BYTES 352
#define TILE_WORDS 32
#define STAGE_WORDS 42
#include "generated.cuh"

GENERATED {
  BEGIN
  case 0:
    asm volatile(
        "{ .reg .b32 s<6>; .reg .b32 x<7>; .reg .f32 u; .reg .f32 v; .reg .f32 w;\n"
        ".reg .b16 h; .reg .b16 g; .reg .pred a; .reg .pred b; .reg .pred p; .reg .b32 t; .reg .b32 left;\n"
        ".reg .b64 d; .reg .b64 e; .reg .pred first;\n"
        "mov.u32 t, %%laneid; setp.eq.u32 first, t, 0;\n"
        "mov.b32 s0, 0;\n"
        "mov.b32 s1, 0;\n"
        "mov.b32 s2, 0;\n"
        "mov.b32 s3, 0;\n"
        "mov.b32 s4, 0;\n"
        "mov.b32 s5, 0;\n"
        "CHUNK0: mbarrier." WAIT ".parity.shared.b64 p, [%2+0], %0; @!p bra CHUNK0;\n"
        "ld.shared.b32 x0, [%1+0];\n"
        "ld.shared.b32 x1, [%1+4];\n"
        "prmt.b32 x2, x0, x1, 0x5432;\n"
        "mov.b32 t, 0x38003800; fma.rn.f16x2 s0, x2, t, s0;\n"
        "mov.b32 t, 0x42004200; fma.rn.f16x2 s1, x2, t, s1;\n"
        "ld.shared.b32 x3, [%1+196];\n"
        "ld.shared.b32 x4, [%1+200];\n"
        "prmt.b32 x5, x3, x4, 0x5432;\n"
        "mov.b32 t, 0xC000C000; fma.rn.f16x2 s3, x5, t, s3;\n"
        "ld.shared.b32 x6, [%1+212];\n"
        "mov.b32 t, 0x34003400; fma.rn.f16x2 s2, x6, t, s2;\n"
        "bar.warp.sync 0xffffffff;\n"
        "@first mbarrier.arrive.shared.b64 d, [%2+16];\n"
        "CHUNK1: mbarrier." WAIT ".parity.shared.b64 p, [%2+8], %0; @!p bra CHUNK1;\n"
        "bar.warp.sync 0xffffffff;\n"
        "@first mbarrier.arrive.shared.b64 d, [%2+24];\n"
        "xor.b32 %0, %0, 1;\n"
        "and.b32 t, %3, 1; setp.ne.u32 a, t, 0; and.b32 t, %3, 2; setp.ne.u32 b, t, 0;\n"
        "add.u64 d, %6, %5;\n"
        "mov.b32 {h, g}, s0; cvt.f32.f16 u, h; cvt.f32.f16 v, g;\n"
        "mov.b32 {h, g}, s3; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;\n"
        "add.f32 u, u, 0f3F800000; add.f32 v, v, 0f3F800000;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 v, v, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 v, v, t;\n"
        "cvt.rn.f16x2.f32 s0, v, u;\n"
        "@a st.global.b32 [%6+0], s0;\n"
        "mov.b32 {h, g}, s1; cvt.f32.f16 u, h; cvt.f32.f16 v, g;\n"
        "mov.b32 {h, g}, s4; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;\n"
        "add.f32 u, u, 0fBF800000; add.f32 v, v, 0fBF800000;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 v, v, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 v, v, t;\n"
        "cvt.rn.f16x2.f32 s1, v, u;\n"
        "@a st.global.b32 [%6+72], s1;\n"
        "mov.b32 {h, g}, s2; cvt.f32.f16 u, h; cvt.f32.f16 v, g;\n"
        "mov.b32 {h, g}, s5; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;\n"
        "add.f32 u, u, 0f00000000; add.f32 v, v, 0f00000000;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 u, u, t;\n"
        "mov.b32 t, 0f00000000; max.NaN.f32 v, v, t;\n"
        "mov.b32 t, 0f40C00000; min.NaN.f32 v, v, t;\n"
        "cvt.rn.f16x2.f32 s2, v, u;\n"
        "@a st.global.b32 [%6+144], s2;\n"
        "}\n"
        OPERANDS);
    break;
  END
}
