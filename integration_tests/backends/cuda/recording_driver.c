/* The four driver functions that a launch uses, writing down what they were given: stands in for libcuda where there is
 * no GPU. The structures are those of cuda.h. */
#include <stdint.h>
#include <string.h>

typedef struct {
    int id, pad;
    unsigned value[16];
} Attribute;
typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    Attribute* attributes;
    unsigned count;
} Config;

static char arguments[4096];
static int argument_bytes;
static unsigned grid, block, shared_bytes, count;
static Attribute attributes[2];
static void *stream, *function, *current = (void*)1;
static int launches, pushes, result;

int cuLaunchKernelEx(const Config* config, void* f, void** parameters, void** extra) {
    memcpy(arguments, parameters[0], argument_bytes);
    grid = config->grid[0];
    block = config->block[0];
    shared_bytes = config->shared_bytes;
    count = config->count;
    memcpy(attributes, config->attributes, count * sizeof(Attribute));
    stream = config->stream;
    function = f;
    launches++;
    return result;
}
int cuCtxGetCurrent(void** context) {
    *context = current;
    return 0;
}
int cuCtxPushCurrent_v2(void* context) {
    pushes += context != 0;
    return 0;
}
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuGetErrorName(int code, const char** name) {
    *name = "CUDA_ERROR_RECORDED";
    return 0;
}

const char* recorded_arguments(void) { return arguments; }
/* What a kernel takes: a launch does not say. */
void expect(int bytes) { argument_bytes = bytes; }
int64_t recorded(int i) {
    int64_t values[] = {grid,
                        block,
                        shared_bytes,
                        count,
                        attributes[0].id,
                        attributes[0].value[0],
                        attributes[1].id,
                        attributes[1].value[0],
                        (int64_t)stream,
                        (int64_t)function,
                        launches,
                        pushes};
    return values[i];
}
void set_result(int code) { result = code; }
void set_context(int64_t context) { current = (void*)context; }
