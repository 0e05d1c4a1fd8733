/* What `_gpu.c` needs of CUDA's driver, over host memory: a kernel is a memcpy at once, an event counts down queries.
 * Kernel 1 copies blocks, 2 does without Triton's last pointer, 3 takes others, 4 loads a word. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

long launches, uploads, waits, queries_left, fail_with;
long last_grid, last_threads, last_shared;

int cuFuncGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *size) {
    static const size_t sizes[] = {8, 8, 4, 8, 8, 8};
    const int of_word = kernel == (void *)4;
    if (index >= (of_word ? 4u : 6u) - (kernel == (void *)2)) return 1;
    *offset = 8 * index;
    *size = of_word || kernel == (void *)3 ? 8 : sizes[index];
    return 0;
}

int cuLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    if (fail_with) return (int)fail_with;
    launches++, last_grid = gx * gy * gz, last_threads = bx * by * bz, last_shared = shared;
    if (kernel == (void *)4) {
        memcpy(*(void **)params[1], *(void **)params[0], 8);
        return *(int64_t *)params[2] || *(int64_t *)params[3];
    }
    int64_t *table = *(int64_t **)params[0], nbytes = *(int64_t *)params[3];
    int32_t n = *(int32_t *)params[2];
    for (int32_t i = 0; i < n; i++) memcpy((void *)table[n + i], (void *)table[i], (size_t)nbytes);
    return *(int64_t *)params[1] || *(int64_t *)params[4] || *(int64_t *)params[5] || extra;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t nbytes, void *stream) {
    uploads++;
    memcpy((void *)to, from, nbytes);
    return 0;
}

int cuEventRecord(void *event, void *stream) { return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    waits++;
    return 0;
}
int cuEventQuery(void *event) { return fail_with ? (int)fail_with : queries_left-- > 0 ? 600 : 0; }
