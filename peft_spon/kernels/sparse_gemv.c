// Copyright 2026 The peft_spon authors.
// SPDX-License-Identifier: Apache-2.0
//
// y = z W^T + b for a few rows z, most of whose entries are 0: rows of W^T (in, out) whose input is 0 in every row of z
// are never read. fp32, bf16 and fp16, and weights of 8 bits with a scale per output; sums in fp32 in the order of the
// inputs, so that a result depends neither on the number of threads nor on the other rows of the batch, and zeros skipped
// or multiplied give the same bits.
//
// Plain C, no headers of Python or torch: called through ctypes (cpu.py). Built by `cc -O3 -shared -fPIC`; no OpenMP is
// linked: the caller hands over the entry points of the pool that torch itself uses.
//
// The file includes itself once per instruction set; the functions of the second half are written once.

#ifndef ISA

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, ISA)

enum { F32, BF16, F16, I8 };  // I8: of weights only
#define SIZE(type) ((type) == F32 ? 4 : (type) == I8 ? 1 : 2)

enum { MAX_BATCH = 8 };    // rows that share one reading of the weights
enum { COLUMNS = 16384 };  // fp32 sums of a thread at a time, of all rows together: 64 KB of its stack
enum { AHEAD = 512 };      // bytes of the next rows to fetch early; whole rows would push others out of small caches
enum { GRAIN = 1 << 17 };  // bytes of weights worth another thread

enum { DONE, NEAR, NO_MEMORY };  // what the entry points return

typedef struct {
    int type, weight_type;  // of z and y; of the weights: the same, or I8
    long n_active, n_out, stride, batch;
    const int32_t *active;  // (n_active,)
    const float *values;    // (n_active, batch)
    const char *weight;
    const float *weight_scale;  // (n_out,), of I8: W is weight * weight_scale
    const void *bias;
    int bias_type;
    char *y;  // (batch, n_out)
    long chunk, chunks;
} Product;

typedef struct {
    void (*convert)(int type, const void *x, float *z, long n);
    int (*threshold)(float *z, long n, float tau, const float *scale, const float *gain, int relative, const float *mean);
    void (*columns)(const Product *p, long from, long to);
    float (*sum)(const float *p, long n);
} Kernels;

INLINE float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float f = rest < 0x400 ? (float)rest * 0x1p-24f : bits_to_float((rest << 13) + (112u << 23));
    return bits_to_float(sign | float_to_bits(f));
}

INLINE uint16_t to_half(float f) {
    uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    // Below 2^-14 halves are multiples of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to one.
    if (rest < 0x38800000) return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    rest -= 112u << 23;
    return (uint16_t)(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE float load_one(int type, const void *p, long i) {
    if (type == F32) return ((const float *)p)[i];
    if (type == I8) return ((const int8_t *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return type == BF16 ? bits_to_float((uint32_t)bits << 16) : from_half(bits);
}

INLINE void store_one(int type, void *p, long i, float f) {
    if (type == F32) {
        ((float *)p)[i] = f;
    } else if (type == F16) {
        ((uint16_t *)p)[i] = to_half(f);
    } else {
        uint32_t bits = float_to_bits(f);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        ((uint16_t *)p)[i] = (uint16_t)(f != f ? bits >> 16 | 0x40 : rounded);
    }
}

// ---- once per instruction set: V, a vector of WIDTH floats; RANK weight vectors at a time are shared by a batch ----

#define ISA portable
#define TARGET
#define WIDTH 1
#define RANK 4
typedef float V_portable;
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define ALL(f) (f)
#define FMA(a, b, c) ((a) * (b) + (c))
#define LOAD_BF16(p) load_one(BF16, p, 0)
#define LOAD_F16(p) load_one(F16, p, 0)
#define LOAD_I8(p) load_one(I8, p, 0)
#define STORE_F16(p, v) store_one(F16, p, 0, v)
#include "sparse_gemv.c"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86
#include <immintrin.h>

#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define RANK 4
typedef __m256 V_avx2;
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define ALL(f) _mm256_set1_ps(f)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOAD_BF16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define LOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_I8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define STORE_F16(p, v) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(v, 0))
#include "sparse_gemv.c"

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define RANK 8
typedef __m512 V_avx512;
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define ALL(f) _mm512_set1_ps(f)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOAD_BF16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define LOAD_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_I8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define STORE_F16(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(v, 0))
#include "sparse_gemv.c"
#endif

#if defined(__aarch64__) && defined(__GNUC__)
#define HAVE_NEON
#include <arm_neon.h>

INLINE float32x4_t four_bytes(const char *p) {
    uint32_t bytes;  // of little-endian memory, as all that Linux and macOS run on
    memcpy(&bytes, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
}

#define ISA neon
#define TARGET
#define WIDTH 4
#define RANK 8
typedef float32x4_t V_neon;
#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define ALL(f) vdupq_n_f32(f)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define LOAD_BF16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)(p)), 16))
#define LOAD_F16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p))))
#define LOAD_I8(p) four_bytes(p)
#define STORE_F16(p, v) vst1_u16((uint16_t *)(p), vreinterpret_u16_f16(vcvt_f16_f32(v)))
#include "sparse_gemv.c"
#endif

// ---- dispatch and threads ----

static const Kernels *const kernels[] = {
    &kernels_portable,
#if defined(HAVE_X86)
    &kernels_avx2,
    &kernels_avx512,
#elif defined(HAVE_NEON)
    &kernels_neon,
#endif
};
static const char *const names[] = {
    "portable",
#if defined(HAVE_X86)
    "avx2",
    "avx512",
#elif defined(HAVE_NEON)
    "neon",
#endif
};
static const Kernels *chosen = &kernels_portable;

static int supported(const char *name) {
#if defined(HAVE_X86)
    // Whatever has AVX2 and FMA has F16C, too, which older clangs cannot ask for.
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    (void)name;
    return 1;
}

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel
static int (*thread_number)(void);
static int (*thread_count)(void);

// The pool: addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, or three times NULL.
EXPORT void spon_set_pool(void *run, void *number, void *count) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
}

// Chooses the named instruction set, or the best one for NULL; its name, or NULL where this machine has it not.
EXPORT const char *spon_choose(const char *name) {
    for (int i = (int)(sizeof names / sizeof *names) - 1; i >= 0; i--)
        if (supported(names[i]) && (!name || !strcmp(name, names[i]))) {
            chosen = kernels[i];
            return names[i];
        }
    return NULL;
}

static void share(void *argument) {
    const Product *p = argument;
    for (long i = thread_number(); i < p->chunks; i += thread_count()) {
        long from = i * p->chunk, to = from + p->chunk;
        chosen->columns(p, from, to < p->n_out ? to : p->n_out);
    }
}

// The inputs that are not 0 in every row, and their values side by side. z (batch, n) may share memory with no output.
static long compact(const float *z, long n, long batch, int dense, int32_t *active, float *values) {
    long k = 0;
    if (batch == 1) {
        for (long i = 0; i < n; i++) {
            active[k] = (int32_t)i;
            values[k] = z[i];
            k += dense | (z[i] != 0);
        }
        return k;
    }
    for (long i = 0; i < n; i++) {
        int any = dense;
        for (long b = 0; b < batch; b++) {
            float v = z[b * n + i];
            values[k * batch + b] = v;
            any |= v != 0;
        }
        active[k] = (int32_t)i;
        k += any;
    }
    return k;
}

typedef struct {
    int use, relative;
    float tau;
    const float *scale, *gain, *mean;
} Threshold;

static int run(const void *x, const void *weight, const float *weight_scale, const void *bias, void *y, long rows,
               long n_in, long n_out, long stride, int type, int weight_type, int bias_type, int dense, long threads,
               Threshold threshold) {
    if (!rows || !n_out) return DONE;
    long most = rows < MAX_BATCH ? rows : MAX_BATCH;
    // One element more: the branch-free compaction writes behind the last active input.
    size_t inputs = (size_t)most * n_in, need = (2 * inputs + most + n_in + 1) * 4;
    float small[4096], *memory = need <= sizeof small ? small : malloc(need);
    if (!memory) return NO_MEMORY;
    float *z = memory, *values = z + inputs;
    int32_t *active = (int32_t *)(values + inputs + most);
    int status = DONE;

    for (long row = 0; row < rows && status == DONE; row += most) {
        long batch = rows - row < most ? rows - row : most;
        chosen->convert(type, (const char *)x + row * n_in * SIZE(type), z, batch * n_in);
        if (threshold.use)
            for (long b = 0; b < batch; b++)
                if (chosen->threshold(z + b * n_in, n_in, threshold.tau, threshold.scale, threshold.gain,
                                      threshold.relative, threshold.mean ? threshold.mean + row + b : NULL))
                    status = NEAR;
        if (status != DONE) break;
        long k = compact(z, n_in, batch, dense, active, values);

        Product p = {type,   weight_type,  k,    n_out,     stride, batch, active, values,
                     weight, weight_scale, bias, bias_type, (char *)y + row * n_out * SIZE(type), n_out, 1};
        long worth = 1 + k * n_out * SIZE(weight_type) / GRAIN;
        long use = parallel ? (threads < worth ? threads : worth) : 1;
        // Chunks are whole cache lines: a column is summed by the same instructions whatever the number of threads.
        p.chunk = ((n_out + use - 1) / use + 63) / 64 * 64;
        p.chunks = (n_out + p.chunk - 1) / p.chunk;
        if (p.chunks > 1)
            parallel(share, &p, (unsigned)p.chunks, 0);
        else
            chosen->columns(&p, 0, n_out);
    }
    if (memory != small) free(memory);
    return status;
}

// y = z W^T + b; x (rows, n_in), y (rows, n_out), weight (n_in, n_out) with `stride` elements from row to row; bias
// (n_out,) or NULL; types 0 fp32, 1 bf16, 2 fp16. The weight's type is that of x, or 3, 8 bits: its columns are multiplied
// by weight_scale (n_out,) then. With `dense`, zeros are inputs like others.
EXPORT int spon_gemv(const void *x, const void *weight, const float *weight_scale, const void *bias, void *y, long rows,
                     long n_in, long n_out, long stride, int type, int weight_type, int bias_type, int dense,
                     long threads) {
    Threshold none = {0};
    return run(x, weight, weight_scale, bias, y, rows, n_in, n_out, stride, type, weight_type, bias_type, dense, threads,
               none);
}

// y = (S(x) * gain) W^T + b, S keeping entries with score above tau[0]; scale, gain (n_in,) fp32 or NULL. `relative`
// 1 or 2: scores are divided by their mean, or root mean square: mean (rows,), or NULL to have it computed here, when
// NEAR may be returned and y is not written: an entry lies so near the threshold that the rounding of the mean decides.
EXPORT int spon_threshold_gemv(const void *x, const void *weight, const float *weight_scale, const void *bias, void *y,
                               const float *tau, const float *scale, const float *gain, const float *mean, int relative,
                               long rows, long n_in, long n_out, long stride, int type, int weight_type, int bias_type,
                               long threads) {
    Threshold threshold = {1, relative, *tau, scale, gain, mean};
    return run(x, weight, weight_scale, bias, y, rows, n_in, n_out, stride, type, weight_type, bias_type, 0, threads,
               threshold);
}

// The sum of n floats, n < 2^31: how fast this machine reads memory, for benchmarks. Needs a pool.
typedef struct {
    const float *p;
    long n;
    float sum[64];
} Read;

static void read_share(void *argument) {
    Read *r = argument;
    long i = thread_number(), part = r->n / thread_count() / 64 * 64;
    r->sum[i] = chosen->sum(r->p + i * part, part);
}

EXPORT float spon_read(const float *p, long n, long threads) {
    Read r = {p, n, {0}};
    float sum = 0;
    parallel(read_share, &r, threads < 64 ? (unsigned)threads : 64, 0);
    for (int i = 0; i < 64; i++) sum += r.sum[i];
    return sum;
}

#else  // ISA: the second half

#define V NAME(V)

TARGET INLINE V NAME(load)(const int type, const char *p) {
    return type == F32 ? LOAD((const float *)p) : type == BF16 ? LOAD_BF16(p) : type == F16 ? LOAD_F16(p) : LOAD_I8(p);
}

TARGET static void NAME(convert)(int type, const void *x, float *z, long n) {
    long i = 0;
    if (type == F32) {
        memcpy(z, x, n * sizeof *z);
        return;
    }
    if (type == F16)
        for (; i + WIDTH <= n; i += WIDTH) STORE(z + i, LOAD_F16((const char *)x + 2 * i));
    for (; i < n; i++) z[i] = load_one(type, x, i);
}

TARGET INLINE float NAME(score)(float x, const float *scale, long i) { return fabsf(scale ? x * scale[i] : x); }

// In place: x where score > tau, x * 0 (NaN stays NaN) elsewhere; then times gain. The operations of criteria/*.py in
// their order, in fp32, so that the set is theirs; only the mean is summed otherwise. Where rounding it could
// move an entry across the threshold, the answer is 1 and z is spoilt.
TARGET INLINE int NAME(threshold_)(float *z, long n, float tau, const float *scale, const float *gain, int relative,
                                   const float *mean) {
    float divisor = 1, low = tau, high = tau;
    if (relative && mean) divisor = *mean;
    if (relative && !mean) {
        double sums[8] = {0}, sum = 0;
        long i = 0;
        for (; i + 8 <= n; i += 8)
            for (int j = 0; j < 8; j++) {
                double s = NAME(score)(z[i + j], scale, i + j);
                sums[j] += relative == 1 ? s : s * s;
            }
        for (; i < n; i++) {
            double s = NAME(score)(z[i], scale, i);
            sum += relative == 1 ? s : s * s;
        }
        for (int j = 0; j < 8; j++) sum += sums[j];
        // n additions of positive numbers in fp32, in any order, are off by n * 2^-24 of the sum at most, a root by half
        // of it; what overflows or vanishes in fp32 is left to the caller.
        if (sum != 0 && !(sum > 1e-30 && sum < 1e38) && !isinf(sum) && sum == sum) return 1;
        double error = ((relative == 1 ? 1 : 0.5) * n + 8) * 0x1p-24;
        divisor = (float)(relative == 1 ? sum / n : sqrt(sum / n));
        if (divisor < FLT_MIN) divisor = FLT_MIN;
        low = (float)(tau * (1 - error)), high = (float)(tau * (1 + error));
    }
    int near = 0;
    for (long i = 0; i < n; i++) {
        float s = NAME(score)(z[i], scale, i);
        if (relative) s = s / divisor;
        near += (s > low) ^ (s > high);
        z[i] *= s > tau ? 1.0f : 0.0f;
        if (gain) z[i] *= gain[i];
    }
    return near != 0;
}

TARGET static int NAME(threshold)(float *z, long n, float tau, const float *scale, const float *gain, int relative,
                                  const float *mean) {
    if (relative == 1 && scale) return NAME(threshold_)(z, n, tau, scale, gain, 1, mean);
    if (relative && scale) return NAME(threshold_)(z, n, tau, scale, gain, 2, mean);
    if (relative) return NAME(threshold_)(z, n, tau, NULL, gain, relative, mean);
    return NAME(threshold_)(z, n, tau, scale, gain, 0, NULL);
}

// sums (batch, n) from column j on += values (R, batch) times the R rows w: what is left of a row after whole vectors.
TARGET static __attribute__((noinline)) void NAME(tail)(int type, int R, const char *const *w, const float *values,
                                                        float *sums, long j, long n, long batch) {
    for (; j < n; j++)
        for (long i = 0; i < batch; i++)
            for (int r = 0; r < R; r++) sums[i * n + j] += load_one(type, w[r], j) * values[r * batch + i];
}

// The same from column 0, for one row of inputs. One cache line of each row at a time; `next` are the rows that come
// afterwards: hardware does not guess which those are, so their beginnings are fetched ahead.
TARGET INLINE void NAME(add)(const int type, const int R, const char *const *w, const char *const *next,
                             const float *values, float *sums, long n) {
    long j = 0;
#if WIDTH == 1
    (void)next;
    for (; j < n; j++) {
        float s = sums[j];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) s += load_one(type, w[r], j) * values[r];
        sums[j] = s;
    }
#else
    const int line = 64 / SIZE(type), vectors = line / WIDTH;
    V c[8], a[64 / WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) c[r] = ALL(values[r]);
    for (; j + line <= n; j += line) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) a[v] = LOAD(sums + j + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (j * SIZE(type) < AHEAD) __builtin_prefetch(next[r] + j * SIZE(type), 0, 2);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++)
                a[v] = FMA(NAME(load)(type, w[r] + (j + v * WIDTH) * SIZE(type)), c[r], a[v]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) STORE(sums + j + v * WIDTH, a[v]);
    }
#endif
    NAME(tail)(type, R, w, values, sums, j, n, 1);
}

// The same for a batch: every weight is read and converted once.
TARGET INLINE void NAME(add_batch)(const int type, const int R, const char *const *w, const char *const *next,
                                   const float *values, float *sums, long n, long batch) {
    long j = 0;
#if WIDTH == 1
    (void)next;
#else
    V a[RANK], b[RANK];
    for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            a[r] = NAME(load)(type, w[r] + j * SIZE(type));
            b[r] = NAME(load)(type, w[r] + (j + WIDTH) * SIZE(type));
            __builtin_prefetch(next[r] + j * SIZE(type), 0, 2);
        }
        for (long i = 0; i < batch; i++) {
            V s = LOAD(sums + i * n + j), t = LOAD(sums + i * n + j + WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                V c = ALL(values[r * batch + i]);
                s = FMA(a[r], c, s);
                t = FMA(b[r], c, t);
            }
            STORE(sums + i * n + j, s);
            STORE(sums + i * n + j + WIDTH, t);
        }
    }
#endif
    NAME(tail)(type, R, w, values, sums, j, n, batch);
}

// y = sums (batch, n) * weight_scale + bias, columns from `from` on.
TARGET static __attribute__((noinline)) void NAME(finish)(const Product *p, float *sums, long from, long n) {
    for (long i = 0; i < p->batch; i++, sums += n) {
        char *y = p->y + (i * p->n_out + from) * SIZE(p->type);
        long j = 0;
        if (p->weight_scale)
            for (long l = 0; l < n; l++) sums[l] *= p->weight_scale[from + l];
        if (p->bias)
            for (long l = 0; l < n; l++) sums[l] += load_one(p->bias_type, p->bias, from + l);
        if (p->type == F16)
            for (; j + WIDTH <= n; j += WIDTH) STORE_F16(y + 2 * j, LOAD(sums + j));
        for (; j < n; j++) store_one(p->type, y, j, sums[j]);
    }
}

TARGET INLINE void NAME(columns_)(const int type, const Product *p, long from, long to) {
    float sums[COLUMNS];
    long batch = p->batch, block = COLUMNS / batch / 64 * 64;
    for (; from < to; from += block) {
        long n = to - from < block ? to - from : block;
        memset(sums, 0, n * batch * sizeof *sums);
        for (long k = 0; k < p->n_active;) {
            const char *w[8], *next[8];
            const float *values = p->values + k * batch;
            long left = p->n_active - k;
            int R = batch > 1 ? (left >= RANK ? RANK : 1) : left >= 8 ? 8 : left >= 4 ? 4 : 1;
            for (int r = 0; r < R; r++) {
                long ahead = k + R + r < p->n_active ? k + R + r : k + r;
                w[r] = p->weight + (p->active[k + r] * p->stride + from) * SIZE(type);
                next[r] = p->weight + (p->active[ahead] * p->stride + from) * SIZE(type);
            }
            if (batch > 1 && R == RANK) NAME(add_batch)(type, RANK, w, next, values, sums, n, batch);
            else if (batch > 1) NAME(add_batch)(type, 1, w, next, values, sums, n, batch);
            else if (R == 8) NAME(add)(type, 8, w, next, values, sums, n);
            else if (R == 4) NAME(add)(type, 4, w, next, values, sums, n);
            else NAME(add)(type, 1, w, next, values, sums, n);
            k += R;
        }
        NAME(finish)(p, sums, from, n);
    }
}

TARGET static void NAME(columns)(const Product *p, long from, long to) {
    if (p->weight_type == F32) NAME(columns_)(F32, p, from, to);
    else if (p->weight_type == BF16) NAME(columns_)(BF16, p, from, to);
    else if (p->weight_type == F16) NAME(columns_)(F16, p, from, to);
    else NAME(columns_)(I8, p, from, to);
}

TARGET static float NAME(sum)(const float *p, long n) {
    float parts[WIDTH], sum = 0;
    V a[8], one = ALL(1);
    for (int i = 0; i < 8; i++) a[i] = ALL(0);
    for (long j = 0; j + 8 * WIDTH <= n; j += 8 * WIDTH)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) a[i] = FMA(LOAD(p + j + i * WIDTH), one, a[i]);
    for (int i = 0; i < 8; i++) {
        STORE(parts, a[i]);
        for (int j = 0; j < WIDTH; j++) sum += parts[j];
    }
    return sum;
}

static const Kernels NAME(kernels) = {NAME(convert), NAME(threshold), NAME(columns), NAME(sum)};

#undef V
#undef ISA
#undef TARGET
#undef WIDTH
#undef RANK
#undef LOAD
#undef STORE
#undef ALL
#undef FMA
#undef LOAD_BF16
#undef LOAD_F16
#undef LOAD_I8
#undef STORE_F16

#endif
