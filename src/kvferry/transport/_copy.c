/* Gather and scatter of many blocks in one call, without the GIL; one small block with its checks; a look at offsets.
 *
 * Why C: a copy call for each block through ctypes gives the GIL up and takes it back for each block, and waits up to
 * 5 ms for it whenever another thread computes. And libc's memcpy reads each target line before it overwrites it,
 * unless a single copy is larger than most of the last-level cache; the loops below never do (streaming stores).
 * The module is optional: kvferry.transport.copying does without it, more slowly, where it was not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
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

/* Offsets as check_blocks must know them. Four at a time: vectors of 32 bytes, which the compiler makes of smaller ones
 * where the machine has none. */
typedef int64_t four __attribute__((vector_size(32)));
typedef uint64_t four_unsigned __attribute__((vector_size(32)));

struct extent {
    int64_t low, high;
    uint64_t differing; /* the bits in which any offset differs from the first */
    int rising;         /* each at least `nbytes` behind the one before */
};

#define PICK(MASK, A, B) (((A) & (MASK)) | ((B) & ~(MASK)))
#define DEFINE_EXTENT(NAME, TARGET)                                                                            \
    TARGET static void NAME(const int64_t *offsets, size_t count, int64_t nbytes, struct extent *found) {      \
        const int64_t first = offsets[0];                                                                      \
        int64_t low = first, high = first;                                                                     \
        uint64_t differing = 0, short_steps = 0;                                                               \
        size_t i = 1;                                                                                          \
        if (count > 8) {                                                                                       \
            four lows = {first, first, first, first}, highs = lows, firsts = lows, bits = {0}, close = {0};    \
            const four steps = {nbytes, nbytes, nbytes, nbytes};                                               \
            for (; i + 4 <= count; i += 4) {                                                                   \
                four here, before;                                                                             \
                memcpy(&here, offsets + i, sizeof here);                                                       \
                memcpy(&before, offsets + i - 1, sizeof before);                                               \
                four lower = here < lows, higher = here > highs;                                               \
                lows = PICK(lower, here, lows);                                                                \
                highs = PICK(higher, here, highs);                                                             \
                bits |= here ^ firsts;                                                                         \
                close |= (four)((four_unsigned)here - (four_unsigned)before) < steps;                          \
            }                                                                                                  \
            for (int k = 0; k < 4; k++) {                                                                      \
                if (lows[k] < low) low = lows[k];                                                              \
                if (highs[k] > high) high = highs[k];                                                          \
                differing |= (uint64_t)bits[k];                                                                \
                short_steps |= (uint64_t)close[k];                                                             \
            }                                                                                                  \
        }                                                                                                      \
        for (; i < count; i++) {                                                                               \
            const int64_t here = offsets[i];                                                                   \
            if (here < low) low = here;                                                                        \
            if (here > high) high = here;                                                                      \
            differing |= (uint64_t)here ^ (uint64_t)first;                                                     \
            short_steps |= (int64_t)((uint64_t)here - (uint64_t)offsets[i - 1]) < nbytes;                      \
        }                                                                                                      \
        *found = (struct extent){low, high, differing, !short_steps};                                          \
    }

DEFINE_EXTENT(extent_anywhere, )
#ifdef HAVE_STREAM
DEFINE_EXTENT(extent_avx2, AVX2)
#endif

#define FEW 64
#define PLACES_PER_OFFSET 16
#define KEEPS_GIL_UP_TO 4096

static int few_are_apart(const int64_t *offsets, size_t count, uint64_t nbytes) {
    int64_t sorted[FEW];
    for (size_t i = 0; i < count; i++) {
        size_t at = i;
        for (; at > 0 && sorted[at - 1] > offsets[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = offsets[i];
    }
    for (size_t i = 1; i < count; i++)
        if ((uint64_t)sorted[i] - (uint64_t)sorted[i - 1] < nbytes) return 0;
    return 1;
}

/* Whether each place on the grid is taken once. Another thread may be writing to the offsets: hence the look at `span`.
 */
static int once_each_shifted(
    const int64_t *offsets, size_t count, uint64_t low, uint64_t span, int shift, char *taken
) {
    char twice = 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t beside = (uint64_t)offsets[i] - low;
        if (beside > span) return 0;
        twice |= taken[beside >> shift];
        taken[beside >> shift] = 1;
    }
    return !twice;
}

static int once_each(
    const int64_t *offsets, size_t count, uint64_t low, uint64_t span, uint64_t nbytes, char *taken
) {
    char twice = 0;
    /* Quicker than a division, and exact where the offset is on the grid: places are far fewer than 2^52. */
    const double of_nbytes = 1.0 / (double)nbytes;
    for (size_t i = 0; i < count; i++) {
        const uint64_t beside = (uint64_t)offsets[i] - low;
        if (beside > span) return 0;
        const uint64_t place = (uint64_t)(int64_t)((double)(int64_t)beside * of_nbytes + 0.5);
        if (place * nbytes != beside) return 0;
        twice |= taken[place];
        taken[place] = 1;
    }
    return !twice;
}

/* Blocks of a paged cache lie on a grid: then two overlap only if they have the same place on it. 0 also where only
 * sorting could tell: off the grid, or with too many places for so few blocks. */
static int apart_on_grid(const int64_t *offsets, size_t count, uint64_t nbytes, const struct extent *found) {
    const uint64_t low = (uint64_t)found->low, span = (uint64_t)found->high - low;
    const int is_power = !(nbytes & (nbytes - 1));
    if (span / nbytes >= PLACES_PER_OFFSET * (uint64_t)count || (is_power && found->differing & (nbytes - 1))) return 0;
    char *taken = calloc((size_t)(span / nbytes) + 1, 1);
    if (!taken) return 0;
    const int apart = is_power ? once_each_shifted(offsets, count, low, span, __builtin_ctzll(nbytes), taken)
                               : once_each(offsets, count, low, span, nbytes, taken);
    free(taken);
    return apart;
}

static int is_apart(const int64_t *offsets, size_t count, int64_t nbytes, const struct extent *found) {
    /* What is negative lies in no region; without it, no difference is more than 63 bits hold. */
    if (nbytes < 1 || found->low < 0) return 0;
    if (found->rising) return 1;
    return count <= FEW ? few_are_apart(offsets, count, (uint64_t)nbytes)
                        : apart_on_grid(offsets, count, (uint64_t)nbytes, found);
}

static PyObject *look_through(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "look_through takes an array and a number");
        return NULL;
    }
    int overflow;
    long long nbytes = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    if (nbytes == -1 && PyErr_Occurred()) return NULL;
    if (overflow) nbytes = 0;
    Py_buffer buffer;
    if (PyObject_GetBuffer(args[0], &buffer, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    const char *format = buffer.format ? buffer.format : "";
    const int is_int64 = buffer.itemsize == 8 && (format[0] == 'l' || format[0] == 'q') && !format[1];
    if (!is_int64 || buffer.ndim != 1 || buffer.len == 0) {
        PyBuffer_Release(&buffer);
        Py_RETURN_NONE;
    }
    const int64_t *offsets = buffer.buf;
    const size_t count = (size_t)buffer.len / 8;
    struct extent found;
    PyThreadState *state = count > KEEPS_GIL_UP_TO ? PyEval_SaveThread() : NULL;
#ifdef HAVE_STREAM
    if (__builtin_cpu_supports("avx2")) extent_avx2(offsets, count, nbytes, &found);
    else
#endif
        extent_anywhere(offsets, count, nbytes, &found);
    const int apart = is_apart(offsets, count, nbytes, &found);
    if (state) PyEval_RestoreThread(state);
    PyBuffer_Release(&buffer);
    return Py_BuildValue("LLO", (long long)found.low, (long long)found.high, apart ? Py_True : Py_False);
}

static PyObject *is_dead(PyObject *module, PyObject *arg) {
    (void)module;
    long pidfd = PyLong_AsLong(arg);
    if (pidfd == -1 && PyErr_Occurred()) return NULL;
    struct pollfd process = {(int)pidfd, POLLIN, 0};
    int seen;
    do seen = poll(&process, 1, 0);
    while (seen < 0 && errno == EINTR);
    if (seen < 0) return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(seen);
}

static PyMethodDef methods[] = {
    {"copy_blocks", (PyCFunction)(void (*)(void))copy_blocks, METH_FASTCALL,
     "copy_blocks(target, source, target_offsets, source_offsets, count, nbytes, streaming): addresses as integers"},
    {"copy_checked", (PyCFunction)(void (*)(void))copy_checked, METH_FASTCALL,
     "copy_checked(target, source, nbytes, pidfd, slot, nonce, [word_slot, word_nonce, word_address, word]) -> int: 0 if "
     "all stands; 1: a slot holds another nonce; 2: the process is dead; 3: the word is another one"},
    {"is_dead", is_dead, METH_O, "is_dead(pidfd) -> bool: the process has ended, or there is no such descriptor"},
    {"look_through", (PyCFunction)(void (*)(void))look_through, METH_FASTCALL,
     "look_through(offsets, nbytes) -> (low, high, whether blocks of nbytes are surely apart), or None if the offsets "
     "are no int64 array [n] in one piece, n > 0"},
    {"load_word", load_word, METH_O, "load_word(address) -> int: 8 bytes, atomically, after everything loaded before"},
    {"store_word", (PyCFunction)(void (*)(void))store_word, METH_FASTCALL,
     "store_word(address, word): 8 bytes, atomically, visible before anything stored later"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_copy", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copy(void) { return PyModule_Create(&definition); }
