/* The pass that writes: linear combinations of rows. */

#pragma once

#include "_codes.h"
#include "_rows.h"

typedef struct {
    const int64_t *into;        /* [writes][tensors] */
    const double *coefficients; /* [writes][rows] */
    const char *accumulate;     /* [writes] */
    const char *kinds;          /* [writes] */
    Py_ssize_t count;
} Writes;

/* Adds coefficients[r] * values[r], up to TILE rows at once, so that sums are loaded and stored once for all. */
INLINE void add(const float *const *values, const float *coefficients, int rows, int64_t n, float *restrict sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float sum = sums[i];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sum += coefficients[r] * values[r][i];
        sums[i] = sum;
    }
}

INLINE void add_rows(const float *const *values, const float *coefficients, int rows, int64_t n, float *sums) {
    WITH_CONSTANT(rows, add(values, coefficients, N, n, sums))
}

INLINE void
block_combine(const Rows *rows, const Writes *writes, Py_ssize_t tensor, int64_t start, int64_t n) {
    float room[TILE * BLOCK], results[MAX_WRITES * BLOCK]; /* row after row, n elements each */
    for (Py_ssize_t w = 0; w < writes->count; w++) {
        const void *into = (const void *)(uintptr_t)writes->into[w * rows->tensors + tensor];
        if (!writes->accumulate[w])
            memset(results + n * w, 0, sizeof(float) * n);
        else if (writes->kinds[w] == FLOAT32)
            memcpy(results + n * w, (const float *)into + start, sizeof(float) * n);
        else
            widen((const uint16_t *)into + start, n, results + n * w);
    }
    for (Py_ssize_t r = 0; r < rows->rows;) {
        const float *values[TILE];
        Py_ssize_t place[TILE];
        int count = 0;
        for (; r < rows->rows && count < TILE; r++) {
            int wanted = 0;
            for (Py_ssize_t w = 0; w < writes->count; w++)
                wanted |= writes->coefficients[w * rows->rows + r] != 0.0;
            if (wanted && !in_registers(rows, r) &&
                (values[count] = row_values(rows, r, tensor, start, n, room + n * count)))
                place[count++] = r;
        }
        for (Py_ssize_t w = 0; w < writes->count; w++) {
            const float *chosen[TILE];
            float coefficients[TILE];
            int terms = 0;
            for (int i = 0; i < count; i++) {
                const float c = (float)writes->coefficients[w * rows->rows + place[i]];
                /* A row with a coefficient of 0 may hold anything, NaN included. */
                if (c != 0.0f)
                    chosen[terms] = values[i], coefficients[terms++] = c;
            }
            add_rows(chosen, coefficients, terms, n, results + n * w);
        }
    }
#ifdef CODES_IN_REGISTERS
    for (Py_ssize_t w = 0; w < writes->count; w++)
        for (Py_ssize_t r = 0; r < rows->rows;) {
            Codes codes = {.start = start};
            float coefficients[TILE];
            for (; r < rows->rows && codes.count < TILE; r++) {
                const float c = coefficients[codes.count] = (float)writes->coefficients[w * rows->rows + r];
                if (c != 0.0f && in_registers(rows, r))
                    take(&codes, rows, r, tensor);
            }
            if (codes.count)
                codes_add_rows(&codes, coefficients, n, results + n * w);
        }
#endif
    /* Only when all is read, since what is written may be a row. */
    for (Py_ssize_t w = 0; w < writes->count; w++) {
        void *into = (void *)(uintptr_t)writes->into[w * rows->tensors + tensor];
        if (writes->kinds[w] == FLOAT32)
            memcpy((float *)into + start, results + n * w, sizeof(float) * n);
        else
            narrow(results + n * w, n, (uint16_t *)into + start);
    }
}

DISPATCHED
static void combine_pass(const Rows *rows, const int64_t *lengths, const Writes *writes, int64_t lo, int64_t hi) {
    const int64_t block = block_of(rows);
    int64_t begin = 0;
    for (Py_ssize_t t = 0; t < rows->tensors && begin < hi; begin += lengths[t], t++) {
        const int64_t last = hi - begin < lengths[t] ? hi - begin : lengths[t];
        for (int64_t i = lo > begin ? lo - begin : 0; i < last; i += block)
            block_combine(rows, writes, t, i, last - i < block ? last - i : block);
    }
}

static void combine_threads(const Rows *rows, const int64_t *lengths, const Writes *writes, int threads) {
    const int64_t elements = total_length(lengths, rows->tensors);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++)
        combine_pass(rows, lengths, writes, elements * i / threads, elements * (i + 1) / threads);
}
