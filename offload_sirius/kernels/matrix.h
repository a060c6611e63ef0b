/* Rows of weights, as products.c and tiles.c are handed them by cpu.py. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum kind { FLOAT32, BFLOAT16, INT8, INT4 };
enum activation { SILU, GELU, GELU_TANH };

enum {
    UNIT = 32, /* weights that are decoded at once; all blocks are multiples of it */
    LINE = 64, /* of a cache, in bytes */
    OUTLIER_NBYTES = 4,
};

struct matrix {
    const char *rows;
    int64_t stride;       /* bytes from row to row */
    int64_t num_rows;
    int64_t width;        /* weights of a row */
    int32_t kind;
    int32_t group_log2;   /* of the number of weights that share a scale */
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

INLINE const char *row_of(const struct matrix *m, int64_t index) {
    return m->rows + index * m->stride;
}

INLINE int64_t place_of(int kind, int64_t column) {
    return kind == FLOAT32 ? 4 * column : kind == BFLOAT16 ? 2 * column : kind == INT8 ? column : column / 2;
}

/* Where the scales of a quantised row begin, float16 each, its outlier, and the zeros of an int4 row, in sixteenths. */
INLINE int64_t scales_place(int kind, int64_t width) { return place_of(kind, rounded_up(width, UNIT)); }
INLINE int64_t outlier_place(int kind, int64_t width, int group_log2) {
    return scales_place(kind, width) + 2 * (((width - 1) >> group_log2) + 1);
}
INLINE int64_t zeros_place(int kind, int64_t width, int group_log2) {
    return outlier_place(kind, width, group_log2) + OUTLIER_NBYTES;
}

/* Ask for the bytes of these columns of a row that will be read soon. */
INLINE void fetch_ahead(int kind, const char *row, int64_t first, int64_t end) {
    for (int64_t at = place_of(kind, first); at < place_of(kind, end); at += LINE)
        __builtin_prefetch(row + at);
}

INLINE float from_half(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    if (rest < 0x400) { /* subnormal: a multiple of 2^-24 */
        float value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23));
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

INLINE float activated(int activation, float g) {
    if (activation == SILU)
        return g / (1 + expf(-g));
    if (activation == GELU)
        return 0.5f * g * (1 + erff(g * 0.70710678118654752f));
    return 0.5f * g * (1 + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
}

/* Pieces that a thread takes at once: enough of them that one which is held up does not hold up all. */
INLINE int64_t piece_of(int64_t num_tiles, int num_threads) {
    int64_t piece = num_tiles / (8 * num_threads);
    return piece > 0 ? piece : 1;
}

/* A row's outlier: what is added to the weight at its place. */
struct outlier {
    int64_t place;
    float rest;
};

INLINE struct outlier outlier_of(const struct matrix *m, const char *row) {
    const uint16_t *at = (const uint16_t *)(row + outlier_place(m->kind, m->width, m->group_log2));
    /* Bytes from a file may say anything: a place behind the end is nowhere. */
    return at[0] < m->width ? (struct outlier){at[0], from_half(at[1])} : (struct outlier){0, 0};
}

INLINE int has_outliers(const struct matrix *m) { return m->kind == INT8 || m->kind == INT4; }

/* Number i of a token, float32 or bfloat16. */
INLINE float number_of(int kind, const char *x, int64_t i) {
    if (kind == FLOAT32)
        return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* out += z rows, for outliers of num_rows rows from `row` on that lie in columns first .. end. z: of the first of them, z_stride in bytes;
   out_stride in floats. */
INLINE void add_outliers(const struct matrix *m, int64_t row, int64_t num_rows, int64_t first, int64_t end, const char *z, int z_kind,
                         int64_t z_stride, int64_t num_tokens, float *out, int64_t out_stride) {
    if (!has_outliers(m))
        return;
    for (int64_t j = 0; j < num_rows; j++) {
        const struct outlier o = outlier_of(m, row_of(m, row + j));
        if (o.place >= first && o.place < end)
            for (int64_t t = 0; t < num_tokens; t++)
                out[t * out_stride + o.place] += number_of(z_kind, z + t * z_stride, j) * o.rest;
    }
}
