// Attention of one new position a sequence over its keys and values ("decode"), grouped-query, split over positions.
//
//   query         [B, Hq, D]; head h reads keys of head h / group
//   keys, values  [B, Hkv, T, D] and [B, Hkv, T, DV], f32, f16, bf16 or int8; any strides but the last, which is 1;
//                 rows begin at multiples of 16 bytes, those of int8 of 8
//   key_scales, value_scales  of int8 only: [B, Hkv, T], f16 or f32, any strides but the last, which is 1; one for
//                 each row: a number is its integer times the scale
//
// `attend` is memory-bound: a block reads the keys and values of one head once and uses them for all query heads of it
// (up to TILES * HEADS; more take further blocks). All arithmetic is f32: it is the fast one before Volta, and bf16 is
// unknown to cards before Ampere. Blocks take each a share of the positions (a split), and leave for every query head
// the largest logit, the sum of weights, and the weighted sum of values; `combine` puts the splits together in their
// order, so the result does not depend on when they run. With one split `attend` writes the result itself.
//
// In a warp LANES lanes have a row, eight elements each; ROWS rows are read at once, and LOADS such reads are under way
// together. Every row of lanes keeps a softmax of its own, so that the loop over positions needs no barrier. Of a
// block's warps those of one tile (HEADS query heads) divide the positions; the tiles read the same ones.
//
// Positions that are not seen are not read: before `starts` of the sequence, out of the window, hidden by the mask.
//
// Macros: KV_TYPE; D, DV (multiples of 8, up to 256); HEADS (query heads of a warp); TILES (of a block: 1, 2, 4).
#include "common.cuh"

#define TYPE_INT8 3
#define MASK_NONE 0
#define MASK_BOOL 1  // a byte for each position: seen
#define MASK_ADDED 2  // + TYPE_F32, ...: added to the logit; what is as low as HIDDEN leaves no weight

#define HIDDEN -1e4f
#define NOTHING -1e30f  // the largest logit of no positions; finite, so that a difference of two is a number
#define UNSEEN bits_to_float(0xff800000u)  // -inf
#define LOG2E 1.44269504088896341f

#define WARPS 4
#define CHUNK 8
#define WIDER (D > DV ? D : DV)
#define LANES (WIDER > 128 ? 32 : WIDER > 64 ? 16 : WIDER > 32 ? 8 : WIDER > 16 ? 4 : WIDER > 8 ? 2 : 1)
#define ROWS (32 / LANES)
#define LOADS (LANES > 4 ? 4 : LANES)
#define STEP (ROWS * LOADS)
#define WARPS_OF_TILE (WARPS / TILES)
#define BLOCK_HEADS (TILES * HEADS)
#define WORDS (KV_TYPE == TYPE_F32 ? 8 : KV_TYPE == TYPE_INT8 ? 2 : 4)  // of 32 bits in a chunk

struct Strides {  // in elements
    long long batch, head, position;
};

struct Problem {
    Strides query, keys, values, key_scales, value_scales;
    long long mask_batch;  // elements from sequence to sequence, 0: one for all
    int kv_heads, group, length, window, splits;  // window 0: all
    int query_type, scale_type, mask_kind;
    float scale, softcap;  // softcap 0: none
};

__device__ __forceinline__ void load_chunk(const void* data, long long at, u32* words) {
#if KV_TYPE == TYPE_INT8
    uint2 read = *(const uint2*)((const u8*)data + at);
    words[0] = read.x, words[1] = read.y;
#else
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        uint4 read = ((const uint4*)((const u16*)data + at * (KV_TYPE == TYPE_F32 ? 2 : 1)))[i / 4];
        words[i] = read.x, words[i + 1] = read.y, words[i + 2] = read.z, words[i + 3] = read.w;
    }
#endif
}

__device__ __forceinline__ void unpack_chunk(const u32* words, float scale, float* numbers) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
#if KV_TYPE == TYPE_F32
        numbers[i] = bits_to_float(words[i]);
#elif KV_TYPE == TYPE_F16
        numbers[i] = f16_to_float((u16)(words[i / 2] >> 16 * (i % 2)));
#elif KV_TYPE == TYPE_BF16
        numbers[i] = bits_to_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
        numbers[i] = (float)(signed char)(words[i / 4] >> 8 * (i % 4)) * scale;
#endif
    }
}

// Which of a row's loads a lane is left with by `row_sum`, and the lane that is left with a load: the same function.
__device__ __forceinline__ int own_load(int lane) {
    return LOADS == 4 ? (lane & 1) << 1 | (lane >> 1 & 1) : lane & (LOADS - 1);
}

// The sum over the row's lanes of part[own_load(lane)]: half of the sums leave a lane at each step.
__device__ __forceinline__ float row_sum(float* part, int lane) {
#pragma unroll
    for (int step = 1; step < LOADS; step *= 2) {
        const int count = LOADS / 2 / step;
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            float sent = upper ? part[i] : part[i + count];
            float kept = upper ? part[i + count] : part[i];
            part[i] = kept + __shfl_xor_sync(FULL_MASK, sent, step);
        }
    }
#pragma unroll
    for (int step = LOADS; step < LANES; step *= 2) part[0] += __shfl_xor_sync(FULL_MASK, part[0], step);
    return part[0];
}

// What the mask adds to the logit of a position, times log2(e); -inf where it is not seen.
__device__ __forceinline__ float mask_bias(const void* mask, int kind, long long at) {
    if (kind == MASK_NONE) return 0.0f;
    if (kind == MASK_BOOL) return ((const u8*)mask)[at] ? 0.0f : UNSEEN;
    float added = load_element(mask, at, kind - MASK_ADDED);
    return added <= HIDDEN ? UNSEEN : added * LOG2E;
}

// Where element `at` of a head lies in shared memory: the lanes' first halves of a chunk side by side, then the second.
__device__ __forceinline__ int staged_at(int head, int at) {
    return ((head * 2 + at % CHUNK / 4) * LANES + at / CHUNK) * 4 + at % 4;
}

// The result of one element from its weighted sum, with one more logit for the sink. `top` in units of log2.
__device__ __forceinline__ float finished(float value, float top, float sum, const float* sinks, int head) {
    if (sinks) {
        float sink = sinks[head] * LOG2E, higher = fmaxf(top, sink), factor = exp2f(top - higher);
        value *= factor;
        sum = sum * factor + exp2f(sink - higher);
    }
    return sum == 0.0f ? 0.0f : value / sum;
}

// The largest logit and the sum of weights of several parts, [top, sum] each, `step` pairs apart.
__device__ __forceinline__ void joined(const float* states, int parts, int step, float& top, float& sum) {
    top = NOTHING, sum = 0.0f;
    for (int i = 0; i < parts; ++i) top = fmaxf(top, states[2 * i * step]);
    for (int i = 0; i < parts; ++i) sum += states[2 * i * step + 1] * exp2f(states[2 * i * step] - top);
}

// sums: [B, Hq, splits, DV], states: [B, Hq, splits, 2]; not used with one split. out: [B, Hq, DV] of the query's type.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) attend(
    const void* __restrict__ query, const void* __restrict__ keys, const void* __restrict__ values,
    const void* __restrict__ key_scales, const void* __restrict__ value_scales, const void* __restrict__ mask,
    const int* __restrict__ starts, const float* __restrict__ sinks, float* __restrict__ sums,
    float* __restrict__ states, void* __restrict__ out, Problem of
) {
    __shared__ __align__(16) float staged[BLOCK_HEADS * LANES * CHUNK];  // queries, then weighted sums
    __shared__ float warp_states[WARPS_OF_TILE * BLOCK_HEADS * 2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = warp % TILES, warp_of_tile = warp / TILES;
    const int row = lane / LANES, chunk = lane % LANES * CHUNK;
    const int kv_head = blockIdx.y % of.kv_heads, first_head = blockIdx.y / of.kv_heads * BLOCK_HEADS;
    const long long batch = blockIdx.z, split = blockIdx.x;

    for (int i = threadIdx.x; i < BLOCK_HEADS * LANES * CHUNK; i += 32 * WARPS) {
        const int head = i / (LANES * CHUNK), at = i % (LANES * CHUNK);
        float number = 0.0f;
        if (at < D && first_head + head < of.group) {
            long long q_head = kv_head * of.group + first_head + head;
            number = load_element(query, batch * of.query.batch + q_head * of.query.head + at, of.query_type);
        }
        staged[staged_at(head, at)] = number * of.scale;
    }
    __syncthreads();

    // the split's positions, a whole number of steps of all warps but for the last
    int begin = starts ? max(starts[batch], 0) : 0;
    if (of.window && of.length - of.window > begin) begin = of.length - of.window;
    const int all_steps = (max(of.length - begin, 0) + STEP * WARPS_OF_TILE - 1) / (STEP * WARPS_OF_TILE);
    const int share = (all_steps + of.splits - 1) / of.splits * (STEP * WARPS_OF_TILE);
    const long long from = begin + split * share;
    const int to = (int)(from + share < of.length ? from + share : of.length);

    const long long key_row = batch * of.keys.batch + kv_head * of.keys.head + chunk;
    const long long value_row = batch * of.values.batch + kv_head * of.values.head + chunk;
#if KV_TYPE == TYPE_INT8
    const long long key_scale = batch * of.key_scales.batch + kv_head * of.key_scales.head;
    const long long value_scale = batch * of.value_scales.batch + kv_head * of.value_scales.head;
#endif
    float top[HEADS], sum[HEADS], found[HEADS][CHUNK];
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
        top[head] = NOTHING, sum[head] = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) found[head][i] = 0.0f;
    }

    for (long long first = from + warp_of_tile * STEP; first < to; first += STEP * WARPS_OF_TILE) {
        u32 key_words[LOADS][WORDS], value_words[LOADS][WORDS];
        float key_factor[LOADS], value_factor[LOADS], bias = UNSEEN;
        bool any = false;
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            const long long at = first + load * ROWS + row;
            const float added = at < to ? mask_bias(mask, of.mask_kind, batch * of.mask_batch + at) : UNSEEN;
            const bool seen = added != UNSEEN;
            if (load == own_load(lane)) bias = added;
            any |= seen;
            key_factor[load] = value_factor[load] = 1.0f;
#pragma unroll
            for (int i = 0; i < WORDS; ++i) key_words[load][i] = value_words[load][i] = 0u;
            if (seen && chunk < D) load_chunk(keys, key_row + at * of.keys.position, key_words[load]);
            if (seen && chunk < DV) load_chunk(values, value_row + at * of.values.position, value_words[load]);
#if KV_TYPE == TYPE_INT8
            if (seen) {
                key_factor[load] = load_element(key_scales, key_scale + at, of.scale_type);
                value_factor[load] = load_element(value_scales, value_scale + at, of.scale_type);
            }
#endif
        }
        if (!__any_sync(FULL_MASK, any)) continue;

        float weight[HEADS], factor[HEADS], numbers[LOADS][CHUNK];
#pragma unroll
        for (int load = 0; load < LOADS; ++load) unpack_chunk(key_words[load], key_factor[load], numbers[load]);
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
            float part[LOADS];
            const float4* q = (const float4*)staged + (tile * HEADS + head) * 2 * LANES + lane % LANES;
            const float4 low = q[0], high = q[LANES];
#pragma unroll
            for (int load = 0; load < LOADS; ++load) {
                const float* k = numbers[load];
                part[load] = low.x * k[0] + low.y * k[1] + low.z * k[2] + low.w * k[3];
                part[load] += high.x * k[4] + high.y * k[5] + high.z * k[6] + high.w * k[7];
            }
            float logit = row_sum(part, lane);
            if (of.softcap != 0.0f) logit = of.softcap * tanhf(logit / of.softcap);
            logit = logit * LOG2E + bias;
            float highest = logit;
#pragma unroll
            for (int step = 1; step < LOADS; step *= 2)
                highest = fmaxf(highest, __shfl_xor_sync(FULL_MASK, highest, step));
            highest = fmaxf(highest, top[head]);
            factor[head] = exp2f(top[head] - highest);
            weight[head] = exp2f(logit - highest);
            top[head] = highest;
            sum[head] = sum[head] * factor[head] + weight[head];
        }

#pragma unroll
        for (int load = 0; load < LOADS; ++load) unpack_chunk(value_words[load], value_factor[load], numbers[load]);
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) found[head][i] *= factor[head];
#pragma unroll
            for (int load = 0; load < LOADS; ++load) {
                const float given = __shfl_sync(FULL_MASK, weight[head], row * LANES + own_load(load));
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) found[head][i] += given * numbers[load][i];
            }
        }
    }

    // the rows of lanes of a warp; what is used is that of the first one
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
#pragma unroll
        for (int step = 1; step < LOADS; step *= 2) sum[head] += __shfl_xor_sync(FULL_MASK, sum[head], step);
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            const float other = __shfl_xor_sync(FULL_MASK, top[head], step), higher = fmaxf(top[head], other);
            const float mine = exp2f(top[head] - higher), its = exp2f(other - higher);
            top[head] = higher;
            sum[head] = sum[head] * mine + __shfl_xor_sync(FULL_MASK, sum[head], step) * its;
#pragma unroll
            for (int i = 0; i < CHUNK; ++i)
                found[head][i] = found[head][i] * mine + __shfl_xor_sync(FULL_MASK, found[head][i], step) * its;
        }
        if (lane == 0) {
            float* state = warp_states + 2 * (warp_of_tile * BLOCK_HEADS + tile * HEADS + head);
            state[0] = top[head], state[1] = sum[head];
        }
    }
    __syncthreads();

    // the warps of a tile, one after the other
    for (int turn = 0; turn < WARPS_OF_TILE; ++turn) {
        if (turn == warp_of_tile && row == 0) {
#pragma unroll
            for (int head = 0; head < HEADS; ++head) {
                float highest, whole;
                joined(warp_states + 2 * (tile * HEADS + head), WARPS_OF_TILE, BLOCK_HEADS, highest, whole);
                const float mine = exp2f(top[head] - highest);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    float* to_add = staged + staged_at(tile * HEADS + head, chunk + i);
                    *to_add = (turn ? *to_add : 0.0f) + found[head][i] * mine;
                }
            }
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < BLOCK_HEADS * DV; i += 32 * WARPS) {
        const int head = i / DV, at = i % DV;
        if (first_head + head >= of.group) break;
        const int q_head = kv_head * of.group + first_head + head;
        const long long result = batch * of.kv_heads * of.group + q_head;
        float highest, whole;
        joined(warp_states + 2 * head, WARPS_OF_TILE, BLOCK_HEADS, highest, whole);
        const float value = staged[staged_at(head, at)];
        if (of.splits == 1) {
            store_element(out, result * DV + at, of.query_type, finished(value, highest, whole, sinks, q_head));
        } else {
            sums[(result * of.splits + split) * DV + at] = value;
            float* state = states + 2 * (result * of.splits + split);
            if (at == 0) state[0] = highest, state[1] = whole;
        }
    }
}

// A block for each query head and sequence: the splits' sums put together.
extern "C" __global__ void __launch_bounds__(256) combine(
    const float* __restrict__ sums, const float* __restrict__ states, const float* __restrict__ sinks,
    void* __restrict__ out, int q_heads, int splits, int out_type
) {
    const long long result = (long long)blockIdx.y * q_heads + blockIdx.x;
    const float* state = states + 2 * result * splits;
    float highest, whole;
    joined(state, splits, 1, highest, whole);
    for (int at = threadIdx.x; at < DV; at += blockDim.x) {
        float value = 0.0f;
        for (int split = 0; split < splits; ++split)
            value += sums[(result * splits + split) * DV + at] * exp2f(state[2 * split] - highest);
        store_element(out, result * DV + at, out_type, finished(value, highest, whole, sinks, (int)blockIdx.x));
    }
}
