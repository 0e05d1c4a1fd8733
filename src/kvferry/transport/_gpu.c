/* One launch of a copy on a GPU by one call: the table of addresses, its upload, the kernel, the event behind it; and
 * the wait for an event, without the GIL.
 *
 * Why C: the same steps from Python are some thousand instructions of an interpreter whose code left the caches while
 * the thread slept through the last copy. That took 100 to 200 us before a kernel began, of reads that take 500.
 *
 * The driver's functions are found at run time, so that this builds without CUDA. A thread calls with its device current.
 * The module is optional: kvferry.transport.cuda_copy does without it, more slowly.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

enum { SUCCESS = 0, NOT_READY = 600, MAX_PARAMS = 16 };

static int (*launch_kernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                            void **);
static int (*param_info)(void *, size_t, size_t *, size_t *);
static int (*upload)(uint64_t, const void *, size_t, void *);
static int (*record)(void *, void *);
static int (*query)(void *);
static int (*wait_event)(void *, void *, unsigned);

static PyObject *failed(const char *what, int status) {
    PyErr_Format(PyExc_RuntimeError, "%s failed: CUDA error %d", what, status);
    return NULL;
}

static PyObject *open_driver(PyObject *self, PyObject *path) {
    const char *name = PyUnicode_AsUTF8(path);
    if (!name) return NULL;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) return PyErr_Format(PyExc_OSError, "%s", dlerror());
    launch_kernel = dlsym(library, "cuLaunchKernel");
    param_info = dlsym(library, "cuFuncGetParamInfo");
    upload = dlsym(library, "cuMemcpyHtoDAsync_v2");
    record = dlsym(library, "cuEventRecord");
    query = dlsym(library, "cuEventQuery");
    wait_event = dlsym(library, "cuStreamWaitEvent");
    if (!launch_kernel || !param_info || !upload || !record || !query || !wait_event)
        return PyErr_Format(PyExc_OSError, "%s lacks a function that this needs", name);
    Py_RETURN_NONE;
}

static PyObject *param_sizes(PyObject *self, PyObject *function) {
    void *kernel = PyLong_AsVoidPtr(function);
    if (PyErr_Occurred()) return NULL;
    PyObject *sizes = PyList_New(0);
    for (size_t i = 0; sizes && i < MAX_PARAMS; i++) {
        size_t offset, size;
        if (param_info(kernel, i, &offset, &size) != SUCCESS) break;
        PyObject *number = PyLong_FromSize_t(size);
        if (!number || PyList_Append(sizes, number)) Py_CLEAR(sizes);
        Py_XDECREF(number);
    }
    return sizes;
}

/* Adds the base, or each block's own, to the offsets [first, last); all addresses or-ed go into *bits. 0: done. */
static int add(PyObject *offsets, PyObject *base, Py_ssize_t first, Py_ssize_t last, int64_t *out, uint64_t *bits) {
    Py_buffer at, bases = {0};
    int64_t one = 0;
    if (PyObject_GetBuffer(offsets, &at, PyBUF_SIMPLE)) return -1;
    if (PyLong_Check(base)) {
        one = PyLong_AsLongLong(base);
        if (PyErr_Occurred()) goto wrong;
    } else if (PyObject_GetBuffer(base, &bases, PyBUF_SIMPLE)) {
        goto wrong;
    }
    if (first < 0 || last < first || last * 8 > at.len || (bases.buf && last * 8 > bases.len)) {
        PyErr_SetString(PyExc_ValueError, "not so many offsets");
        goto wrong;
    }
    const int64_t *from = (const int64_t *)at.buf + first, *of = bases.buf ? (const int64_t *)bases.buf + first : NULL;
    uint64_t seen = 0;
    if (of)
        for (Py_ssize_t i = 0; i < last - first; i++) seen |= (uint64_t)(out[i] = from[i] + of[i]);
    else
        for (Py_ssize_t i = 0; i < last - first; i++) seen |= (uint64_t)(out[i] = from[i] + one);
    *bits |= seen;
    if (bases.buf) PyBuffer_Release(&bases);
    PyBuffer_Release(&at);
    return 0;
wrong:
    if (bases.buf) PyBuffer_Release(&bases);
    PyBuffer_Release(&at);
    return -1;
}

enum { SOURCES, SOURCE_BASE, TARGETS, TARGET_BASE, FIRST, LAST, NBYTES, TABLE, ON_DEVICE, STREAM, BEHIND, DONE, FUNCTION };
enum { GRID = FUNCTION + 1, THREADS, SHARED, NUM_ARGS };

static PyObject *start(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t of[NUM_ARGS];
    uint64_t bits = 0;
    if (given != NUM_ARGS) return PyErr_Format(PyExc_TypeError, "%zd arguments, expected %d", given, NUM_ARGS);
    for (int i = FIRST; i < NUM_ARGS; i++) {
        of[i] = (int64_t)PyLong_AsUnsignedLongLongMask(args[i]);
        if (PyErr_Occurred()) return NULL;
    }
    int64_t first = of[FIRST], last = of[LAST], *host = (int64_t *)of[TABLE];
    if (add(args[SOURCES], args[SOURCE_BASE], first, last, host, &bits)) return NULL;
    if (add(args[TARGETS], args[TARGET_BASE], first, last, host + (last - first), &bits)) return NULL;
    if (bits & 15) Py_RETURN_FALSE;
    int status;
    int32_t n = (int32_t)(last - first);
    int64_t table = of[TABLE], none = 0;
    void *stream = (void *)of[STREAM];
    if (of[ON_DEVICE]) {
        if ((status = upload((uint64_t)of[ON_DEVICE], (void *)table, 16 * (size_t)n, stream)))
            return failed("cuMemcpyHtoDAsync", status);
        table = of[ON_DEVICE];
    }
    if (of[BEHIND] && (status = wait_event(stream, (void *)of[BEHIND], 0))) return failed("cuStreamWaitEvent", status);
    /* (table, sums, n, nbytes), and two pointers of Triton's own that may follow them. */
    void *params[] = {&table, &none, &n, &of[NBYTES], &none, &none};
    if ((status = launch_kernel((void *)of[FUNCTION], (unsigned)of[GRID], 1, 1, (unsigned)of[THREADS], 1, 1,
                                (unsigned)of[SHARED], stream, params, NULL)))
        return failed("cuLaunchKernel", status);
    if ((status = record((void *)of[DONE], stream))) return failed("cuEventRecord", status);
    Py_RETURN_TRUE;
}

/* (word, slot, stream, behind, done, function): start loading 8 bytes into pinned memory, behind an event or 0. */
static PyObject *start_word(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    enum { WORD, SLOT, STREAM_, BEHIND_, DONE_, FUNCTION_, COUNT };
    int64_t of[COUNT], none = 0;
    if (given != COUNT) return PyErr_Format(PyExc_TypeError, "%zd arguments, expected %d", given, COUNT);
    for (int i = 0; i < COUNT; i++) {
        of[i] = (int64_t)PyLong_AsUnsignedLongLongMask(args[i]);
        if (PyErr_Occurred()) return NULL;
    }
    int status;
    void *stream = (void *)of[STREAM_], *params[] = {&of[WORD], &of[SLOT], &none, &none};
    if (of[BEHIND_] && (status = wait_event(stream, (void *)of[BEHIND_], 0))) return failed("cuStreamWaitEvent", status);
    if ((status = launch_kernel((void *)of[FUNCTION_], 1, 1, 1, 32, 1, 1, 0, stream, params, NULL)))
        return failed("cuLaunchKernel", status);
    if ((status = record((void *)of[DONE_], stream))) return failed("cuEventRecord", status);
    Py_RETURN_NONE;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static PyObject *await_event(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 2) return PyErr_Format(PyExc_TypeError, "%zd arguments, expected 2", given);
    void *event = PyLong_AsVoidPtr(args[0]);
    double seconds = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred()) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    double until = now() + seconds;
    do status = query(event);
    while (status == NOT_READY && now() < until);
    Py_END_ALLOW_THREADS;
    if (status == SUCCESS) Py_RETURN_TRUE;
    if (status == NOT_READY) Py_RETURN_FALSE;
    return failed("work on the GPU", status);
}

static PyMethodDef methods[] = {
    {"open", open_driver, METH_O, "Find the driver's functions in this library."},
    {"param_sizes", param_sizes, METH_O, "The sizes in bytes of a kernel's parameters."},
    {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL,
     "Start copying blocks with a kernel; False, and nothing is started, where an address is no multiple of 16."},
    {"start_word", (PyCFunction)(void (*)(void))start_word, METH_FASTCALL, "Start loading 8 bytes into pinned memory."},
    {"wait", (PyCFunction)(void (*)(void))await_event, METH_FASTCALL, "Look at an event for so many seconds; is it done?"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_gpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gpu(void) { return PyModule_Create(&module); }
