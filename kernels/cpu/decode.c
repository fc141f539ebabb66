/* What a step does between its matrix multiplications, on a CPU: norm, rotation, attention, gated activation, memory;
   and the matrix multiplications of few tokens.

       stream ─ add_norm ─ (matrix) ─ rotate ─ attend ─ (matrix) ─ add_norm ─ (matrix) ─ gated ─ (matrix) ─ add ─► stream
       stream, rows ─ (matrix) ─ engram ─► stream

   Every function exists twice, name_f32 and name_bf16, by including this file into itself with REAL set. Arithmetic is
   fp32 throughout; values of the model's type are rounded once, when they are stored, to nearest even.

   Shapes: T tokens, B sequences, Hq query heads, Hk key-value heads, D values a head, H hidden width, F inner width; D, H
   and F are multiples of lanes(). Nothing is checked here: ops.py gives what it checked. Vectors are GCC's and clang's
   extension, as wide as the processor's. Threads are those of the OpenMP library linked with, torch's own.
*/
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8 /* of weights that multiply() reads at once */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif
#define WIDEST 256          /* values a head, at most */
#define CHUNK 64            /* cached tokens scored at once */
#define AHEAD 2             /* rows, values included, asked for before they are scored: a quarter less from cold memory */
#define SPLIT 512           /* cached tokens that are worth a thread of their own */
#define FEW 3               /* tokens that multiply() takes at once; with more, oneDNN's blocks are as fast */
#define WORTH_THREADS 32768 /* values touched, from which on a second thread gains more than waking it costs */
#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t M __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef struct {
    int64_t heads, kv_heads, width, block_size, window;
    float scale;
    int32_t threads;
} Shape;

/* table[B, table_stride]: blocks of each sequence; lengths[B] of the contexts, the step's own token included. */
typedef struct {
    int64_t tokens, sequences, table_stride;
    const int64_t *slots, *table, *lengths;
} Step;

/* An Engram layer of C branches: gain and conv_gain [C, H], conv [K, C · H]. */
typedef struct {
    int64_t branches, width, kernel;
    float key_eps, query_eps, conv_eps;
    int32_t threads;
    const float *gain, *conv_gain, *conv;
} Engram;

int32_t lanes(void) { return LANES; }
int32_t widest(void) { return WIDEST; }
#ifdef _OPENMP
int32_t few(void) { return FEW; }
#else
int32_t few(void) { return 0; } /* one thread would be slower than oneDNN's */
#endif

INLINE V choose(M mask, V yes, V no) { return (V)(((M)yes & mask) | ((M)no & ~mask)); }

/* Lanes of x in another order, constant: one builtin of GCC, another of clang. */
#ifdef __clang__
#define LANES_OF(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define LANES_OF(x, ...) __builtin_shuffle(x, (M){__VA_ARGS__})
#endif
#if LANES == 16
#define EVEN(x) LANES_OF(x, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)
#define ODD(x) LANES_OF(x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15)
#define SWAPPED(x) LANES_OF(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif LANES == 8
#define EVEN(x) LANES_OF(x, 0, 0, 2, 2, 4, 4, 6, 6)
#define ODD(x) LANES_OF(x, 1, 1, 3, 3, 5, 5, 7, 7)
#define SWAPPED(x) LANES_OF(x, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define EVEN(x) LANES_OF(x, 0, 0, 2, 2)
#define ODD(x) LANES_OF(x, 1, 1, 3, 3)
#define SWAPPED(x) LANES_OF(x, 1, 0, 3, 2)
#endif

INLINE float sum_of(V x) {
#if LANES == 16
    x += LANES_OF(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += LANES_OF(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += LANES_OF(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    x += LANES_OF(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += LANES_OF(x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    x += LANES_OF(x, 2, 3, 0, 1);
#endif
    return x[0] + x[1];
}

/* exp, relative error under 2e-7, of what is clamped to ±87: 2^n by the exponent's bits, a polynomial (Cephes) for the
   rest. */
INLINE V exp_of(V x) {
    const V low = (V){} - 87.0f, high = (V){} + 87.0f, magic = (V){} + 12582912.0f; /* 1.5 · 2^23 rounds to integers */
    x = choose(x < low, low, choose(x > high, high, x));
    V shifted = x * 1.44269504f + magic;
    V n = shifted - magic;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (V)(((M)shifted + 127) << 23);
}

INLINE float exp_one(float x) { return exp_of((V){} + x)[0]; }

INLINE V silu(V x) { return x / (1.0f + exp_of(-x)); }

/* GELU's tanh form as x · sigmoid(2 · sqrt(2 / π) · (x + 0.044715 x³)). */
INLINE V gelu(V x) { return x / (1.0f + exp_of(-1.5957691216f * (x + 0.044715f * x * x * x))); }

INLINE V get_f32(const float *x) { return *(const V *)x; }
INLINE void put_f32(float *x, V v) { *(V *)x = v; }
INLINE V get_bf16(const uint16_t *x) { return (V)(__builtin_convertvector(*(const H *)x, U) << 16); }

INLINE float get_one_f32(const float *x) { return *x; }
INLINE float get_one_bf16(const uint16_t *x) {
    const uint32_t bits = (uint32_t)*x << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
INLINE void put_one_f32(float *x, float v) { *x = v; }
INLINE void put_one_bf16(uint16_t *x, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *x = v != v ? 0x7fc0u : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void put_bf16(uint16_t *x, V v) {
    U bits = (U)v;
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    U nan = (U)(v != v);
    *(H *)x = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), H);
}

/* How multiply() adds products: of so many values AT_ONCE, a sum a lane. */
#define FACTOR float
#define FACTORS V
#define FACTORS_OF GET
#define FACTORS_AT get_f32
#define PRODUCTS(sum, a, b) ((sum) + (a) * (b))
#define WIDEN(to, from) put_f32(to, GET(from))
#define AT_ONCE LANES

#define REAL float
#define NAME(x) x##_f32
#include "decode.c"
#undef REAL
#undef NAME

#ifdef __AVX512BF16__ /* products of pairs in one instruction */
#include <immintrin.h>
#undef FACTOR
#undef FACTORS
#undef FACTORS_OF
#undef FACTORS_AT
#undef PRODUCTS
#undef WIDEN
#undef AT_ONCE
#define FACTOR uint16_t
#define FACTORS __m512bh
#define FACTORS_OF(x) ((__m512bh)_mm512_loadu_si512(x))
#define FACTORS_AT FACTORS_OF
#define PRODUCTS(sum, a, b) ((V)_mm512_dpbf16_ps((__m512)(sum), a, b))
#define WIDEN(to, from) memcpy(to, from, LANES * sizeof(uint16_t))
#define AT_ONCE (2 * LANES)
#endif

#define REAL uint16_t
#define NAME(x) x##_bf16
#include "decode.c"

#else

#define GET NAME(get)
#define PUT NAME(put)

/* stream[T, H] += delta[T, H], if there is one; out = stream · rsqrt(mean(stream²) + eps) · weight */
void NAME(add_norm)(float *stream, const REAL *delta, const float *weight, float eps, REAL *out, int64_t tokens,
                    int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        float *x = stream + t * width;
        V sum = {};
        for (int64_t i = 0; i < width; i += LANES) {
            V v = get_f32(x + i);
            if (delta) put_f32(x + i, v += GET(delta + t * width + i));
            sum += v * v;
        }
        const float scale = 1.0f / sqrtf(sum_of(sum) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            PUT(out + t * width + i, get_f32(x + i) * scale * get_f32(weight + i));
    }
}

/* heads[T, N, D] in place, rows `stride` apart: every pair (2i, 2i + 1) times the complex turn[T, D / 2]. */
void NAME(rotate)(REAL *heads, const float *turn, int64_t tokens, int64_t stride, int64_t count, int64_t width,
                  int32_t threads) {
    M sign;
    for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & 1 ? 0 : INT32_MIN;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * count * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < width; i += LANES) {
            const V w = get_f32(turn + t * width + i);
            const V cosine = EVEN(w), sine = (V)((M)ODD(w) ^ sign);
            for (int64_t h = 0; h < count; h++) {
                REAL *at = heads + t * stride + h * width + i;
                const V x = GET(at);
                PUT(at, x * cosine + SWAPPED(x) * sine);
            }
        }
    }
}

/* out[T, F] = f(gate) · up; rows of gate and up `gate_stride` and `up_stride` apart; kind 0: SiLU, 1: GELU's tanh form. */
void NAME(gated)(const REAL *gate, const REAL *up, REAL *out, int64_t tokens, int64_t width, int64_t gate_stride,
                 int64_t up_stride, int32_t kind, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const REAL *g = gate + t * gate_stride, *u = up + t * up_stride;
        for (int64_t i = 0; i < width; i += LANES) {
            const V x = GET(g + i);
            PUT(out + t * width + i, (kind ? gelu(x) : silu(x)) * GET(u + i));
        }
    }
}

/* Adds to n heads' values, D apart, m vectors of the rows at[count] + offset under weights CHUNK apart. n, m: constants. */
INLINE void NAME(weigh)(float *value, const float *weight, const REAL *const *at, int64_t offset, int64_t count,
                        const int64_t D, const int n, const int m) {
    V sum[4 * 2];
    for (int i = 0; i < n * m; i++) sum[i] = get_f32(value + i / m * D + i % m * LANES);
    for (int64_t j = 0; j < count; j++) {
        V x[2];
        for (int i = 0; i < m; i++) x[i] = GET(at[j] + offset + i * LANES);
        for (int i = 0; i < n * m; i++) sum[i] += weight[i / m * CHUNK + j] * x[i % m];
    }
    for (int i = 0; i < n * m; i++) put_f32(value + i / m * D + i % m * LANES, sum[i]);
}

INLINE void NAME(weigh_heads)(float *value, const float *weight, const REAL *const *at, int64_t offset, int64_t count,
                              const int64_t D, const int n) {
    int64_t i = 0;
    for (; i + 2 * LANES <= D; i += 2 * LANES) NAME(weigh)(value + i, weight, at, offset + i, count, D, n, 2);
    if (i < D) NAME(weigh)(value + i, weight, at, offset + i, count, D, n, 1);
}

/* One sequence's cached positions [from, to): per query head the largest score, the sum of exponents and the weighted
   values. query[Hq, D] is scaled already. D is a constant where the caller's is. */
INLINE void NAME(part)(const Shape *s, const REAL *cache, const int64_t *blocks, const float *query, int64_t from,
                       int64_t to, float *most, float *sum, float *value, const int64_t D) {
    const int64_t heads = s->heads, group = s->heads / s->kv_heads, size = s->block_size;
    const int64_t kv = s->kv_heads * D, row = 2 * kv;
    float score[heads * CHUNK];
    for (int64_t h = 0; h < heads; h++) most[h] = -INFINITY, sum[h] = 0.0f;
    memset(value, 0, heads * D * sizeof(float));
    for (int64_t start = from; start < to; start += CHUNK) {
        const int64_t count = to - start < CHUNK ? to - start : CHUNK;
        const REAL *at[CHUNK];
        for (int64_t j = 0; j < count; j++)
            at[j] = cache + (blocks[(start + j) / size] * size + (start + j) % size) * row;
        for (int64_t j = 0; j < count; j++) {
            for (int64_t i = 0; j + AHEAD < count && i < row; i += 64 / (int64_t)sizeof(REAL))
                __builtin_prefetch(at[j + AHEAD] + i);
            for (int64_t k = 0; k < s->kv_heads; k++) {
                V key[WIDEST / LANES];
                for (int64_t i = 0; i < D / LANES; i++) key[i] = GET(at[j] + k * D + i * LANES);
                for (int64_t h = k * group; h < (k + 1) * group; h++) {
                    V dot = {};
                    for (int64_t i = 0; i < D / LANES; i++) dot += get_f32(query + h * D + i * LANES) * key[i];
                    score[h * CHUNK + j] = sum_of(dot);
                }
            }
        }
        for (int64_t h = 0; h < heads; h++) {
            float *w = score + h * CHUNK, top = most[h];
            for (int64_t j = 0; j < count; j++) top = w[j] > top ? w[j] : top;
            for (int64_t j = count; j % LANES; j++) w[j] = -INFINITY;
            const float shrink = start == from ? 0.0f : exp_one(most[h] - top);
            V add = {};
            for (int64_t j = 0; j < count; j += LANES) {
                const V x = get_f32(w + j);
                const V weight = choose(x == -INFINITY, (V){}, exp_of(x - top));
                put_f32(w + j, weight);
                add += weight;
            }
            most[h] = top;
            sum[h] = sum[h] * shrink + sum_of(add);
            if (start != from)
                for (int64_t i = h * D; i < (h + 1) * D; i += LANES) put_f32(value + i, get_f32(value + i) * shrink);
        }
        for (int64_t h = 0; h < heads;) {
            const int64_t offset = kv + h / group * D, left = (h / group + 1) * group - h;
            float *v = value + h * D;
            const float *w = score + h * CHUNK;
            if (left >= 4) NAME(weigh_heads)(v, w, at, offset, count, D, 4), h += 4;
            else if (left == 3) NAME(weigh_heads)(v, w, at, offset, count, D, 3), h += 3;
            else if (left == 2) NAME(weigh_heads)(v, w, at, offset, count, D, 2), h += 2;
            else NAME(weigh_heads)(v, w, at, offset, count, D, 1), h += 1;
        }
    }
}

/* The step's keys and values to their slots; then one query a sequence over its own context.

   qkv[T, (Hq + 2 Hk) · D], queries and keys rotated; cache[·, block_size, 2 · Hk · D]; out[T, Hq · D], of which the first B
   rows are written: token b is the newest of sequence b. A long context is split among threads and joined. */
void NAME(attend)(const Shape *s, const Step *p, const REAL *qkv, REAL *cache, REAL *out) {
    const int64_t D = s->width, heads = s->heads, q_size = heads * D, row = 2 * s->kv_heads * D;
    for (int64_t t = 0; t < p->tokens; t++)
        memcpy(cache + p->slots[t] * row, qkv + t * (q_size + row) + q_size, row * sizeof(REAL));
    int64_t longest = 0, all = 0;
    for (int64_t b = 0; b < p->sequences; b++) {
        const int64_t length = s->window && p->lengths[b] > s->window ? s->window : p->lengths[b];
        longest = length > longest ? length : longest;
        all += length;
    }
    int64_t splits = 1;
    if (p->sequences < 2 * s->threads && longest > SPLIT && s->threads > 1) {
        const int64_t wanted = (2 * s->threads + p->sequences - 1) / p->sequences, useful = (longest + SPLIT - 1) / SPLIT;
        splits = wanted < useful ? wanted : useful;
    }
    float *parts = splits > 1 ? malloc(p->sequences * splits * heads * (D + 2) * sizeof(float)) : NULL;
    if (!parts) splits = 1;
    const int64_t tasks = p->sequences * splits;
    const int several = s->threads > 1 && tasks > 1 && all * row > 4 * WORTH_THREADS;
#pragma omp parallel for num_threads(s->threads) schedule(dynamic, 1) if (several)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task / splits, split = task % splits, length = p->lengths[b];
        const int64_t oldest = s->window && length > s->window ? length - s->window : 0;
        const int64_t each = (length - oldest + splits - 1) / splits;
        const int64_t from = oldest + split * each < length ? oldest + split * each : length;
        const int64_t to = from + each < length ? from + each : length;
        const int64_t *blocks = p->table + b * p->table_stride;
        const REAL *q = qkv + b * (q_size + row);
        float query[q_size], most[heads], sum[heads], value[q_size];
        for (int64_t i = 0; i < q_size; i += LANES) put_f32(query + i, GET(q + i) * s->scale);
        switch (D) {
        case 64: NAME(part)(s, cache, blocks, query, from, to, most, sum, value, 64); break;
        case 128: NAME(part)(s, cache, blocks, query, from, to, most, sum, value, 128); break;
        default: NAME(part)(s, cache, blocks, query, from, to, most, sum, value, D);
        }
        if (splits > 1) {
            float *part = parts + task * heads * (D + 2);
            memcpy(part, most, heads * sizeof(float));
            memcpy(part + heads, sum, heads * sizeof(float));
            memcpy(part + 2 * heads, value, q_size * sizeof(float));
            continue;
        }
        for (int64_t i = 0; i < q_size; i += LANES) PUT(out + b * q_size + i, get_f32(value + i) / sum[i / D]);
    }
    for (int64_t b = 0; splits > 1 && b < p->sequences; b++) {
        const float *first = parts + b * splits * heads * (D + 2);
        for (int64_t h = 0; h < heads; h++) {
            float top = -INFINITY, sum = 0.0f, value[D];
            memset(value, 0, D * sizeof(float));
            for (int64_t i = 0; i < splits; i++) {
                const float most = first[i * heads * (D + 2) + h];
                top = most > top ? most : top;
            }
            for (int64_t i = 0; i < splits; i++) {
                const float *part = first + i * heads * (D + 2);
                if (part[heads + h] == 0.0f) continue;
                const float weight = exp_one(part[h] - top);
                sum += part[heads + h] * weight;
                for (int64_t d = 0; d < D; d += LANES)
                    put_f32(value + d, get_f32(value + d) + get_f32(part + 2 * heads + h * D + d) * weight);
            }
            for (int64_t d = 0; d < D; d += LANES) PUT(out + b * q_size + h * D + d, get_f32(value + d) / sum);
        }
    }
    free(parts);
}

/* r rows of weight[·, K] times n tokens x[n, K] to out[·, N] at those rows. n, r: constants. */
INLINE void NAME(dots)(const FACTOR *x, const REAL *weight, const REAL *bias, REAL *out, int64_t N, int64_t K,
                       const int n, const int r) {
    V sum[FEW * ROWS];
    for (int i = 0; i < n * r; i++) sum[i] = (V){};
    for (int64_t k = 0; k < K; k += AT_ONCE) {
        FACTORS w[ROWS];
        for (int j = 0; j < r; j++) {
            __builtin_prefetch(weight + (j + 8) * K + k); /* past the last rows it does nothing */
            w[j] = FACTORS_OF(weight + j * K + k);
        }
        for (int t = 0; t < n; t++) {
            const FACTORS v = FACTORS_AT(x + t * K + k);
            for (int j = 0; j < r; j++) sum[t * r + j] = PRODUCTS(sum[t * r + j], v, w[j]);
        }
    }
    for (int t = 0; t < n; t++)
        for (int j = 0; j < r; j++)
            NAME(put_one)(out + t * N + j, sum_of(sum[t * r + j]) + (bias ? NAME(get_one)(bias + j) : 0.0f));
}

/* Widths that multiply() knows are multiples of this. */
int32_t NAME(at_once)(void) { return AT_ONCE; }

/* out[T, N] = x[T, K] · weight[N, K]ᵀ + bias[N], if there is one, for T up to FEW: a row of weights is read once, in the
   order in which it lies. A token's sums are the same whatever T is. */
void NAME(multiply)(const REAL *x, const REAL *weight, const REAL *bias, REAL *out, int64_t tokens, int64_t N, int64_t K,
                    int32_t threads) {
    if (tokens < 1 || tokens > FEW) return;
    FACTOR wide[tokens * K];
    for (int64_t i = 0; i < tokens * K; i += LANES) WIDEN(wide + i, x + i);
    const int64_t rows = tokens <= 2 ? ROWS : ROWS / 2; /* as many as the processor has registers for */
    const int64_t blocks = N / rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && N * K > WORTH_THREADS)
    for (int64_t b = 0; b < blocks; b++) {
        const REAL *w = weight + b * rows * K, *add = bias ? bias + b * rows : NULL;
        REAL *to = out + b * rows;
        switch (tokens) {
        case 1: NAME(dots)(wide, w, add, to, N, K, 1, ROWS); break;
        case 2: NAME(dots)(wide, w, add, to, N, K, 2, ROWS); break;
        default: NAME(dots)(wide, w, add, to, N, K, 3, ROWS / 2);
        }
    }
    for (int64_t at = blocks * rows; at < N; at++)
        for (int64_t t = 0; t < tokens; t++)
            NAME(dots)(wide + t * K, weight + at * K, bias ? bias + at : NULL, out + t * N + at, N, K, 1, 1);
}

/* The paper's memory layer after its projection: gate, value, short convolution.

   hidden[T, C · H], wide[T, (C + 1) · H]: C keys, then the value; slots[T] of the tokens' convolution inputs, taps[K, T] of
   what each reads; inputs[·, C · H]; out[T, C · H] = total, if there is one, + α · value + SiLU(convolution). */
void NAME(engram)(const Engram *m, const float *hidden, const REAL *wide, int64_t tokens, const int64_t *slots,
                  const int64_t *taps, REAL *inputs, const float *total, float *out) {
    const int64_t H = m->width, row = m->branches * H;
    const int several = m->threads > 1 && tokens * row > WORTH_THREADS;
#pragma omp parallel for num_threads(m->threads) if (several)
    for (int64_t t = 0; t < tokens; t++) {
        const REAL *value = wide + t * (row + H) + row;
        for (int64_t c = 0; c < m->branches; c++) {
            const REAL *key = wide + t * (row + H) + c * H;
            const float *query = hidden + t * row + c * H, *gain = m->gain + c * H, *conv_gain = m->conv_gain + c * H;
            V kq = {}, kk = {}, qq = {}, vv = {};
            for (int64_t i = 0; i < H; i += LANES) {
                const V k = GET(key + i), q = get_f32(query + i), v = GET(value + i);
                kq += k * get_f32(gain + i) * q, kk += k * k, qq += q * q, vv += v * v;
            }
            const float width = (float)H;
            float score = sum_of(kq) / sqrtf(width) / sqrtf(sum_of(kk) / width + m->key_eps);
            score /= sqrtf(sum_of(qq) / width + m->query_eps);
            const float size = fabsf(score), root = sqrtf(size > 1e-6f ? size : 1e-6f);
            const float signed_root = score > 0 ? root : score < 0 ? -root : score; /* 0 and NaN stay what they are */
            const float alpha = 1.0f / (1.0f + expf(-signed_root));
            const float scale = alpha / sqrtf(alpha * alpha * sum_of(vv) / width + m->conv_eps);
            REAL *input = inputs + slots[t] * row + c * H;
            for (int64_t i = 0; i < H; i += LANES) {
                const V v = GET(value + i);
                put_f32(out + t * row + c * H + i, v * alpha);
                PUT(input + i, v * scale * get_f32(conv_gain + i));
            }
        }
    }
#pragma omp parallel for num_threads(m->threads) if (several)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < row; i += LANES) {
            V sum = {};
            for (int64_t k = 0; k < m->kernel; k++)
                sum += GET(inputs + taps[k * tokens + t] * row + i) * get_f32(m->conv + k * row + i);
            V added = get_f32(out + t * row + i) + silu(sum);
            if (total) added += get_f32(total + t * row + i);
            put_f32(out + t * row + i, added);
        }
    }
}

#undef GET
#undef PUT
#endif
