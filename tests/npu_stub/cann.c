/* The functions of CANN's runtime whose results torch_npu uses: one device with host memory. cann.py generates all
   other functions that torch_npu loads; they return 0. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, OUT_OF_MEMORY = 207001, NOT_SUPPORTED = 207000, ALIGNMENT = 512, MEMORY_BITS = 33 };

static int32_t device = 0;
static intptr_t last_handle = 0x1000;

static void *handle(void) { return (void *)__sync_add_and_fetch(&last_handle, 16); }

/* Names of the requested device kernels, one per line. */
static char kernel_log[1 << 22];
static size_t kernel_log_end = 0;
static volatile int kernel_log_lock = 0;

void stub_log_kernel(const char *name) {
    size_t length = strlen(name);
    while (__sync_lock_test_and_set(&kernel_log_lock, 1)) { }
    if (kernel_log_end + length + 2 < sizeof kernel_log) {
        memcpy(kernel_log + kernel_log_end, name, length);
        kernel_log_end += length;
        kernel_log[kernel_log_end++] = '\n';
        kernel_log[kernel_log_end] = 0;
    }
    __sync_lock_release(&kernel_log_lock);
}
const char *stub_log(void) { return kernel_log; }
void stub_clear(void) { kernel_log_end = 0; kernel_log[0] = 0; }

/* Device */
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return OK; }
int aclrtGetDevice(int32_t *out) { *out = device; return OK; }
int aclrtSetDevice(int32_t chosen) { device = chosen; return OK; }
const char *aclrtGetSocName(void) { const char *name = getenv("STUB_SOC"); return name ? name : "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return "there is no device behind this library"; }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
    *available = *total = (size_t)1 << MEMORY_BITS;
    return OK;
}
int aclrtGetCurrentContext(void **context) { *context = (void *)0x10; return OK; }
int aclrtGetPrimaryCtxState(int32_t id, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = 1;
    return OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t from, int32_t to) { *can = 0; return OK; }
int aclrtGetDeviceInfo(uint32_t id, int what, int64_t *value) { *value = 20; return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclGetCannAttributeList(const int **list, size_t *count) { *count = 0; return OK; }
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *buffer, size_t size) {
    if (size > 1) { buffer[0] = '0'; buffer[1] = 0; }
    return OK;
}

/* Memory */
int aclrtMalloc(void **out, size_t size, int policy) {
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *out = aligned_alloc(ALIGNMENT, size);
    if (!*out) return OUT_OF_MEMORY;
    memset(*out, 0xff, size); /* NaN in every floating-point type */
    return OK;
}
int aclrtMallocAlign32(void **out, size_t size, int policy) { return aclrtMalloc(out, size, policy); }
int aclrtMallocHost(void **out, size_t size) { return aclrtMalloc(out, size, 0); }
int aclrtMallocHostWithCfg(void **out, size_t size, void *config) { return aclrtMalloc(out, size, 0); }
int aclrtFree(void *memory) { free(memory); return OK; }
int aclrtFreeHost(void *memory) { free(memory); return OK; }
int aclrtReserveMemAddress(void **out, size_t size, size_t alignment, void *expected, uint64_t flags) {
    return NOT_SUPPORTED;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memmove(to, from, size); return OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t size) { memset(to, value, size); return OK; }
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *stream) {
    return aclrtMemset(to, room, value, size);
}

/* Streams and events: all work is synchronous */
int aclrtCreateStream(void **stream) { *stream = handle(); return OK; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { *event = handle(); return OK; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { *event = handle(); return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }
int aclQueryEventRecordedStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 0; return OK; }
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
    if (status) *status = 0;
    if (model) *model = 0;
    return OK;
}

/* Kernels of the older interface, named by a string */
void *aclopCreateAttr(void) { return handle(); }
void *aclCreateDataBuffer(void *memory, size_t size) { return handle(); }
void *aclCreateTensorDesc(int type, int rank, const int64_t *sizes, int format) { return handle(); }
int aclopCompileAndExecute(const char *name) { stub_log_kernel(name); return OK; }
int aclopCompileAndExecuteV2(const char *name) { stub_log_kernel(name); return OK; }
int aclopExecuteV2(const char *name) { stub_log_kernel(name); return OK; }

/* Profiling */
uint64_t MsprofSysCycleTime(void) { return 0; }
uint64_t MsprofGetHashId(const char *text, size_t length) { return 0; }
void aclAppLog(void) { }
