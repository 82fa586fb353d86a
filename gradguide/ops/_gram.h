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

INLINE void dots(const float *const *x, int xs, const float *const *y, int ys, int64_t n, float products[2][TILE]) {
    if (xs == 1)
        WITH_CONSTANT(ys, tile(x, 1, y, N, n, products))
    else
        WITH_CONSTANT(ys, tile(x, 2, y, N, n, products))
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

/* Rows of a block in float32: their elements, and their numbers. */
typedef struct {
    const float *values[MAX_ROWS];
    Py_ssize_t place[MAX_ROWS], count;
} Block;

/* Up to TILE rows: in float32, or codes. */
typedef struct {
    const float *const *values; /* NULL for codes */
    Codes codes;
    const Py_ssize_t *place;
    int count;
} Tile;

INLINE void tile_dots(const float *const *x, int xs, const Tile *y, int64_t n, float products[2][TILE]) {
#ifdef CODES_IN_REGISTERS
    if (!y->values)
        codes_dots(x, xs, &y->codes, n, products);
    else
#endif
        dots(x, xs, y->values, y->count, n, products);
}

/* Product of x with row s of the tile in float64. */
INLINE double tile_wide_dot(const float *x, const Tile *y, int s, int64_t n) {
    float room[BLOCK];
    if (y->values)
        return wide_dot(x, y->values[s], n);
    decode(y->codes.first[s], y->codes.scales[s], y->codes.start, n, room);
    return wide_dot(x, room, n);
}

/* Adds to `total` the products of the rows x with those of a tile. If the tile is x from row `first` on, each pair is
 * taken once; otherwise `first` is beyond all of x. */
INLINE void
tile_products(const Block *x, const Tile *y, Py_ssize_t first, int64_t n, Py_ssize_t rows, double *total) {
    for (Py_ssize_t r = 0; r < x->count && r < first + y->count; r += 2) {
        const int xs = x->count - r < 2 ? 1 : 2;
        float products[2][TILE];
        tile_dots(x->values + r, xs, y, n, products);
        for (int i = 0; i < xs; i++)
            for (int j = 0; j < y->count; j++)
                if (r + i <= first + j)
                    *cell(total, rows, x->place[r + i], y->place[j]) +=
                        sound(products[i][j]) ? products[i][j] : tile_wide_dot(x->values[r + i], y, j, n);
    }
}

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
    for (Py_ssize_t s = 0; s < wanted.count; s += TILE) {
        const int count = wanted.count - s < TILE ? (int)(wanted.count - s) : TILE;
        const Tile tile = {.values = wanted.values + s, .place = wanted.place + s, .count = count};
        tile_products(&wanted, &tile, s, n, rows->rows, total);
    }
    /* Those that are known have products with the others alone: TILE of them at a time, while they are at hand. */
    for (Py_ssize_t r = 0; r < rows->rows && wanted.count;) {
        float *spare = room + n * wanted.count;
        for (known.count = 0; r < rows->rows && known.count < TILE; r++)
            if (rows->known[r] && !in_registers(rows, r) &&
                (known.values[known.count] = row_values(rows, r, tensor, start, n, spare + n * known.count)))
                known.place[known.count++] = r;
        const Tile tile = {.values = known.values, .place = known.place, .count = (int)known.count};
        tile_products(&wanted, &tile, wanted.count, n, rows->rows, total);
    }
    for (Py_ssize_t r = 0; r < rows->rows && wanted.count;) {
        Tile tile = {.codes = {.start = start}};
        for (; r < rows->rows && tile.codes.count < TILE; r++)
            if (rows->known[r] && in_registers(rows, r))
                take(&tile.codes, rows, r, tensor);
        tile.place = tile.codes.place;
        tile.count = tile.codes.count;
        tile_products(&wanted, &tile, wanted.count, n, rows->rows, total);
    }
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
