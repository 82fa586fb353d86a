/* Passes over float32 rows in memory, for the CPU: one read of every row for all products, one for all sums.
 *
 * A pass walks the elements lo..hi of a bucket's tensors, laid end to end, in blocks that stay in the first-level
 * cache while everything that is wanted of them is computed. Rows come as a table of addresses, [rows][4][tensors]:
 * a row is offset + scale * (at - anchor), and an address of 0 is a part that is absent. A row with a scale but nothing
 * to scale is one of 8 bits: codes in place of the offset, and a scale for every CODES of them. Nothing here knows a rule.
 *
 * Threads are OpenMP's, each with a range of its own, whose sums are added in order: the same number of threads gives
 * the same bits. Linked to the library that torch has loaded, they are torch's own threads.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS 20
#define MAX_WRITES 4
#define MAX_THREADS 256
#define BLOCK 512 /* elements; 2 KiB of each row */
#define CODES 128 /* elements that share a scale, from the tensor's first on */

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

enum { OFFSET, SCALE, AT, ANCHOR, PARTS };

typedef struct {
    const int64_t *table; /* [rows][PARTS][tensors] */
    Py_ssize_t rows, tensors;
    const char *known; /* [rows]: products of two such rows are not wanted */
} Rows;

INLINE const void *address(const Rows *rows, Py_ssize_t row, int which, Py_ssize_t tensor) {
    return (const void *)(uintptr_t)rows->table[(row * PARTS + which) * rows->tensors + tensor];
}

INLINE const float *part(const Rows *rows, Py_ssize_t row, int which, Py_ssize_t tensor, int64_t start) {
    const float *first = address(rows, row, which, tensor);
    return first ? first + start : NULL;
}

INLINE void decode(const int8_t *codes, const float *scales, int64_t start, int64_t n, float *room) {
    for (int64_t i = start; i < start + n;) {
        const int64_t end = (i / CODES + 1) * CODES, stop = end < start + n ? end : start + n;
        const float scale = scales[i / CODES];
        for (int64_t j = i; j < stop; j++)
            room[j - start] = scale * (float)codes[j];
        i = stop;
    }
}

/* n elements of a row: where they lie if the row is plain, formed in `room` if it is not, NULL if there is no row. */
INLINE const float *
row_values(const Rows *rows, Py_ssize_t row, Py_ssize_t tensor, int64_t start, int64_t n, float *room) {
    const float *offset = part(rows, row, OFFSET, tensor, start);
    const float *at = part(rows, row, AT, tensor, start), *scale = part(rows, row, SCALE, tensor, start);
    if (!at && scale) {
        decode(address(rows, row, OFFSET, tensor), address(rows, row, SCALE, tensor), start, n, room);
        return room;
    }
    if (!at)
        return offset;
    const float *anchor = part(rows, row, ANCHOR, tensor, start);
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

/* Products of x with the rows y, up to three at once: each element of x is then loaded once for all of them. */
INLINE void dots(const float *x, const float *const *y, Py_ssize_t rows, int64_t n, float *products) {
    float a = 0.0f, b = 0.0f, c = 0.0f;
    if (rows == 1) {
        const float *p = y[0];
#pragma omp simd reduction(+ : a)
        for (int64_t i = 0; i < n; i++)
            a += x[i] * p[i];
    } else if (rows == 2) {
        const float *p = y[0], *q = y[1];
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = 0; i < n; i++) {
            a += x[i] * p[i];
            b += x[i] * q[i];
        }
        products[1] = b;
    } else {
        const float *p = y[0], *q = y[1], *r = y[2];
#pragma omp simd reduction(+ : a, b, c)
        for (int64_t i = 0; i < n; i++) {
            a += x[i] * p[i];
            b += x[i] * q[i];
            c += x[i] * r[i];
        }
        products[1] = b;
        products[2] = c;
    }
    products[0] = a;
}

/* The same for one pair in float64. */
INLINE double wide_dot(const float *x, const float *y, int64_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)y[i];
    return sum;
}

/* Adds the products of all rows over elements start..start + n of one tensor to `total` [rows][rows], upper half. */
INLINE void block_gram(const Rows *rows, Py_ssize_t tensor, int64_t start, int64_t n, double *total) {
    float room[MAX_ROWS][BLOCK], products[MAX_ROWS];
    const float *values[MAX_ROWS];
    Py_ssize_t place[MAX_ROWS], count = 0;
    /* Those that are not known first: each with all that follow, and none among the others. */
    Py_ssize_t wanted = 0;
    for (int known = 0; known < 2; known++) {
        for (Py_ssize_t r = 0; r < rows->rows; r++)
            if (rows->known[r] == known && (values[count] = row_values(rows, r, tensor, start, n, room[count])))
                place[count++] = r;
        wanted = known ? wanted : count;
    }
    for (Py_ssize_t r = 0; r < wanted; r++) {
        for (Py_ssize_t s = r; s < count; s += 3)
            dots(values[r], values + s, count - s, n, products + s);
        for (Py_ssize_t s = r; s < count; s++) {
            const float size = products[s] < 0 ? -products[s] : products[s];
            const Py_ssize_t low = place[r] < place[s] ? place[r] : place[s], high = place[r] + place[s] - low;
            total[low * rows->rows + high] +=
                size > SMALLEST && size < LARGEST ? products[s] : wide_dot(values[r], values[s], n);
        }
    }
}

DISPATCHED
static void gram_pass(const Rows *rows, const int64_t *lengths, int64_t lo, int64_t hi, double *total) {
    int64_t begin = 0;
    for (Py_ssize_t t = 0; t < rows->tensors && begin < hi; begin += lengths[t], t++) {
        const int64_t last = hi - begin < lengths[t] ? hi - begin : lengths[t];
        for (int64_t i = lo > begin ? lo - begin : 0; i < last; i += BLOCK)
            block_gram(rows, t, i, last - i < BLOCK ? last - i : BLOCK, total);
    }
}

static int64_t total_length(const int64_t *lengths, Py_ssize_t tensors) {
    int64_t elements = 0;
    for (Py_ssize_t t = 0; t < tensors; t++)
        elements += lengths[t];
    return elements;
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

typedef struct {
    const int64_t *into;        /* [writes][tensors] */
    const double *coefficients; /* [writes][rows] */
    const char *accumulate;     /* [writes] */
    Py_ssize_t count;
} Writes;

INLINE void
block_combine(const Rows *rows, const Writes *writes, Py_ssize_t tensor, int64_t start, int64_t n) {
    float room[BLOCK], results[MAX_WRITES][BLOCK];
    for (Py_ssize_t w = 0; w < writes->count; w++) {
        if (writes->accumulate[w])
            memcpy(results[w], (const float *)(uintptr_t)writes->into[w * rows->tensors + tensor] + start, 4 * n);
        else
            memset(results[w], 0, 4 * n);
    }
    for (Py_ssize_t r = 0; r < rows->rows; r++) {
        const float *values = NULL;
        for (Py_ssize_t w = 0; w < writes->count; w++) {
            const float c = (float)writes->coefficients[w * rows->rows + r];
            /* A row with a coefficient of 0 may hold anything, NaN included. */
            if (c == 0.0f || !(values || (values = row_values(rows, r, tensor, start, n, room))))
                continue;
            for (int64_t i = 0; i < n; i++)
                results[w][i] += c * values[i];
        }
    }
    /* Only when all is read, since what is written may be a row. */
    for (Py_ssize_t w = 0; w < writes->count; w++)
        memcpy((float *)(uintptr_t)writes->into[w * rows->tensors + tensor] + start, results[w], 4 * n);
}

DISPATCHED
static void combine_pass(const Rows *rows, const int64_t *lengths, const Writes *writes, int64_t lo, int64_t hi) {
    int64_t begin = 0;
    for (Py_ssize_t t = 0; t < rows->tensors && begin < hi; begin += lengths[t], t++) {
        const int64_t last = hi - begin < lengths[t] ? hi - begin : lengths[t];
        for (int64_t i = lo > begin ? lo - begin : 0; i < last; i += BLOCK)
            block_combine(rows, writes, t, i, last - i < BLOCK ? last - i : BLOCK);
    }
}

static void combine_threads(const Rows *rows, const int64_t *lengths, const Writes *writes, int threads) {
    const int64_t elements = total_length(lengths, rows->tensors);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++)
        combine_pass(rows, lengths, writes, elements * i / threads, elements * (i + 1) / threads);
}

static int check(const Rows *rows, const Py_buffer *table, int threads) {
    const Py_ssize_t wanted = rows->rows * PARTS * rows->tensors * (Py_ssize_t)sizeof(int64_t);
    if (rows->rows < 1 || rows->rows > MAX_ROWS || table->len != wanted) {
        PyErr_Format(
            PyExc_ValueError, "table must hold 1 to %d rows of %zd tensors, found %zd rows in %zd bytes", MAX_ROWS,
            rows->tensors, rows->rows, table->len);
        return 0;
    }
    if (threads < 1 || threads > MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "threads must be in [1, %d], found %d", MAX_THREADS, threads);
        return 0;
    }
    return 1;
}

static PyObject *gram(PyObject *module, PyObject *args) {
    Py_buffer table, lengths, known;
    Py_ssize_t count;
    int threads;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*niy*", &table, &lengths, &count, &threads, &known))
        return NULL;
    PyObject *result = NULL;
    const Rows rows = {table.buf, count, lengths.len / (Py_ssize_t)sizeof(int64_t), known.buf};
    const int good = check(&rows, &table, threads);
    if (good && known.len != count)
        PyErr_Format(PyExc_ValueError, "known must have a byte for each of %zd rows, found %zd", count, known.len);
    else if (good) {
        double total[MAX_ROWS * MAX_ROWS] = {0};
        Py_BEGIN_ALLOW_THREADS;
        gram_threads(&rows, lengths.buf, threads, total);
        Py_END_ALLOW_THREADS;
        result = PyTuple_New(count * count);
        for (Py_ssize_t i = 0; result && i < count * count; i++) {
            const Py_ssize_t r = i / count, s = i % count;
            PyObject *number = PyFloat_FromDouble(r <= s ? total[r * count + s] : total[s * count + r]);
            if (!number)
                Py_CLEAR(result);
            else
                PyTuple_SET_ITEM(result, i, number);
        }
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&known);
    return result;
}

static PyObject *combine(PyObject *module, PyObject *args) {
    Py_buffer table, lengths, into, coefficients, accumulate;
    Py_ssize_t count;
    int threads;
    (void)module;
    if (!PyArg_ParseTuple(
            args, "y*y*niy*y*y*", &table, &lengths, &count, &threads, &into, &coefficients, &accumulate))
        return NULL;
    int good = 0;
    const Rows rows = {table.buf, count, lengths.len / (Py_ssize_t)sizeof(int64_t), NULL};
    const Writes writes = {into.buf, coefficients.buf, accumulate.buf, accumulate.len};
    if (check(&rows, &table, threads)) {
        good = writes.count <= MAX_WRITES &&
               into.len == writes.count * rows.tensors * (Py_ssize_t)sizeof(int64_t) &&
               coefficients.len == writes.count * rows.rows * (Py_ssize_t)sizeof(double);
        if (!good)
            PyErr_Format(PyExc_ValueError, "at most %d writes, each with targets and coefficients", MAX_WRITES);
    }
    if (good) {
        Py_BEGIN_ALLOW_THREADS;
        combine_threads(&rows, lengths.buf, &writes, threads);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&into);
    PyBuffer_Release(&coefficients);
    PyBuffer_Release(&accumulate);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"gram", gram, METH_VARARGS,
     "gram(table, lengths, rows, threads, known) -> inner products of pairs of rows, row by row; 0 among the known"},
    {"combine", combine, METH_VARARGS,
     "combine(table, lengths, rows, threads, into, coefficients, accumulate): write sums of rows"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "gradguide.ops._cpu", "Passes over float32 rows.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
