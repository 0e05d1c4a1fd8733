/* Gather and scatter of many blocks in one call, without the GIL; one small block with its checks.
 *
 * Why C: a copy call for each block through ctypes gives the GIL up and takes it back for each block, and waits up to
 * 5 ms for it whenever another thread computes. And libc's memcpy reads each target line before it overwrites it,
 * unless a single copy is larger than most of the last-level cache; the loops below never do (streaming stores).
 * The module is optional: kvferry.transport.copying does without it, more slowly, where it was not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_STREAM 1
#define PAGE 4096

/* Four vectors at a time, all loaded before the first is stored, and in the direction in which loads run away from stores:
 * a load that agrees with a store under way in the low 12 bits of its address may wait until that store has reached
 * memory, which makes a copy four times as long. (Interleaving pages, as glibc does, meets this at every line.) The page
 * ahead is touched early, for hardware stops at the page, and the walk of the page table is long where pages are small. */
#define ORDERED __asm__ volatile("" ::: "memory")
#define UNROLLED _Pragma("GCC unroll 4") /* in registers also where Python was built with -O2: else a third slower */
#define DEFINE_STREAM(NAME, TARGET, VECTOR, LOAD, STORE)                                                      \
    TARGET static void NAME(char *target, const char *source, size_t nbytes) {                                \
        const size_t group = 4 * sizeof(VECTOR), count = nbytes / group;                                      \
        const int backwards = (((uintptr_t)source - (uintptr_t)target) & (PAGE - 1)) > PAGE / 2;              \
        for (size_t i = 0; i < count; i++) {                                                                  \
            const size_t at = (backwards ? count - 1 - i : i) * group;                                        \
            const char *from = source + at;                                                                   \
            char *to = target + at;                                                                           \
            if (at % PAGE == 0) _mm_prefetch(backwards ? from - PAGE : from + PAGE, _MM_HINT_T0);             \
            VECTOR value[4];                                                                                  \
            UNROLLED for (int k = 0; k < 4; k++) value[k] = LOAD((const void *)(from + k * sizeof(VECTOR)));  \
            UNROLLED for (int k = 0; k < 4; k++) {                                                            \
                STORE((void *)(to + k * sizeof(VECTOR)), value[k]);                                           \
                ORDERED;                                                                                      \
            }                                                                                                 \
        }                                                                                                     \
        memcpy(target + count * group, source + count * group, nbytes - count * group);                       \
    }

#define AVX512 __attribute__((target("avx512f")))
#define AVX2 __attribute__((target("avx2")))

DEFINE_STREAM(stream_sse2, , __m128i, _mm_loadu_si128, _mm_stream_si128)
DEFINE_STREAM(stream_avx2, AVX2, __m256i, _mm256_loadu_si256, _mm256_stream_si256)
DEFINE_STREAM(stream_avx512, AVX512, __m512i, _mm512_loadu_si512, _mm512_stream_si512)

typedef void (*stream_function)(char *, const char *, size_t);

static stream_function widest_stream(void) {
    if (__builtin_cpu_supports("avx512f")) return stream_avx512;
    return __builtin_cpu_supports("avx2") ? stream_avx2 : stream_sse2;
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
    stream_function stream = widest_stream();
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
        stream(to + head, from + head, nbytes - head);
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

/* Whether the words that say who owns the memory are what they must be: (address, word) pairs. */
static int words_stand(const unsigned long long *pairs, int count) {
    for (int i = 0; i < count; i++)
        if (__atomic_load_n((const uint64_t *)(uintptr_t)pairs[2 * i], __ATOMIC_SEQ_CST) != pairs[2 * i + 1]) return 0;
    return 1;
}

/* One small block, and all that must be looked at before and after it, in one call. Keeps the GIL: giving it up and
 * taking it back may cost more than the copy. */
static PyObject *copy_checked(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 6 && nargs != 10) {
        PyErr_SetString(PyExc_TypeError, "copy_checked takes 6 or 10 integers");
        return NULL;
    }
    unsigned long long value[10];
    for (int i = 0; i < nargs; i++) {
        value[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred()) return NULL;
    }
    int slots = nargs == 10 ? 2 : 1;
    if (!words_stand(value + 4, slots)) return PyLong_FromLong(1);
    memcpy((void *)(uintptr_t)value[0], (const void *)(uintptr_t)value[1], (size_t)value[2]);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the words below are loaded after the data */
    int word_stands = nargs != 10 || words_stand(value + 8, 1);
    struct pollfd process = {(int)value[3], POLLIN, 0};
    if (poll(&process, 1, 0)) return PyLong_FromLong(2);
    if (!words_stand(value + 4, slots)) return PyLong_FromLong(1);
    return PyLong_FromLong(word_stands ? 0 : 3);
}

static PyMethodDef methods[] = {
    {"copy_blocks", (PyCFunction)(void (*)(void))copy_blocks, METH_FASTCALL,
     "copy_blocks(target, source, target_offsets, source_offsets, count, nbytes, streaming): addresses as integers"},
    {"copy_checked", (PyCFunction)(void (*)(void))copy_checked, METH_FASTCALL,
     "copy_checked(target, source, nbytes, pidfd, slot, nonce, [word_slot, word_nonce, word_address, word]) -> int: 0 if "
     "all stands; 1: a slot holds another nonce; 2: the process is dead; 3: the word is another one"},
    {"load_word", load_word, METH_O, "load_word(address) -> int: 8 bytes, atomically, after everything loaded before"},
    {"store_word", (PyCFunction)(void (*)(void))store_word, METH_FASTCALL,
     "store_word(address, word): 8 bytes, atomically, visible before anything stored later"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_copy", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copy(void) { return PyModule_Create(&definition); }
