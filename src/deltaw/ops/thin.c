/* The thin products of an adapter on a CPU, dropout made in registers, and the codes of 8-bit products.

       make        x = c f((z - m) a w) + b          (T, k) -> a tile of x, for what follows to read
       shrink      h = s drop(x) A^T                 (T, k), (r, k) -> (T, r)
       expand      y <- a c y + b + s drop(h B^T)    (T, r), (r, n) -> (T, n)   in place, or written first (no a c y, or z for y)
       outer       s u^T drop(x)                     (T, r), (T, k) -> (r, k), or the transpose
       dots        sum_t x (y - b)                   (T, k), (T, k) -> (k,)
       quantize    codes and scales of x * w         (T, k) -> (T, k), (T,)
       squares     a + b (2s h + s^2 G b)            (T,), (T, r), (T, r), (r, r) -> (T,)   |w + s b A|^2, as in dora.py

   All of it is 32 bit, rows without gaps. These operations cost what they read and write, so a *sweep* runs a list of them
   over the same rows, tile by tile: what one has read or written is still in the cache for the next, which may build on
   it (h of a tile, then outer(h, g) of that tile). torch's operations go through memory once each, and for drop(x) once
   more. x itself need not be in memory: where it was not kept (recompute.py) each tile of it is made from what was. Segments
   of rows may have factors of their own (a batch with many adapters). A row of h, y or the codes depends on no other row; sums
   over rows depend on the number of threads.

   The file is compiled once for each width that vectors have (setup.py) and called from cpu_thin.py. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef SOURCE
#define SOURCE 0
#endif
const int64_t source = SOURCE; /* the CRC-32 of the C files, by which compiled.py knows its own */

#if defined(__AVX512F__)
#define V 16
#else
#define V 8
#endif
#define RANKS (V / 2)
#define TILE 131072 /* numbers that a tile reads and writes, about: they stay in the second-level cache */
#define STRIP 512   /* columns whose part of B^T stays in the first-level cache while a tile's rows pass */

typedef float vector __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * V), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* ---- dropout: mask[i, j] = tape[start(i / height) + (i mod height) columns + j], as in dropout.py; the tape in bits ---- */

typedef struct {
    const uint8_t *tape; /* NULL: nothing is dropped */
    uint32_t seed, places;
    int64_t height, columns;
} Mask;

INLINE uint32_t hashed(uint32_t k) {
    k = (k ^ (k >> 16)) * 0x21F0AAADu;
    k = (k ^ (k >> 15)) * 0x735A2D97u;
    return k ^ (k >> 15);
}

/* The place on the tape of row t's first decision. */
INLINE int64_t place(const Mask *m, int64_t t) {
    int64_t block = m->tape ? t / m->height : 0;
    return m->tape ? (hashed(m->seed + (uint32_t)block) & (m->places - 1)) + (t - block * m->height) * m->columns : 0;
}

/* x where the V decisions from `place` on keep it, else 0. */
INLINE vector kept(vector x, const uint8_t *tape, int64_t place) {
    static const bits one = {1, 2, 4, 8, 16, 32, 64, 128,
#if V == 16
        256, 512, 1024, 2048, 4096, 8192, 16384, 32768
#endif
    };
    uint32_t word;
    memcpy(&word, tape + (place >> 3), 4);
    return (vector)((bits)x & ((((bits){0} + (int32_t)(word >> (place & 7))) & one) != 0));
}

/* ---- vectors ---- */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE vector load(const float *p) { return *(const vector *)p; }
INLINE void store(float *p, vector v) { *(vector *)p = v; }
INLINE vector all(float s) { return (vector){0} + s; }
INLINE vector either(bits which, vector yes, vector no) { return (vector)((which & (bits)yes) | (~which & (bits)no)); }
INLINE vector load_some(const float *p, int64_t n) { /* the first n < V, then zeros */
    vector v = {0};
    memcpy(&v, p, 4 * n);
    return v;
}

/* The sums of V vectors, one beside the other: halves are added in turn. */
#if V == 16
#define HALVES(a, b, w) ((w) == 8 ? SWAP(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 8) \
    : (w) == 4 ? SWAP(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27, 4) \
    : (w) == 2 ? SWAP(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29, 2) \
    : SWAP(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30, 1))
#define SWAP(a, b, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, ia, ib, ic, id, ie, if_, w) \
    (__builtin_shufflevector(a, b, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, ia, ib, ic, id, ie, if_) + \
     __builtin_shufflevector(a, b, i0 + w, i1 + w, i2 + w, i3 + w, i4 + w, i5 + w, i6 + w, i7 + w, i8 + w, i9 + w, \
                             ia + w, ib + w, ic + w, id + w, ie + w, if_ + w))
#else
#define HALVES(a, b, w) ((w) == 4 ? SWAP(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 4) \
    : (w) == 2 ? SWAP(a, b, 0, 1, 8, 9, 4, 5, 12, 13, 2) \
    : SWAP(a, b, 0, 8, 2, 10, 4, 12, 6, 14, 1))
#define SWAP(a, b, i0, i1, i2, i3, i4, i5, i6, i7, w) \
    (__builtin_shufflevector(a, b, i0, i1, i2, i3, i4, i5, i6, i7) + \
     __builtin_shufflevector(a, b, i0 + w, i1 + w, i2 + w, i3 + w, i4 + w, i5 + w, i6 + w, i7 + w))
#endif

INLINE vector sums(vector *a) {
#if V == 16
    UNROLL for (int i = 0; i < 8; i++) a[i] = HALVES(a[i], a[i + 8], 8);
#endif
    UNROLL for (int i = 0; i < 4; i++) a[i] = HALVES(a[i], a[i + 4], 4);
    UNROLL for (int i = 0; i < 2; i++) a[i] = HALVES(a[i], a[i + 2], 2);
    return HALVES(a[0], a[1], 1);
}

/* V numbers, or the first n < V of them where not `whole`. */
INLINE vector take(const float *p, const int whole, int64_t n) { return whole ? load(p) : load_some(p, n); }
INLINE void put(float *p, vector v, const int whole, int64_t n) {
    if (whole) store(p, v);
    else memcpy(p, &v, 4 * n);
}

/* ---- the operations, each on the rows from..to ---- */

enum { SHRINK, EXPAND, OUTER, DOTS, QUANTIZE, MAKE, SQUARES };
enum { ITSELF, GELU, GELU_TANH, SILU };

/* Rows of a batch with many adapters, up to `stop`, and the adapter that they have. */
typedef struct {
    int64_t stop;
    const float *A, *B; /* (rank, columns) and (columns, rank); NULL: none, their h is not written and y gets no product */
    float scale;        /* in expand */
} Segment;

typedef struct {
    int64_t op, columns, rank;
    Mask mask;
    float scale;
    const float *wide;   /* x (rows, columns), or z; NULL: x is what the sweep makes */
    int64_t stride;      /* of x's rows, or of y's */
    const float *thin;   /* h or u (rows, rank); make: m (rows,) or NULL */
    const float *factor; /* A or B^T (rank, columns); squares: G (rank, rank); quantize: w (columns,) or NULL */
    int64_t standing;    /* whether A or B^T lies in memory as (columns, rank) */
    const Segment *segments; /* up to the last row, whose factors stand in the place of these; or NULL */
    const float *rowscale, *gain, *shift; /* a (rows,), c and b (columns,), or NULL */
    const float *other;  /* dots: y (rows, columns); squares: b (rows, rank); make: w, expand: z in y's place, or NULL */
    int64_t other_stride;
    int64_t first;       /* expand: whether y is written first */
    int64_t function;    /* make: f */
    int64_t head, head_stride; /* make: columns that lie beside each other in z, and from there to the next ones */
    int64_t sample, sample_stride; /* rows that are `stride` apart, and from there to the next ones */
    float *out;          /* h, y, scales, squares */
    float *sum;          /* outer, dots: the result */
    int64_t transposed;  /* outer: whether that is (columns, rank) */
    uint8_t *codes;
} Job;

/* f(..., R, drop) for all ranks, R of them at a time, which is a constant there, as is whether there is a mask. Two rows times
   RANKS ranks are V vectors of sums: half of the processor's registers. */
#define WITH_MASK(f, R, ...) do { if (j->mask.tape) f(__VA_ARGS__, R, 1); else f(__VA_ARGS__, R, 0); } while (0)
#if V == 16
#define EIGHT(f, ...) if (left >= 8) { WITH_MASK(f, 8, __VA_ARGS__); r += 8; } else
#else
#define EIGHT(f, ...)
#endif
#define BY_RANKS(f, ...) for (int64_t r = 0; r < j->rank;) { int64_t left = j->rank - r; \
    EIGHT(f, __VA_ARGS__) if (left >= 4) { WITH_MASK(f, 4, __VA_ARGS__); r += 4; } \
    else if (left >= 2) { WITH_MASK(f, 2, __VA_ARGS__); r += 2; } else { WITH_MASK(f, 1, __VA_ARGS__); r += 1; } }

/* The sums a of two rows, R ranks each, over V columns from k on. m, m2: the rows' places on the tape. */
INLINE void shrink_columns(const Job *j, const float *x, const float *x2, int64_t k, int64_t m, int64_t m2, const float *A, vector *a,
                           const int R, const int drop, const int whole) {
    const int64_t n = j->columns - k;
    vector p = take(x + k, whole, n), p2 = take(x2 + k, whole, n);
    if (whole) __builtin_prefetch(x + 8 * j->stride + k), __builtin_prefetch(x2 + 8 * j->stride + k); /* the rows that come next */
    if (drop) p = kept(p, j->mask.tape, m + k), p2 = kept(p2, j->mask.tape, m2 + k);
    UNROLL for (int i = 0; i < R; i++) {
        vector w = take(A + i * j->columns + k, whole, n);
        a[i] += p * w;
        a[RANKS + i] += p2 * w;
    }
}

INLINE void shrink_rows(const Job *j, int64_t from, int64_t to, int64_t r, const int R, const int drop) {
    const float *A = j->factor + r * j->columns;
    for (int64_t t = from; t < to; t += 2) {
        int64_t t2 = least(t + 1, to - 1), m = place(&j->mask, t), m2 = place(&j->mask, t2), k = 0;
        const float *x = j->wide + t * j->stride, *x2 = j->wide + t2 * j->stride;
        vector a[V];
        UNROLL for (int i = 0; i < V; i++) a[i] = all(0);
        for (; k + V <= j->columns; k += V) shrink_columns(j, x, x2, k, m, m2, A, a, R, drop, 1);
        if (k < j->columns) shrink_columns(j, x, x2, k, m, m2, A, a, R, drop, 0);
        vector h = sums(a) * j->scale;
        memcpy(j->out + t2 * j->rank + r, (float *)&h + RANKS, 4 * R); /* if both are one row, the same twice */
        memcpy(j->out + t * j->rank + r, &h, 4 * R);
    }
}

INLINE void shrink(const Job *j, int64_t from, int64_t to) { BY_RANKS(shrink_rows, j, from, to, r) }

typedef struct {
    float *y, *y2;
    const float *z, *z2; /* what is read: themselves, or the rows in whose place they are written */
    int64_t ahead;
    float a, a2;   /* what that is multiplied with */
    int64_t m, m2; /* their places on the tape */
} Pair;

/* V columns from k on of two rows (the last ones, n < V, where not `whole`). */
INLINE void expand_columns(const Job *j, const Pair *p, const vector *h, const vector *h2, const float *B, int64_t k,
                           const int R, const int drop, const int later, const int whole, int64_t n) {
    vector v = all(0), v2 = all(0);
    UNROLL for (int i = 0; i < R; i++) {
        vector b = take(B + i * j->columns + k, whole, n);
        v += h[i] * b;
        v2 += h2[i] * b;
    }
    if (drop) v = kept(v, j->mask.tape, p->m + k), v2 = kept(v2, j->mask.tape, p->m2 + k);
    if (j->shift && !later) {
        vector b = take(j->shift + k, whole, n);
        v += b, v2 += b;
    }
    if (whole) __builtin_prefetch(p->z + p->ahead + k, 1), __builtin_prefetch(p->z2 + p->ahead + k, 1);
    if (later || !j->first) {
        vector c = j->gain && !later ? take(j->gain + k, whole, n) : all(1);
        v += p->a * c * take(p->z + k, whole, n);
        v2 += p->a2 * c * take(p->z2 + k, whole, n);
    }
    put(p->y2 + k, v2, whole, n); /* if both are one row, the same twice */
    put(p->y + k, v, whole, n);
}

INLINE void expand_strip(const Job *j, int64_t from, int64_t to, int64_t k0, int64_t k1, int64_t r, const int R, const int drop) {
    const float *B = j->factor + r * j->columns;
    const int later = r > 0; /* the first ranks have written y */
    for (int64_t t = from; t < to; t += 2) {
        int64_t t2 = least(t + 1, to - 1), k = k0;
        float *y = j->out + t * j->stride, *y2 = j->out + t2 * j->stride;
        Pair p = {y, y2, y, y2, 4 * j->stride, 1, 1, place(&j->mask, t), place(&j->mask, t2)};
        if (j->other && !later) p.z = j->other + t * j->other_stride, p.z2 = j->other + t2 * j->other_stride, p.ahead = 4 * j->other_stride;
        if (j->rowscale && !later) p.a = j->rowscale[t], p.a2 = j->rowscale[t2];
        vector h[RANKS], h2[RANKS];
        UNROLL for (int i = 0; i < R; i++) {
            h[i] = all(j->scale * j->thin[t * j->rank + r + i]);
            h2[i] = all(j->scale * j->thin[t2 * j->rank + r + i]);
        }
        for (; k + V <= k1; k += V) expand_columns(j, &p, h, h2, B, k, R, drop, later, 1, V);
        if (k < k1) expand_columns(j, &p, h, h2, B, k, R, drop, later, 0, k1 - k);
    }
}

INLINE void expand(const Job *j, int64_t from, int64_t to) {
    for (int64_t k = 0; k < j->columns; k += STRIP) {
        int64_t k1 = least(k + STRIP, j->columns);
        if (j->rank == 0) expand_strip(j, from, to, k, k1, 0, 0, 0);
        BY_RANKS(expand_strip, j, from, to, k, k1, r)
    }
}

/* Those columns from k on that fill n vectors (1 or 2), or are fewer than one (0). */
INLINE void outer_columns(const Job *j, int64_t from, int64_t to, float *out, int64_t k, int64_t r, const int R, const int drop, const int n) {
    const int64_t K = j->columns, some = K - k;
    vector a[R], a2[R]; /* a tile's sums are begun anew: two short chains of roundings instead of a long one */
    UNROLL for (int i = 0; i < R; i++) a[i] = a2[i] = all(0);
    for (int64_t t = from; t < to; t++) {
        const float *x = j->wide + t * j->stride + k, *u = j->thin + t * j->rank + r;
        int64_t m = drop ? place(&j->mask, t) + k : 0;
        vector p = n ? load(x) : load_some(x, some), p2 = n == 2 ? load(x + V) : p;
        if (n == 2) __builtin_prefetch(x + 2 * V), __builtin_prefetch(x + 3 * V); /* the columns that come next */
        if (drop) p = kept(p, j->mask.tape, m), p2 = n == 2 ? kept(p2, j->mask.tape, m + V) : p;
        UNROLL for (int i = 0; i < R; i++) {
            a[i] += p * u[i];
            if (n == 2) a2[i] += p2 * u[i];
        }
    }
    UNROLL for (int i = 0; i < R; i++) {
        float *o = out + i * K + k;
        put(o, take(o, n, some) + a[i], n, some);
        if (n == 2) store(o + V, load(o + V) + a2[i]);
    }
}

INLINE void outer_rows(const Job *j, int64_t from, int64_t to, float *out, int64_t r, const int R, const int drop) {
    int64_t k = 0;
    out += r * j->columns;
    for (; k + 2 * V <= j->columns; k += 2 * V) outer_columns(j, from, to, out, k, r, R, drop, 2);
    for (; k + V <= j->columns; k += V) outer_columns(j, from, to, out, k, r, R, drop, 1);
    if (k < j->columns) outer_columns(j, from, to, out, k, r, R, drop, 0);
}

INLINE void outer(const Job *j, int64_t from, int64_t to, float *out) { BY_RANKS(outer_rows, j, from, to, out, r) }

INLINE void dots_columns(const Job *j, int64_t from, int64_t to, float *out, int64_t k, const int whole, int64_t n) {
    vector sum = all(0), b = j->shift ? take(j->shift + k, whole, n) : all(0);
    for (int64_t t = from; t < to; t++)
        sum += take(j->wide + t * j->stride + k, whole, n) * (take(j->other + t * j->other_stride + k, whole, n) - b);
    put(out + k, take(out + k, whole, n) + sum, whole, n);
}

INLINE void dots(const Job *j, int64_t from, int64_t to, float *out) {
    int64_t k = 0;
    for (; k + V <= j->columns; k += V) dots_columns(j, from, to, out, k, 1, V);
    if (k < j->columns) dots_columns(j, from, to, out, k, 0, j->columns - k);
}

INLINE int32_t as_bits(float v) { int32_t b; memcpy(&b, &v, 4); return b; }
INLINE float as_float(int32_t b) { float v; memcpy(&v, &b, 4); return v; }

/* One row's codes, around 128, and its scale. */
INLINE float quantized(const float *restrict x, const float *restrict w, uint8_t *restrict codes, const int64_t columns, const int64_t stride,
                       const int weighted) {
    for (int64_t k = 0; k < columns; k += 16) __builtin_prefetch(x + 8 * stride + k);
    int32_t largest = 0; /* of the bits of |x|: their order is that of the numbers, and NaN's are above all */
    for (int64_t k = 0; k < columns; k++) {
        int32_t b = as_bits(weighted ? x[k] * w[k] : x[k]) & 0x7fffffff;
        largest = largest > b ? largest : b;
    }
    const float top = as_float(largest) < 1e-35f ? 1e-35f : as_float(largest), inverse = 127.0f / top, rounding = 12582912.0f + 128.0f;
    for (int64_t k = 0; k < columns; k++) codes[k] = (uint8_t)as_bits((weighted ? x[k] * w[k] : x[k]) * inverse + rounding);
    return top / 127.0f;
}

INLINE void quantize(const Job *j, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
        const float *x = j->wide + t * j->stride;
        uint8_t *codes = j->codes + t * j->columns;
        j->out[t] = j->factor ? quantized(x, j->factor, codes, j->columns, j->stride, 1)
                              : quantized(x, x, codes, j->columns, j->stride, 0);
    }
}

INLINE void squares(const Job *j, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
        const float *h = j->thin + t * j->rank, *b = j->other + t * j->rank, *G = j->factor;
        float square = j->rowscale[t];
        for (int64_t i = 0; i < j->rank; i++, G += j->rank) {
            float inner = 0;
            for (int64_t l = 0; l < j->rank; l++) inner += G[l] * b[l];
            square += b[i] * j->scale * (2 * h[i] + j->scale * inner);
        }
        j->out[t] = square < 0 ? 0 : square; /* roundings may leave it there */
    }
}

/* e^v: 2^n of the nearest n, times the series of e^r for |r| <= ln(2) / 2, whose next term is 2^-27. */
INLINE vector exponential(vector v) {
    const vector low = all(-87), high = all(88), big = all(12582912.0f); /* 1.5 * 2^23: numbers beside it are whole */
    v = either(v < low, low, either(v > high, high, v));
    vector n = v * 1.44269504f + big, r = v - (n - big) * 0.693145752f;
    r -= (n - big) * 1.42860682e-6f; /* ln(2) in two parts, of which the first has few digits */
    vector p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vector)(((bits)n << 23) + 0x3f800000);
}

INLINE vector applied(vector v, const int function) {
    if (function == SILU) return v / (1.0f + exponential(-v));
    if (function == GELU_TANH) return v / (1.0f + exponential(v * (v * v * 0.0713548163f + 1.59576912f) * -1.0f)); /* 2 sqrt(2/pi) (v + .044715 v^3) */
    if (function == GELU) { /* v Phi(v), of erf by Abramowitz and Stegun's 7.1.26, as torch's own: 1.5e-7 */
        vector s = (vector)((bits)v & 0x7fffffff) * 0.707106781f, t = 1.0f / (s * 0.3275911f + 1.0f), p = all(1.061405429f);
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        p = p * t * exponential(-s * s); /* 1 - erf(|v| / sqrt(2)) */
        return v * 0.5f * either(v < all(0), p, 2.0f - p);
    }
    return v;
}

/* V columns of one row of x from k on; p is where their z lies. */
INLINE void make_columns(const Job *j, const float *p, float *x, int64_t t, int64_t k, const int function, const int whole, int64_t n) {
    vector v = take(p, whole, n);
    if (whole) __builtin_prefetch(p + 4 * j->stride);
    if (j->thin) v -= j->thin[t];
    if (j->rowscale) v *= j->rowscale[t];
    if (j->other) v *= take(j->other + t * j->other_stride + k, whole, n);
    v = applied(v, function);
    if (j->gain) v *= take(j->gain + k, whole, n);
    if (j->shift) v += take(j->shift + k, whole, n);
    put(x + k, v, whole, n);
}

INLINE void make_rows(const Job *j, int64_t from, int64_t to, float *x, const int function) {
    for (int64_t t = from; t < to; t++, x += j->columns) {
        const float *z = j->wide + t / j->sample * j->sample_stride + t % j->sample * j->stride;
        for (int64_t k = 0; k < j->columns; z += j->head_stride) {
            int64_t start = k, stop = k + j->head;
            for (; k + V <= stop; k += V) make_columns(j, z + k - start, x, t, k, function, 1, V);
            if (k < stop) make_columns(j, z + k - start, x, t, k, function, 0, stop - k);
            k = stop;
        }
    }
}

INLINE void make(const Job *j, int64_t from, int64_t to, float *x) {
    switch (j->function) {
    case ITSELF: make_rows(j, from, to, x, ITSELF); break;
    case GELU: make_rows(j, from, to, x, GELU); break;
    case GELU_TANH: make_rows(j, from, to, x, GELU_TANH); break;
    case SILU: make_rows(j, from, to, x, SILU); break;
    }
}

/* ---- a sweep: the jobs one after the other on every tile, by the team of torch's own OpenMP, whichever it is ---- */

typedef struct {
    void (*parallel)(void (*task)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread)(void);
    int (*team)(void); /* its size: there may be fewer threads than were asked for */
    int64_t threads, rows, count;
    Job *jobs;
    int64_t tile;       /* its rows */
    int64_t made, sums, each; /* numbers of a thread's own memory: its tile of x, its sums, and in all, with turned factors */
    float *own;
} Sweep;

INLINE int64_t sums_of(const Job *j) { return j->op == OUTER ? j->rank * j->columns : j->op == DOTS ? j->columns : 0; }
INLINE int64_t turned_of(const Job *j) { return j->standing ? j->rank * j->columns : 0; }

static void turn(const float *restrict standing, float *restrict lying, int64_t rank, int64_t columns) {
    for (int64_t i = 0; i < rank; i++)
        for (int64_t k = 0; k < columns; k++) lying[i * columns + k] = standing[k * rank + i];
}

/* shrink or expand on the rows from..to, each segment's with its own factor. One that stands is turned where the thread, whose
   rows begin with `begin`, comes to it. */
static void by_segment(Job j, int64_t from, int64_t to, int64_t rows, int64_t begin, float *turned) {
    const Segment all = {rows, j.factor, j.factor, j.scale}, *s = j.segments ? j.segments : &all;
    const int64_t rank = j.rank;
    for (int64_t start = 0; start < to; start = s++->stop) {
        int64_t first = most(from, start), last = least(to, s->stop);
        if (first >= last) continue;
        j.factor = j.op == SHRINK ? s->A : s->B;
        j.rank = j.factor ? rank : 0;
        if (j.op == EXPAND) j.scale = s->scale;
        if (j.standing && j.factor) {
            if (first == most(begin, start)) turn(j.factor, turned, rank, j.columns);
            j.factor = turned;
        }
        if (j.op == SHRINK) shrink(&j, first, last);
        else expand(&j, first, last);
    }
}

static void share(void *data) {
    const Sweep *s = data;
    int64_t me = s->threads > 1 ? s->thread() : 0, team = s->threads > 1 ? s->team() : 1;
    int64_t each = ((s->rows + team - 1) / team + 1) & ~(int64_t)1; /* even: a row has the same neighbour in any team */
    int64_t begin = me * each, stop = least(begin + each, s->rows);
    for (int64_t from = begin; from < stop; from += s->tile) {
        int64_t to = least(from + s->tile, stop);
        float *x = s->own + me * s->each, *sum = x + s->made, *turned = sum + s->sums;
        for (int64_t i = 0; i < s->count; i++) {
            Job j = s->jobs[i];
            if (!j.wide) j.wide = x - from * j.columns, j.stride = j.columns;
            switch (j.op) {
            case MAKE: make(&j, from, to, x); break;
            case SHRINK: case EXPAND: by_segment(j, from, to, s->rows, begin, turned); break;
            case OUTER: outer(&j, from, to, sum); break;
            case DOTS: dots(&j, from, to, sum); break;
            case QUANTIZE: quantize(&j, from, to); break;
            case SQUARES: squares(&j, from, to); break;
            }
            sum += sums_of(&j), turned += turned_of(&j);
        }
    }
}

/* 0, or 1 if there is no memory. */
int sweep(Sweep *s) {
    int64_t columns = 1, turned = 0;
    s->sums = s->made = 0;
    for (int64_t i = 0; i < s->count; i++) {
        columns += s->jobs[i].columns;
        s->sums += sums_of(s->jobs + i), turned += turned_of(s->jobs + i);
        if (s->jobs[i].op == MAKE) s->made = s->jobs[i].columns;
    }
    s->tile = (least(TILE / columns, 256) + 16) & ~(int64_t)1;
    s->made *= s->tile;
    s->each = (s->made + s->sums + turned + 16) & ~(int64_t)15; /* whole lines of the cache */
    s->own = aligned_alloc(64, 4 * s->threads * s->each);
    if (!s->own) return 1;
    for (int64_t i = 0; i < s->threads; i++) memset(s->own + i * s->each + s->made, 0, 4 * s->sums);
    if (s->threads > 1) s->parallel(share, s, (unsigned)s->threads, 0);
    else share(s);
    const float *own = s->own + s->made;
    for (int64_t i = 0; i < s->count; i++) {
        const Job *j = s->jobs + i;
        int64_t size = sums_of(j);
        for (int64_t at = 0; at < size; at++) {
            float sum = 0;
            for (int64_t thread = 0; thread < s->threads; thread++) sum += own[thread * s->each + at];
            j->sum[j->transposed ? at % j->columns * j->rank + at / j->columns : at] = sum * j->scale;
        }
        own += size;
    }
    free(s->own);
    return 0;
}
