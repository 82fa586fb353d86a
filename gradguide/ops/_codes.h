/* Products with, and sums of, rows of 8-bit codes that are widened in registers, on x86 processors with AVX2. */

#pragma once

#include "_rows.h"

/* Rows of 8-bit codes over one block of a tensor that begins at element `start`. */
typedef struct {
    const int8_t *first[TILE]; /* of the tensor */
    const float *scales[TILE];
    Py_ssize_t place[TILE];
    int count;
    int64_t start;
} Codes;

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define CODES_IN_REGISTERS 1
#define AVX2 __attribute__((target("avx2,fma")))

AVX2 INLINE __m256 widen_codes(const int8_t *codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
}

AVX2 INLINE float total_of(__m256 sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

AVX2 INLINE void codes_tile(const float *const *x, int xs, const Codes *y, int ys, int64_t n, float products[2][TILE]) {
    __m256 sums[2][TILE];
    float rest[2][TILE] = {{0}};
    for (int s = 0; s < TILE; s++)
        sums[0][s] = sums[1][s] = _mm256_setzero_ps();
    for (int64_t i = 0, stop; i < n; i = stop) {
        __m256 scales[TILE];
        stop = run_end(y->start + i, y->start + n) - y->start;
        for (int s = 0; s < ys; s++)
            scales[s] = _mm256_set1_ps(y->scales[s][(y->start + i) / CODES]);
        for (; i + 8 <= stop; i += 8) {
            const __m256 a = _mm256_loadu_ps(x[0] + i), b = xs > 1 ? _mm256_loadu_ps(x[1] + i) : a;
#pragma GCC unroll 4
            for (int s = 0; s < ys; s++) {
                const __m256 value = _mm256_mul_ps(scales[s], widen_codes(y->first[s] + y->start + i));
                sums[0][s] = _mm256_fmadd_ps(a, value, sums[0][s]);
                if (xs > 1)
                    sums[1][s] = _mm256_fmadd_ps(b, value, sums[1][s]);
            }
        }
        for (; i < stop; i++)
            for (int s = 0; s < ys; s++)
                for (int r = 0; r < xs; r++)
                    rest[r][s] += x[r][i] * _mm256_cvtss_f32(scales[s]) * (float)y->first[s][y->start + i];
    }
    for (int r = 0; r < xs; r++)
        for (int s = 0; s < ys; s++)
            products[r][s] = total_of(sums[r][s]) + rest[r][s];
}

AVX2 static void codes_dots(const float *const *x, int xs, const Codes *y, int64_t n, float products[2][TILE]) {
    if (xs == 1)
        WITH_CONSTANT(y->count, codes_tile(x, 1, y, N, n, products))
    else
        WITH_CONSTANT(y->count, codes_tile(x, 2, y, N, n, products))
}

AVX2 INLINE void codes_add(const Codes *y, const float *coefficients, int rows, int64_t n, float *sums) {
    for (int64_t i = 0, stop; i < n; i = stop) {
        __m256 factors[TILE];
        stop = run_end(y->start + i, y->start + n) - y->start;
        for (int r = 0; r < rows; r++)
            factors[r] = _mm256_set1_ps(coefficients[r] * y->scales[r][(y->start + i) / CODES]);
        for (; i + 8 <= stop; i += 8) {
            __m256 sum = _mm256_loadu_ps(sums + i);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum = _mm256_fmadd_ps(factors[r], widen_codes(y->first[r] + y->start + i), sum);
            _mm256_storeu_ps(sums + i, sum);
        }
        for (; i < stop; i++)
            for (int r = 0; r < rows; r++)
                sums[i] += _mm256_cvtss_f32(factors[r]) * (float)y->first[r][y->start + i];
    }
}

AVX2 static void codes_add_rows(const Codes *y, const float *coefficients, int64_t n, float *sums) {
    WITH_CONSTANT(y->count, codes_add(y, coefficients, N, n, sums))
}
#endif

static int codes_in_registers; /* whether this machine has what they need; decoded to memory first if not */

INLINE int in_registers(const Rows *rows, Py_ssize_t row) {
    return codes_in_registers && rows->kinds[row * PARTS + OFFSET] == CODES8;
}

/* Appends the row's codes, unless the tensor has none. */
INLINE void take(Codes *codes, const Rows *rows, Py_ssize_t row, Py_ssize_t tensor) {
    codes->first[codes->count] = address(rows, row, OFFSET, tensor);
    codes->scales[codes->count] = address(rows, row, SCALE, tensor);
    codes->place[codes->count] = row;
    codes->count += codes->first[codes->count] != NULL;
}
