// Elements, as bits, and as many neighbours of them as a thread moves at once: VECTOR of BYTES bytes, 16 bytes at most.
typedef unsigned short u16;
typedef unsigned int u32;

#if BYTES == 2
typedef u16 Element;
#else
typedef u32 Element;
#endif

#if BYTES * VECTOR == 16
typedef uint4 Vector;
#elif BYTES * VECTOR == 8
typedef uint2 Vector;
#elif BYTES * VECTOR == 4
typedef u32 Vector;
#else
typedef u16 Vector;
#endif
