/* Passes over rows in memory, for the CPU: one read of every row for all products, one for all sums.
 *
 * A pass walks the elements lo..hi of a bucket's tensors, laid end to end, in blocks that stay in the first-level
 * cache while everything that is wanted of them is computed. Rows come as a table of addresses, [rows][4][tensors]:
 * a row is offset + scale * (at - anchor), and an address of 0 is a part that is absent. How a part is stored is a
 * kind: float32, bfloat16, or (an offset alone) 8-bit codes, whose scale has an entry for every CODES of them. Nothing
 * here knows a rule.
 *
 * Threads are OpenMP's, each with a range of its own, whose sums are added in order: the same number of threads gives
 * the same bits. Linked to the library that torch has loaded, they are torch's own threads.
 */

#include "_combine.h"
#include "_gram.h"

static int check(const Rows *rows, const Py_buffer *table, const Py_buffer *kinds, int threads) {
    const Py_ssize_t wanted = rows->rows * PARTS * rows->tensors * (Py_ssize_t)sizeof(int64_t);
    if (rows->rows < 1 || rows->rows > MAX_ROWS || table->len != wanted) {
        PyErr_Format(
            PyExc_ValueError, "table must hold 1 to %d rows of %zd tensors, found %zd rows in %zd bytes", MAX_ROWS,
            rows->tensors, rows->rows, table->len);
        return 0;
    }
    if (kinds->len != rows->rows * PARTS) {
        PyErr_Format(
            PyExc_ValueError, "kinds must have %d bytes for each of %zd rows, found %zd", PARTS, rows->rows,
            kinds->len);
        return 0;
    }
    if (threads < 1 || threads > MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "threads must be in [1, %d], found %d", MAX_THREADS, threads);
        return 0;
    }
    return 1;
}

static PyObject *gram(PyObject *module, PyObject *args) {
    Py_buffer table, kinds, lengths, known;
    Py_ssize_t count;
    int threads;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*niy*", &table, &kinds, &lengths, &count, &threads, &known))
        return NULL;
    PyObject *result = NULL;
    const Rows rows = {table.buf, kinds.buf, count, lengths.len / (Py_ssize_t)sizeof(int64_t), known.buf};
    const int good = check(&rows, &table, &kinds, threads);
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
    PyBuffer_Release(&kinds);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&known);
    return result;
}

static PyObject *combine(PyObject *module, PyObject *args) {
    Py_buffer table, kinds, lengths, into, coefficients, accumulate, stored;
    Py_ssize_t count;
    int threads;
    (void)module;
    if (!PyArg_ParseTuple(
            args, "y*y*y*niy*y*y*y*", &table, &kinds, &lengths, &count, &threads, &into, &coefficients, &accumulate,
            &stored))
        return NULL;
    int good = 0;
    const Rows rows = {table.buf, kinds.buf, count, lengths.len / (Py_ssize_t)sizeof(int64_t), NULL};
    const Writes writes = {into.buf, coefficients.buf, accumulate.buf, stored.buf, accumulate.len};
    if (check(&rows, &table, &kinds, threads)) {
        good = writes.count <= MAX_WRITES && stored.len == writes.count &&
               into.len == writes.count * rows.tensors * (Py_ssize_t)sizeof(int64_t) &&
               coefficients.len == writes.count * rows.rows * (Py_ssize_t)sizeof(double);
        if (!good)
            PyErr_Format(PyExc_ValueError, "at most %d writes, each with targets, coefficients and a kind", MAX_WRITES);
    }
    if (good) {
        Py_BEGIN_ALLOW_THREADS;
        combine_threads(&rows, lengths.buf, &writes, threads);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&kinds);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&into);
    PyBuffer_Release(&coefficients);
    PyBuffer_Release(&accumulate);
    PyBuffer_Release(&stored);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"gram", gram, METH_VARARGS,
     "gram(table, kinds, lengths, rows, threads, known) -> products of pairs of rows, row by row; 0 among the known"},
    {"combine", combine, METH_VARARGS,
     "combine(table, kinds, lengths, rows, threads, into, coefficients, accumulate, stored): write sums of rows"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "gradguide.ops._cpu", "Passes over rows in memory.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) {
#ifdef CODES_IN_REGISTERS
    codes_in_registers = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return PyModule_Create(&definition);
}
