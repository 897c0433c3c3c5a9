// Experts with int8, int4 or MXFP4 weights, for few tokens: memory-bound, weights are read once as they lie in a slot.
//
// The layout is that of cpu_kernels/packed_layout.py: blocks of 32 outputs, records of consecutive inputs. A block of
// threads computes the 32 outputs of one block of one expert; its warps take turns at the steps of 32 inputs, and sums
// over warps are made in a fixed order. A warp reads a step of 4-bit codes in one go, 16 bytes a lane, of int8 codes in
// two. A lane then has four inputs (one row of the record) of 8 or 4 outputs: operands of a byte dot product.
//
//   gate_up   h = act(gate, up) of each pair, rounded to planes: the 32 outputs are just one group of down's inputs
//   down      partial[pair] = down(h) + bias; `join` in routing.cu weighs and sums them
//
// FORMAT: 0 int8, 1 int4, 2 mxfp4. TILE: rows that share what was read.
#include "common.cuh"
#include "activation.cuh"
#include "planes.cuh"
#include "routed.cuh"

#define INT8 0
#define INT4 1
#define MXFP4 2
#define MAX_WARPS 8

#if FORMAT == INT8
#define LOADS 2     // of 16 bytes a lane, for 32 inputs of 32 outputs
#define OUTPUTS 4   // of a lane
#else
#define LOADS 1
#define OUTPUTS 8
#endif
#if TILE == 1
#define UNROLL 4  // steps whose bytes are on their way at once
#define BLOCKS 3  // on a multiprocessor, at least: the compiler's own guess spills registers on some cards
#else
#define UNROLL 1
#define BLOCKS 1
#endif
#define STEP_BYTES (512 * LOADS)
#define COLUMNS (OUTPUTS == 8 ? 4 : 8)  // lanes side by side in a row of a record

// A float whose bits are this integer plus a small one is 12582912 plus that one: faster than a conversion. Sums here
// stay below 2^22: 4 * 12 * 32512.
#define MAGIC_BITS 0x4b400000
#define MAGIC 12582912.0f

struct Codes {
    uint4 words[LOADS];
    float scales[OUTPUTS];
};

__device__ __forceinline__ float e8m0_to_float(u32 exponent) {
    // 0 is 2^-127, a subnormal; 255 is NaN: both have f32's uppermost fraction bit.
    u32 odd = (exponent == 0u || exponent == 255u) ? 0x400000u : 0u;
    return bits_to_float(exponent << 23 | odd);
}

// The lane's share of step `step` of a matrix's block. `group`: inputs of a scale.
__device__ __forceinline__ Codes load_step(const u8* block, int step, int group, int lane) {
#if FORMAT == MXFP4
    const u8* record = block + (u64)(step >> 1) * (2 * STEP_BYTES + 64);
    int part = step & 1;
    const u8* scales = record + 2 * STEP_BYTES + 32 * part;
#else
    int shift = group >> 6;  // 32, 64, 128 inputs: 1, 2, 4 steps
    int part = step & ((1 << shift) - 1);
    const u8* record = block + (u64)(step >> shift) * ((STEP_BYTES << shift) + 64);
    const u8* scales = record + (STEP_BYTES << shift);
#endif
    Codes codes;
    const uint4* words = (const uint4*)(record + part * STEP_BYTES) + lane;
    int first = 4 * (lane % COLUMNS);  // the lane's first output
#pragma unroll
    for (int i = 0; i < LOADS; ++i) codes.words[i] = words[32 * i];
#pragma unroll
    for (int half = 0; half < OUTPUTS / 4; ++half) {
#if FORMAT == MXFP4
        u32 four = *(const u32*)(scales + first + 16 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) codes.scales[4 * half + i] = e8m0_to_float(four >> (8 * i) & 255u);
#else
        uint2 four = *(const uint2*)(scales + 2 * (first + 16 * half));
        codes.scales[4 * half] = f16_to_float((u16)(four.x & 0xffffu));
        codes.scales[4 * half + 1] = f16_to_float((u16)(four.x >> 16));
        codes.scales[4 * half + 2] = f16_to_float((u16)(four.y & 0xffffu));
        codes.scales[4 * half + 3] = f16_to_float((u16)(four.y >> 16));
#endif
    }
    return codes;
}

// Bytes to multiply with, of the outputs in a word's low and high nibbles, with a zero point that ZERO takes off.
#if FORMAT == INT8
#define ZERO 0u
#elif FORMAT == INT4
#define ZERO 0xf8f8f8f8u  // -8
#else
#define ZERO 0xf0f0f0f0u  // -16
#endif

__device__ __forceinline__ void spread(u32 word, u32& low, u32& high) {
#if FORMAT == MXFP4
    // Twice the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 by table; then 16 + m, or 16 - m = (m ^ 15) + 1.
    u32 magnitudes = word & 0x77777777u;
    u32 first = __byte_perm(0x03020100u, 0x0c080604u, magnitudes);
    u32 second = __byte_perm(0x03020100u, 0x0c080604u, magnitudes >> 16);
    u32 minus_low = __byte_perm(word << 4, 0u, 0xba98u), minus_high = __byte_perm(word, 0u, 0xba98u);
    low = __byte_perm(first, second, 0x6420u);
    high = __byte_perm(first, second, 0x7531u);
    low = (low ^ (minus_low & 0x0f0f0f0fu)) + (0x10101010u ^ (minus_low & 0x11111111u));
    high = (high ^ (minus_high & 0x0f0f0f0fu)) + (0x10101010u ^ (minus_high & 0x11111111u));
#else
    low = word & 0x0f0f0f0fu;
    high = word >> 4 & 0x0f0f0f0fu;
#endif
}

// sums += codes * x for one row of activations.
__device__ __forceinline__ void add_step(
    const Codes& codes, const u8* x, int padded, int step, int lane, float (&sums)[OUTPUTS]
) {
    const u32* high = (const u32*)x + 8 * step;
    const u32* low = (const u32*)(x + padded) + 8 * step;
    float scale = ((const float*)(x + 2 * padded))[step];
#if FORMAT == INT8
    int totals[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        int row = 4 * i + lane / COLUMNS;
        u32 h = high[row], l = low[row];
        const u32 words[4] = {codes.words[i].x, codes.words[i].y, codes.words[i].z, codes.words[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) totals[j] = dot_planes(words[j] ^ 0x80808080u, h, l, totals[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += (float)totals[j] * (scale * codes.scales[j]);
#else
    int row = lane / COLUMNS;
    u32 h = high[row], l = low[row];
    int base = dot_planes(ZERO, h, l, MAGIC_BITS);
    const u32 words[4] = {codes.words[0].x, codes.words[0].y, codes.words[0].z, codes.words[0].w};
#if FORMAT == MXFP4
    scale *= 0.5f;  // the codes are twice the numbers
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 first, second;
        spread(words[j], first, second);
        float a = __int_as_float(dot_planes(first, h, l, base)) - MAGIC;
        float b = __int_as_float(dot_planes(second, h, l, base)) - MAGIC;
        sums[j] += a * (scale * codes.scales[j]);
        sums[4 + j] += b * (scale * codes.scales[4 + j]);
    }
#endif
}

// Add the lanes that hold the same outputs, and leave the 32 sums of this warp in `out`.
__device__ __forceinline__ void store_sums(float (&sums)[OUTPUTS], int lane, float* out) {
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j)
#pragma unroll
        for (int other = COLUMNS; other < 32; other <<= 1) sums[j] += __shfl_xor_sync(FULL_MASK, sums[j], other);
    if (lane < COLUMNS) {
#pragma unroll
        for (int j = 0; j < OUTPUTS; ++j) out[4 * lane + (j & 3) + 16 * (j >> 2)] = sums[j];
    }
}

// sums[r] += this warp's steps of a matrix's block times row r of `count` rows of x.
__device__ __forceinline__ void add_block(
    const u8* block, int steps, int group, const u8* const (&x)[TILE], int count, int warp, int warps, int lane,
    float (&sums)[TILE][OUTPUTS]
) {
#pragma unroll UNROLL
    for (int step = warp; step < steps; step += warps) {
        const Codes codes = load_step(block, step, group, lane);
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            if (r >= count) break;
            add_step(codes, x[r], 32 * steps, step, lane, sums[r]);
        }
    }
}

__device__ __forceinline__ float over_warps(const float* sums, int warps, int lane) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += sums[32 * w + lane];
    return total;
}

// grid (blocks of I, jobs). x: rows of tokens, h: rows of pairs, both as of planes.cuh. gate_at < 0: no gate.
// bias_at: bytes to gate's and up's f32 biases; < 0: none.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, BLOCKS)
gate_up(
    const Jobs jobs, const u64* __restrict__ table, const int* __restrict__ pair_expert, int num_pairs, int top_k,
    const u8* __restrict__ x, int x_stride, u8* __restrict__ h, int h_stride, int* __restrict__ pair_done,
    int hidden, int inner, int group, u64 block_bytes, long long gate_at, u64 up_at, long long gate_bias, long long up_bias,
    int kind, float alpha, float limit
) {
    __shared__ short pairs[MAX_PAIRS];
    __shared__ int found;
    __shared__ float sums[2][TILE][MAX_WARPS * 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, block = blockIdx.x;
    const Routed routed = find_pairs(jobs, table, pair_expert, num_pairs, blockIdx.y, pairs, &found);
    const int steps = (hidden + 31) >> 5, padded_h = ((inner + 31) >> 5) << 5;
    const u8* up = routed.record + up_at + block * block_bytes;
    const u8* gate = routed.record + (gate_at < 0 ? up_at : (u64)gate_at) + block * block_bytes;
    for (int first = 0; first < routed.count; first += TILE) {
        const int rows = min(TILE, routed.count - first);
        const u8* rows_of_x[TILE];
#pragma unroll
        for (int r = 0; r < TILE; ++r) rows_of_x[r] = x + (u64)(pairs[first + min(r, rows - 1)] / top_k) * x_stride;
        float of_up[TILE][OUTPUTS] = {}, of_gate[TILE][OUTPUTS] = {};
        add_block(up, steps, group, rows_of_x, rows, warp, warps, lane, of_up);
        if (gate_at >= 0) add_block(gate, steps, group, rows_of_x, rows, warp, warps, lane, of_gate);
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
            store_sums(of_up[r], lane, &sums[0][r][32 * warp]);
            if (gate_at >= 0) store_sums(of_gate[r], lane, &sums[1][r][32 * warp]);
        }
        __syncthreads();
        const int output = 32 * block + lane;
        for (int r = warp; r < rows; r += warps) {
            const int pair = pairs[first + r];
            float a = over_warps(sums[0][r], warps, lane), value = 0.0f;
            if (output < inner) {
                if (up_bias >= 0) a += ((const float*)(routed.record + up_bias))[output];
                if (gate_at >= 0) {
                    float b = over_warps(sums[1][r], warps, lane);
                    if (gate_bias >= 0) b += ((const float*)(routed.record + gate_bias))[output];
                    value = activate(kind, b, a, alpha, limit);
                } else {
                    value = activate_single(kind, a, alpha);
                }
            }
            store_group(h + (u64)pair * h_stride, padded_h, block, lane, value);
            if (block == 0 && lane == 0) pair_done[pair] = 1;
        }
        __syncthreads();
    }
}

// grid (blocks of H, jobs). partial: f32 [pairs, H].
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, BLOCKS)
down(
    const Jobs jobs, const u64* __restrict__ table, const int* __restrict__ pair_expert, int num_pairs,
    const u8* __restrict__ h, int h_stride, float* __restrict__ partial, int hidden, int inner, int group,
    u64 block_bytes, u64 down_at, long long bias_at
) {
    __shared__ short pairs[MAX_PAIRS];
    __shared__ int found;
    __shared__ float sums[TILE][MAX_WARPS * 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, block = blockIdx.x;
    const Routed routed = find_pairs(jobs, table, pair_expert, num_pairs, blockIdx.y, pairs, &found);
    const int steps = (inner + 31) >> 5;
    const u8* matrix = routed.record + down_at + block * block_bytes;
    for (int first = 0; first < routed.count; first += TILE) {
        const int rows = min(TILE, routed.count - first);
        const u8* rows_of_h[TILE];
#pragma unroll
        for (int r = 0; r < TILE; ++r) rows_of_h[r] = h + (u64)pairs[first + min(r, rows - 1)] * h_stride;
        float of_row[TILE][OUTPUTS] = {};
        add_block(matrix, steps, group, rows_of_h, rows, warp, warps, lane, of_row);
#pragma unroll
        for (int r = 0; r < TILE; ++r) store_sums(of_row[r], lane, &sums[r][32 * warp]);
        __syncthreads();
        const int output = 32 * block + lane;
        for (int r = warp; r < rows; r += warps) {
            float value = over_warps(sums[r], warps, lane);
            if (output < hidden) {
                if (bias_at >= 0) value += ((const float*)(routed.record + bias_at))[output];
                partial[(u64)pairs[first + r] * hidden + output] = value;
            }
        }
        __syncthreads();
    }
}
