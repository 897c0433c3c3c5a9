// Activations as integers: x is rounded to 16 bits in groups of 32, as cpu_kernels/activation_rows.py does it, and kept as
// two planes of signed bytes, v = 256 * high + low. Products with quantised weights are then exact integers, equal on
// every card and on the CPU: x is known to 3e-5 of its group's largest, against 4e-3 for plain int8.
//
// A row of P inputs (filled up with zeros to a multiple of 32):  high s8 [P] | low s8 [P] | scale f32 [P / 32]
//
// A group with a NaN or an infinity gets the scale NaN, so that its outputs are NaN.
#pragma once
#include "common.cuh"

#define LARGEST_PLANES 32512.0f  // 127 * 256: its upper byte is a signed byte after rounding
#define LARGEST_FLOAT 3.402823466e38f

// One warp rounds one group: each lane brings one number.
__device__ __forceinline__ void store_group(u8* row, int padded, int group, int lane, float value) {
    float size = fabsf(value);
    float largest = warp_max(size);
    bool odd = __any_sync(FULL_MASK, !(size <= LARGEST_FLOAT));
    bool zero = odd || largest < 1e-30f;
    int v = zero ? 0 : __float2int_rn(value * (LARGEST_PLANES / largest));
    int high = (v + 128) >> 8;
    row[32 * group + lane] = (u8)high;
    row[padded + 32 * group + lane] = (u8)(v - 256 * high);
    if (lane == 0) {
        float scale = odd ? bits_to_float(0x7fc00000u) : (zero ? 0.0f : largest / LARGEST_PLANES);
        ((float*)(row + 2 * padded))[group] = scale;
    }
}

// sum + four products of bytes w (signed where they go below 0) with four numbers v, exactly.
__device__ __forceinline__ int dot_planes(u32 w, u32 high, u32 low, int sum) {
#if __CUDA_ARCH__ >= 610
    return dot4(w, high, 0) * 256 + dot4(w, low, sum);
#else
    // sm_60: v is put together once for all outputs; products of 16 bits are one instruction each.
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        short v = (short)((short)((signed char)(high >> i)) * 256 + (short)((signed char)(low >> i)));
        sum += (int)(short)((signed char)(w >> i)) * (int)v;
    }
    return sum;
#endif
}
