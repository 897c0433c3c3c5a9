// Experts in bf16, f16 or f32 as a checkpoint stores them, row by row, for few tokens: memory-bound, f32 arithmetic.
//
// bf16 is the upper half of f32, so cards that have no bf16 read it as well as others. A block of threads computes 32
// outputs of one expert, a warp four of them: it reads four rows (and gate's four) side by side, 16 bytes a lane.
//
//   gate_up   h = act(gate, up) of each pair, f32
//   down      partial[pair] = down(h) + bias; `join` in routing.cu weighs and sums them
//
// ELEMENT: the weights' type, as of common.cuh. TILE: rows of x that share what was read.
#include "common.cuh"
#include "activation.cuh"
#include "routed.cuh"

#define WARPS 8
#define ROWS 4  // outputs of a warp
#define BLOCKS (TILE == 1 ? 3 : 2)  // on a multiprocessor, at least: the compiler's own guess spills on some cards
#if ELEMENT == TYPE_F32
#define VECTOR 4  // numbers in 16 bytes
#else
#define VECTOR 8
#endif

__device__ __forceinline__ void unpack(uint4 bits, float (&numbers)[VECTOR]) {
    const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if ELEMENT == TYPE_F32
        numbers[i] = bits_to_float(words[i]);
#elif ELEMENT == TYPE_BF16
        numbers[2 * i] = bits_to_float(words[i] << 16);
        numbers[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
#else
        numbers[2 * i] = f16_to_float((u16)(words[i] & 0xffffu));
        numbers[2 * i + 1] = f16_to_float((u16)(words[i] >> 16));
#endif
    }
}

// sums[r][o] += row `rows[o]` of the matrix times x[r], of this lane's columns.
__device__ __forceinline__ void add_products(
    const u8* matrix, const int (&rows)[ROWS], int cols, const float* const (&x)[TILE], int count, int lane,
    float (&sums)[TILE][ROWS]
) {
    const int size = ELEMENT == TYPE_F32 ? 4 : 2;
    if (cols % VECTOR == 0) {
        for (int k = VECTOR * lane; k < cols; k += 32 * VECTOR) {
            uint4 bits[ROWS];
#pragma unroll
            for (int o = 0; o < ROWS; ++o) bits[o] = *(const uint4*)(matrix + ((u64)rows[o] * cols + k) * size);
#pragma unroll
            for (int r = 0; r < TILE; ++r) {
                if (r >= count) break;
                float inputs[VECTOR];
#pragma unroll
                for (int i = 0; i < VECTOR; i += 4) {
                    const float4 four = *(const float4*)(x[r] + k + i);
                    inputs[i] = four.x, inputs[i + 1] = four.y, inputs[i + 2] = four.z, inputs[i + 3] = four.w;
                }
#pragma unroll
                for (int o = 0; o < ROWS; ++o) {
                    float numbers[VECTOR];
                    unpack(bits[o], numbers);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sums[r][o] += numbers[i] * inputs[i];
                }
            }
        }
        return;
    }
    for (int k = lane; k < cols; k += 32)  // rows begin anywhere
#pragma unroll
        for (int o = 0; o < ROWS; ++o) {
            const float number = load_element(matrix, (u64)rows[o] * cols + k, ELEMENT);
#pragma unroll
            for (int r = 0; r < TILE; ++r)
                if (r < count) sums[r][o] += number * x[r][k];
        }
}

// grid (blocks of 32 of I, jobs), WARPS warps. x: f32 rows of tokens, h: of pairs; strides in bytes. gate_at < 0: no gate.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
gate_up(
    const Jobs jobs, const u64* __restrict__ table, const int* __restrict__ pair_expert, int num_pairs, int top_k,
    const u8* __restrict__ x, int x_stride, u8* __restrict__ h, int h_stride, int* __restrict__ pair_done,
    int hidden, int inner, long long gate_at, u64 up_at, long long gate_bias, long long up_bias,
    int kind, float alpha, float limit
) {
    __shared__ short pairs[MAX_PAIRS];
    __shared__ int found;
    const int lane = threadIdx.x & 31, output = 32 * blockIdx.x + ROWS * (threadIdx.x >> 5);
    const Routed routed = find_pairs(jobs, table, pair_expert, num_pairs, blockIdx.y, pairs, &found);
    int rows[ROWS];
#pragma unroll
    for (int o = 0; o < ROWS; ++o) rows[o] = min(output + o, inner - 1);
    for (int first = 0; first < routed.count; first += TILE) {
        const int count = min(TILE, routed.count - first);
        const float* inputs[TILE];
        float of_gate[TILE][ROWS], of_up[TILE][ROWS];
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            inputs[r] = (const float*)(x + (u64)(pairs[first + min(r, count - 1)] / top_k) * x_stride);
#pragma unroll
            for (int o = 0; o < ROWS; ++o) of_gate[r][o] = of_up[r][o] = 0.0f;
        }
        add_products(routed.record + up_at, rows, hidden, inputs, count, lane, of_up);
        if (gate_at >= 0) add_products(routed.record + gate_at, rows, hidden, inputs, count, lane, of_gate);
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            if (r >= count) break;
            const int pair = pairs[first + r];
#pragma unroll
            for (int o = 0; o < ROWS; ++o) {
                float a = warp_sum(of_up[r][o]), b = gate_at >= 0 ? warp_sum(of_gate[r][o]) : 0.0f;
                if (lane != 0 || output + o >= inner) continue;
                if (up_bias >= 0) a += ((const float*)(routed.record + up_bias))[output + o];
                if (gate_at >= 0 && gate_bias >= 0) b += ((const float*)(routed.record + gate_bias))[output + o];
                ((float*)(h + (u64)pair * h_stride))[output + o] =
                    gate_at >= 0 ? activate(kind, b, a, alpha, limit) : activate_single(kind, a, alpha);
            }
            if (output == 0 && lane == 0) pair_done[pair] = 1;
        }
    }
}

// grid (blocks of 32 of H, jobs), WARPS warps. partial: f32 [pairs, H].
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
down(
    const Jobs jobs, const u64* __restrict__ table, const int* __restrict__ pair_expert, int num_pairs,
    const u8* __restrict__ h, int h_stride, float* __restrict__ partial, int hidden, int inner, u64 down_at,
    long long bias_at
) {
    __shared__ short pairs[MAX_PAIRS];
    __shared__ int found;
    const int lane = threadIdx.x & 31, output = 32 * blockIdx.x + ROWS * (threadIdx.x >> 5);
    const Routed routed = find_pairs(jobs, table, pair_expert, num_pairs, blockIdx.y, pairs, &found);
    int rows[ROWS];
#pragma unroll
    for (int o = 0; o < ROWS; ++o) rows[o] = min(output + o, hidden - 1);
    for (int first = 0; first < routed.count; first += TILE) {
        const int count = min(TILE, routed.count - first);
        const float* inputs[TILE];
        float sums[TILE][ROWS];
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            inputs[r] = (const float*)(h + (u64)pairs[first + min(r, count - 1)] * h_stride);
#pragma unroll
            for (int o = 0; o < ROWS; ++o) sums[r][o] = 0.0f;
        }
        add_products(routed.record + down_at, rows, inner, inputs, count, lane, sums);
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            if (r >= count) break;
#pragma unroll
            for (int o = 0; o < ROWS; ++o) {
                float value = warp_sum(sums[r][o]);
                if (lane != 0 || output + o >= hidden) continue;
                if (bias_at >= 0) value += ((const float*)(routed.record + bias_at))[output + o];
                partial[(u64)pairs[first + r] * hidden + output + o] = value;
            }
        }
    }
}
