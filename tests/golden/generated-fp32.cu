// 1x2x6x6 -> 3, kernel 3x3, fp32 on cpu, padding (1, 1, 1, 1)
// out_channels=3, consumers=1, producers=1, channel_block=2, stages=2
// 1 parts in 1 slices, 4 multiply-adds among 7 steps
#define STORAGE 0
#define COLUMNS 1
#define SAMPLES 1
#define CHANNELS 2
#define HEIGHT 6
#define WIDTH 6
#define PITCH 7
#define SAMPLE_ROWS 7
#define TOP 1
#define LEFT 1
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
#define CHANNEL_WORDS 48
#define STAGE_BYTES 384
#define TILE_WORDS 32
#define STAGE_WORDS 48
#include "generated.cuh"

GENERATED {
  BEGIN
  case 0:
    asm volatile(
        "{ .reg .f32 s<3>; .reg .f32 x<3>; .reg .f32 u; .reg .f32 v; .reg .f32 w;\n"
        ".reg .b16 h; .reg .b16 g; .reg .pred a; .reg .pred b; .reg .pred p; .reg .b32 t; .reg .b32 left;\n"
        ".reg .b64 d; .reg .b64 e; .reg .pred first;\n"
        "mov.u32 t, %%laneid; setp.eq.u32 first, t, 0;\n"
        "mov.f32 s0, 0f00000000;\n"
        "mov.f32 s1, 0f00000000;\n"
        "mov.f32 s2, 0f00000000;\n"
        "CHUNK0: mbarrier." WAIT ".parity.shared.b64 p, [%2+0], %0; @!p bra CHUNK0;\n"
        "ld.shared.f32 x0, [%1+0];\n"
        "fma.rn.f32 s0, x0, 0f3F000000, s0;\n"
        "fma.rn.f32 s1, x0, 0f40400000, s1;\n"
        "ld.shared.f32 x1, [%1+228];\n"
        "fma.rn.f32 s0, x1, 0fC0000000, s0;\n"
        "ld.shared.f32 x2, [%1+252];\n"
        "fma.rn.f32 s2, x2, 0f3E800000, s2;\n"
        "bar.warp.sync 0xffffffff;\n"
        "@first mbarrier.arrive.shared.b64 d, [%2+16];\n"
        "CHUNK1: mbarrier." WAIT ".parity.shared.b64 p, [%2+8], %0; @!p bra CHUNK1;\n"
        "bar.warp.sync 0xffffffff;\n"
        "@first mbarrier.arrive.shared.b64 d, [%2+24];\n"
        "xor.b32 %0, %0, 1;\n"
        "and.b32 t, %3, 1; setp.ne.u32 a, t, 0; and.b32 t, %3, 2; setp.ne.u32 b, t, 0;\n"
        "add.u64 d, %6, %5;\n"
        "@a st.global.f32 [%6+0], s0;\n"
        "@a st.global.f32 [%6+144], s1;\n"
        "@a st.global.f32 [%6+288], s2;\n"
        "}\n"
        OPERANDS);
    break;
  END
}
