// What all kernels share. One source for NVRTC and for the tests' g++, which defines CUDA_HOST_SHIM: no header of CUDA
// is included, so that its run-time headers need not be installed, and no type of it is used that needs one.
//
// Every kernel is an extern "C" function without template parameters; what varies at compile time is a macro.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_MASK 0xffffffffu

__device__ __forceinline__ float bits_to_float(u32 bits) {
    return __uint_as_float(bits);
}

__device__ __forceinline__ float bf16_to_float(u16 bits) {
    return __uint_as_float((u32)bits << 16);
}

__device__ __forceinline__ float f16_to_float(u16 bits) {
#ifdef CUDA_HOST_SHIM
    return shim_half_to_float(bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Rounded to nearest even; NaN stays NaN.
__device__ __forceinline__ u16 float_to_f16(float value) {
#ifdef CUDA_HOST_SHIM
    return shim_float_to_half(value);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

__device__ __forceinline__ u16 float_to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40u);
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Element types of tensors, as arguments and macros name them.
#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_BF16 2

__device__ __forceinline__ float load_element(const void* data, u64 at, int type) {
    if (type == TYPE_F32) return ((const float*)data)[at];
    u16 bits = ((const u16*)data)[at];
    return type == TYPE_F16 ? f16_to_float(bits) : bf16_to_float(bits);
}

__device__ __forceinline__ void store_element(void* data, u64 at, int type, float value) {
    if (type == TYPE_F32) ((float*)data)[at] = value;
    else ((u16*)data)[at] = type == TYPE_F16 ? float_to_f16(value) : float_to_bf16(value);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) value += __shfl_xor_sync(FULL_MASK, value, other);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, other));
    return value;
}

// sum + four products of signed bytes. sm_60 (P100) has no such instruction, sm_61 has.
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
#if __CUDA_ARCH__ >= 610
    return __dp4a((int)a, (int)b, sum);
#else
#pragma unroll
    for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (int)(signed char)(b >> i);
    return sum;
#endif
}
