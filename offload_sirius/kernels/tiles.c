/* Products of tokens with many rows of weights on a CPU that multiplies matrices of bfloat16 by itself (AMX). The same as products.c
   where there is no such CPU. Compiled on first use by native.py, called by cpu.py.

   Integers of 8 and 4 bits, zeros subtracted, are exact in bfloat16, and a float32 number is the sum of three such parts. So the unit
   multiplies integers, not weights: scales, which would not fit, meet the sums of their groups (linear), or the tokens' numbers before
   they are split into parts (down). Sums are float32's. Each number that comes out is computed in one and the same order of additions,
   whatever number of tokens, rows and threads there are: what a token gives does not depend on the tokens beside it. Parts that are
   zeros change no sum. */

#include "matrix.h"

#include <stddef.h>

#if defined(__AMX_BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)

#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILE = 16,        /* rows, tokens or columns of a tile, which has 16 lines of 64 bytes */
    TILE_NBYTES = 1024,
    PIECE_ROWS = 32,  /* two tiles of weights share the loads of tokens */
    SPAN = 128,       /* weights of a row that are decoded at once: whole groups */
    BLOCK_ROWS = 64,  /* neurons that are summed before their sum is added */
    MAX_TILES = 4,    /* tiles of tokens that meet a row when it is decoded */
    MAX_TOKENS = MAX_TILES * TILE,
    MAX_PARTS = 3,
    PLAIN_LOG2 = 7,
    REQUEST_PERMISSION = 0x1023, /* of Linux, to use a part of the CPU whose registers it has to keep */
    TILE_DATA = 18,
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_nbytes[16];
    uint8_t num_rows[16];
} tile_shapes;

/* Sixteen times what the integers of four bits are, zero subtracted, twice each: the fifth bit of an index counts, and means nothing. */
static uint16_t integers_of_zero[256][32] __attribute__((aligned(64)));

INLINE uint16_t bfloat_of(int small) {
    float number = (float)small;
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Whether this process may use the unit. To be called before all else. */
int offload_sirius_tiles_ready(void) {
    for (int zero = 0; zero < 256; zero++)
        for (int i = 0; i < 32; i++)
            integers_of_zero[zero][i] = bfloat_of(16 * (i % 16) - zero);
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* Tiles 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones. num_rows: of sums and left; num_columns: of sums and right. */
INLINE void shape_tiles(int num_rows, int num_columns) {
    tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.num_rows[i] = i < 6 ? num_rows : TILE;
        shapes.row_nbytes[i] = i == 4 || i == 5 ? LINE : 4 * num_columns;
    }
    _tile_loadconfig(&shapes);
}

/* One of these, by what the matrix is. PLAIN_LOG2: rows without groups are read in pieces of so many weights, as a power of two. */
#define FOR_EACH_FORM(m, DO) \
    switch ((m)->kind << 4 | (m)->group_log2) { \
    case BFLOAT16 << 4 | PLAIN_LOG2: DO(BFLOAT16, PLAIN_LOG2); break; \
    case INT8 << 4 | 5: DO(INT8, 5); break; \
    case INT8 << 4 | 6: DO(INT8, 6); break; \
    case INT8 << 4 | 7: DO(INT8, 7); break; \
    case INT4 << 4 | 5: DO(INT4, 5); break; \
    case INT4 << 4 | 6: DO(INT4, 6); break; \
    case INT4 << 4 | 7: DO(INT4, 7); break; \
    }

/* ---- numbers become bfloat16 ---- */

/* Ask for bytes that will be read after more others than the nearest cache holds. */
INLINE void fetch_far_ahead(int kind, const char *row, int64_t first, int64_t end) {
    for (int64_t at = place_of(kind, first); at < place_of(kind, end); at += LINE)
        __builtin_prefetch(row + at, 0, 2);
}

/* UNIT integers of a row as bfloat16, or its weights where they are that. table: of the group's zero, for int4. */
INLINE __m512i integers_at(int kind, const char *row, int64_t column, const uint16_t *table) {
    const char *from = row + place_of(kind, column);
    if (kind == BFLOAT16)
        return _mm512_loadu_si512(from);
    if (kind == INT8) {
        __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
        __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + 16)));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
    }
    const __m512i spread = _mm512_set_epi64(0x0f0f0e0e0d0d0c0c, 0x0b0b0a0a09090808, 0x0707060605050404, 0x0303020201010000,
                                            0x0f0f0e0e0d0d0c0c, 0x0b0b0a0a09090808, 0x0707060605050404, 0x0303020201010000);
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
    __m512i indices = _mm512_srlv_epi16(_mm512_permutexvar_epi8(spread, bytes), shifts);
    return _mm512_permutexvar_epi16(indices, _mm512_load_si512(table));
}

/* The last weights of a row that is not padded, and zeros behind them. */
INLINE __m512i last_integers_at(const char *row, int64_t column, int64_t width) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << (width - column)) - 1), row + place_of(BFLOAT16, column));
}

/* Scales of integers as integers_at gives them. */
INLINE void scales_of_halves(int kind, int count, const uint16_t *halves, float *scales) {
    for (int i = 0; i < count; i += 16) {
        __m512 numbers = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(halves + i)));
        if (kind == INT4)
            numbers *= 0.0625f;
        _mm512_store_ps(scales + i, numbers);
    }
}

/* UNIT numbers of a token from `column` on, zeros behind the end. */
INLINE void numbers_at(int kind, const char *x, int64_t column, int64_t end, __m512 *low, __m512 *high) {
    const uint32_t mask = end - column < UNIT ? (1u << (end - column)) - 1 : ~0u;
    if (kind == BFLOAT16) {
        __m512i both = _mm512_maskz_loadu_epi16(mask, x + 2 * column);
        *low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
        *high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
    } else {
        *low = _mm512_maskz_loadu_ps((__mmask16)mask, x + 4 * column);
        *high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), x + 4 * column + 64);
    }
}

/* UNIT numbers -> parts whose sum they are, the last one rounded: vectors of UNIT bfloat16, `step` bytes apart. */
INLINE void split(int num_parts, __m512 low, __m512 high, char *out, int64_t step) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                                         19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    for (int p = 0; p < num_parts; p++) {
        __m512i first = (__m512i)low, second = (__m512i)high;
        if (p == num_parts - 1) {
            first = _mm512_add_epi32(first, half);
            second = _mm512_add_epi32(second, half);
        }
        _mm512_store_si512(out + p * step, _mm512_permutex2var_epi16(first, odd, second));
        low -= (__m512)_mm512_and_si512(first, upper);
        high -= (__m512)_mm512_and_si512(second, upper);
    }
}

/* ---- dot products of rows with tokens ---- */

/* Tokens as right operands: tiles of them, each with its steps of UNIT columns, each with its parts. A tile has a line for every
   pair of columns, and in it two numbers of each token; a single token has a tile of its own shape. */
struct tokens {
    char *packed;
    int64_t num_tiles, tile_nbytes;
    int num_parts, part_nbytes;
};

static void pack_step(const char *x, int kind, int64_t x_stride, int64_t num_tokens, int64_t width, int64_t step,
                      const struct tokens *to) {
    for (int64_t tile = 0; tile < to->num_tiles; tile++) {
        char *out = to->packed + tile * to->tile_nbytes + step * to->num_parts * to->part_nbytes;
        char parts[TILE][MAX_PARTS][LINE] __attribute__((aligned(64))) = {0};
        const int64_t count = smaller(TILE, num_tokens - tile * TILE);
        for (int64_t t = 0; t < count; t++) {
            __m512 low, high;
            numbers_at(kind, x + (tile * TILE + t) * x_stride, step * UNIT, width, &low, &high);
            split(to->num_parts, low, high, to->part_nbytes == LINE ? out : parts[t][0], LINE);
        }
        if (to->part_nbytes == LINE) /* a single token's pairs lie as they come */
            continue;
        for (int p = 0; p < to->num_parts; p++)
            for (int t = 0; t < TILE; t++)
                for (int pair = 0; pair < TILE; pair++)
                    ((uint32_t *)(out + p * TILE_NBYTES))[pair * TILE + t] = ((const uint32_t *)parts[t][p])[pair];
    }
}

/* Rows as left operands: two tiles, each with its steps. */
struct rows {
    const char *first, *second;
    int64_t stride;  /* bytes from row to row */
    int64_t advance; /* bytes from step to step */
};

/* sums[row][token] of two tiles of rows with one or two tiles of tokens: from zero, over some steps. */
INLINE void multiply(int two, const struct rows *w, const struct tokens *x, int64_t tile, int64_t first_step, int64_t num_steps,
                     float *sums) {
    const int64_t x_stride = x->part_nbytes / TILE;
    const char *left = x->packed + tile * x->tile_nbytes + first_step * x->num_parts * x->part_nbytes;
    _tile_zero(0);
    _tile_zero(2);
    if (two) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < num_steps; step++) {
        _tile_loadd(4, w->first + step * w->advance, w->stride);
        _tile_loadd(5, w->second + step * w->advance, w->stride);
        for (int p = 0; p < x->num_parts; p++, left += x->part_nbytes) {
            _tile_loadd(6, left, x_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if (two) {
                _tile_loadd(7, left + x->tile_nbytes, x_stride);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, x_stride);
    _tile_stored(2, sums + TILE * x_stride / 4, x_stride);
    if (two) {
        _tile_stored(1, sums + 2 * TILE * x_stride / 4, x_stride);
        _tile_stored(3, sums + 3 * TILE * x_stride / 4, x_stride);
    }
}

INLINE void add_scaled(int kind, __m512 scale, const float *sums, float *totals) {
    __m512 sum = _mm512_load_ps(sums), total = _mm512_load_ps(totals);
    _mm512_store_ps(totals, kind == BFLOAT16 ? _mm512_add_ps(total, sum) : _mm512_fmadd_ps(scale, sum, total));
}

/* totals += scales * sums, [row][token], or [row] of a single token. */
INLINE void add_piece(int kind, int64_t num_tokens, const float *scales, const float *sums, float *totals) {
    if (num_tokens == 1)
        for (int64_t r = 0; r < PIECE_ROWS; r += TILE)
            add_scaled(kind, _mm512_load_ps(scales + r), sums + r, totals + r);
    else
        for (int64_t r = 0; r < PIECE_ROWS; r++)
            add_scaled(kind, _mm512_set1_ps(scales[r]), sums + r * TILE, totals + r * TILE);
}

/* Weights first .. end of a row, of which scales and zeros are told: lines of `out` that are a tile apart, and the groups' scales, the
   rows of a piece apart. */
INLINE void decode_span(int kind, int group_log2, const char *row, int64_t first, int64_t end, int64_t width, const uint16_t *scales,
                        const uint8_t *zeros, char *out, uint16_t *halves) {
    const int size = smaller(SPAN, 1 << group_log2);
#pragma GCC unroll 4
    for (int group = 0; group < SPAN / size; group++) {
        if (first + group * size >= end)
            return;
        const int64_t index = (first >> group_log2) + group;
        const uint16_t *table = kind == INT4 ? integers_of_zero[zeros[index]] : NULL;
        if (kind != BFLOAT16)
            halves[group * PIECE_ROWS] = scales[index];
#pragma GCC unroll 4
        for (int unit = group * size / UNIT; unit < (group + 1) * size / UNIT; unit++) {
            const int64_t column = first + unit * UNIT;
            if (column >= end)
                return;
            __m512i numbers = kind == BFLOAT16 && column + UNIT > width ? last_integers_at(row, column, width)
                                                                        : integers_at(kind, row, column, table);
            _mm512_store_si512(out + unit * TILE_NBYTES, numbers);
        }
    }
}

/* totals[tile of tokens][row][token], or [row] of a single token, for PIECE_ROWS rows from `row` on: the last one stands for those
   behind it. */
INLINE void dot_piece(int kind, int group_log2, const struct matrix *m, int64_t row, const struct tokens *x, float *totals) {
    char decoded[2][SPAN / UNIT][TILE][LINE] __attribute__((aligned(64)));
    float sums[4 * TILE * TILE] __attribute__((aligned(64))), scales[SPAN / UNIT][PIECE_ROWS] __attribute__((aligned(64)));
    uint16_t halves[SPAN / UNIT][PIECE_ROWS] __attribute__((aligned(64))) = {0};
    const int64_t last = m->num_rows - 1, num_tokens = x->part_nbytes == LINE ? 1 : TILE, piece = PIECE_ROWS * num_tokens;
    const int64_t size = smaller(SPAN, 1 << group_log2), width = m->width;
    const int64_t scales_at = scales_place(kind, width), zeros_at = zeros_place(kind, width, group_log2);
    const char *at[PIECE_ROWS], *next[PIECE_ROWS];
    for (int r = 0; r < PIECE_ROWS; r++) {
        at[r] = row_of(m, smaller(row + r, last));
        next[r] = row_of(m, smaller(row + r + PIECE_ROWS, last));
    }
    memset(totals, 0, x->num_tiles * piece * sizeof(float));
    for (int64_t first = 0; first < width; first += SPAN) {
        const int64_t end = smaller(first + SPAN, width);
        const int as_they_lie = kind == BFLOAT16 && row + PIECE_ROWS <= m->num_rows && first + SPAN <= width;
        struct rows w = {decoded[0][0][0], decoded[1][0][0], LINE, TILE_NBYTES};
        if (as_they_lie)
            w = (struct rows){at[0] + 2 * first, at[TILE] + 2 * first, m->stride, LINE};
        for (int r = 0; r < PIECE_ROWS; r++) {
            const uint16_t *row_scales = (const uint16_t *)(at[r] + scales_at);
            const uint8_t *row_zeros = (const uint8_t *)at[r] + zeros_at;
            char *out = decoded[r / TILE][0][r % TILE];
            fetch_ahead(kind, at[r], first + 2 * SPAN, first + 3 * SPAN);
            fetch_far_ahead(kind, next[r], first, first + SPAN);
            if (as_they_lie)
                continue;
            if (first + SPAN <= width)
                decode_span(kind, group_log2, at[r], first, first + SPAN, first + SPAN, row_scales, row_zeros, out, halves[0] + r);
            else
                decode_span(kind, group_log2, at[r], first, end, width, row_scales, row_zeros, out, halves[0] + r);
        }
        if (kind != BFLOAT16)
            scales_of_halves(kind, SPAN / size * PIECE_ROWS, halves[0], scales[0]);
        for (int64_t group = 0; group < SPAN / size && first + group * size < end; group++) {
            const int64_t start = first + group * size, num_steps = (smaller(size, end - start) + UNIT - 1) / UNIT;
            int64_t tile = 0;
            for (; tile + 2 <= x->num_tiles; tile += 2) {
                multiply(1, &w, x, tile, start / UNIT, num_steps, sums);
                for (int64_t t = 0; t < 2; t++) /* sums: first rows with both tiles' tokens, then the second's */
                    add_piece(kind, num_tokens, scales[group], sums + 2 * t * TILE * TILE, totals + (tile + t) * piece);
            }
            if (tile < x->num_tiles) {
                multiply(0, &w, x, tile, start / UNIT, num_steps, sums);
                add_piece(kind, num_tokens, scales[group], sums, totals + tile * piece);
            }
            w.first += num_steps * w.advance;
            w.second += num_steps * w.advance;
        }
    }
}

static void dot_piece_of(const struct matrix *m, int64_t row, const struct tokens *x, float *totals) {
#define DOT(KIND, GROUP_LOG2) dot_piece(KIND, GROUP_LOG2, m, row, x, totals)
    FOR_EACH_FORM(m, DOT)
#undef DOT
}

INLINE int64_t tiles_of(int64_t num_tokens) { return (num_tokens + TILE - 1) / TILE; }

/* Where the sum of a token and a row of the piece is, of the tokens from a tile on. */
INLINE int64_t total_of(int64_t num_tokens, int64_t first_tile, int64_t t, int64_t r) {
    return num_tokens == 1 ? r : ((t / TILE - first_tile) * PIECE_ROWS + r) * TILE + t % TILE;
}

/* totals += products of tokens with the outliers of `count` rows. x: of all tokens. */
INLINE void add_row_outliers(const struct matrix *m, int64_t row, int64_t count, const char *x, int x_kind, int64_t x_stride,
                             int64_t num_tokens, int64_t first_tile, float *totals) {
    if (!has_outliers(m))
        return;
    for (int64_t r = 0; r < count; r++) {
        const struct outlier o = outlier_of(m, row_of(m, row + r));
        for (int64_t t = first_tile * TILE; t < smaller(num_tokens, (first_tile + MAX_TILES) * TILE); t++)
            totals[total_of(num_tokens, first_tile, t, r)] += number_of(x_kind, x + t * x_stride, o.place) * o.rest;
    }
}

/* number i of a row that is float32 or bfloat16, the nearest one. */
INLINE void put(int kind, char *row, int64_t i, float number) {
    if (kind == FLOAT32)
        ((float *)row)[i] = number;
    else
        ((uint16_t *)row)[i] = ((__v8hu)(_mm_cvtneps_pbh(_mm_set_ps1(number))))[0];
}

/* e to the x, within two units of the last place; none of it overflows to what is no number. */
INLINE __m512 exponential(__m512 x) {
    static const float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    static const float COEFFICIENTS[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}; /* of Cephes' expf */
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-104.0f));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)), 0), sum = _mm512_set1_ps(COEFFICIENTS[0]);
    x = _mm512_fnmadd_ps(power, _mm512_set1_ps(LN2_HIGH), x);
    x = _mm512_fnmadd_ps(power, _mm512_set1_ps(LN2_LOW), x);
    for (int i = 1; i < 6; i++)
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(COEFFICIENTS[i]));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(x, x), sum, _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(sum, power);
}

/* gates = activation(gates) * ups */
static void activate(int activation, int64_t count, float *gates, const float *ups) {
    for (int64_t i = 0; i < count; i += 16) {
        __m512 gate = _mm512_load_ps(gates + i);
        if (activation == SILU) {
            __m512 one = _mm512_set1_ps(1.0f);
            gate = _mm512_div_ps(gate, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
        } else {
            for (int lane = 0; lane < 16; lane++)
                gates[i + lane] = activated(activation, gates[i + lane]);
            gate = _mm512_load_ps(gates + i);
        }
        _mm512_store_ps(gates + i, _mm512_mul_ps(gate, _mm512_load_ps(ups + i)));
    }
}

/* x [num_tokens, width] -> out [num_tokens, num_rows], each float32 or bfloat16, strides in bytes: out = x rows^T, or with a second
   matrix of as many rows, out = activation(x rows^T) * (x up^T). packed: aligned to LINE, as long as _operand in cpu.py says. */
INLINE void product(const struct matrix *m, const struct matrix *up, int activation, const char *x, int x_kind, int64_t x_stride,
                    int64_t num_tokens, char *packed, char *out, int out_kind, int64_t out_stride, int num_threads) {
    const int64_t num_pieces = (m->num_rows + PIECE_ROWS - 1) / PIECE_ROWS, num_steps = (m->width + UNIT - 1) / UNIT;
    const int64_t piece = piece_of(num_pieces, num_threads);
    struct tokens to = {.packed = packed, .num_parts = x_kind == BFLOAT16 ? 1 : MAX_PARTS};
    to.part_nbytes = num_tokens == 1 ? LINE : TILE_NBYTES;
    to.tile_nbytes = num_steps * to.num_parts * to.part_nbytes;
    to.num_tiles = tiles_of(num_tokens);
#pragma omp parallel num_threads(num_threads)
    {
        shape_tiles(TILE, num_tokens == 1 ? 1 : TILE);
#pragma omp for schedule(static)
        for (int64_t step = 0; step < num_steps; step++)
            pack_step(x, x_kind, x_stride, num_tokens, m->width, step, &to);
#pragma omp for schedule(dynamic, piece)
        for (int64_t p = 0; p < num_pieces; p++) {
            const int64_t row = p * PIECE_ROWS, count = smaller(PIECE_ROWS, m->num_rows - row);
            for (int64_t tile = 0; tile < to.num_tiles; tile += MAX_TILES) {
                float totals[MAX_TILES * PIECE_ROWS * TILE] __attribute__((aligned(64)));
                float ups[MAX_TILES * PIECE_ROWS * TILE] __attribute__((aligned(64)));
                struct tokens some = to;
                some.packed += tile * to.tile_nbytes;
                some.num_tiles = smaller(MAX_TILES, to.num_tiles - tile);
                dot_piece_of(m, row, &some, totals);
                add_row_outliers(m, row, count, x, x_kind, x_stride, num_tokens, tile, totals);
                if (up) {
                    dot_piece_of(up, row, &some, ups);
                    add_row_outliers(up, row, count, x, x_kind, x_stride, num_tokens, tile, ups);
                    activate(activation, some.num_tiles * PIECE_ROWS * (num_tokens == 1 ? 1 : TILE), totals, ups);
                }
                for (int64_t t = tile * TILE; t < smaller(num_tokens, (tile + MAX_TILES) * TILE); t++)
                    for (int64_t r = 0; r < count; r++)
                        put(out_kind, out + t * out_stride, row + r, totals[total_of(num_tokens, tile, t, r)]);
            }
        }
        _tile_release();
    }
}

void offload_sirius_tiles_linear(const struct matrix *m, const char *x, int x_kind, int64_t x_stride, int64_t num_tokens,
                                 char *packed, char *out, int out_kind, int64_t out_stride, int num_threads) {
    product(m, NULL, SILU, x, x_kind, x_stride, num_tokens, packed, out, out_kind, out_stride, num_threads);
}

void offload_sirius_tiles_gate_up(const struct matrix *gate, const struct matrix *up, int activation, const char *x, int x_kind,
                                  int64_t x_stride, int64_t num_tokens, char *packed, char *out, int out_kind, int64_t out_stride,
                                  int num_threads) {
    product(gate, up, activation, x, x_kind, x_stride, num_tokens, packed, out, out_kind, out_stride, num_threads);
}

/* ---- sums of rows ---- */

/* UNIT numbers -> parts as `split` makes them, but number i and number 16 + i beside each other. */
INLINE void split_pairs(int num_parts, __m512 low, __m512 high, char *out, int64_t step) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
    for (int p = 0; p < num_parts; p++) {
        __m512i first = (__m512i)low, second = (__m512i)high;
        if (p == num_parts - 1) {
            first = _mm512_add_epi32(first, half);
            second = _mm512_add_epi32(second, half);
        }
        second = _mm512_and_si512(second, upper);
        _mm512_store_si512(out + p * step, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
        if (p == num_parts - 1)
            break;
        low -= (__m512)_mm512_and_si512(first, upper);
        high -= (__m512)second;
    }
}

/* A block of neurons: their rows, those of the next block, what their weights share, and the tokens' numbers times that. */
struct block {
    const char *at[BLOCK_ROWS], *next[BLOCK_ROWS];
    const uint16_t *tables[BLOCK_ROWS];
    char parts[MAX_TILES][BLOCK_ROWS / UNIT][MAX_PARTS][TILE][LINE] __attribute__((aligned(64)));
    char decoded[SPAN / UNIT][BLOCK_ROWS / UNIT][2][TILE][LINE]; /* units, steps, tiles of 16 columns, pairs of neurons */
};

/* z: of the block's first neuron. */
INLINE void weigh(int kind, int group_log2, int num_parts, int64_t num_rows, int64_t width, int64_t group, const char *z, int z_kind,
                  int64_t z_stride, int64_t num_tokens, struct block *b) {
    uint16_t halves[BLOCK_ROWS] __attribute__((aligned(64)));
    float scales[BLOCK_ROWS] __attribute__((aligned(64)));
    const int64_t scale_at = scales_place(kind, width) + 2 * group, zero_at = zeros_place(kind, width, group_log2) + group;
    if (kind != BFLOAT16) {
        for (int64_t j = 0; j < BLOCK_ROWS; j++) {
            halves[j] = *(const uint16_t *)(b->at[j] + scale_at);
            if (kind == INT4)
                b->tables[j] = integers_of_zero[*(const uint8_t *)(b->at[j] + zero_at)];
        }
        scales_of_halves(kind, BLOCK_ROWS, halves, scales);
    }
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t j = 0; j < num_rows; j += UNIT) {
            __m512 low, high;
            numbers_at(z_kind, z + t * z_stride, j, num_rows, &low, &high);
            if (kind != BFLOAT16) {
                low *= _mm512_load_ps(scales + j);
                high *= _mm512_load_ps(scales + j + 16);
            }
            split_pairs(num_parts, low, high, b->parts[t / TILE][j / UNIT][0][t % TILE], TILE_NBYTES);
        }
}

/* Some units of columns, of one group, as right operands. */
INLINE void decode_block(int kind, int64_t num_steps, int64_t column, int64_t num_units, int64_t width, struct block *b) {
    const int partial = kind == BFLOAT16 && column + num_units * UNIT > width;
    for (int64_t step = 0; step < num_steps; step++)
        for (int64_t pair = 0; pair < TILE; pair++) {
            const int64_t j = step * UNIT + pair;
            fetch_far_ahead(kind, b->next[j], column, column + num_units * UNIT);
            fetch_far_ahead(kind, b->next[j + TILE], column, column + num_units * UNIT);
#pragma GCC unroll 4
            for (int64_t unit = 0; unit < num_units; unit++) {
                const int64_t c = column + unit * UNIT;
                __m512i first, second;
                if (partial && c + UNIT > width) {
                    first = last_integers_at(b->at[j], c, width);
                    second = last_integers_at(b->at[j + TILE], c, width);
                } else {
                    first = integers_at(kind, b->at[j], c, b->tables[j]);
                    second = integers_at(kind, b->at[j + TILE], c, b->tables[j + TILE]);
                }
                _mm512_store_si512(b->decoded[unit][step][0][pair], _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(b->decoded[unit][step][1][pair], _mm512_unpackhi_epi16(first, second));
            }
        }
}

/* out[token][UNIT columns] += sums of one or two tiles of tokens over some steps of neurons. */
INLINE void sum_tiles(int two, int num_parts, int64_t num_steps, char (*z)[BLOCK_ROWS / UNIT][MAX_PARTS][TILE][LINE],
                      char (*decoded)[2][TILE][LINE], int64_t num_tokens, float *out, int64_t out_stride) {
    float sums[4][TILE][TILE] __attribute__((aligned(64)));
    /* Interleaving two rows leaves the columns of a pair of tiles in this order. */
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < num_steps; step++) {
        _tile_loadd(6, decoded[step][0], LINE);
        _tile_loadd(7, decoded[step][1], LINE);
        for (int p = 0; p < num_parts; p++) {
            _tile_loadd(4, z[0][step][p], LINE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, z[1][step][p], LINE);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums[0], LINE);
    _tile_stored(1, sums[1], LINE);
    if (two) {
        _tile_stored(2, sums[2], LINE);
        _tile_stored(3, sums[3], LINE);
    }
    for (int64_t t = 0; t < num_tokens; t++, out += out_stride) {
        __m512 low = _mm512_load_ps(sums[t / TILE * 2][t % TILE]), high = _mm512_load_ps(sums[t / TILE * 2 + 1][t % TILE]);
        _mm512_storeu_ps(out, _mm512_loadu_ps(out) + _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(out + 16, _mm512_loadu_ps(out + 16) + _mm512_permutex2var_ps(low, second, high));
    }
}

/* Columns first .. end of up to MAX_TOKENS tokens; both multiples of UNIT. */
INLINE void down_columns(int kind, int group_log2, const struct matrix *m, int64_t first, int64_t end, const char *z, int z_kind,
                         int64_t z_stride, int64_t num_tokens, float *out, int64_t out_stride) {
    struct block b;
    const int num_parts = z_kind == FLOAT32 ? MAX_PARTS : kind == BFLOAT16 ? 1 : 2, z_nbytes = z_kind == FLOAT32 ? 4 : 2;
    const int64_t num_tiles = tiles_of(num_tokens), size = 1 << group_log2;
    if (num_tokens > TILE && num_tokens % TILE) /* tokens that are not there */
        memset(b.parts, 0, sizeof b.parts);
    for (int64_t row = 0; row < m->num_rows; row += BLOCK_ROWS, z += BLOCK_ROWS * z_nbytes) {
        const int64_t num_rows = smaller(BLOCK_ROWS, m->num_rows - row), num_steps = (num_rows + UNIT - 1) / UNIT;
        for (int64_t j = 0; j < BLOCK_ROWS; j++) {
            b.at[j] = row_of(m, smaller(row + j, m->num_rows - 1));
            b.next[j] = row_of(m, smaller(row + j + BLOCK_ROWS, m->num_rows - 1));
        }
        for (int64_t column = first, stop; column < end; column = stop) {
            stop = smaller(end, (column & -size) + size);
            const int64_t num_units = (stop - column) / UNIT;
            if (kind != BFLOAT16 || column == first)
                weigh(kind, group_log2, num_parts, num_rows, m->width, column >> group_log2, z, z_kind, z_stride, num_tokens, &b);
            if (num_units == size / UNIT)
                decode_block(kind, num_steps, column, size / UNIT, m->width, &b);
            else
                decode_block(kind, num_steps, column, num_units, m->width, &b);
            for (int64_t unit = 0; unit < num_units; unit++) {
                float *place = out + column + unit * UNIT;
                int64_t tile = 0;
                for (; tile + 2 <= num_tiles; tile += 2)
                    sum_tiles(1, num_parts, num_steps, b.parts + tile, b.decoded[unit], smaller(2 * TILE, num_tokens - tile * TILE),
                              place + tile * TILE * out_stride, out_stride);
                if (tile < num_tiles)
                    sum_tiles(0, num_parts, num_steps, b.parts + tile, b.decoded[unit], num_tokens - tile * TILE,
                              place + tile * TILE * out_stride, out_stride);
            }
        }
        add_outliers(m, row, num_rows, first, end, z, z_kind, z_stride, num_tokens, out, out_stride);
    }
}

static void down_columns_of(const struct matrix *m, int64_t first, int64_t end, const char *z, int z_kind, int64_t z_stride,
                            int64_t num_tokens, float *out, int64_t out_stride) {
#define DOWN(KIND, GROUP_LOG2) down_columns(KIND, GROUP_LOG2, m, first, end, z, z_kind, z_stride, num_tokens, out, out_stride)
    FOR_EACH_FORM(m, DOWN)
#undef DOWN
}

/* z [num_tokens, num_rows], float32 or bfloat16, z_stride in bytes -> out [num_tokens, width rounded up to UNIT], float32, out_stride
   in floats: out = z rows. */
void offload_sirius_tiles_down(const struct matrix *m, const char *z, int z_kind, int64_t z_stride, int64_t num_tokens, float *out,
                               int64_t out_stride, int num_threads) {
    const int64_t num_units = rounded_up(m->width, UNIT) / UNIT;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++) {
        int64_t first = num_units * thread / num_threads * UNIT, end = num_units * (thread + 1) / num_threads * UNIT;
        shape_tiles(smaller(TILE, num_tokens), TILE);
        for (int64_t t = 0; t < num_tokens; t++)
            memset(out + t * out_stride + first, 0, (end - first) * sizeof(float));
        for (int64_t t = 0; t < num_tokens; t += MAX_TOKENS) {
            const int64_t count = smaller(MAX_TOKENS, num_tokens - t);
            const char *some = z + t * z_stride;
            down_columns_of(m, first, end, some, z_kind, z_stride, count, out + t * out_stride, out_stride);
        }
        _tile_release();
    }
}

#else

int offload_sirius_tiles_ready(void) { return 0; }

#endif
