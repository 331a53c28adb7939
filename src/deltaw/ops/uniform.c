/* Uniform random numbers as torch draws them on a CPU, to the bit, several at a time.

   torch's generator is the Mersenne Twister mt19937 (Matsumoto and Nishimura, ACM TOMACS 8, 1998): 624 words of state, of
   which each is drawn once, and then all are made anew, each from itself, its neighbour and the word 397 places on:

       s[i] <- s[i + 397] ^ twist(high bit of s[i], low bits of s[i + 1])          (places modulo 624)

   A drawn word is tempered (its bits are mixed by shifts); its low 24 bits k give low + (high - low) k / 2^24, rounded once.
   torch does all that word by word. No place depends on one that is less than 227 before it, so here it is done in vectors.

   Called from uniform.py, which compares with torch's own numbers first. */

#include <stdint.h>

#define N 624
#define M 397

/* What `Generator.get_state()` holds, as far as it is read here. */
typedef struct {
    uint64_t seed;
    int32_t left, seeded; /* left: one more than the words that are not drawn yet */
    uint64_t next, state[N];
} Generator;

static inline uint32_t twisted(uint32_t far, uint32_t here, uint32_t after) {
    uint32_t both = (here & 0x80000000u) | (after & 0x7fffffffu);
    return far ^ (both >> 1) ^ (-(after & 1u) & 0x9908b0dfu);
}

static inline uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

void uniform(Generator *g, float *restrict out, int64_t count, float low, float high) {
    uint32_t s[N];
    int64_t left = g->left, next = (int64_t)g->next;
    for (int i = 0; i < N; i++) s[i] = (uint32_t)g->state[i];
    while (count) {
        if (left == 1) {
            for (int i = 0; i < N - M; i++) s[i] = twisted(s[i + M], s[i], s[i + 1]);
            for (int i = N - M; i < N - 1; i++) s[i] = twisted(s[i + M - N], s[i], s[i + 1]);
            s[N - 1] = twisted(s[M - 1], s[N - 1], s[0]);
            left = N + 1, next = 0;
        }
        int64_t take = left - 1 < count ? left - 1 : count;
        for (int64_t i = 0; i < take; i++)
            out[i] = __builtin_fmaf((float)(int32_t)(tempered(s[next + i]) & 0xffffffu) * 0x1p-24f, high - low, low);
        out += take, count -= take, left -= take, next += take;
    }
    for (int i = 0; i < N; i++) g->state[i] = s[i];
    g->left = (int32_t)left, g->next = (uint64_t)next;
}
