// What stands before and behind the experts of a layer on the device.
//
//   export_layer   hidden states and the router's answer go to page-locked host memory, and stay here as the experts'
//                  kernels want them: activations as planes (planes.cuh) or f32, choices as int, weights as f32
//   join           output of a token = the CPU's share + that of tiled experts + its pairs' shares, in this order
//
// Pairs that ran here are marked in pair_done: the host need not tell `join` which.
#include "common.cuh"
#include "planes.cuh"

// grid (tokens), whole warps. Pointers of what is not wanted are null.
// hidden: rows of `type` at hidden_stride elements; index: int64 [T, K]; weights: [T, K] of weight_type; both dense.
extern "C" __global__ void __launch_bounds__(256)
export_layer(
    const void* __restrict__ hidden, long long hidden_stride, int type, int size,
    const long long* __restrict__ index, const void* __restrict__ weights, int weight_type, int top_k,
    int num_experts, float* __restrict__ host_hidden, long long* __restrict__ host_index, float* __restrict__ host_weights,
    u8* __restrict__ x, int x_stride, int planes,
    int* __restrict__ pair_expert, float* __restrict__ pair_weight, int* __restrict__ pair_done
) {
    const int token = blockIdx.x, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int groups = (size + 31) >> 5;
    u8* row = x == nullptr ? nullptr : x + (u64)token * x_stride;
    for (int group = threadIdx.x >> 5; group < groups; group += warps) {
        const int at = 32 * group + lane;
        const float value = at < size ? load_element(hidden, (u64)token * hidden_stride + at, type) : 0.0f;
        if (host_hidden != nullptr && at < size) host_hidden[(u64)token * size + at] = value;
        if (row == nullptr) continue;
        if (planes) store_group(row, 32 * groups, group, lane, value);
        else ((float*)row)[at] = value;
    }
    for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        const u64 pair = (u64)token * top_k + k;
        const long long expert = index[pair];
        const float weight = load_element(weights, pair, weight_type);
        if (host_index != nullptr) host_index[pair] = expert;
        if (host_weights != nullptr) host_weights[pair] = weight;
        if (pair_expert != nullptr) {
            pair_expert[pair] = expert >= 0 && expert < num_experts ? (int)expert : -1;  // -1: somebody else's
            pair_weight[pair] = weight;
            pair_done[pair] = 0;
        }
    }
}

// grid (tokens, slices of H), one thread a number. cpu: f32 [T, H], may lie in host memory; tiled: f32 [T, H].
extern "C" __global__ void __launch_bounds__(256)
join(
    void* __restrict__ out, int type, int size, const float* __restrict__ cpu, const float* __restrict__ tiled,
    const float* __restrict__ partial, const float* __restrict__ pair_weight, const int* __restrict__ pair_done, int top_k
) {
    const u64 token = blockIdx.x;
    const int at = blockIdx.y * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float sum = cpu == nullptr ? 0.0f : cpu[token * size + at];
    if (tiled != nullptr) sum += tiled[token * size + at];
    if (partial != nullptr)
        for (int k = 0; k < top_k; ++k) {
            const u64 pair = token * top_k + k;
            if (pair_done[pair]) sum += pair_weight[pair] * partial[pair * size + at];
        }
    store_element(out, token * size + at, type, sum);
}
