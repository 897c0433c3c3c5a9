// Four neighbouring elements of a row at once, where they lie so that one load or store takes them.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 element_bytes(int type) {
    return type == TYPE_F32 ? 4u : 2u;
}

__device__ __forceinline__ const void* element_at(const void* data, u64 at, int type) {
    return (const u8*)data + at * element_bytes(type);
}

__device__ __forceinline__ void* element_at(void* data, u64 at, int type) {
    return (u8*)data + at * element_bytes(type);
}

// Whether elements 0..3, 4..7 and so on of a row can be taken at once.
__device__ __forceinline__ bool in_fours(const void* row, int type) {
    return ((u64)row & (4u * element_bytes(type) - 1u)) == 0;
}

__device__ __forceinline__ float4 load_four(const void* row, int at, int type) {
    if (type == TYPE_F32) return *(const float4*)((const float*)row + at);
    uint2 bits = *(const uint2*)((const u16*)row + at);
    if (type == TYPE_F16) {
        return make_float4(f16_to_float((u16)bits.x), f16_to_float((u16)(bits.x >> 16)), f16_to_float((u16)bits.y),
                           f16_to_float((u16)(bits.y >> 16)));
    }
    return make_float4(bits_to_float(bits.x << 16), bits_to_float(bits.x & 0xffff0000u), bits_to_float(bits.y << 16),
                       bits_to_float(bits.y & 0xffff0000u));
}

__device__ __forceinline__ u32 two_halves(float first, float second, int type) {
    return type == TYPE_F16 ? float_to_f16(first) | (u32)float_to_f16(second) << 16
                            : float_to_bf16(first) | (u32)float_to_bf16(second) << 16;
}

__device__ __forceinline__ void store_four(void* row, int at, int type, float4 value) {
    if (type == TYPE_F32) {
        *(float4*)((float*)row + at) = value;
        return;
    }
    *(uint2*)((u16*)row + at) = make_uint2(two_halves(value.x, value.y, type), two_halves(value.z, value.w, type));
}

// Elements at ... at + 3 of a row of `count`; zeros behind its end. fours: `in_fours(row)`.
__device__ __forceinline__ float4 load_up_to_four(const void* row, int at, int count, int type, bool fours) {
    if (fours && at + 4 <= count) return load_four(row, at, type);
    float4 value;
    value.x = load_element(row, at, type);
    value.y = at + 1 < count ? load_element(row, at + 1, type) : 0.0f;
    value.z = at + 2 < count ? load_element(row, at + 2, type) : 0.0f;
    value.w = at + 3 < count ? load_element(row, at + 3, type) : 0.0f;
    return value;
}

__device__ __forceinline__ void store_up_to_four(void* row, int at, int count, int type, bool fours, float4 value) {
    if (fours && at + 4 <= count) {
        store_four(row, at, type, value);
        return;
    }
    store_element(row, at, type, value.x);
    if (at + 1 < count) store_element(row, at + 1, type, value.y);
    if (at + 2 < count) store_element(row, at + 2, type, value.z);
    if (at + 3 < count) store_element(row, at + 3, type, value.w);
}
