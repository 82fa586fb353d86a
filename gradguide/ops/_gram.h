/* The pass that measures: inner products of rows. */

#pragma once

#include "_codes.h"
#include "_rows.h"

/* LANES elements in a register, or in two where registers are narrower. */
#define LANES 8
typedef float lanes __attribute__((vector_size(4 * LANES)));

/* Up to LANES elements; those past `count` are 0. */
INLINE lanes load(const float *x, int64_t count) {
    lanes value = {0};
    memcpy(&value, x, sizeof(float) * count);
    return value;
}

INLINE void tile_step(const float *const *x, int xs, const float *const *y, int ys, int64_t i, int64_t count,
                      lanes sums[2][TILE]) {
    const lanes a = load(x[0] + i, count), b = xs > 1 ? load(x[1] + i, count) : a;
#pragma GCC unroll 4
    for (int s = 0; s < ys; s++) {
        const lanes value = load(y[s] + i, count);
        sums[0][s] += a * value;
        if (xs > 1)
            sums[1][s] += b * value;
    }
}

/* Products of xs rows, up to two, with ys rows, up to TILE: what is loaded serves all, and no sum waits for another. */
INLINE void tile(const float *const *x, int xs, const float *const *y, int ys, int64_t n, float products[2][TILE]) {
    lanes sums[2][TILE] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        tile_step(x, xs, y, ys, i, LANES, sums);
    if (i < n)
        tile_step(x, xs, y, ys, i, n - i, sums);
    for (int r = 0; r < xs; r++)
        for (int s = 0; s < ys; s++) {
            products[r][s] = 0.0f;
            for (int lane = 0; lane < LANES; lane++)
                products[r][s] += sums[r][s][lane];
        }
}

/* Constants for the compiler, which then keeps the sums in registers. */
INLINE void dots(const float *const *x, int xs, const float *const *y, int ys, int64_t n, float products[2][TILE]) {
    switch (xs * 10 + ys) {
    case 11: tile(x, 1, y, 1, n, products); break;
    case 12: tile(x, 1, y, 2, n, products); break;
    case 13: tile(x, 1, y, 3, n, products); break;
    case 14: tile(x, 1, y, 4, n, products); break;
    case 21: tile(x, 2, y, 1, n, products); break;
    case 22: tile(x, 2, y, 2, n, products); break;
    case 23: tile(x, 2, y, 3, n, products); break;
    case 24: tile(x, 2, y, 4, n, products); break;
    }
}

/* The same for one pair in float64. */
INLINE double wide_dot(const float *x, const float *y, int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)y[i];
    return sum;
}

/* Whether a float32 sum of products is to be trusted. */
INLINE int sound(float product) {
    const float size = product < 0 ? -product : product;
    return size > SMALLEST && size < LARGEST;
}

INLINE double *cell(double *total, Py_ssize_t rows, Py_ssize_t a, Py_ssize_t b) {
    return total + (a < b ? a * rows + b : b * rows + a);
}

/* Rows of a block: their elements, and their numbers. */
typedef struct {
    const float *values[MAX_ROWS];
    Py_ssize_t place[MAX_ROWS], count;
} Block;

/* Adds to `total` the products of the rows x with the rows y from `first` on, up to TILE; if y is x, each pair once. */
INLINE void
block_products(const Block *x, const Block *y, Py_ssize_t first, int64_t n, Py_ssize_t rows, double *total) {
    const int ys = y->count - first < TILE ? (int)(y->count - first) : TILE;
    for (Py_ssize_t r = 0; r < (x == y ? first + ys : x->count); r += 2) {
        const int xs = x->count - r < 2 ? 1 : 2;
        float products[2][TILE];
        dots(x->values + r, xs, y->values + first, ys, n, products);
        for (int i = 0; i < xs; i++)
            for (int j = 0; j < ys; j++)
                if (x != y || r + i <= first + j)
                    *cell(total, rows, x->place[r + i], y->place[first + j]) +=
                        sound(products[i][j]) ? products[i][j]
                                              : wide_dot(x->values[r + i], y->values[first + j], n);
    }
}

#ifdef CODES_IN_REGISTERS
INLINE void codes_products(const Block *x, const Codes *y, int64_t n, Py_ssize_t rows, double *total) {
    for (Py_ssize_t r = 0; r < x->count; r += 2) {
        const int xs = x->count - r < 2 ? 1 : 2;
        float products[2][TILE];
        codes_dots(x->values + r, xs, y, n, products);
        for (int i = 0; i < xs; i++)
            for (int j = 0; j < y->count; j++) {
                double product = products[i][j];
                if (!sound(products[i][j])) {
                    float room[BLOCK];
                    decode(y->first[j], y->scales[j], y->start, n, room);
                    product = wide_dot(x->values[r + i], room, n);
                }
                *cell(total, rows, x->place[r + i], y->place[j]) += product;
            }
    }
}
#endif

/* Adds the products of all rows over elements start..start + n of one tensor to `total` [rows][rows], upper half. */
INLINE void block_gram(const Rows *rows, Py_ssize_t tensor, int64_t start, int64_t n, double *total) {
    float room[MAX_ROWS * BLOCK]; /* row after row, n elements each: a power of two apart they would evict each other */
    Block wanted, known;
    wanted.count = 0;
    for (Py_ssize_t r = 0; r < rows->rows; r++) {
        float *place = room + n * wanted.count;
        if (!rows->known[r] && (wanted.values[wanted.count] = row_values(rows, r, tensor, start, n, place)))
            wanted.place[wanted.count++] = r;
    }
    for (Py_ssize_t s = 0; s < wanted.count; s += TILE)
        block_products(&wanted, &wanted, s, n, rows->rows, total);
    if (!wanted.count)
        return;
    /* Those that are known have products with the others alone: TILE of them at a time, while they are at hand. */
    for (Py_ssize_t r = 0; r < rows->rows;) {
        float *spare = room + n * wanted.count;
        for (known.count = 0; r < rows->rows && known.count < TILE; r++)
            if (rows->known[r] && !in_registers(rows, r) &&
                (known.values[known.count] = row_values(rows, r, tensor, start, n, spare + n * known.count)))
                known.place[known.count++] = r;
        if (known.count)
            block_products(&wanted, &known, 0, n, rows->rows, total);
    }
#ifdef CODES_IN_REGISTERS
    for (Py_ssize_t r = 0; r < rows->rows;) {
        Codes codes = {.start = start};
        for (; r < rows->rows && codes.count < TILE; r++)
            if (rows->known[r] && in_registers(rows, r))
                take(&codes, rows, r, tensor);
        if (codes.count)
            codes_products(&wanted, &codes, n, rows->rows, total);
    }
#endif
}

DISPATCHED
static void gram_pass(const Rows *rows, const int64_t *lengths, int64_t lo, int64_t hi, double *total) {
    const int64_t block = block_of(rows);
    int64_t begin = 0;
    for (Py_ssize_t t = 0; t < rows->tensors && begin < hi; begin += lengths[t], t++) {
        const int64_t last = hi - begin < lengths[t] ? hi - begin : lengths[t];
        for (int64_t i = lo > begin ? lo - begin : 0; i < last; i += block)
            block_gram(rows, t, i, last - i < block ? last - i : block, total);
    }
}

static void gram_threads(const Rows *rows, const int64_t *lengths, int threads, double *total) {
    static const int64_t line = 8; /* doubles: no two threads write to one cache line */
    const int64_t elements = total_length(lengths, rows->tensors), size = rows->rows * rows->rows;
    const int64_t stride = (size + line - 1) / line * line;
    double *parts = calloc(stride * threads, sizeof(double));
    if (!parts)
        parts = total, threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++)
        gram_pass(rows, lengths, elements * i / threads, elements * (i + 1) / threads, parts + stride * i);
    if (parts == total)
        return;
    for (int i = 0; i < threads; i++)
        for (int64_t j = 0; j < size; j++)
            total[j] += parts[stride * i + j];
    free(parts);
}
