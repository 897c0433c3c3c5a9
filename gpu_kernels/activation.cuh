// Activations of all architectures, in f32. Kinds are numbered as in activation.py; formulas are those of torch_experts.py.
//
// A kind is an argument, not a macro: it is the same for all threads, so the branch costs nothing beside the reading.
#pragma once
#include "common.cuh"

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define GELU_QUICK 3
#define RELU 4
#define RELU2 5
#define SWIGLU_OAI 6
#define SILU_CLAMP 7
#define SILU_CAP 8
#define SILU_SOFTCAP 9

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// Bounded on one or both sides; NaN stays NaN, which fminf and fmaxf would swallow.
__device__ __forceinline__ float at_most(float x, float limit) {
    return x > limit ? limit : x;
}

__device__ __forceinline__ float within(float x, float limit) {
    return x > limit ? limit : (x < -limit ? -limit : x);
}

// f(x), of experts without a gate.
__device__ __forceinline__ float activate_single(int kind, float x, float alpha) {
    switch (kind) {
        case SILU: return x * sigmoid(x);
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case GELU_QUICK: return x * sigmoid(alpha * x);
        case RELU: return x < 0.0f ? 0.0f : x;
        default: return x < 0.0f ? 0.0f : x * x;
    }
}

// f(gate) * up.
__device__ __forceinline__ float activate(int kind, float gate, float up, float alpha, float limit) {
    switch (kind) {
        case SWIGLU_OAI: {
            gate = at_most(gate, limit);
            return (within(up, limit) + 1.0f) * gate * sigmoid(alpha * gate);
        }
        case SILU_CLAMP: {
            gate = at_most(gate, limit);
            return gate * sigmoid(gate) * within(up, limit);
        }
        case SILU_CAP: return at_most(gate * sigmoid(gate), limit) * within(up, limit);
        case SILU_SOFTCAP: return alpha * tanhf(gate / alpha) * sigmoid(gate) * (limit * tanhf(up / limit));
        default: return activate_single(kind, gate, alpha) * up;
    }
}
