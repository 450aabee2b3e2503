/* The four driver functions that a launch uses, for CPU tensors: the "kernel" is a fused residual-add and RMSNorm over
 * contiguous fp32 rows in plain C, so that launcher.c serves a whole model where there is no GPU. */
#include <math.h>
#include <stdint.h>

typedef struct {
    const float *x, *residual, *weight;
    float *normed, *total;
    int64_t m, words[15];
    float eps;
} Args;

static int launches, result, columns;
static float eps[4096];

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    const Args *a = parameters[0];
    if (result)
        return result;
    for (int64_t row = 0; row < a->m; row++) {
        const int64_t at = row * columns;
        double squares = 0;
        for (int i = 0; i < columns; i++) {
            a->total[at + i] = a->x[at + i] + a->residual[at + i];
            squares += (double)a->total[at + i] * a->total[at + i];
        }
        const float rstd = (float)(1 / sqrt(squares / columns + a->eps));
        for (int i = 0; i < columns; i++)
            a->normed[at + i] = a->weight[i] * (a->total[at + i] * rstd);
    }
    eps[launches++ % 4096] = a->eps;
    return 0;
}
int cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}
int cuCtxPushCurrent_v2(void *context) { return 0; }
int cuCtxPopCurrent_v2(void **context) { return 0; }

int launched(void) { return launches; }
float eps_of(int launch) { return eps[launch % 4096]; }
void set_columns(int n) { columns = n; }
void set_result(int code) { result = code; }
