/* Gather and scatter of many blocks in one call, without the GIL.
 *
 * Why C: a copy call for each block through ctypes gives the GIL up and takes it back for each block, and waits up to
 * 5 ms for it whenever another thread computes. And libc's memcpy reads each target line before it overwrites it,
 * unless a single copy is larger than most of the last-level cache; the loops below never do (streaming stores).
 * The module is optional: kvferry.transport.copying falls back on one memmove a block where it was not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_STREAM 1
#define PAGE 4096

/* Several pages in turn: more open DRAM rows, as in glibc's large_memcpy. */
static void stream_sse2(char *target, const char *source, size_t nbytes) {
    for (; nbytes >= 4 * PAGE; nbytes -= 4 * PAGE, target += 4 * PAGE, source += 4 * PAGE)
        for (size_t line = 0; line < PAGE; line += 64)
            for (int page = 0; page < 4; page++) {
                const char *from = source + page * PAGE + line;
                char *to = target + page * PAGE + line;
                _mm_prefetch(from + 256, _MM_HINT_T0);
                __m128i a = _mm_loadu_si128((const void *)from), b = _mm_loadu_si128((const void *)(from + 16));
                __m128i c = _mm_loadu_si128((const void *)(from + 32)), d = _mm_loadu_si128((const void *)(from + 48));
                _mm_stream_si128((void *)to, a);
                _mm_stream_si128((void *)(to + 16), b);
                _mm_stream_si128((void *)(to + 32), c);
                _mm_stream_si128((void *)(to + 48), d);
            }
    memcpy(target, source, nbytes);
}

__attribute__((target("avx512f"))) static void stream_avx512(char *target, const char *source, size_t nbytes) {
    for (; nbytes >= 2 * PAGE; nbytes -= 2 * PAGE, target += 2 * PAGE, source += 2 * PAGE)
        for (size_t line = 0; line < PAGE; line += 128)
            for (int page = 0; page < 2; page++) {
                const char *from = source + page * PAGE + line;
                char *to = target + page * PAGE + line;
                _mm_prefetch(from + 512, _MM_HINT_T0);
                _mm_prefetch(from + 576, _MM_HINT_T0);
                __m512i a = _mm512_loadu_si512((const void *)from), b = _mm512_loadu_si512((const void *)(from + 64));
                _mm512_stream_si512((void *)to, a);
                _mm512_stream_si512((void *)(to + 64), b);
            }
    memcpy(target, source, nbytes);
}
#endif

static PyObject *copy_blocks(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "copy_blocks takes 7 integers");
        return NULL;
    }
    unsigned long long value[7];
    for (int i = 0; i < 7; i++) {
        value[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred()) return NULL;
    }
    char *target = (char *)(uintptr_t)value[0];
    const char *source = (const char *)(uintptr_t)value[1];
    const int64_t *target_offsets = (const int64_t *)(uintptr_t)value[2];
    const int64_t *source_offsets = (const int64_t *)(uintptr_t)value[3];
    size_t count = (size_t)value[4], nbytes = (size_t)value[5];
    int streaming = (int)value[6];
    Py_BEGIN_ALLOW_THREADS;
#ifdef HAVE_STREAM
    int wide = __builtin_cpu_supports("avx512f");
    for (size_t i = 0; i < count; i++) {
        char *to = target + target_offsets[i];
        const char *from = source + source_offsets[i];
        if (!streaming) {
            memcpy(to, from, nbytes);
            continue;
        }
        /* Streaming stores want aligned targets: a head of ordinary bytes brings them there. */
        size_t head = (64 - ((uintptr_t)to & 63)) & 63;
        if (head > nbytes) head = nbytes;
        memcpy(to, from, head);
        if (wide)
            stream_avx512(to + head, from + head, nbytes - head);
        else
            stream_sse2(to + head, from + head, nbytes - head);
    }
    if (streaming) _mm_sfence();
#else
    (void)streaming;
    for (size_t i = 0; i < count; i++) memcpy(target + target_offsets[i], source + source_offsets[i], nbytes);
#endif
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *load_word(PyObject *module, PyObject *arg) {
    (void)module;
    unsigned long long address = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred()) return NULL;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* not before the loads of the data that the word guards */
    return PyLong_FromLongLong(__atomic_load_n((const int64_t *)(uintptr_t)address, __ATOMIC_SEQ_CST));
}

static PyObject *store_word(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "store_word takes an address and a word");
        return NULL;
    }
    unsigned long long address = PyLong_AsUnsignedLongLong(args[0]);
    long long word = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred()) return NULL;
    __atomic_store_n((int64_t *)(uintptr_t)address, word, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* visible before any later store of this thread */
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_blocks", (PyCFunction)(void (*)(void))copy_blocks, METH_FASTCALL,
     "copy_blocks(target, source, target_offsets, source_offsets, count, nbytes, streaming): addresses as integers"},
    {"load_word", load_word, METH_O, "load_word(address) -> int: 8 bytes, atomically, after everything loaded before"},
    {"store_word", (PyCFunction)(void (*)(void))store_word, METH_FASTCALL,
     "store_word(address, word): 8 bytes, atomically, visible before anything stored later"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_copy", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copy(void) { return PyModule_Create(&definition); }
