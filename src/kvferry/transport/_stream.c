/* One small block over a data stream: the reader's whole exchange in one call, and the owner's loop of answers, both
 * without the GIL.
 *
 * Why C: where both sides share a core, each finds its caches and branch predictor full of the other one's interpreter,
 * and the few microseconds of Python around four system calls became sixty. And an owner that computes in Python would let
 * the reader wait for its GIL. Only what is as it must be is done here; everything else goes back to Python, which knows
 * the words for it. The module is optional: kvferry.transport.streams does without it, more slowly.
 *
 * The formats (frames, requests, trailers) are those of kvferry.wire and kvferry.transport.streams.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { HEADER = 24, CHECK_AT = 8, CHECK = 16, KEY = 32, TRAILER = 25, TOKEN = 16, REQUEST = 41, GUARDED_REQUEST = 81 };
enum { SMALL_BYTES = 64 << 10, BUSY_US = 1000 };

/* BLAKE2b (RFC 7693) with a key of 32 and a digest of 16 bytes, over a counter and a payload that fit into one block. */

static const uint64_t IV[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                               0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
static const uint8_t SIGMA[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};

static uint64_t rotated(uint64_t x, int n) { return x >> n | x << (64 - n); }

static uint64_t load64(const uint8_t *at) {
    uint64_t x = 0;
    for (int i = 7; i >= 0; i--) x = x << 8 | at[i];
    return x;
}

static void store64(uint8_t *at, uint64_t x) {
    for (int i = 0; i < 8; i++) at[i] = (uint8_t)(x >> 8 * i);
}

static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x, v[d] = rotated(v[d] ^ v[a], 32), v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 24);
    v[a] += v[b] + y, v[d] = rotated(v[d] ^ v[a], 16), v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 63);
}

static void compress(uint64_t *h, const uint8_t *block, uint64_t nbytes_so_far, int last) {
    uint64_t v[16], m[16];
    for (int i = 0; i < 16; i++) m[i] = load64(block + 8 * i);
    for (int i = 0; i < 8; i++) v[i] = h[i], v[i + 8] = IV[i];
    v[12] ^= nbytes_so_far;
    if (last) v[14] = ~v[14];
    for (int r = 0; r < 12; r++) {
        const uint8_t *s = SIGMA[r];
        for (int i = 0; i < 4; i++) mix(v, i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
        for (int i = 0; i < 4; i++)
            mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
    }
    for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}

/* kvferry.wire._mac; `nbytes` at most 120. */
static void mac(uint8_t *check, const uint8_t *key, uint64_t counter, const uint8_t *payload, size_t nbytes) {
    uint64_t h[8];
    uint8_t block[128] = {0};
    memcpy(h, IV, sizeof h);
    h[0] ^= 0x01010000 ^ (KEY << 8) ^ CHECK;
    memcpy(block, key, KEY);
    compress(h, block, 128, 0);
    memset(block, 0, sizeof block);
    store64(block, counter);
    memcpy(block + 8, payload, nbytes);
    compress(h, block, 128 + 8 + nbytes, 1);
    store64(check, h[0]), store64(check + 8, h[1]);
}

/* A frame's header in front of its payload. */
static void seal(uint8_t *frame, const uint8_t *key, uint64_t counter, size_t nbytes) {
    memcpy(frame, "KVF1", 4);
    for (int i = 0; i < 4; i++) frame[4 + i] = (uint8_t)(nbytes >> 8 * i);
    mac(frame + CHECK_AT, key, counter, frame + HEADER, nbytes);
}

static int is_sealed(const uint8_t *frame, const uint8_t *key, uint64_t counter, size_t nbytes) {
    uint8_t wanted[CHECK], differs = 0;
    mac(wanted, key, counter, frame + HEADER, nbytes);
    for (int i = 0; i < CHECK; i++) differs |= wanted[i] ^ frame[CHECK_AT + i];
    return !differs;
}

static size_t frame_length(const uint8_t *frame) {
    return memcmp(frame, "KVF1", 4) ? 0 : frame[4] | frame[5] << 8 | frame[6] << 16 | (size_t)frame[7] << 24;
}

/* Sockets. */

static int64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Being woken costs tens of microseconds where a core had gone to sleep meanwhile; an answer often takes less. Not where
 * the sender runs on this very core: it could not answer before this thread sleeps, and then nobody has to be woken. */
static ssize_t receive_awake(int fd, void *place, size_t nbytes, int64_t within_us) {
#ifdef SO_INCOMING_CPU
    int sender = -1;
    socklen_t size = sizeof sender;
    if (within_us && !getsockopt(fd, SOL_SOCKET, SO_INCOMING_CPU, &sender, &size) && sender == sched_getcpu())
        within_us = 0;
#endif
    for (int64_t until_us = within_us ? now_us() + within_us : 0; within_us && now_us() < until_us;) {
        ssize_t got = recv(fd, place, nbytes, MSG_DONTWAIT);
        if (got >= 0 || (errno != EAGAIN && errno != EINTR)) return got;
    }
    errno = EAGAIN;
    return -1;
}

static ssize_t receive(int fd, void *place, size_t nbytes, int64_t within_us) {
    ssize_t got = within_us ? receive_awake(fd, place, nbytes, within_us) : -1;
    return got < 0 && (!within_us || errno == EAGAIN) ? recv(fd, place, nbytes, 0) : got;
}

static int send_all(int fd, const uint8_t *data, size_t nbytes) {
    while (nbytes) {
        ssize_t sent = send(fd, data, nbytes, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR) return -1;
        if (sent > 0) data += sent, nbytes -= (size_t)sent;
    }
    return 0;
}

static PyObject *receive_soon(PyObject *module, PyObject *args) {
    (void)module;
    int fd;
    long long within_us;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "iw*L", &fd, &buffer, &within_us)) return NULL;
    ssize_t got;
    Py_BEGIN_ALLOW_THREADS;
    got = receive_awake(fd, buffer.buf, (size_t)buffer.len, within_us);
    Py_END_ALLOW_THREADS;
    int failed = errno;
    PyBuffer_Release(&buffer);
    if (got < 0 && failed != EAGAIN) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(got);
}

/* The owner's regions, as the loop of answers sees them. */

typedef struct {
    uint64_t region_id, nbytes;
    const char *address;
    uint8_t token[TOKEN];
} Region;

typedef struct {
    pthread_mutex_t lock;
    Region *regions;
    size_t count, room;
} Regions;

static const char NAME[] = "kvferry.transport._stream.Regions";

static void free_regions(PyObject *capsule) {
    Regions *all = PyCapsule_GetPointer(capsule, NAME);
    pthread_mutex_destroy(&all->lock);
    free(all->regions);
    free(all);
}

static PyObject *regions(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    Regions *all = calloc(1, sizeof *all);
    if (!all) return PyErr_NoMemory();
    pthread_mutex_init(&all->lock, NULL);
    return PyCapsule_New(all, NAME, free_regions);
}

static PyObject *admit(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *capsule;
    unsigned long long region_id, address, nbytes;
    const char *token;
    Py_ssize_t token_bytes;
    if (!PyArg_ParseTuple(args, "OKKKy#", &capsule, &region_id, &address, &nbytes, &token, &token_bytes)) return NULL;
    Regions *all = PyCapsule_GetPointer(capsule, NAME);
    if (!all) return NULL;
    if (token_bytes != TOKEN) return PyErr_Format(PyExc_ValueError, "a token has %d bytes, not %zd", TOKEN, token_bytes);
    int full = 0;
    pthread_mutex_lock(&all->lock);
    if (all->count == all->room) {
        size_t room = all->room ? 2 * all->room : 16;
        Region *more = realloc(all->regions, room * sizeof *more);
        if (more) all->regions = more, all->room = room;
        full = !more;
    }
    if (!full) {
        Region *mine = &all->regions[all->count++];
        *mine = (Region){region_id, nbytes, (const char *)(uintptr_t)address, {0}};
        memcpy(mine->token, token, TOKEN);
    }
    pthread_mutex_unlock(&all->lock);
    if (full) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *withdraw(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *capsule;
    unsigned long long region_id;
    if (!PyArg_ParseTuple(args, "OK", &capsule, &region_id)) return NULL;
    Regions *all = PyCapsule_GetPointer(capsule, NAME);
    if (!all) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    pthread_mutex_lock(&all->lock);
    for (size_t i = 0; i < all->count; i++)
        if (all->regions[i].region_id == region_id) all->regions[i--] = all->regions[--all->count];
    pthread_mutex_unlock(&all->lock);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static const Region *find(const Regions *all, const uint8_t *id_and_token) {
    for (size_t i = 0; i < all->count; i++)
        if (all->regions[i].region_id == load64(id_and_token))
            return memcmp(all->regions[i].token, id_and_token + 8, TOKEN) ? NULL : &all->regions[i];
    return NULL;
}

/* The block and its verdict into `answer`, or 0 where anything is not as it must be. The word is loaded after the copy (R2),
 * and both happen before `withdraw` can return. */
static size_t copy_block(Regions *all, const uint8_t *request, uint8_t *answer) {
    size_t nbytes = 0;
    pthread_mutex_lock(&all->lock);
    const Region *region = find(all, request + 1);
    uint64_t size = load64(request + 25), offset = load64(request + 33), at = 0;
    const Region *holder = NULL;
    int fits = region && size && size <= SMALL_BYTES && size <= region->nbytes && offset <= region->nbytes - size;
    if (fits && request[0]) {
        holder = find(all, request + REQUEST);
        at = load64(request + REQUEST + 24);
        fits = holder && at % 8 == 0 && holder->nbytes >= 8 && at <= holder->nbytes - 8;
    }
    if (fits) {
        memcpy(answer + HEADER + TRAILER, region->address + offset, size);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        uint64_t word = holder ? __atomic_load_n((const uint64_t *)(const void *)(holder->address + at), __ATOMIC_SEQ_CST) : 0;
        memset(answer + HEADER, 0, TRAILER);
        answer[HEADER] = holder && word != load64(request + REQUEST + 32);
        store64(answer + HEADER + 1, word);
        nbytes = size;
    }
    pthread_mutex_unlock(&all->lock);
    return nbytes;
}

static PyObject *serve(PyObject *module, PyObject *args) {
    (void)module;
    int fd, awake;
    PyObject *capsule;
    const char *in_key, *out_key;
    Py_ssize_t in_bytes, out_bytes;
    unsigned long long in_counter, out_counter, answered = 0;
    long long within_us;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "iOy#Ky#Kw*Lp", &fd, &capsule, &in_key, &in_bytes, &in_counter, &out_key, &out_bytes,
                          &out_counter, &buffer, &within_us, &awake))
        return NULL;
    Regions *all = PyCapsule_GetPointer(capsule, NAME);
    uint8_t *answer = all ? malloc(HEADER + TRAILER + SMALL_BYTES) : NULL, *data = buffer.buf;
    if (!answer || in_bytes != KEY || out_bytes != KEY) {
        if (all && !answer) PyErr_NoMemory();
        if (all && answer) PyErr_SetString(PyExc_ValueError, "keys have 32 bytes");
        free(answer);
        PyBuffer_Release(&buffer);
        return NULL;
    }
    size_t have = 0;
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS;
    while (!have && !failed) {
        int64_t began_us = now_us();
        ssize_t got = receive(fd, data, (size_t)buffer.len, awake ? within_us : 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) failed = errno;
        if (got <= 0) break;
        awake = now_us() - began_us < BUSY_US;
        have = (size_t)got;
        while (have >= HEADER + REQUEST) {
            size_t length = frame_length(data), end = HEADER + length;
            const uint8_t *request = data + HEADER;
            if (length != (request[0] ? GUARDED_REQUEST : REQUEST) || request[0] > 1 || have < end) break;
            if (!is_sealed(data, (const uint8_t *)in_key, in_counter + answered, length)) break;
            size_t nbytes = copy_block(all, request, answer);
            if (!nbytes) break;
            seal(answer, (const uint8_t *)out_key, out_counter + answered, TRAILER);
            if (send_all(fd, answer, HEADER + TRAILER + nbytes)) {
                failed = errno;
                break;
            }
            answered++;
            have -= end;
            memmove(data, data + end, have);
        }
    }
    Py_END_ALLOW_THREADS;
    free(answer);
    PyBuffer_Release(&buffer);
    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return Py_BuildValue("KnO", answered, (Py_ssize_t)have, awake ? Py_True : Py_False);
}

static PyObject *ask(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 11 || !PyBytes_Check(args[1]) || !PyBytes_Check(args[2]) || !PyBytes_Check(args[4]) ||
        !PyByteArray_Check(args[6]) || PyBytes_GET_SIZE(args[1]) > GUARDED_REQUEST || PyBytes_GET_SIZE(args[2]) != KEY ||
        PyBytes_GET_SIZE(args[4]) != KEY || PyByteArray_GET_SIZE(args[6]) != HEADER + TRAILER) {
        PyErr_SetString(PyExc_TypeError, "ask takes a descriptor, a request, keys of 32 bytes with counters, 49 bytes for "
                                         "the answer's head, and where the block goes");
        return NULL;
    }
    unsigned long long value[11] = {0};
    for (int i = 0; i < 11; i++) {
        if (i == 1 || i == 2 || i == 4 || i == 6) continue;
        value[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred()) return NULL;
    }
    int fd = (int)value[0], failed = 0, odd = 0;
    size_t length = (size_t)PyBytes_GET_SIZE(args[1]), got = (size_t)value[9];
    const size_t head_bytes = HEADER + TRAILER, total = head_bytes + (size_t)value[8];
    uint8_t request[HEADER + GUARDED_REQUEST], *head = (uint8_t *)PyByteArray_AS_STRING(args[6]);
    const uint8_t *in_key = (const uint8_t *)PyBytes_AS_STRING(args[4]);
    memcpy(request + HEADER, PyBytes_AS_STRING(args[1]), length);
    Py_BEGIN_ALLOW_THREADS;
    if (length) {
        seal(request, (const uint8_t *)PyBytes_AS_STRING(args[2]), value[3], length);
        if (send_all(fd, request, HEADER + length)) failed = errno;
    }
    while (!failed && got < total) {
        uint8_t *place = got < head_bytes ? head + got : (uint8_t *)(uintptr_t)value[7] + (got - head_bytes);
        ssize_t more = receive(fd, place, got < head_bytes ? head_bytes - got : total - got, got ? 0 : (int64_t)value[10]);
        if (more < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (more <= 0) failed = more ? errno : ECONNRESET;
        if (more > 0) got += (size_t)more;
        if (got == head_bytes && more > 0) {
            odd = frame_length(head) != TRAILER || head[HEADER] || !is_sealed(head, in_key, value[5], TRAILER);
            if (odd) break;
        }
    }
    Py_END_ALLOW_THREADS;
    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(odd ? -1 : (Py_ssize_t)got);
}

static PyMethodDef methods[] = {
    {"receive_soon", receive_soon, METH_VARARGS,
     "receive_soon(fd, buffer, within_us) -> int: bytes received without sleeping, 0 at the end; -1: none came in time"},
    {"regions", regions, METH_NOARGS, "regions(): an empty table of what `serve` may answer from"},
    {"admit", admit, METH_VARARGS, "admit(regions, region_id, address, nbytes, token)"},
    {"withdraw", withdraw, METH_VARARGS, "withdraw(regions, region_id): when it returns, none of its bytes is being copied"},
    {"serve", serve, METH_VARARGS,
     "serve(fd, regions, in_key, in_counter, out_key, out_counter, buffer, within_us, awake) -> (answered, left, awake): "
     "answer requests for small blocks until something else comes, which is then the first `left` bytes of the buffer "
     "(0: end of stream); awake: whether requests come so quickly that the next one is waited for without sleeping"},
    {"ask", (PyCFunction)(void (*)(void))ask, METH_FASTCALL,
     "ask(fd, request, out_key, out_counter, in_key, in_counter, head, address, nbytes, got, within_us) -> int: send the "
     "request (b\"\" to go on after a time-out), receive head and block: bytes received so far of both, or -1 if the head "
     "brings no good verdict; then nothing was received into place"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_stream", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__stream(void) { return PyModule_Create(&definition); }
