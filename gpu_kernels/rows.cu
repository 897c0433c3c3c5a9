// What happens to the rows of one expert before, between and after its matrix products. A block per row.
//
// COMPUTE is the type of the products (TYPE_F32, TYPE_F16, TYPE_BF16); all else is f32. Where it is f16, whose range a
// bf16 model's activations exceed, every row of a product's input is divided by a power of two that puts its largest
// magnitude into 1 ... 2 (exact, but for numbers 2^14 times smaller), and what comes out is multiplied by it again.
#include "activation.cuh"
#include "vectors.cuh"

#define THREADS 256

// Exponent field of the scale of a row, by the largest magnitude in it. Within what has a reciprocal that is no
// subnormal; that of infinity and of a row of zeros too.
__device__ __forceinline__ u32 exponent_of(float largest) {
    u32 exponent = __float_as_uint(largest) >> 23;
    return exponent < 1u ? 1u : exponent > 253u ? 253u : exponent;
}

__device__ __forceinline__ float reciprocal(u32 exponent) {
    return bits_to_float((254u - exponent) << 23);
}

__device__ __forceinline__ float largest_of(float so_far, float4 value) {
    return fmaxf(fmaxf(fmaxf(so_far, fabsf(value.x)), fmaxf(fabsf(value.y), fabsf(value.z))), fabsf(value.w));
}

__device__ __forceinline__ float4 times(float4 value, float factor) {
    return make_float4(value.x * factor, value.y * factor, value.z * factor, value.w * factor);
}

// Of all threads' values; NaN is not seen, and stays in its row by itself.
__device__ __forceinline__ float largest_of_block(float largest) {
    __shared__ float of_warp[THREADS / 32];
    largest = warp_max(largest);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) largest = fmaxf(largest, of_warp[warp]);
    return largest;
}

// out [n, H] = x[tokens] in COMPUTE; scales [n]. x: type x_type, row_stride elements from row to row; tokens: null for
// rows 0 ... n - 1.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows(const void* __restrict__ x, int x_type, long long row_stride, const long long* __restrict__ tokens,
            void* __restrict__ out, float* __restrict__ scales, int cols) {
    u64 row = blockIdx.x;
    long long token = tokens ? tokens[row] : (long long)row;
    const void* from = element_at(x, (u64)(token * row_stride), x_type);
    void* to = element_at(out, row * cols, COMPUTE);
    bool from_fours = in_fours(from, x_type), to_fours = in_fours(to, COMPUTE);
    float factor = 1.0f;
#if COMPUTE == TYPE_F16
    float largest = 0.0f;
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * THREADS) {
        largest = largest_of(largest, load_up_to_four(from, at, cols, x_type, from_fours));
    }
    u32 exponent = exponent_of(largest_of_block(largest));
    if (threadIdx.x == 0) scales[row] = bits_to_float(exponent << 23);
    factor = reciprocal(exponent);
#endif
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * THREADS) {
        float4 value = load_up_to_four(from, at, cols, x_type, from_fours);
        store_up_to_four(to, at, cols, COMPUTE, to_fours, times(value, factor));
    }
}

struct Product {  // one row of a product, with what makes it whole: value * scale + bias
    const void* values;
    const float* bias;
    float scale;
    bool fours;
};

__device__ __forceinline__ Product product_of(const void* y, u64 at, const float* bias, float scale) {
    const void* values = element_at(y, at, COMPUTE);
    return {values, bias, scale, in_fours(values, COMPUTE)};
}

__device__ __forceinline__ float4 four_of(const Product& product, int at, int cols) {
    float4 value = times(load_up_to_four(product.values, at, cols, COMPUTE, product.fours), product.scale);
    if (product.bias) {
        float4 bias = load_up_to_four(product.bias, at, cols, TYPE_F32, true);
        value = make_float4(value.x + bias.x, value.y + bias.y, value.z + bias.z, value.w + bias.w);
    }
    return value;
}

struct Activation {  // by value, as activation.py numbers the kinds
    int kind;
    float alpha, limit;
    bool gated;
};

__device__ __forceinline__ float one_of(const Activation& f, float gate, float up) {
    return f.gated ? activate(f.kind, gate, up, f.alpha, f.limit) : activate_single(f.kind, up, f.alpha);
}

__device__ __forceinline__ float4 activated(const Activation& f, const Product& gate, const Product& up, int at,
                                            int cols) {
    float4 b = four_of(up, at, cols);
    float4 a = f.gated ? four_of(gate, at, cols) : b;
    return make_float4(one_of(f, a.x, b.x), one_of(f, a.y, b.y), one_of(f, a.z, b.z), one_of(f, a.w, b.w));
}

// h [n, I] in COMPUTE = act(gate, up), with h_scales [n]. y [n, y_cols] has gate from column 0 and up from column
// up_first, or up alone when up_first is 0. Biases f32 [I], aligned to 16, null without.
extern "C" __global__ void __launch_bounds__(THREADS)
activate_rows(const void* __restrict__ y, int y_cols, int up_first, const float* __restrict__ scales,
              const float* __restrict__ gate_bias, const float* __restrict__ up_bias, int kind, float alpha,
              float limit, void* __restrict__ h, float* __restrict__ h_scales, int cols) {
    u64 row = blockIdx.x;
    float scale = COMPUTE == TYPE_F16 ? scales[row] : 1.0f;
    Activation f = {kind, alpha, limit, up_first > 0};
    Product gate = product_of(y, row * y_cols, gate_bias, scale);
    Product up = product_of(y, row * y_cols + up_first, up_bias, scale);
    void* to = element_at(h, row * cols, COMPUTE);
    bool to_fours = in_fours(to, COMPUTE);
    float factor = 1.0f;
#if COMPUTE == TYPE_F16
    // Computed twice: a row is longer than what a block can keep, and what was read is still in the cache.
    float largest = 0.0f;
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * THREADS) {
        largest = largest_of(largest, activated(f, gate, up, at, cols));  // of what lies behind the end: 0
    }
    u32 exponent = exponent_of(largest_of_block(largest));
    if (threadIdx.x == 0) h_scales[row] = bits_to_float(exponent << 23);
    factor = reciprocal(exponent);
#endif
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * THREADS) {
        store_up_to_four(to, at, cols, COMPUTE, to_fours, times(activated(f, gate, up, at, cols), factor));
    }
}

// out[tokens] += weights * (y * scales + bias): out f32 [T, H], y [n, H]. Rows of one expert are different tokens, and
// launches follow one another: no two threads have one number of `out`, so nothing here is atomic and the order of
// sums is that of the launches.
extern "C" __global__ void __launch_bounds__(THREADS)
add_rows(float* __restrict__ out, const long long* __restrict__ tokens, const void* __restrict__ y,
         const float* __restrict__ scales, const float* __restrict__ bias, const float* __restrict__ weights,
         int cols) {
    u64 row = blockIdx.x;
    u64 token = tokens ? (u64)tokens[row] : row;
    Product product = product_of(y, row * cols, bias, COMPUTE == TYPE_F16 ? scales[row] : 1.0f);
    float weight = weights[row];
    float* to = out + token * cols;
    bool to_fours = in_fours(to, TYPE_F32);
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * THREADS) {
        float4 value = times(four_of(product, at, cols), weight);
        float4 before = load_up_to_four(to, at, cols, TYPE_F32, to_fours);
        value = make_float4(before.x + value.x, before.y + value.y, before.z + value.z, before.w + value.w);
        store_up_to_four(to, at, cols, TYPE_F32, to_fours, value);
    }
}
