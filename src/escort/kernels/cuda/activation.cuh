// The activations of an epilogue that do more than bound. They are PTX, since generated code is.
//
// ACTIVATION is the name of one, as in problem.py; without it a kernel only bounds. ACTIVATE(v, slope) is the text of
// what replaces the register v by its activation. SLOPED says whether that has slopes: slope, a register or a number,
// is what multiplies numbers below zero.
//
// Infinities and NaN give what torch makes of them. Against float64 the results are off by 1e-6 (gelu 2e-6, gelu_tanh
// 5e-6) of themselves down to -6; hardsigmoid and hardswish by 3e-7, absolute, as few digits are left near -3.
//
// Where results are rounded to 16 bits (STORAGE), tanh and silu are made of tanh.approx, which may be off by 2^-11 of
// its result. So silu is off by 2^-12 of its argument: where that is positive half a unit in the last place of fp16,
// and a part of the result that grows below -3. It saves one of two instructions of the unit for special functions, of
// which a multiprocessor does 16 per clock: in layers that read few channels these would take longer than the products.
// sigmoid stays exact, as all of its results may be small, and gelu, whose tail is shorter.
#pragma once

// Each reads and writes y; part, square, series and below are its own.
#define SLOPED_leaky_relu 1
#define ACTIVATION_leaky_relu   \
  "setp.lt.f32 below, y, 0.0; " \
  "@below mul.f32 y, y, slope; "

// part = hardsigmoid(y)
#define HARDSIGMOID                                \
  "fma.rn.f32 part, y, 0.16666666666666667, 0.5; " \
  "max.NaN.f32 part, part, 0.0; "                  \
  "min.NaN.f32 part, part, 1.0; "
#define ACTIVATION_hardsigmoid HARDSIGMOID "mov.f32 y, part; "
#define ACTIVATION_hardswish HARDSIGMOID "mul.f32 y, y, part; "

// part = 1 / (1 + e^-part), 0 where e^-part overflows.
#define SIGMOID                               \
  "mul.f32 part, part, -1.4426950408889634; " \
  "ex2.approx.ftz.f32 part, part; "           \
  "add.f32 part, part, 1.0; "                 \
  "rcp.approx.ftz.f32 part, part; "
#define ACTIVATION_sigmoid "mov.f32 part, y; " SIGMOID "mov.f32 y, part; "

// Times the share of a standard normal distribution below y. The share beyond |y| is e^(-y^2 / 2) t p(t) with
// t = 1 / (1 + 0.3 |y|) and the polynomial p of kernels/cpu/epilogue.hpp.
#define ACTIVATION_gelu                                   \
  "abs.f32 part, y; "                                     \
  "fma.rn.f32 part, part, 0.3, 1.0; "                     \
  "rcp.approx.ftz.f32 part, part; "                       \
  "fma.rn.f32 series, part, 0.0359317549, -0.158276081; " \
  "fma.rn.f32 series, series, part, 0.208206728; "        \
  "fma.rn.f32 series, series, part, -0.0553939454; "      \
  "fma.rn.f32 series, series, part, 0.129469246; "        \
  "fma.rn.f32 series, series, part, 0.0996374786; "       \
  "fma.rn.f32 series, series, part, 0.120798357; "        \
  "fma.rn.f32 series, series, part, 0.119626388; "        \
  "mul.f32 series, series, part; "                        \
  "mul.f32 square, y, y; "                                \
  "mul.f32 square, square, -0.7213475204444817; "         \
  "ex2.approx.ftz.f32 square, square; "                   \
  "mul.f32 series, series, square; "                      \
  "setp.lt.f32 below, y, 0.0; "                           \
  "@!below sub.f32 series, 1.0, series; "                 \
  "mul.f32 y, y, series; "

// y (1 + tanh u) / 2 = y sigmoid(2 u)
#define ACTIVATION_gelu_tanh                                         \
  "mul.f32 part, y, y; "                                             \
  "fma.rn.f32 part, part, 0.07135481627260025, 1.5957691216057308; " \
  "mul.f32 part, part, y; " SIGMOID "mul.f32 y, y, part; "

#if STORAGE
#define ACTIVATION_tanh "tanh.approx.f32 y, y; "

// y (1 + tanh(y / 2)) / 2
#define ACTIVATION_silu       \
  "mul.f32 y, y, 0.5; "       \
  "tanh.approx.f32 part, y; " \
  "fma.rn.f32 y, y, part, y; "
#else
// An odd polynomial below 0.6, exact to 8e-8 of the result; from there on 1 - 2 / (1 + e^2|y|).
#define ACTIVATION_tanh                                  \
  "mul.f32 square, y, y; "                               \
  "fma.rn.f32 series, square, 0.01561239, -0.05221166; " \
  "fma.rn.f32 series, series, square, 0.13313115; "      \
  "fma.rn.f32 series, series, square, -0.33332598; "     \
  "mul.f32 series, series, square; "                     \
  "fma.rn.f32 series, series, y, y; "                    \
  "abs.f32 part, y; "                                    \
  "setp.lt.f32 below, part, 0.6; "                       \
  "mul.f32 part, part, 2.8853900817779268; "             \
  "ex2.approx.ftz.f32 part, part; "                      \
  "add.f32 part, part, 1.0; "                            \
  "rcp.approx.ftz.f32 part, part; "                      \
  "fma.rn.f32 part, part, -2.0, 1.0; "                   \
  "copysign.f32 part, y, part; "                         \
  "selp.f32 y, series, part, below; "

#define ACTIVATION_silu "mov.f32 part, y; " SIGMOID "mul.f32 y, y, part; "
#endif

#define JOINED(a, b) a##b
#define NAME(a, b) JOINED(a, b)
#ifdef ACTIVATION
#define BEYOND_BOUNDS 1
#define ACTIVATE(v, slope)                                                                                \
  "{ .reg .f32 y, slope, part, square, series; .reg .pred below; mov.f32 y, " v "; mov.f32 slope, " slope \
  "; " NAME(ACTIVATION_, ACTIVATION) "mov.f32 " v ", y; }"
#else
#define BEYOND_BOUNDS 0
#define ACTIVATE(v, slope) ""
#endif
#if NAME(SLOPED_, ACTIVATION)  // a name that nobody defines counts as 0
#define SLOPED 1
#else
#define SLOPED 0
#endif

__device__ __forceinline__ float activated(float v, float slope) {
  asm(ACTIVATE("%0", "%1") : "+f"(v) : "f"(slope));
  return v;
}
