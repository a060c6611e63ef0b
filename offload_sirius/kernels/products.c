/* Products of a few tokens with many rows of weights, on a CPU. Compiled on first use by native.py, called by cpu.py.

   A row holds D weights: float32, bfloat16, or the integers, scales and zeros of quantization.py. Each number that comes out is
   computed in one and the same order of additions, whatever number of tokens, rows and threads there are: what a token
   gives does not depend on the tokens beside it.

   Work is done in blocks that stay in the nearest cache: weights of some rows become float32 there, once, and meet all tokens.
   Vectors are as wide as the registers that the compiler was told of. */

#include "matrix.h"

#include <stddef.h>

/* Floats of a register; accumulators of a dot product, so many that 4 rows of 3 tokens fit into the registers. */
#if defined(__AVX512F__)
enum { LANES = 16, NUM_SUMS = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, NUM_SUMS = 1 };
#else
enum { LANES = 4, NUM_SUMS = 1 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

enum {
    NUM_VECS = UNIT / LANES,
    BLOCK = 512,      /* weights of a row in the buffer of a dot product */
    STEP = BLOCK + 16, /* floats from row to row in it: a power of two would put all into the same places of the cache */
    TILE_ROWS = 4,    /* rows that share the loads of a token */
    TILE_TOKENS = 3,  /* tokens that share the loads of a row */
    MAX_TOKENS = 64,  /* that meet a row when it is decoded */
    DOWN_ROWS = 8,    /* neurons that are summed before their sum is added */
    DOWN_COLUMNS = 512,
    STRIP = 4 * NUM_SUMS, /* vectors of columns that are summed in registers */
};

/* ---- weights become float32 ---- */

/* Columns that can be read in whole units: those of rows that are not padded may end within one. */
INLINE int64_t whole_width(int kind, int64_t width) {
    return kind == INT8 || kind == INT4 ? rounded_up(width, UNIT) : width / UNIT * UNIT;
}

/* What weights of one group have in common: 16 weights to look up (int4, AVX512), or factor and summand of an integer. */
struct group {
    vec factor, summand;
};

INLINE struct group group_at(int kind, int group_log2, const char *row, int64_t width, int64_t column) {
    struct group g = {{0}, {0}};
    if (kind == FLOAT32 || kind == BFLOAT16)
        return g;
    const int64_t index = column >> group_log2;
    g.factor += from_half(((const uint16_t *)(row + scales_place(kind, width)))[index]);
    if (kind == INT4) {
        const uint8_t *zeros = (const uint8_t *)row + zeros_place(kind, width, group_log2);
        g.summand += (float)zeros[index] * g.factor[0] * -0.0625f;
#if defined(__AVX512F__)
        const vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        g.factor = numbers * g.factor + g.summand;
#endif
    }
    return g;
}

INLINE vec vec_of_bfloats(const char *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, words) << 16);
}

INLINE vec vec_of_bytes(const char *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vec out;
    for (int i = 0; i < LANES; i++)
        out[i] = (float)((const int8_t *)from)[i];
    return out;
#endif
}

/* Weights that are the low and the high four bits of LANES bytes. */
INLINE void vecs_of_nibbles(const struct group *g, const char *from, vec *low, vec *high) {
#if defined(__AVX512F__)
    /* Looking up takes the low four bits and no notice of the others. */
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    *low = (vec)_mm512_permutexvar_ps(both, (__m512)g->factor);
    *high = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)g->factor);
#elif defined(__AVX2__)
    __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
    *low = (vec)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15))) * g->factor + g->summand;
    *high = (vec)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)) * g->factor + g->summand;
#else
    for (int i = 0; i < LANES; i++) {
        uint8_t both = ((const uint8_t *)from)[i];
        (*low)[i] = (float)(both & 15);
        (*high)[i] = (float)(both >> 4);
    }
    *low = *low * g->factor + g->summand;
    *high = *high * g->factor + g->summand;
#endif
}

/* UNIT weights of a row, of one group. */
INLINE void unit_at(int kind, const struct group *g, const char *row, int64_t column, vec *out) {
    const char *from = row + place_of(kind, column);
#pragma GCC unroll 8
    for (int v = 0; v < NUM_VECS; v++) {
        if (kind == FLOAT32)
            out[v] = (vec)*(const vec_anywhere *)(from + 4 * LANES * v);
        else if (kind == BFLOAT16)
            out[v] = vec_of_bfloats(from + 2 * LANES * v);
        else if (kind == INT8)
            out[v] = vec_of_bytes(from + LANES * v) * g->factor;
        else if (v < NUM_VECS / 2)
            vecs_of_nibbles(g, from + LANES * v, out + v, out + NUM_VECS / 2 + v);
    }
}

/* The last weights of a row that is not padded, less than UNIT, and zeros behind them. */
INLINE void decode_end(int kind, const char *row, int64_t column, int64_t width, float *out) {
    char padded[UNIT * sizeof(float)] __attribute__((aligned(64))) = {0};
    struct group none = {{0}, {0}};
    memcpy(padded, row + place_of(kind, column), place_of(kind, width - column));
    unit_at(kind, &none, padded, 0, (vec *)out);
}

/* Weights first .. end of a row, zeros behind its end; both multiples of UNIT. Those of `next` are asked for. */
INLINE void decode(int kind, int group_log2, const char *row, const char *next, int64_t first, int64_t end, int64_t width,
                   float *out) {
    const int64_t whole = smaller(end, whole_width(kind, width)), size = INT64_C(1) << group_log2;
    for (int64_t column = first, stop; column < whole; column = stop) {
        const struct group g = group_at(kind, group_log2, row, width, column);
        stop = smaller(whole, (column & -size) + size);
        fetch_ahead(kind, next, column, stop);
        for (int64_t c = column; c < stop; c += UNIT)
            unit_at(kind, &g, row, c, (vec *)(out + c - first));
    }
    if (whole < end)
        decode_end(kind, row, whole, width, out + whole - first);
}

/* ---- dot products of rows with tokens ---- */

typedef vec row_sums[TILE_ROWS][NUM_SUMS];

/* sums += products of TILE_ROWS rows, decoded, STEP floats apart, with a few tokens. */
INLINE void dot_decoded(int num_tokens, const float *x, int64_t x_stride, const float *weights, int64_t count, row_sums *sums) {
    vec a[TILE_TOKENS][TILE_ROWS][NUM_SUMS];
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int h = 0; h < NUM_SUMS; h++)
                a[t][r][h] = sums[t][r][h];
    for (int64_t i = 0; i < count; i += UNIT) {
#pragma GCC unroll 8
        for (int v = 0; v < NUM_VECS; v++) {
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) {
                vec w = *(const vec *)(weights + r * STEP + i + v * LANES);
#pragma GCC unroll 3
                for (int t = 0; t < num_tokens; t++)
                    a[t][r][v % NUM_SUMS] += w * *(const vec_anywhere *)(x + t * x_stride + i + v * LANES);
            }
        }
    }
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int h = 0; h < NUM_SUMS; h++)
                sums[t][r][h] = a[t][r][h];
}

/* The same of whole rows that are decoded on the way: for tokens so few that nothing is gained by keeping them. */
INLINE void dot_coded(int kind, int num_tokens, const struct matrix *m, const char *const *rows, const char *const *next,
                      const float *x, int64_t x_stride, row_sums *sums) {
    vec a[TILE_TOKENS][TILE_ROWS][NUM_SUMS];
    const int64_t whole = whole_width(kind, m->width), size = INT64_C(1) << m->group_log2;
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int h = 0; h < NUM_SUMS; h++)
                a[t][r][h] = sums[t][r][h];
    for (int64_t first = 0; first < whole; first += size) {
        const int64_t stop = smaller(whole, first + size);
        struct group g[TILE_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++) {
            g[r] = group_at(kind, m->group_log2, rows[r], m->width, first);
            fetch_ahead(kind, next[r], first, stop);
        }
        for (int64_t i = first; i < stop; i += UNIT) {
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) {
                vec w[NUM_VECS];
                unit_at(kind, &g[r], rows[r], i, w);
#pragma GCC unroll 8
                for (int v = 0; v < NUM_VECS; v++)
#pragma GCC unroll 3
                    for (int t = 0; t < num_tokens; t++)
                        a[t][r][v % NUM_SUMS] += w[v] * *(const vec_anywhere *)(x + t * x_stride + i + v * LANES);
            }
        }
    }
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int h = 0; h < NUM_SUMS; h++)
                sums[t][r][h] = a[t][r][h];
    if (whole < m->width) {
        float weights[TILE_ROWS * STEP] __attribute__((aligned(64)));
        for (int r = 0; r < TILE_ROWS; r++)
            decode_end(kind, rows[r], whole, m->width, weights + r * STEP);
        dot_decoded(num_tokens, x + whole, x_stride, weights, UNIT, sums);
    }
}

/* The same, of any number of tokens: rows are decoded once, block by block. */
INLINE void dot_many(int kind, const struct matrix *m, const char *const *rows, const char *const *next, const float *x,
                     int64_t x_stride, int64_t num_tokens, row_sums *sums) {
    float weights[TILE_ROWS * STEP] __attribute__((aligned(64)));
    const int64_t padded = rounded_up(m->width, UNIT);
    for (int64_t first = 0; first < padded; first += BLOCK) {
        int64_t end = smaller(first + BLOCK, padded), t = 0;
        for (int r = 0; r < TILE_ROWS; r++)
            decode(kind, m->group_log2, rows[r], next[r], first, end, m->width, weights + r * STEP);
        for (; t + TILE_TOKENS <= num_tokens; t += TILE_TOKENS)
            dot_decoded(TILE_TOKENS, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
        if (num_tokens - t == 2)
            dot_decoded(2, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
        if (num_tokens - t == 1)
            dot_decoded(1, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
    }
}

INLINE float sum_of(const vec *sums) {
    float lanes[LANES] __attribute__((aligned(4 * LANES)));
    *(vec *)lanes = NUM_SUMS == 2 ? sums[0] + sums[NUM_SUMS - 1] : sums[0];
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

/* out[t * out_stride + r], for TILE_ROWS rows from `row` on and up to MAX_TOKENS tokens. */
INLINE void dot_rows(int kind, const struct matrix *m, int64_t row, const float *x, int64_t x_stride, int64_t num_tokens,
                     float *out, int64_t out_stride) {
    row_sums sums[MAX_TOKENS];
    const char *rows[TILE_ROWS], *next[TILE_ROWS];
    const int64_t last = m->num_rows - 1;
    for (int r = 0; r < TILE_ROWS; r++) {
        rows[r] = row_of(m, smaller(row + r, last));
        next[r] = row_of(m, smaller(row + r + TILE_ROWS, last));
    }
    memset(sums, 0, num_tokens * sizeof(row_sums));
    if (num_tokens == 1)
        dot_coded(kind, 1, m, rows, next, x, x_stride, sums);
    else if (num_tokens == 2)
        dot_coded(kind, 2, m, rows, next, x, x_stride, sums);
    else if (num_tokens == 3)
        dot_coded(kind, 3, m, rows, next, x, x_stride, sums);
    else
        dot_many(kind, m, rows, next, x, x_stride, num_tokens, sums);
    for (int64_t r = 0; r < smaller(TILE_ROWS, m->num_rows - row); r++) {
        const struct outlier o = kind == INT8 || kind == INT4 ? outlier_of(m, rows[r]) : (struct outlier){0, 0};
        for (int64_t t = 0; t < num_tokens; t++)
            out[t * out_stride + r] = sum_of(sums[t][r]) + (kind == INT8 || kind == INT4 ? x[t * x_stride + o.place] * o.rest : 0);
    }
}

static void dot_rows_of(const struct matrix *m, int64_t row, const float *x, int64_t x_stride, int64_t num_tokens, float *out,
                        int64_t out_stride) {
    if (m->kind == FLOAT32)
        dot_rows(FLOAT32, m, row, x, x_stride, num_tokens, out, out_stride);
    else if (m->kind == BFLOAT16)
        dot_rows(BFLOAT16, m, row, x, x_stride, num_tokens, out, out_stride);
    else if (m->kind == INT8)
        dot_rows(INT8, m, row, x, x_stride, num_tokens, out, out_stride);
    else
        dot_rows(INT4, m, row, x, x_stride, num_tokens, out, out_stride);
}

/* x [num_tokens, width rounded up to UNIT, zeros behind width], out [num_tokens, num_rows]: out = x rows^T. Strides in floats. */
void offload_sirius_linear(const struct matrix *m, const float *x, int64_t x_stride, int64_t num_tokens, float *out,
                           int64_t out_stride, int num_threads) {
    int64_t num_tiles = (m->num_rows + TILE_ROWS - 1) / TILE_ROWS, piece = piece_of(num_tiles, num_threads);
#pragma omp parallel for schedule(dynamic, piece) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t t = 0; t < num_tokens; t += MAX_TOKENS)
            dot_rows_of(m, tile * TILE_ROWS, x + t * x_stride, x_stride, smaller(MAX_TOKENS, num_tokens - t),
                        out + t * out_stride + tile * TILE_ROWS, out_stride);
}

/* The same of two matrices of as many rows: out = activation(x gate^T) * (x up^T). */
void offload_sirius_gate_up(const struct matrix *gate, const struct matrix *up, int activation, const float *x, int64_t x_stride,
                            int64_t num_tokens, float *out, int64_t out_stride, int num_threads) {
    int64_t num_tiles = (gate->num_rows + TILE_ROWS - 1) / TILE_ROWS, piece = piece_of(num_tiles, num_threads);
#pragma omp parallel for schedule(dynamic, piece) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t t = 0; t < num_tokens; t += MAX_TOKENS) {
            int64_t row = tile * TILE_ROWS, tokens = smaller(MAX_TOKENS, num_tokens - t);
            float gates[MAX_TOKENS * TILE_ROWS], *z = out + t * out_stride + row;
            dot_rows_of(gate, row, x + t * x_stride, x_stride, tokens, gates, TILE_ROWS);
            dot_rows_of(up, row, x + t * x_stride, x_stride, tokens, z, out_stride);
            for (int64_t s = 0; s < tokens; s++)
                for (int64_t r = 0; r < smaller(TILE_ROWS, gate->num_rows - row); r++)
                    z[s * out_stride + r] *= activated(activation, gates[s * TILE_ROWS + r]);
        }
}

/* ---- sums of rows ---- */

/* out += z rows, for num_vectors vectors of columns and num_tokens tokens. weights [num_rows, DOWN_COLUMNS]. */
INLINE void down_tile(int num_tokens, int num_vectors, int64_t num_rows, const float *z, int64_t z_stride, const float *weights,
                      float *out, int64_t out_stride) {
    vec a[TILE_TOKENS][STRIP > NUM_VECS ? STRIP : NUM_VECS];
#pragma GCC unroll 3
    for (int t = 0; t < num_tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++)
            a[t][v] = (vec){0};
    for (int64_t j = 0; j < num_rows; j++) {
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            vec w = *(const vec *)(weights + j * DOWN_COLUMNS + v * LANES);
#pragma GCC unroll 3
            for (int t = 0; t < num_tokens; t++)
                a[t][v] += w * z[t * z_stride + j];
        }
    }
#pragma GCC unroll 3
    for (int t = 0; t < num_tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            vec_anywhere *place = (vec_anywhere *)(out + t * out_stride + v * LANES);
            *place += (vec_anywhere)a[t][v];
        }
}

INLINE void down_tokens(int num_vectors, int64_t num_tokens, int64_t num_rows, const float *z, int64_t z_stride,
                        const float *weights, float *out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + TILE_TOKENS <= num_tokens; t += TILE_TOKENS)
        down_tile(TILE_TOKENS, num_vectors, num_rows, z + t * z_stride, z_stride, weights, out + t * out_stride, out_stride);
    if (num_tokens - t == 2)
        down_tile(2, num_vectors, num_rows, z + t * z_stride, z_stride, weights, out + t * out_stride, out_stride);
    if (num_tokens - t == 1)
        down_tile(1, num_vectors, num_rows, z + t * z_stride, z_stride, weights, out + t * out_stride, out_stride);
}

/* Columns first .. end of all rows; both multiples of UNIT. Rows are decoded once, some at a time. */
INLINE void down_many(int kind, const struct matrix *m, int64_t first, int64_t end, const float *z, int64_t z_stride,
                      int64_t num_tokens, float *out, int64_t out_stride) {
    float weights[DOWN_ROWS * DOWN_COLUMNS] __attribute__((aligned(64)));
    const int64_t last = m->num_rows - 1;
    for (int64_t row = 0; row < m->num_rows; row += DOWN_ROWS) {
        int64_t num_rows = smaller(DOWN_ROWS, m->num_rows - row);
        for (int64_t column = first; column < end; column += DOWN_COLUMNS) {
            int64_t count = smaller(DOWN_COLUMNS, end - column), c = 0;
            for (int64_t j = 0; j < num_rows; j++)
                decode(kind, m->group_log2, row_of(m, row + j), row_of(m, smaller(row + j + DOWN_ROWS, last)), column,
                       column + count, m->width, weights + j * DOWN_COLUMNS);
            for (; c + STRIP * LANES <= count; c += STRIP * LANES)
                down_tokens(STRIP, num_tokens, num_rows, z + row, z_stride, weights + c, out + column + c, out_stride);
            for (; c < count; c += UNIT)
                down_tokens(NUM_VECS, num_tokens, num_rows, z + row, z_stride, weights + c, out + column + c, out_stride);
        }
        add_outliers(m, row, num_rows, first, end, (const char *)(z + row), FLOAT32, 4 * z_stride, num_tokens, out, out_stride);
    }
}

/* out += z rows, for a strip of columns and a few tokens; rows are decoded on the way. */
INLINE void down_strip(int kind, int num_tokens, const struct matrix *m, const char *const *rows, const char *const *next,
                       int64_t num_rows, int64_t column, const float *z, int64_t z_stride, float *out, int64_t out_stride) {
    vec a[TILE_TOKENS][STRIP];
#pragma GCC unroll 3
    for (int t = 0; t < num_tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < STRIP; v++)
            a[t][v] = (vec){0};
    for (int64_t j = 0; j < num_rows; j++) {
        struct group g = group_at(kind, m->group_log2, rows[j], m->width, column);
        fetch_ahead(kind, next[j], column, column + STRIP * LANES);
#pragma GCC unroll 4
        for (int u = 0; u < STRIP / NUM_VECS; u++) {
            vec w[NUM_VECS];
            if (u > 0 && ((column + u * UNIT) & ((INT64_C(1) << m->group_log2) - 1)) == 0)
                g = group_at(kind, m->group_log2, rows[j], m->width, column + u * UNIT);
            unit_at(kind, &g, rows[j], column + u * UNIT, w);
#pragma GCC unroll 8
            for (int v = 0; v < NUM_VECS; v++)
#pragma GCC unroll 3
                for (int t = 0; t < num_tokens; t++)
                    a[t][u * NUM_VECS + v] += w[v] * z[t * z_stride + j];
        }
    }
#pragma GCC unroll 3
    for (int t = 0; t < num_tokens; t++)
#pragma GCC unroll 8
        for (int v = 0; v < STRIP; v++) {
            vec_anywhere *place = (vec_anywhere *)(out + t * out_stride + column + v * LANES);
            *place += (vec_anywhere)a[t][v];
        }
}

INLINE void down_few(int kind, int num_tokens, const struct matrix *m, int64_t first, int64_t end, const float *z,
                     int64_t z_stride, float *out, int64_t out_stride) {
    const char *rows[DOWN_ROWS], *next[DOWN_ROWS];
    for (int64_t row = 0; row < m->num_rows; row += DOWN_ROWS) {
        const int64_t num_rows = smaller(DOWN_ROWS, m->num_rows - row);
        for (int64_t j = 0; j < num_rows; j++) {
            rows[j] = row_of(m, row + j);
            next[j] = row_of(m, smaller(row + j + DOWN_ROWS, m->num_rows - 1));
        }
        for (int64_t column = first; column < end; column += STRIP * LANES)
            down_strip(kind, num_tokens, m, rows, next, num_rows, column, z + row, z_stride, out, out_stride);
        add_outliers(m, row, num_rows, first, end, (const char *)(z + row), FLOAT32, 4 * z_stride, num_tokens, out, out_stride);
    }
}

INLINE void down_columns(int kind, const struct matrix *m, int64_t first, int64_t end, const float *z, int64_t z_stride,
                         int64_t num_tokens, float *out, int64_t out_stride) {
    const int64_t strips = (smaller(end, whole_width(kind, m->width)) - first) / (STRIP * LANES) * (STRIP * LANES);
    const int64_t rest = num_tokens <= TILE_TOKENS && strips > 0 ? first + strips : first;
    if (rest > first && num_tokens == 1)
        down_few(kind, 1, m, first, rest, z, z_stride, out, out_stride);
    else if (rest > first && num_tokens == 2)
        down_few(kind, 2, m, first, rest, z, z_stride, out, out_stride);
    else if (rest > first)
        down_few(kind, 3, m, first, rest, z, z_stride, out, out_stride);
    if (rest < end)
        down_many(kind, m, rest, end, z, z_stride, num_tokens, out, out_stride);
}

/* z [num_tokens, num_rows], out [num_tokens, width rounded up to UNIT]: out = z rows. Strides in floats. */
void offload_sirius_down(const struct matrix *m, const float *z, int64_t z_stride, int64_t num_tokens, float *out,
                         int64_t out_stride, int num_threads) {
    const int64_t num_units = rounded_up(m->width, UNIT) / UNIT;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++) {
        int64_t first = num_units * thread / num_threads * UNIT, end = num_units * (thread + 1) / num_threads * UNIT;
        for (int64_t t = 0; t < num_tokens; t++)
            memset(out + t * out_stride + first, 0, (end - first) * sizeof(float));
        if (m->kind == FLOAT32)
            down_columns(FLOAT32, m, first, end, z, z_stride, num_tokens, out, out_stride);
        else if (m->kind == BFLOAT16)
            down_columns(BFLOAT16, m, first, end, z, z_stride, num_tokens, out, out_stride);
        else if (m->kind == INT8)
            down_columns(INT8, m, first, end, z, z_stride, num_tokens, out, out_stride);
        else
            down_columns(INT4, m, first, end, z, z_stride, num_tokens, out, out_stride);
    }
}
