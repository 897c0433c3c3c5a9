// A matrix of an expert's record, row by row in a type that cuBLAS multiplies: for experts with many rows.
//
// Compiled for one pair of types: FROM, how the matrix lies, and TO, what becomes of it (a TYPE_). Values are those of
// unpack.py: code times scale in f32, rounded once. What does not fit TO becomes infinite: whoever asks for f16 has
// checked that the weights are within its range.
#include "vectors.cuh"

#define PACKED_INT8 3
#define PACKED_INT4 4
#define PACKED_MXFP4 5

#if FROM <= TYPE_BF16

// One type to another. data and out: [count], aligned to 16 bytes; four numbers a thread.
extern "C" __global__ void __launch_bounds__(256)
convert(const void* __restrict__ data, void* __restrict__ out, u64 count) {
    u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= count) return;
    int left = count - at < 4 ? (int)(count - at) : 4;
    float4 value = load_up_to_four(element_at(data, at, FROM), 0, left, FROM, true);
    store_up_to_four(element_at(out, at, TO), 0, left, TO, true, value);
}

#else

#define OUTPUTS 32  // rows of the matrix in one of its blocks: see cpu_kernels/packed_layout.py
#define INPUTS 128  // whole records of every group size
#if FROM == PACKED_INT8
#define PIECES 8  // 16 bytes each, of what lies in memory as a row: four inputs of four outputs
#else
#define PIECES 4  // four inputs of eight outputs: 4p ... 4p + 3 in the low nibbles, 16 more in the high ones
#endif
#define ROW_BYTES (16 * PIECES)
#define SCALE_BYTES 64  // of a record: 32 in f16, or twice 32 bytes
#define THREADS (INPUTS / 4 * PIECES)
#if TO == TYPE_F32
#define SIZE 4
#else
#define SIZE 2
#endif
#define PER_VECTOR (16 / SIZE)
#define VECTORS (INPUTS / PER_VECTOR)  // 16 bytes each, of one output

// Where in its line of the tile an output's quads (four inputs) lie: quad ^ swizzle. The threads that store at once
// have PIECES outputs, four apart, of neighbouring quads; with this they go to different banks. It is even where a
// vector is two quads, so that these stay together.
#define SWIZZLE(output) (((output) >> 2 & (PIECES - 1)) * (8 / PIECES) * (4 / SIZE))

__device__ __forceinline__ void put(u8* tile, int output, int quad, float4 value) {
    store_four(tile + output * INPUTS * SIZE, 4 * (quad ^ SWIZZLE(output)), TO, value);
}

#if FROM == PACKED_MXFP4
// Four FP4 (E2M1) codes at bits 0..3 of each byte. Exponent and fraction are put where f32 has them: the same
// number times 2^-126.
__device__ __forceinline__ float number(u32 codes, int k) {
    u32 code = codes >> 8 * k;
    return bits_to_float((code & 8u) << 28 | (code & 7u) << 22) * bits_to_float(253u << 23);
}

// 2^(byte - 127); 0 is a subnormal f32, 255 is NaN: both have f32's uppermost fraction bit.
__device__ __forceinline__ float scale_of(u32 scales, int i) {
    u32 exponent = scales >> 8 * i & 255u;
    return bits_to_float(exponent << 23 | (exponent == 0u || exponent == 255u ? 1u << 22 : 0u));
}

#define SCALES u32
#elif FROM == PACKED_INT4
__device__ __forceinline__ float number(u32 codes, int k) {
    return (float)((int)(codes >> 8 * k & 15u) - 8);
}
#else
__device__ __forceinline__ float number(u32 codes, int k) {
    return (float)((int)(codes >> 8 * k & 255u) - 128);
}
#endif

#ifndef SCALES
#define SCALES uint2
__device__ __forceinline__ float scale_of(uint2 scales, int i) {
    return f16_to_float((u16)((i < 2 ? scales.x : scales.y) >> 16 * (i & 1)));
}
#endif

__device__ __forceinline__ float4 numbers(u32 codes, float scale) {
    return make_float4(number(codes, 0) * scale, number(codes, 1) * scale, number(codes, 2) * scale,
                       number(codes, 3) * scale);
}

// Grid: [inputs / 128, outputs / 32], filled up. data: packed [rows, cols], aligned to 64; out: [rows, cols], aligned
// to 16. span_bits: log2 of the inputs of a record. A block reads 128 inputs of 32 outputs in pieces of 16 bytes, one
// behind the other, and turns them round in shared memory, so that it also writes whole lines.
extern "C" __global__ void __launch_bounds__(THREADS)
dequantise(const u8* __restrict__ data, void* __restrict__ out, int rows, int cols, int span_bits) {
    __shared__ __align__(16) u8 tile[OUTPUTS * INPUTS * SIZE];
    int quad = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    int first = blockIdx.x * INPUTS, span = 1 << span_bits;
    int records = (cols + span - 1) >> span_bits;
    int record = (first + 4 * quad) >> span_bits;
    if (record < records) {
        const u8* content = data + ((u64)blockIdx.y * records + record) * (u64)(span / 4 * ROW_BYTES + SCALE_BYTES);
        int row = quad & (span / 4 - 1);  // of the record: a block begins with one
        uint4 loaded = *(const uint4*)(content + row * ROW_BYTES + 16 * piece);
        u32 codes[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        const SCALES* scales = (const SCALES*)(content + span / 4 * ROW_BYTES) + piece;
#if FROM == PACKED_MXFP4
        scales += row / 8 * (OUTPUTS / 4);  // those of the second group
#endif
        SCALES low = scales[0];
#pragma unroll
        for (int i = 0; i < 4; i++) put(tile, 4 * piece + i, quad, numbers(codes[i], scale_of(low, i)));
#if FROM != PACKED_INT8
        SCALES high = scales[4];
#pragma unroll
        for (int i = 0; i < 4; i++) put(tile, 16 + 4 * piece + i, quad, numbers(codes[i] >> 4, scale_of(high, i)));
#endif
    }
    __syncthreads();
    for (int i = threadIdx.x; i < OUTPUTS * VECTORS; i += THREADS) {
        int output = i / VECTORS, vector = i % VECTORS;
        int row = blockIdx.y * OUTPUTS + output, col = first + vector * PER_VECTOR;
        if (row >= rows || col >= cols) continue;
        const u8* from = tile + (output * VECTORS + (vector ^ SWIZZLE(output) * SIZE / 4)) * 16;
        u8* to = (u8*)out + ((u64)row * cols + col) * SIZE;
        if (cols % PER_VECTOR == 0) {
            *(uint4*)to = *(const uint4*)from;
        } else {
            for (int n = 0; n < PER_VECTOR && col + n < cols; n++) {
#if SIZE == 4
                ((u32*)to)[n] = ((const u32*)from)[n];
#else
                ((u16*)to)[n] = ((const u16*)from)[n];
#endif
            }
        }
    }
}

#endif
