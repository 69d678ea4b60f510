/* The part of CANN's C interface that torch_npu needs to import, to count devices and to name the
 * chip, on a machine without CANN. It computes nothing: every operator fails.
 *
 * Names and error codes: AscendCL reference of CANN 8.5, "aclrt*" and "aclError".
 *
 * FAKECANN_SOC      the name of the chip, as "Ascend910B3" (the default)
 * FAKECANN_DEVICES  how many chips there are; ASCEND_RT_VISIBLE_DEVICES narrows them
 */
#define _POSIX_C_SOURCE 200112L
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ACL_SUCCESS 0
#define ACL_ERROR_INVALID_DEVICE 507033
#define ACL_ERROR_BAD_ALLOC 200000
#define ACL_ERROR_API_NOT_SUPPORT 200001

static const size_t MEMORY_TOTAL_BYTES = 64ull << 30;
static const size_t MEMORY_FREE_BYTES = 62ull << 30;

static int current_device;
static int context;

/* How many devices the machine has, whatever is visible. */
static int installed(void) {
    const char *text = getenv("FAKECANN_DEVICES");
    return text ? atoi(text) : 2;
}

/* Like CANN: ascending ids; what follows a bad one is not read. */
static int visible(void) {
    const char *text = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!text) return installed();
    int count = 0;
    for (long last = -1; *text >= '0' && *text <= '9'; text++) {
        char *end;
        long id = strtol(text, &end, 10);
        if (id <= last || id >= installed()) break;
        last = id;
        count++;
        text = end;
        if (*text != ',') break;
    }
    return count;
}

int aclInit(const char *config) { (void)config; return ACL_SUCCESS; }
int aclFinalize(void) { return ACL_SUCCESS; }
const char *aclGetRecentErrMsg(void) { return "fakecann has no operators"; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *text,
               ...) {
    (void)level; (void)function; (void)file; (void)line; (void)text;
}

/* Devices */
const char *aclrtGetSocName(void) {
    const char *name = getenv("FAKECANN_SOC");
    return name ? name : "Ascend910B3";
}
int aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)visible(); return ACL_SUCCESS; }
int aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= visible()) return ACL_ERROR_INVALID_DEVICE;
    current_device = device;
    return ACL_SUCCESS;
}
int aclrtResetDevice(int32_t device) { (void)device; return ACL_SUCCESS; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return ACL_SUCCESS; }
int aclrtGetCurrentContext(void **found) { *found = &context; return ACL_SUCCESS; }
int aclrtSetCurrentContext(void *wanted) { (void)wanted; return ACL_SUCCESS; }
int aclrtSynchronizeDevice(void) { return ACL_SUCCESS; }
int aclrtSynchronizeDeviceWithTimeout(int32_t ms) { (void)ms; return ACL_SUCCESS; }
int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
    (void)device; (void)attribute;
    *value = 24;
    return ACL_SUCCESS;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t one, int32_t other) {
    (void)one; (void)other;
    *can = 1;
    return ACL_SUCCESS;
}
int aclrtDeviceEnablePeerAccess(int32_t device, uint32_t flags) {
    (void)device; (void)flags;
    return ACL_SUCCESS;
}
int aclrtSetDeviceSatMode(int mode) { (void)mode; return ACL_SUCCESS; }
int aclrtGetDeviceSatMode(int *mode) { *mode = 0; return ACL_SUCCESS; }
/* torch_npu counts devices through the driver's library before it asks AscendCL. */
int drvGetDevNum(uint32_t *count) { *count = (uint32_t)installed(); return ACL_SUCCESS; }

/* Memory: the host's */
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
    (void)kind;
    *free_bytes = MEMORY_FREE_BYTES;
    *total_bytes = MEMORY_TOTAL_BYTES;
    return ACL_SUCCESS;
}
int aclrtMalloc(void **memory, size_t bytes, int policy) {
    (void)policy;
    return posix_memalign(memory, 512, bytes ? bytes : 512) ? ACL_ERROR_BAD_ALLOC : ACL_SUCCESS;
}
int aclrtMallocAlign32(void **memory, size_t bytes, int policy) {
    return aclrtMalloc(memory, bytes, policy);
}
int aclrtMallocHost(void **memory, size_t bytes) { return aclrtMalloc(memory, bytes, 0); }
int aclrtFree(void *memory) { free(memory); return ACL_SUCCESS; }
int aclrtFreeHost(void *memory) { free(memory); return ACL_SUCCESS; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    (void)room; (void)kind;
    memcpy(to, from, bytes);
    return ACL_SUCCESS;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind,
                     void *stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, bytes, kind);
}
int aclrtMemset(void *memory, size_t room, int32_t value, size_t bytes) {
    (void)room;
    memset(memory, value, bytes);
    return ACL_SUCCESS;
}

/* Asked on chips before the 910B1 only, which report overflow by a flag of the stream. */
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t on) {
    (void)stream; (void)on;
    return ACL_SUCCESS;
}
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *on) {
    (void)stream;
    *on = 0;
    return ACL_SUCCESS;
}

/* Streams and events: everything has happened already */
int aclrtCreateStream(void **stream) {
    *stream = malloc(1);
    return *stream ? ACL_SUCCESS : ACL_ERROR_BAD_ALLOC;
}
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) {
    (void)priority; (void)flags;
    return aclrtCreateStream(stream);
}
int aclrtDestroyStream(void *stream) { free(stream); return ACL_SUCCESS; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtSynchronizeStream(void *stream) { (void)stream; return ACL_SUCCESS; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t ms) {
    (void)stream; (void)ms;
    return ACL_SUCCESS;
}
int aclrtStreamQuery(void *stream, int *done) { (void)stream; *done = 1; return ACL_SUCCESS; }
int aclrtStreamWaitEvent(void *stream, void *event) {
    (void)stream; (void)event;
    return ACL_SUCCESS;
}
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) {
    (void)flags;
    return aclrtCreateStream(event);
}
int aclrtDestroyEvent(void *event) { free(event); return ACL_SUCCESS; }
int aclrtRecordEvent(void *event, void *stream) { (void)event; (void)stream; return ACL_SUCCESS; }
int aclrtResetEvent(void *event, void *stream) { (void)event; (void)stream; return ACL_SUCCESS; }
int aclrtSynchronizeEvent(void *event) { (void)event; return ACL_SUCCESS; }
int aclrtQueryEventStatus(void *event, int *done) { (void)event; *done = 1; return ACL_SUCCESS; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) {
    (void)start; (void)end;
    *ms = 0;
    return ACL_SUCCESS;
}
int aclrtPeekAtLastError(int level) { (void)level; return ACL_SUCCESS; }
int aclrtGetLastError(int level) { (void)level; return ACL_SUCCESS; }

/* What torch_npu looks at while it starts */
size_t aclGetCompileoptSize(int option) { (void)option; return 2; }
int aclGetCompileopt(int option, char *value, size_t room) {
    (void)option;
    if (room) strncpy(value, "1", room);
    return ACL_SUCCESS;
}
int aclSetCompileopt(int option, const char *value) {
    (void)option; (void)value;
    return ACL_SUCCESS;
}
int aclrtGetSysParamOpt(int option, int64_t *value) {
    (void)option;
    *value = 0;
    return ACL_SUCCESS;
}
int aclrtSetSysParamOpt(int option, int64_t value) {
    (void)option; (void)value;
    return ACL_SUCCESS;
}
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
int aclrtSetOpExecuteTimeOutV2(uint64_t wanted_us, uint64_t *set_us) {
    *set_us = wanted_us;
    return ACL_SUCCESS;
}
uint64_t MsprofGetHashId(const char *text, size_t length) { (void)text; (void)length; return 0; }
uint64_t MsprofSysCycleTime(void) { return 0; }

/* Everything else that its libraries are linked against; a call says "not supported". */
#define NOT_SUPPORTED(name) int name(void) { return ACL_ERROR_API_NOT_SUPPORT; }
NOT_SUPPORTED(MsprofRegisterCallback)
NOT_SUPPORTED(MsprofReportAdditionalInfo)
NOT_SUPPORTED(MsprofReportApi)
NOT_SUPPORTED(MsprofReportCompactInfo)
NOT_SUPPORTED(aclCreateDataBuffer)
NOT_SUPPORTED(aclCreateTensorDesc)
NOT_SUPPORTED(aclDestroyDataBuffer)
NOT_SUPPORTED(aclDestroyTensorDesc)
NOT_SUPPORTED(aclGetDeviceCapability)
NOT_SUPPORTED(aclGetTensorDescDimV2)
NOT_SUPPORTED(aclGetTensorDescFormat)
NOT_SUPPORTED(aclGetTensorDescNumDims)
NOT_SUPPORTED(aclGetTensorDescType)
NOT_SUPPORTED(aclSetTensorDescName)
NOT_SUPPORTED(aclSetTensorFormat)
NOT_SUPPORTED(aclSetTensorPlaceMent)
NOT_SUPPORTED(aclSetTensorShape)
NOT_SUPPORTED(aclmdlFinalizeDump)
NOT_SUPPORTED(aclmdlInitDump)
NOT_SUPPORTED(aclmdlSetDump)
NOT_SUPPORTED(aclopCompileAndExecute)
NOT_SUPPORTED(aclopCreateAttr)
NOT_SUPPORTED(aclopDestroyAttr)
NOT_SUPPORTED(aclopSetAttrBool)
NOT_SUPPORTED(aclopSetAttrDataType)
NOT_SUPPORTED(aclopSetAttrFloat)
NOT_SUPPORTED(aclopSetAttrInt)
NOT_SUPPORTED(aclopSetAttrListBool)
NOT_SUPPORTED(aclopSetAttrListFloat)
NOT_SUPPORTED(aclopSetAttrListInt)
NOT_SUPPORTED(aclopSetAttrListListInt)
NOT_SUPPORTED(aclopSetAttrString)
NOT_SUPPORTED(aclrtBinaryGetFunction)
NOT_SUPPORTED(aclrtBinaryLoadFromData)
NOT_SUPPORTED(aclrtDeviceGetBareTgid)
NOT_SUPPORTED(aclrtFreePhysical)
NOT_SUPPORTED(aclrtGetFunctionAddr)
NOT_SUPPORTED(aclrtMallocPhysical)
NOT_SUPPORTED(aclrtMapMem)
NOT_SUPPORTED(aclrtMemExportToShareableHandle)
NOT_SUPPORTED(aclrtMemImportFromShareableHandle)
NOT_SUPPORTED(aclrtMemSetPidToShareableHandle)
NOT_SUPPORTED(aclrtProcessReport)
NOT_SUPPORTED(aclrtReleaseMemAddress)
NOT_SUPPORTED(aclrtReserveMemAddress)
NOT_SUPPORTED(aclrtUnmapMem)
NOT_SUPPORTED(rtDevBinaryRegister)
NOT_SUPPORTED(rtFunctionRegister)
NOT_SUPPORTED(rtGetC2cCtrlAddr)
NOT_SUPPORTED(rtKernelLaunch)
