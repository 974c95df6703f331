/* A libcuda.so.1 without a GPU: what Triton's driver and its C launchers call, for an H200 that is
   not there. Kernels are loaded as far as reading their registers and stack out of the cubin;
   launches are counted and nothing runs. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef void *Handle;
typedef struct {
  int registers, stack;
} Kernel;

static volatile unsigned long long launches = 0;
static int context;

unsigned long long stand_in_launches(void) { return launches; }

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
/* No device, so that PyTorch's own CUDA code, if it is there, keeps out of this. */
CUresult cuDeviceGetCount(int *count) { *count = 0; return 100; }
CUresult cuDeviceGet(int *device, int index) { *device = index; return 0; }
CUresult cuCtxGetCurrent(Handle *current) { *current = &context; return 0; }
CUresult cuCtxSetCurrent(Handle current) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuDevicePrimaryCtxRetain(Handle *current, int device) { *current = &context; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "no GPU is here"; return 0; }
CUresult cuPointerGetAttribute(void *out, int attribute, unsigned long long pointer) {
  *(uint64_t *)out = pointer;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *count, Handle kernel, const void *config) {
  *count = 1;
  return 0;
}
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;      /* warp size */
    case 12: *value = 65536; break;   /* registers per block */
    case 13: *value = 1980000; break; /* clock, kHz */
    case 16: *value = 132; break;     /* multiprocessors */
    case 36: *value = 3201000; break; /* memory clock, kHz */
    case 37: *value = 6144; break;    /* memory bus, bits */
    case 75: *value = 9; break;       /* compute capability, major */
    case 81: *value = 233472; break;  /* shared memory per multiprocessor */
    case 97: *value = 232448; break;  /* shared memory per block */
    default: *value = 0;
  }
  return 0;
}

/* Registers and stack of a kernel are in the section .nv.info of its cubin, an ELF file. Its entries
   are a format (4: with a payload), an attribute (0x2f registers, 0x12 stack), a length, a symbol
   and a value. */
static void read_info(Kernel *kernel, const unsigned char *section, uint64_t size) {
  for (uint64_t place = 0; place + 4 <= size;) {
    const unsigned char *entry = section + place;
    uint16_t length = entry[0] == 4 ? *(const uint16_t *)(entry + 2) : 0;
    if (length >= 8) {
      int value = (int)*(const uint32_t *)(entry + 8);
      if (entry[1] == 0x2f && value > kernel->registers) kernel->registers = value;
      if (entry[1] == 0x12 && value > kernel->stack) kernel->stack = value;
    }
    place += 4 + length;
  }
}

CUresult cuModuleLoadData(Handle *module, const void *image) {
  const unsigned char *elf = image;
  Kernel *kernel = calloc(1, sizeof *kernel);
  *module = kernel;
  if (memcmp(elf, "\x7f" "ELF", 4)) return 0;
  uint64_t headers = *(const uint64_t *)(elf + 40);
  uint16_t size = *(const uint16_t *)(elf + 58), count = *(const uint16_t *)(elf + 60);
  uint16_t strings = *(const uint16_t *)(elf + 62);
  uint64_t names = *(const uint64_t *)(elf + headers + strings * size + 24);
  for (int i = 0; i < count; i++) {
    const unsigned char *header = elf + headers + i * size;
    if (strcmp((const char *)elf + names + *(const uint32_t *)header, ".nv.info")) continue;
    read_info(kernel, elf + *(const uint64_t *)(header + 24), *(const uint64_t *)(header + 32));
  }
  return 0;
}
CUresult cuModuleGetFunction(Handle *kernel, Handle module, const char *name) {
  *kernel = module;
  return 0;
}
CUresult cuModuleUnload(Handle module) { return 0; }
CUresult cuFuncSetAttribute(Handle kernel, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(Handle kernel, int config) { return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, Handle kernel) {
  switch (attribute) {
    case 0: *value = 1024; break; /* threads per block */
    case 3: *value = ((Kernel *)kernel)->stack; break;
    case 4: *value = ((Kernel *)kernel)->registers; break;
    default: *value = 0;
  }
  return 0;
}
CUresult cuLaunchKernelEx(const void *config, Handle kernel, void **arguments, void **extra) {
  launches++;
  return 0;
}
