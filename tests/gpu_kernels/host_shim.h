// Runs plain CUDA C++ on the CPU: a fiber (a stack of its own) for each CUDA thread, one block at a time, its threads
// in an order that the test chooses. host_kernels.py puts this before a kernel's source and tells what it shows.
//
// A fiber runs until it comes to a barrier or a warp operation, notes there what it waits for and goes back to the
// scheduler; that lets it go on when all whom it waits for have come. So between two meeting points the threads run one
// after the other, and what one of them does without having met another shows in the results of some order.
#pragma once
#define CUDA_HOST_SHIM 1
#include <climits>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- the dialect. The kernel's text stands in an unnamed namespace: all of it is local, as __device__ asks for.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)  // host_kernels.py reads it
#define __align__(n) __attribute__((aligned(n)))
// In a section, to be found and overwritten with NaN before every block; `used`: the compiler must not reason about it.
#define __shared__ static __attribute__((section("cushared"), used))

struct uint3 { unsigned x, y, z; };
struct int3 { int x, y, z; };
struct float3 { float x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
#define SHIM_VECTOR2(element, name, alignment)                  \
    struct alignas(alignment) name { element x, y; };           \
    static inline name make_##name(element x, element y) {      \
        return {x, y};                                          \
    }
#define SHIM_VECTOR4(element, name, alignment)                                          \
    struct alignas(alignment) name { element x, y, z, w; };                             \
    static inline name make_##name(element x, element y, element z, element w) {        \
        return {x, y, z, w};                                                            \
    }
SHIM_VECTOR2(signed char, char2, 2)
SHIM_VECTOR2(unsigned char, uchar2, 2)
SHIM_VECTOR2(short, short2, 4)
SHIM_VECTOR2(unsigned short, ushort2, 4)
SHIM_VECTOR2(int, int2, 8)
SHIM_VECTOR2(unsigned, uint2, 8)
SHIM_VECTOR2(float, float2, 8)
SHIM_VECTOR2(long long, longlong2, 16)
SHIM_VECTOR2(unsigned long long, ulonglong2, 16)
SHIM_VECTOR4(signed char, char4, 4)
SHIM_VECTOR4(unsigned char, uchar4, 4)
SHIM_VECTOR4(short, short4, 8)
SHIM_VECTOR4(unsigned short, ushort4, 8)
SHIM_VECTOR4(int, int4, 16)
SHIM_VECTOR4(unsigned, uint4, 16)
SHIM_VECTOR4(float, float4, 16)

namespace shim {

// ---- fibers
enum State { READY, AT_BARRIER, IN_WARP, DONE };
enum Operation { BARRIER, BARRIER_OR, BARRIER_AND, BARRIER_COUNT, SHUFFLE, BALLOT, SYNC_WARP };

struct Place {
    const char* file;
    int line;
    bool operator==(const Place& other) const { return line == other.line && !strcmp(file, other.file); }
};

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;  // enters the fresh stack, once
    jmp_buf resume;    // every other time: no system call
    bool started = false;
    void* sanitizer = nullptr;
    uint3 thread;
    unsigned flat;
    State state = DONE;
    // what it waits for, and what it got
    Operation operation;
    Place place;
    unsigned mask;
    int source;  // the lane that a shuffle reads
    uint64_t value, result;
};

constexpr size_t STACK = 256 << 10;
constexpr size_t SPARE = 64 << 10;  // of it: who gets here has used too much, and has harmed nobody yet
constexpr uint64_t CANARY = 0x5ca1ab1e0ddba11ull;

static std::vector<Fiber> fibers;
static Fiber* self;
static jmp_buf scheduler;
static dim3 grid, block;
static uint3 block_index;
static unsigned threads;
static std::string error;
static int order;
static void (*body)(void*);
static void* body_argument;
static std::unique_ptr<uint4[]> dynamic_shared;
static size_t dynamic_bytes;

static uint64_t& canary(Fiber& fiber) {
    return *reinterpret_cast<uint64_t*>(fiber.stack.get() + SPARE);
}

// AddressSanitizer has to know which stack it is on.
#ifdef __SANITIZE_ADDRESS__
static void* scheduler_sanitizer;
static const void* scheduler_stack;
static size_t scheduler_size;
static void leave_scheduler(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&scheduler_sanitizer, fiber.stack.get(), STACK);
}
static void enter_scheduler() {
    __sanitizer_finish_switch_fiber(scheduler_sanitizer, nullptr, nullptr);
}
static void leave_fiber() {
    __sanitizer_start_switch_fiber(&self->sanitizer, scheduler_stack, scheduler_size);
}
static void enter_fiber() {
    __sanitizer_finish_switch_fiber(self->sanitizer, &scheduler_stack, &scheduler_size);
}
static void forget(Fiber& fiber) {
    __asan_unpoison_memory_region(fiber.stack.get(), STACK);
}
#else
static void leave_scheduler(Fiber&) {}
static void enter_scheduler() {}
static void leave_fiber() {}
static void enter_fiber() {}
static void forget(Fiber&) {}
#endif

// Back to the scheduler until that resumes this fiber. Other fibers write memory meanwhile: the compiler must not keep
// any of it in registers.
__attribute__((noinline)) static void yield() {
    asm volatile("" ::: "memory");
    leave_fiber();
    if (_setjmp(self->resume) == 0) _longjmp(scheduler, 1);
    enter_fiber();
    asm volatile("" ::: "memory");
}

// A fiber serves one thread after the other.
static void run_threads() {
    enter_fiber();
    for (;;) {
        body(body_argument);
        self->state = DONE;
        yield();
    }
}

__attribute__((noinline)) static void resume(Fiber& fiber) {
    self = &fiber;
    leave_scheduler(fiber);
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_threads, 0);
        setcontext(&fiber.start);
    }
    enter_scheduler();
}

static uint64_t wait_for(State state, Operation operation, Place place, unsigned mask, uint64_t value, int source) {
    self->operation = operation;
    self->place = place;
    self->mask = mask;
    self->value = value;
    self->source = source;
    self->state = state;
    yield();
    return self->result;
}

// ---- the scheduler
static void fail(const char* what, const Fiber& fiber) {
    char text[400];
    snprintf(text, sizeof text, "%s: %s:%d, block (%u, %u, %u), thread %u, mask %08x", what, fiber.place.file,
             fiber.place.line, block_index.x, block_index.y, block_index.z, fiber.flat, fiber.mask);
    if (error.empty()) error = text;
}

// The fault in what `fiber` asks of lane `lane` of its warp, or null; `waiting` when that lane has not come yet.
static const char* disagreement(const Fiber& fiber, unsigned lane, bool& waiting) {
    const unsigned other = (fiber.flat & ~31u) + lane;
    if (other >= threads) return "the mask names a lane that the block does not have";
    const Fiber& peer = fibers[other];
    if (peer.state == DONE) return "the mask names a lane that has returned";
    if (peer.state != IN_WARP) {
        waiting = true;
        return nullptr;
    }
    if (peer.mask != fiber.mask) return "lanes of one warp operation give different masks";
    const bool same = peer.operation == fiber.operation && peer.place == fiber.place;
    return same ? nullptr : "lanes are in different warp operations";
}

static uint64_t warp_result(const Fiber* warp, const Fiber& fiber) {
    if (fiber.operation == SHUFFLE) return warp[fiber.source].value;
    uint64_t votes = 0;
    if (fiber.operation == BALLOT)
        for (int lane = 0; lane < 32; ++lane)
            if (fiber.mask >> lane & 1) votes |= warp[lane].value << lane;
    return votes;
}

// Completes the operation of `fiber`'s warp if all its lanes have come.
static bool complete_warp(Fiber& fiber) {
    if (!(fiber.mask >> (fiber.flat & 31) & 1)) return fail("a lane is not in its own mask", fiber), false;
    bool waiting = false;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (fiber.mask >> lane & 1)
            if (const char* fault = disagreement(fiber, lane, waiting)) return fail(fault, fiber), false;
    if (waiting) return false;
    Fiber* warp = &fibers[fiber.flat & ~31u];
    const unsigned mask = fiber.mask;
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        if (warp[lane].operation == SHUFFLE && !(mask >> warp[lane].source & 1))
            return fail("a lane reads from one outside of the mask", warp[lane]), false;
        warp[lane].result = warp_result(warp, warp[lane]);
    }
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) warp[lane].state = READY;
    return true;
}

// All threads are at a barrier or have returned: let them go on, or say what is wrong.
static void complete_barrier() {
    const Fiber* first = nullptr;
    uint64_t count = 0;
    for (unsigned i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == IN_WARP) return fail("a warp operation that not all of its lanes reach", fiber);
        if (fiber.state == AT_BARRIER && !first) first = &fiber;
    }
    for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i].state == DONE) return fail("a barrier that not all threads reach", *first);
        if (!(fibers[i].place == first->place)) return fail("threads wait at different barriers", fibers[i]);
        count += fibers[i].value != 0;
    }
    const Operation operation = first->operation;
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].result = operation == BARRIER_OR ? count > 0 : operation == BARRIER_AND ? count == threads : count;
        fibers[i].state = READY;
    }
}

struct Random {
    uint64_t state;
    uint64_t below(uint64_t bound) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return (state >> 11) % bound;
    }
};

// 0: forward, 1: backward, more: a seed. With an odd seed one warp runs as far as it can while the others wait, then the
// next: where all warps run up to each other's warp operations, writes and reads of shared memory keep in step, and a
// barrier between them is not missed.
static bool one_warp_ahead() { return order > 1 && order % 2 == 1; }

template <class Index>
static void rearrange(std::vector<Index>& places, Random& random) {
    for (size_t i = places.size(); order > 1 && i > 1; --i) std::swap(places[i - 1], places[random.below(i)]);
}

template <class Index>
static std::vector<Index> arrangement(size_t count) {
    std::vector<Index> places(count);
    for (size_t i = 0; i < count; ++i) places[i] = static_cast<Index>(order == 1 ? count - 1 - i : i);
    return places;
}

extern "C" {
extern char __start_cushared[] __attribute__((weak));
extern char __stop_cushared[] __attribute__((weak));
}

// Shared memory starts as NaN, or -1. Not by memset: AddressSanitizer's redzones lie between the variables.
__attribute__((no_sanitize("address"))) static void poison_shared() {
    for (volatile char* at = __start_cushared; at != __stop_cushared; ++at) *at = static_cast<char>(0xff);
    if (dynamic_bytes) memset(dynamic_shared.get(), 0xff, dynamic_bytes);
}

static bool is_ready(unsigned warp) {
    for (unsigned i = 32 * warp; i < threads && i < 32 * warp + 32; ++i)
        if (fibers[i].state == READY) return true;
    return false;
}

static void run_block(Random& random) {
    poison_shared();
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.flat = i;
        fiber.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        fiber.state = READY;
    }
    std::vector<unsigned> places = arrangement<unsigned>(threads);
    unsigned ahead = threads;  // a thread of the warp that is: none yet
    for (bool all_done = false; !all_done && error.empty();) {
        rearrange(places, random);
        if (one_warp_ahead() && !is_ready(ahead / 32))
            for (unsigned i : places)
                if (fibers[i].state == READY) ahead = i;
        for (unsigned i : places)
            if (fibers[i].state == READY && (!one_warp_ahead() || i / 32 == ahead / 32)) resume(fibers[i]);
        bool progress = false;
        all_done = true;
        for (unsigned i = 0; i < threads && error.empty(); ++i) {
            if (fibers[i].state == IN_WARP) progress |= complete_warp(fibers[i]);
            progress |= fibers[i].state == READY;
            all_done &= fibers[i].state == DONE;
        }
        if (error.empty() && !progress && !all_done) complete_barrier();
    }
    for (unsigned i = 0; i < threads; ++i)
        if (canary(fibers[i]) != CANARY) fail("a thread needs more than its stack", fibers[i]);
}

static void make_fibers() {
    if (fibers.size() < threads) fibers.resize(threads);  // before any of them runs: they do not move afterwards
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        if (fiber.state != DONE || !fiber.started) {  // new, or left behind by a launch that failed
            forget(fiber);
            fiber.started = false;
        }
        canary(fiber) = CANARY;
        fiber.place = {"kernel", 0};
        fiber.mask = 0;
    }
}

static void run_grid(const unsigned* grid_size, const unsigned* block_size, size_t shared_bytes, int chosen_order) {
    grid = {grid_size[0], grid_size[1], grid_size[2]};
    block = {block_size[0], block_size[1], block_size[2]};
    threads = block.x * block.y * block.z;
    order = chosen_order;
    error.clear();
    dynamic_shared.reset(shared_bytes ? new uint4[(shared_bytes + 15) / 16] : nullptr);
    dynamic_bytes = shared_bytes;
    make_fibers();
    Random random{0x9E3779B97F4A7C15ull * static_cast<unsigned>(order + 1)};
    std::vector<uint64_t> places = arrangement<uint64_t>(size_t(grid.x) * grid.y * grid.z);
    rearrange(places, random);
    for (uint64_t i : places) {
        block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        run_block(random);
        if (!error.empty()) break;
    }
}

// ---- a kernel seen from outside
template <class... Parameters, size_t... At>
static void call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<At...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(parameters[At])...);
}

template <class... Parameters>
static const char* launch(void (*kernel)(Parameters...), const unsigned* grid_size, const unsigned* block_size,
                          size_t shared_bytes, void** parameters, int chosen_order) {
    struct Call {
        void (*kernel)(Parameters...);
        void** parameters;
    } whole{kernel, parameters};
    body = [](void* given) {
        Call* whole = static_cast<Call*>(given);
        call(whole->kernel, whole->parameters, std::index_sequence_for<Parameters...>{});
    };
    body_argument = &whole;
    run_grid(grid_size, block_size, shared_bytes, chosen_order);
    return error.c_str();
}

// p: pointer; i4, u8, f4: number; b1: bool; s24: struct of so many bytes.
template <class T>
static std::string code() {
    static_assert(std::is_trivially_copyable_v<T>, "parameters are copied as bytes");
    if (std::is_pointer_v<T>) return "p";
    const char* kind = std::is_class_v<T> ? "s"
                       : std::is_same_v<T, bool> ? "b"
                       : std::is_floating_point_v<T> ? "f"
                       : std::is_unsigned_v<T> ? "u"
                                               : "i";
    return kind + std::to_string(sizeof(T));
}

template <class... Parameters>
static std::string signature(void (*)(Parameters...)) {
    std::string whole;
    ((whole += code<std::remove_const_t<Parameters>>() + " "), ...);
    return whole;
}

// ---- what a warp does together
static inline unsigned lane() {
    return self->flat & 31;
}

template <class T>
static T shuffle(Place place, unsigned mask, T value, unsigned source) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a lane gives 32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = wait_for(IN_WARP, SHUFFLE, place, mask, bits, static_cast<int>(source));
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
static T shuffle_xor(Place place, unsigned mask, T value, int other, int width = 32) {
    const unsigned source = lane() ^ static_cast<unsigned>(other), last = lane() | static_cast<unsigned>(width - 1);
    return shuffle(place, mask, value, source <= last ? source : lane());
}

template <class T>
static T shuffle_down(Place place, unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned source = lane() + delta, last = lane() | static_cast<unsigned>(width - 1);
    return shuffle(place, mask, value, source <= last ? source : lane());
}

template <class T>
static T shuffle_up(Place place, unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned first = lane() & ~static_cast<unsigned>(width - 1);
    return shuffle(place, mask, value, lane() >= first + delta ? lane() - delta : lane());
}

template <class T>
static T shuffle_from(Place place, unsigned mask, T value, int source, int width = 32) {
    const unsigned within = static_cast<unsigned>(width - 1);
    return shuffle(place, mask, value, (lane() & ~within) | (static_cast<unsigned>(source) & within));
}

static inline unsigned ballot(Place place, unsigned mask, int vote) {
    return static_cast<unsigned>(wait_for(IN_WARP, BALLOT, place, mask, vote != 0, 0));
}

static inline unsigned mask_or_full(unsigned mask = ~0u) {
    return mask;
}

static inline void sync_warp(Place place, unsigned mask) {
    wait_for(IN_WARP, SYNC_WARP, place, mask, 0, 0);
}

static inline int barrier(Place place, Operation operation, int value) {
    return static_cast<int>(wait_for(AT_BARRIER, operation, place, 0, value != 0, 0));
}

}  // namespace shim

#define threadIdx (shim::self->thread)
#define blockIdx (shim::block_index)
#define blockDim (shim::block)
#define gridDim (shim::grid)
#define warpSize 32
#define SHIM_HERE (shim::Place{__FILE__, __LINE__})
#define __syncthreads() ((void)shim::barrier(SHIM_HERE, shim::BARRIER, 0))
#define __syncthreads_or(value) shim::barrier(SHIM_HERE, shim::BARRIER_OR, value)
#define __syncthreads_and(value) shim::barrier(SHIM_HERE, shim::BARRIER_AND, value)
#define __syncthreads_count(value) shim::barrier(SHIM_HERE, shim::BARRIER_COUNT, value)
#define __syncwarp(...) shim::sync_warp(SHIM_HERE, shim::mask_or_full(__VA_ARGS__))
#define __shfl_xor_sync(...) shim::shuffle_xor(SHIM_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) shim::shuffle_down(SHIM_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) shim::shuffle_up(SHIM_HERE, __VA_ARGS__)
#define __shfl_sync(...) shim::shuffle_from(SHIM_HERE, __VA_ARGS__)
#define __ballot_sync(mask, vote) shim::ballot(SHIM_HERE, mask, vote)
#define __any_sync(mask, vote) (shim::ballot(SHIM_HERE, mask, vote) != 0)
#define __all_sync(mask, vote) (shim::ballot(SHIM_HERE, mask, !(vote)) == 0)
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// ---- bits
template <class To, class From>
static inline To shim_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
static inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
static inline float __int_as_float(int bits) { return shim_bits<float>(bits); }
static inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }
static inline int __float_as_int(float value) { return shim_bits<int>(value); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }

// The instruction prmt: a nibble of the selector takes one of eight bytes, or, with its upper bit, that byte's sign.
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int at = 0; at < 4; ++at) {
        const unsigned chosen = selector >> 4 * at & 15;
        unsigned byte = bytes >> 8 * (chosen & 7) & 0xff;
        if (chosen & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * at;
    }
    return result;
}

#if __CUDA_ARCH__ >= 610
static inline int __dp4a(int a, int b, int sum) {
    unsigned total = static_cast<unsigned>(sum);
    for (int i = 0; i < 32; i += 8) total += static_cast<unsigned>(int8_t(a >> i) * int8_t(b >> i));
    return static_cast<int>(total);
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
    return sum;
}
#endif

// ---- half precision, as the instructions cvt.f32.f16 and cvt.rn.f16.f32 do it
static inline float shim_half_to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * ldexpf(static_cast<float>(fraction), -24);
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
static inline unsigned short shim_float_to_half(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fff;
    if (size >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // from 65520 on
    if (size < 0x38800000u)  // below 2^-14: a multiple of 2^-24
        return static_cast<unsigned short>(sign | static_cast<unsigned>(rintf(ldexpf(__uint_as_float(size), 24))));
    const unsigned even = size >> 13 & 1;
    return static_cast<unsigned short>(sign | (size - 0x38000000u + 0xfffu + even) >> 13);
}

// ---- arithmetic
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
static inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __expf(x) expf(x)  // macros: some versions of the C library have functions of these names
#define __logf(x) logf(x)
static inline int shim_to_int(float rounded) {  // the device saturates, and NaN is 0
    if (!(rounded < 2147483648.0f)) return rounded != rounded ? 0 : INT_MAX;
    return rounded < -2147483648.0f ? INT_MIN : static_cast<int>(rounded);
}
static inline int __float2int_rn(float a) { return shim_to_int(rintf(a)); }
static inline int __float2int_rz(float a) { return shim_to_int(truncf(a)); }
static inline int __float2int_rd(float a) { return shim_to_int(floorf(a)); }
static inline int __float2int_ru(float a) { return shim_to_int(ceilf(a)); }

template <class T>
static inline T __ldg(const T* at) {
    return *at;
}
// As on the device: of a number and NaN, the number.
template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}

// Integers only: sums of floats would depend on the order of threads.
template <class T, class U, class Change>
static inline T shim_atomic(T* at, U operand, Change change) {
    static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "atomics are for integers of 32 and 64 bits");
    const T before = *at;
    *at = change(before, static_cast<T>(operand));
    return before;
}
#define SHIM_ATOMIC(name, expression)                                                   \
    template <class T, class U>                                                         \
    static inline T name(T* at, U operand) {                                            \
        return shim_atomic(at, operand, [](T a, T b) { (void)a; return T(expression); });    \
    }
SHIM_ATOMIC(atomicAdd, a + b)
SHIM_ATOMIC(atomicSub, a - b)
SHIM_ATOMIC(atomicMin, b < a ? b : a)
SHIM_ATOMIC(atomicMax, a < b ? b : a)
SHIM_ATOMIC(atomicAnd, a & b)
SHIM_ATOMIC(atomicOr, a | b)
SHIM_ATOMIC(atomicExch, b)
template <class T>
static inline T atomicCAS(T* at, T expected, T desired) {
    const T before = *at;
    if (before == expected) *at = desired;
    return before;
}

// What host_kernels.py calls; `bound` is the kernel's __launch_bounds__.
#define SHIM_EXPORTED extern "C" __attribute__((visibility("default")))
#define SHIM_EXPORT(kernel, bound)                                                                              \
    SHIM_EXPORTED const char* launch_##kernel(const unsigned* shim_grid, const unsigned* shim_block,            \
                                              size_t shim_bytes, void** shim_parameters, int shim_order) {      \
        return shim::launch(kernel, shim_grid, shim_block, shim_bytes, shim_parameters, shim_order);            \
    }                                                                                                           \
    SHIM_EXPORTED const char* signature_##kernel() {                                                            \
        static const std::string shim_text = shim::signature(kernel);                                           \
        return shim_text.c_str();                                                                               \
    }                                                                                                           \
    SHIM_EXPORTED int bound_##kernel() { return bound; }
