// Which (token, choice) pairs a block works on, for kernels with one block of threads per expert and block of outputs.
//
// Pairs are numbered token * top_k + choice. A launch names its experts in one of two ways: by value, as `Jobs`, when the
// host knows the routing; or by `table`, the address of each expert's slot (0: not here), which is read when the kernel
// runs: such a launch can be captured in a graph and replayed after the table's contents and the routing have changed.
#pragma once
#include "common.cuh"

#define MAX_JOBS 64
#define MAX_PAIRS 1024

struct Jobs {
    u64 slots[MAX_JOBS];
    int experts[MAX_JOBS];
};

struct Routed {
    const u8* record;  // of the expert; null: nothing to do
    int count;         // of pairs
};

// The expert of job `job` and its pairs, ascending, in `pairs`. Called by all threads of a block; ends with a barrier.
__device__ __forceinline__ Routed find_pairs(
    const Jobs& jobs, const u64* table, const int* pair_expert, int num_pairs, int job, short* pairs, int* found
) {
    int expert;
    u64 slot;
    if (table == nullptr) {
        expert = jobs.experts[job];
        slot = jobs.slots[job];
    } else {  // job is a pair: the first of its expert works for all
        expert = pair_expert[job];
        slot = expert < 0 ? 0 : table[expert];
        for (int before = 0; before < job; ++before)
            if (pair_expert[before] == expert) slot = 0;
    }
    if (threadIdx.x < 32) {
        int count = 0, lane = threadIdx.x;
        for (int first = 0; first < num_pairs; first += 32) {
            bool mine = first + lane < num_pairs && pair_expert[first + lane] == expert;
            u32 all = __ballot_sync(FULL_MASK, mine);
            if (mine) pairs[count + __popc(all & ((1u << lane) - 1u))] = (short)(first + lane);
            count += __popc(all);
        }
        if (lane == 0) *found = count;
    }
    __syncthreads();
    Routed routed;
    routed.record = (const u8*)slot;
    routed.count = slot == 0 ? 0 : *found;
    return routed;
}
