/* A stand-in for libnvidia-ml.so.1, so that the real nvidia-ml-py runs its real ctypes calls.
 *
 * STUB_NVML names the machine: "a100x2" (two A100 behind an NVSwitch, the driver lists them against
 * the order of their PCI buses), "a6000x2" (an NVLink bridge: 4 links from card to card), "t4x2"
 * (PCIe only, an old driver: no second version of the memory call), "mig" (one A100 with two
 * instances), "lost" (two cards, the second fell off), "mismatch" and "not_loaded".
 * Structures and numbers are those of nvml.h, API version 12.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, LOST = 15, MISMATCH = 18 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} pci_t;
typedef struct {
    unsigned multiprocessors, copy, decoder, encoder, jpeg, ofa, gpu_slices, compute_slices;
    unsigned long long memory_mib;
} attributes_t;
typedef struct { unsigned version; int margin; } margin_t;

/* A handle is an index from 1; a MIG instance's is 100 and more. */
typedef long handle_t;

static const char *machine(void) {
    const char *name = getenv("STUB_NVML");
    return name ? name : "";
}
static int is(const char *name) { return strcmp(machine(), name) == 0; }
static int put(char *to, const char *text, unsigned size) {
    snprintf(to, size, "%s", text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return is("mismatch") ? MISMATCH : is("not_loaded") ? DRIVER_NOT_LOADED : SUCCESS;
}
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
    return code == MISMATCH ? "Driver/library version mismatch" : "some error";
}
int nvmlSystemGetDriverVersion(char *to, unsigned size) { return put(to, "535.129.03", size); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 12020;
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = is("mig") ? 1 : is("empty") ? 0 : 2;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle_t *handle) {
    if (is("lost") && index == 1) return LOST;
    *handle = index + 1;
    return SUCCESS;
}
int nvmlDeviceGetName(handle_t handle, char *to, unsigned size) {
    if (handle >= 100) return put(to, "NVIDIA A100-SXM4-80GB MIG 3g.40gb", size);
    if (is("a6000x2")) return put(to, "NVIDIA RTX A6000", size);
    return put(to, is("t4x2") ? "Tesla T4" : "NVIDIA A100-SXM4-80GB", size);
}
int nvmlDeviceGetUUID(handle_t handle, char *to, unsigned size) {
    char uuid[64];
    snprintf(uuid, sizeof uuid, "%s-00000000-0000-0000-0000-%012ld", handle >= 100 ? "MIG" : "GPU", handle);
    return put(to, uuid, size);
}
int nvmlDeviceGetMemoryInfo(handle_t handle, memory_t *memory) {
    (void)handle;
    memory->total = 15360ULL << 20;
    memory->free = 14923ULL << 20;
    memory->used = 437ULL << 20;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(handle_t handle, memory_v2_t *memory) {
    if (is("t4x2")) return NOT_SUPPORTED;
    if (memory->version != 0x02000028) return 25; /* argument version mismatch */
    memory->total = (handle >= 100 ? 40192ULL : 81920ULL) << 20;
    memory->reserved = (handle >= 100 ? 0ULL : 618ULL) << 20;
    memory->free = (handle >= 100 ? 40154ULL : 81038ULL) << 20;
    memory->used = memory->total - memory->reserved - memory->free;
    return SUCCESS;
}
static int pci(long card, pci_t *info) {
    /* Card 1 has the higher bus on a100x2. */
    unsigned bus = is("a100x2") ? (card == 1 ? 0x47 : 0x07) : (unsigned)card;
    memset(info, 0, sizeof *info);
    info->bus = bus;
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", bus);
    return SUCCESS;
}
int nvmlDeviceGetPciInfo_v3(handle_t handle, pci_t *info) { return pci(handle, info); }
int nvmlDeviceGetCudaComputeCapability(handle_t handle, int *major, int *minor) {
    (void)handle;
    *major = is("t4x2") ? 7 : 8;
    *minor = is("t4x2") ? 5 : is("a6000x2") ? 6 : 0;
    return SUCCESS;
}
int nvmlDeviceGetNumGpuCores(handle_t handle, unsigned *cores) {
    (void)handle;
    *cores = is("t4x2") ? 2560 : is("a6000x2") ? 10752 : 6912;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(handle_t handle, unsigned *current, unsigned *pending) {
    (void)handle;
    if (is("t4x2")) return NOT_SUPPORTED;
    *current = *pending = is("mig");
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(handle_t handle, unsigned *count) {
    (void)handle;
    *count = 7;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(handle_t handle, unsigned index, handle_t *part) {
    (void)handle;
    if (index != 0 && index != 3) return NOT_FOUND;
    *part = 100 + index;
    return SUCCESS;
}
int nvmlDeviceGetAttributes_v2(handle_t handle, attributes_t *attributes) {
    if (handle < 100) return NOT_SUPPORTED;
    memset(attributes, 0, sizeof *attributes);
    attributes->multiprocessors = 42;
    attributes->gpu_slices = attributes->compute_slices = 3;
    attributes->memory_mib = 40192;
    return SUCCESS;
}
int nvmlDeviceGetTopologyCommonAncestor(handle_t one, handle_t other, unsigned *level) {
    (void)one, (void)other;
    *level = 30;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(handle_t handle, unsigned link, unsigned *active) {
    (void)handle;
    if (is("t4x2")) return NOT_SUPPORTED;
    if (link >= (is("a6000x2") ? 4u : 12u)) return 2; /* invalid argument */
    *active = 1;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(handle_t handle, unsigned link, unsigned *type) {
    (void)handle, (void)link;
    *type = is("a6000x2") ? 0 : 2;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(handle_t handle, unsigned link, pci_t *info) {
    (void)link;
    return pci(3 - handle, info);
}
int nvmlDeviceGetTotalEccErrors(handle_t handle, unsigned kind, unsigned counter, unsigned long long *count) {
    if (is("t4x2")) return NOT_SUPPORTED;
    *count = handle == 2 && kind == 1 && counter == 0 ? 3 : 0;
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(handle_t handle, unsigned *correctable, unsigned *uncorrectable, unsigned *pending, unsigned *failure) {
    (void)handle;
    if (is("t4x2")) return NOT_SUPPORTED;
    *correctable = *uncorrectable = *failure = 0;
    *pending = handle == 2;
    return SUCCESS;
}
int nvmlDeviceGetRetiredPagesPendingStatus(handle_t handle, unsigned *pending) {
    (void)handle, (void)pending;
    return NOT_SUPPORTED;
}
/* The driver of these machines knows the call by its first name only. */
int nvmlDeviceGetCurrentClocksThrottleReasons(handle_t handle, unsigned long long *reasons) {
    *reasons = handle == 2 ? 0x84 : 1;
    return SUCCESS;
}
int nvmlDeviceGetTemperatureThreshold(handle_t handle, unsigned kind, unsigned *celsius) {
    (void)handle;
    *celsius = kind == 1 ? 89 : 0;
    return SUCCESS;
}
int nvmlDeviceGetTemperature(handle_t handle, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    *celsius = handle == 1 ? 86 : 40;
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, handle_t *handle) {
    *handle = atol(uuid + 28);
    return is("lost") && *handle == 2 ? LOST : SUCCESS;
}
/* Counted from Volta on; an old driver tells of power alone, and another of neither. */
int nvmlDeviceGetTotalEnergyConsumption(handle_t handle, unsigned long long *millijoules) {
    if (is("t4x2") || is("a6000x2")) return NOT_SUPPORTED;
    *millijoules = 1500ULL * handle;
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(handle_t handle, unsigned *milliwatts) {
    if (is("a6000x2")) return NOT_SUPPORTED;
    *milliwatts = 70000u + (unsigned)handle;
    return SUCCESS;
}
int nvmlDeviceGetMarginTemperature(handle_t handle, margin_t *margin) {
    (void)handle, (void)margin;
    return NOT_SUPPORTED;
}
