// An RMSNorm as one would write it first: one kernel a step, one element a thread, one fp32 row of n columns a grid
// row.

extern "C" __global__ void naive_block_sums(const float* x, float* sums, int n) {
    __shared__ float part[256];
    const int column = blockIdx.x * 256 + threadIdx.x;
    const float value = column < n ? x[(long long)blockIdx.y * n + column] : 0.0f;
    part[threadIdx.x] = value * value;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.y * gridDim.x + blockIdx.x] = part[0];
}

extern "C" __global__ void naive_rms(const float* sums, float* rms, int blocks, int n, float eps) {
    __shared__ float part[256];
    float total = 0.0f;
    for (int block = threadIdx.x; block < blocks; block += 256) total += sums[blockIdx.x * blocks + block];
    part[threadIdx.x] = total;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) rms[blockIdx.x] = sqrtf(part[0] / n + eps);
}

extern "C" __global__ void naive_scale(const float* x, const float* weight, const float* rms, float* out, int n) {
    const int column = blockIdx.x * 256 + threadIdx.x;
    const long long at = (long long)blockIdx.y * n + column;
    if (column < n) out[at] = x[at] / rms[blockIdx.y] * weight[column];
}
