/* Rows: where they lie, how they are stored, and their elements in float32. */

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS 20
#define MAX_WRITES 4
#define MAX_THREADS 256
#define SHORT 512  /* elements of a block: 2 KiB of each row, so that many rows stay in the first-level cache */
#define BLOCK 4096 /* the same where but few have to stay: the others are then read by the page */
#define CODES 128  /* elements that share a scale, from the tensor's first on */

/* Between these a float32 sum of products has neither overflowed nor lost what counts to underflow. */
#define SMALLEST 1e-24f
#define LARGEST 1e30f

/* One build, and the widest instructions that the machine has. By level, not by processor: a clone for "haswell" is for
 * Intel's alone, and leaves AMD's with the narrowest. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#if __GNUC__ >= 12
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define DISPATCHED
#endif
#define INLINE static inline __attribute__((always_inline))
/* Vectors are returned by functions that are always inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

enum { OFFSET, SCALE, AT, ANCHOR, PARTS };
enum { FLOAT32, BFLOAT16, CODES8 };

#define TILE 4 /* rows that go through a loop together, so that what they share is loaded once */

/* `call` with the count as a constant N, up to TILE: the compiler then keeps what each row needs in registers. */
#define WITH_CONSTANT(count, call)                                                                                     \
    switch (count) {                                                                                                   \
    case 1: { enum { N = 1 }; call; break; }                                                                           \
    case 2: { enum { N = 2 }; call; break; }                                                                           \
    case 3: { enum { N = 3 }; call; break; }                                                                           \
    case 4: { enum { N = 4 }; call; break; }                                                                           \
    }

typedef struct {
    const int64_t *table; /* [rows][PARTS][tensors] */
    const char *kinds;    /* [rows][PARTS] */
    Py_ssize_t rows, tensors;
    const char *known; /* [rows]: products of two such rows are not wanted */
} Rows;

/* Elements of a block. What is read once, and not again, does not have to stay in the cache. */
INLINE int64_t block_of(const Rows *rows) {
    Py_ssize_t kept = 0;
    for (Py_ssize_t r = 0; rows->known && r < rows->rows; r++)
        kept += !rows->known[r];
    return kept <= 4 && rows->rows > 8 ? BLOCK : SHORT;
}

INLINE const void *address(const Rows *rows, Py_ssize_t row, int which, Py_ssize_t tensor) {
    return (const void *)(uintptr_t)rows->table[(row * PARTS + which) * rows->tensors + tensor];
}

INLINE void widen(const uint16_t *stored, int64_t n, float *room) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)stored[i] << 16;
        memcpy(room + i, &bits, sizeof(bits));
    }
}

/* To the nearest bfloat16, ties to even; what is not a number stays so. */
INLINE void narrow(const float *values, int64_t n, uint16_t *into) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        into[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

/* Where the run of elements ends that begins at i and has one scale. */
INLINE int64_t run_end(int64_t i, int64_t end) {
    const int64_t next = (i / CODES + 1) * CODES;
    return next < end ? next : end;
}

INLINE void decode(const int8_t *codes, const float *scales, int64_t start, int64_t n, float *room) {
    for (int64_t i = start, stop; i < start + n; i = stop) {
        stop = run_end(i, start + n);
        const float scale = scales[i / CODES];
        for (int64_t j = i; j < stop; j++)
            room[j - start] = scale * (float)codes[j];
    }
}

/* n elements of a part in float32: where they lie, or in `room`; NULL if the part is absent. */
INLINE const float *
part(const Rows *rows, Py_ssize_t row, int which, Py_ssize_t tensor, int64_t start, int64_t n, float *room) {
    const void *first = address(rows, row, which, tensor);
    const int kind = rows->kinds[row * PARTS + which];
    if (!first || kind == FLOAT32)
        return first ? (const float *)first + start : NULL;
    if (kind == BFLOAT16)
        widen((const uint16_t *)first + start, n, room);
    else
        decode(first, address(rows, row, SCALE, tensor), start, n, room);
    return room;
}

/* n elements of a row in float32: where they lie, or in `room`; NULL if there is no row. */
INLINE const float *
row_values(const Rows *rows, Py_ssize_t row, Py_ssize_t tensor, int64_t start, int64_t n, float *room) {
    if (!address(rows, row, AT, tensor))
        return part(rows, row, OFFSET, tensor, start, n, room);
    float spare[3][BLOCK];
    const float *at = part(rows, row, AT, tensor, start, n, room);
    const float *anchor = part(rows, row, ANCHOR, tensor, start, n, spare[0]);
    const float *offset = part(rows, row, OFFSET, tensor, start, n, spare[1]);
    const float *scale = part(rows, row, SCALE, tensor, start, n, spare[2]);
    if (scale && offset)
        for (int64_t i = 0; i < n; i++)
            room[i] = offset[i] + scale[i] * (at[i] - anchor[i]);
    else if (scale)
        for (int64_t i = 0; i < n; i++)
            room[i] = scale[i] * (at[i] - anchor[i]);
    else if (offset)
        for (int64_t i = 0; i < n; i++)
            room[i] = offset[i] + (at[i] - anchor[i]);
    else
        for (int64_t i = 0; i < n; i++)
            room[i] = at[i] - anchor[i];
    return room;
}

static int64_t total_length(const int64_t *lengths, Py_ssize_t tensors) {
    int64_t elements = 0;
    for (Py_ssize_t t = 0; t < tensors; t++)
        elements += lengths[t];
    return elements;
}
