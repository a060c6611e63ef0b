/* Products of a few tokens with rows of blocks, on a CPU. Compiled on first use by native.py, called by blocks_cpu.py.

   What the bytes are, offload_sirius/blocks.py says; which weights they stand for, blocks.py beside this file. Blocks become float32
   in the nearest cache, some rows and columns at a time, and meet all tokens there. Each number that comes out is computed in one
   and the same order of additions, whatever number of tokens, rows and threads there are. */

#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum kind { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

enum {
    UNIT = 32,
    SUPER = 256,       /* weights of the larger blocks */
    BLOCK = 512,       /* weights of a row that are decoded at once */
    STEP = BLOCK + 16, /* floats from row to row of them: a power of two would put all into the same places of the cache */
    TILE_ROWS = 4,     /* rows that share the loads of a token */
    TILE_TOKENS = 3,   /* tokens that share the loads of a row */
    NUM_SUMS = 2,      /* chains of additions of a dot product */
    MAX_TOKENS = 64,   /* that meet rows when they are decoded */
    DOWN_ROWS = 8,     /* neurons that are summed before their sum is added */
    STRIP = 4 * LANES, /* columns that are summed in registers; divides BLOCK */
};

struct rows {
    const uint8_t *bytes;
    int64_t stride; /* bytes from row to row */
    int64_t num_rows;
    int64_t width;
    int32_t kind;
};

struct neurons {
    const int32_t *numbers;
    const uint8_t *codes;
    const uint8_t *table;
    int64_t stride; /* bytes from neuron to neuron, of numbers and of codes */
    int64_t table_stride;
    int64_t num_blocks; /* rows of the table */
    int64_t num_rows;
    int64_t width;
    int32_t kind;
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

INLINE float half_at(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return from_half(half);
}

/* ---- sixteen codes become float32 ---- */

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint64_t longs2 __attribute__((vector_size(16)));
typedef int32_t ints16 __attribute__((vector_size(64)));
typedef float floats16 __attribute__((vector_size(64)));

INLINE bytes16 load16(const uint8_t *from) {
    bytes16 bytes;
    memcpy(&bytes, from, sizeof(bytes));
    return bytes;
}

INLINE void store16(float *to, floats16 values) { memcpy(to, &values, sizeof(values)); }

INLINE floats16 load_floats16(const float *from) {
    floats16 values;
    memcpy(&values, from, sizeof(values));
    return values;
}

/* The low or the high four bits. */
INLINE bytes16 nibbles16(const uint8_t *from, int high) { return high ? load16(from) >> 4 : load16(from) & 15; }

INLINE ints16 ints_of(bytes16 codes) { return __builtin_convertvector(codes, ints16); }

INLINE floats16 floats_of(bytes16 codes) { return __builtin_convertvector(ints_of(codes), floats16); }

/* Signed bytes: compilers turn unsigned ones into floats faster. */
INLINE floats16 signed16(const uint8_t *from) { return floats_of(load16(from) ^ 128) - 128; }

/* Codes of five bits: their low four, and two bytes with a bit for each. */
INLINE floats16 fifth_bits(bytes16 low, const uint8_t *high) {
    const ints16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint16_t bits;
    memcpy(&bits, high, sizeof(bits));
    const ints16 all = (ints16){0} + (int32_t)bits;
    return __builtin_convertvector(ints_of(low) | (all >> place & 1) << 4, floats16);
}

/* Bits five and six of codes, in their places: those of pair 0 to 3 of each byte. Shifts of bytes by numbers that compilers do not
   know take them many steps. */
INLINE bytes16 upper_pairs(bytes16 pairs, int pair) {
    return pair == 0 ? (pairs & 3) << 4 : pair == 1 ? (pairs & 12) << 2 : pair == 2 ? pairs & 48 : (pairs & 192) >> 2;
}

/* The same of eight bytes: one pair of each, then another. */
INLINE bytes16 two_upper_pairs(const uint8_t *from, int first, int second) {
    const longs2 front = {~UINT64_C(0), 0};
    uint64_t bits;
    memcpy(&bits, from, sizeof(bits));
    const bytes16 twice = (bytes16)(longs2){bits, bits};
    return (upper_pairs(twice, first) & (bytes16)front) | (upper_pairs(twice, second) & ~(bytes16)front);
}

/* ---- rows along the inputs ---- */

/* Groups of a super-block have scales and minima of six bits each: of the last four two bits lie on top of those of the first. */
INLINE int scale_of(const uint8_t *scales, int group) {
    return group < 4 ? scales[group] & 63 : (scales[group + 4] & 15) | (scales[group - 4] >> 2 & 48);
}

INLINE int minimum_of(const uint8_t *scales, int group) {
    return group < 4 ? scales[group + 4] & 63 : scales[group + 4] >> 4 | (scales[group] >> 2 & 48);
}

/* 32 weights of a row, from a multiple of 32 on. */
INLINE void unit_of_row(int kind, const uint8_t *row, int64_t column, float *out) {
    const int group = column % SUPER / UNIT;
    if (kind == Q8_0) {
        const uint8_t *b = row + column / UNIT * 34;
        const float d = half_at(b);
        store16(out, signed16(b + 2) * d);
        store16(out + 16, signed16(b + 18) * d);
    } else if (kind == Q4_0) {
        const uint8_t *b = row + column / UNIT * 18;
        const float d = half_at(b);
        const bytes16 low = load16(b + 2);
        store16(out, (floats_of(low & 15) - 8) * d);
        store16(out + 16, (floats_of(low >> 4) - 8) * d);
    } else if (kind == Q4_1) {
        const uint8_t *b = row + column / UNIT * 20;
        const float d = half_at(b), m = half_at(b + 2);
        const bytes16 low = load16(b + 4);
        store16(out, floats_of(low & 15) * d + m);
        store16(out + 16, floats_of(low >> 4) * d + m);
    } else if (kind == Q5_0 || kind == Q5_1) {
        const int has_minimum = kind == Q5_1;
        const uint8_t *b = row + column / UNIT * (22 + 2 * has_minimum), *high = b + 2 + 2 * has_minimum;
        const float d = half_at(b), m = has_minimum ? half_at(b + 2) : 0, centre = has_minimum ? 0 : 16;
        const bytes16 low = load16(high + 4);
        store16(out, (fifth_bits(low & 15, high) - centre) * d + m);
        store16(out + 16, (fifth_bits(low >> 4, high + 2) - centre) * d + m);
    } else if (kind == Q4_K || kind == Q5_K) {
        const uint8_t *b = row + column / SUPER * (kind == Q4_K ? 144 : 176), *scales = b + 4;
        const uint8_t *high = b + 16, *low = b + (kind == Q4_K ? 16 : 48) + group / 2 * UNIT;
        const float d = half_at(b) * (float)scale_of(scales, group), m = half_at(b + 2) * (float)minimum_of(scales, group);
        for (int part = 0; part < UNIT; part += 16) {
            bytes16 codes = nibbles16(low + part, group % 2);
            if (kind == Q5_K)
                codes |= (bytes16)((load16(high + part) & (uint8_t)(1 << group)) != 0) & 16;
            store16(out + part, floats_of(codes) * d - m);
        }
    } else {
        const uint8_t *b = row + column / SUPER * 210;
        const int half = group / 4, quarter = group % 4;
        const uint8_t *low = b + half * 64 + quarter % 2 * UNIT, *high = b + 128 + half * UNIT;
        const int8_t *scales = (const int8_t *)b + 192 + group * 2;
        const float d = half_at(b + 208);
        for (int part = 0; part < 2; part++) {
            const bytes16 codes = nibbles16(low + part * 16, quarter / 2) | upper_pairs(load16(high + part * 16), quarter);
            store16(out + part * 16, (floats_of(codes) - 32) * (d * (float)scales[part]));
        }
    }
}

INLINE void decode_row(int kind, const uint8_t *row, int64_t first, int64_t end, float *out) {
    for (int64_t column = first; column < end; column += UNIT)
        unit_of_row(kind, row, column, out + column - first);
}

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
        for (int v = 0; v < UNIT / LANES; v++) {
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

INLINE float sum_of(const vec *sums) {
    float lanes[LANES] __attribute__((aligned(4 * LANES)));
    *(vec *)lanes = sums[0] + sums[1];
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

/* out[t * out_stride + r], for TILE_ROWS rows from `row` on and up to MAX_TOKENS tokens. */
INLINE void dot_rows(int kind, const struct rows *m, int64_t row, const float *x, int64_t x_stride, int64_t num_tokens, float *out,
                     int64_t out_stride) {
    float weights[TILE_ROWS * STEP] __attribute__((aligned(64)));
    row_sums sums[MAX_TOKENS];
    memset(sums, 0, num_tokens * sizeof(row_sums));
    for (int64_t first = 0; first < m->width; first += BLOCK) {
        const int64_t end = smaller(first + BLOCK, m->width);
        int64_t t = 0;
        for (int r = 0; r < TILE_ROWS; r++)
            decode_row(kind, m->bytes + smaller(row + r, m->num_rows - 1) * m->stride, first, end, weights + r * STEP);
        for (; t + TILE_TOKENS <= num_tokens; t += TILE_TOKENS)
            dot_decoded(TILE_TOKENS, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
        if (num_tokens - t == 2)
            dot_decoded(2, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
        if (num_tokens - t == 1)
            dot_decoded(1, x + t * x_stride + first, x_stride, weights, end - first, sums + t);
    }
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t r = 0; r < smaller(TILE_ROWS, m->num_rows - row); r++)
            out[t * out_stride + r] = sum_of(sums[t][r]);
}

#define FOR_EACH_KIND(DO)                                                                                                         \
    switch (m->kind) {                                                                                                            \
    case Q8_0: DO(Q8_0); break;                                                                                                   \
    case Q4_0: DO(Q4_0); break;                                                                                                   \
    case Q4_1: DO(Q4_1); break;                                                                                                   \
    case Q5_0: DO(Q5_0); break;                                                                                                   \
    case Q5_1: DO(Q5_1); break;                                                                                                   \
    case Q4_K: DO(Q4_K); break;                                                                                                   \
    case Q5_K: DO(Q5_K); break;                                                                                                   \
    default: DO(Q6_K);                                                                                                            \
    }

static void dot_rows_of(const struct rows *m, int64_t row, const float *x, int64_t x_stride, int64_t num_tokens, float *out,
                        int64_t out_stride) {
#define DOT(KIND) dot_rows(KIND, m, row, x, x_stride, num_tokens, out, out_stride)
    FOR_EACH_KIND(DOT)
}

/* x [num_tokens, width], out [num_tokens, num_rows]: out = x rows^T. Strides in floats. */
void offload_sirius_block_linear(const struct rows *m, const float *x, int64_t x_stride, int64_t num_tokens, float *out,
                                 int64_t out_stride, int num_threads) {
    const int64_t num_tiles = (m->num_rows + TILE_ROWS - 1) / TILE_ROWS, eighth = num_tiles / (8 * num_threads);
    const int64_t piece = eighth > 0 ? eighth : 1;
#pragma omp parallel for schedule(dynamic, piece) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t t = 0; t < num_tokens; t += MAX_TOKENS)
            dot_rows_of(m, tile * TILE_ROWS, x + t * x_stride, x_stride, smaller(MAX_TOKENS, num_tokens - t),
                        out + t * out_stride + tile * TILE_ROWS, out_stride);
}

static void decode_row_of(const struct rows *m, int64_t row, float *out) {
#define DECODE(KIND) decode_row(KIND, m->bytes + row * m->stride, 0, m->width, out)
    FOR_EACH_KIND(DECODE)
}

/* out [num_rows, width], contiguous: the weights. */
void offload_sirius_block_weights(const struct rows *m, float *out, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < m->num_rows; row++)
        decode_row_of(m, row, out + row * m->width);
}

/* ---- rows of a down projection, a neuron each ---- */

INLINE int group_of_kind(int kind) { return kind == Q6_K ? 16 : UNIT; }
INLINE int block_of_kind(int kind) { return kind >= Q4_K ? SUPER : UNIT; }
INLINE int unit_nbytes(int kind) { return kind == Q8_0 ? 32 : kind == Q6_K ? 24 : kind == Q5_0 || kind == Q5_1 || kind == Q5_K ? 20 : 16; }

INLINE void decode_halves(const uint8_t *from, int64_t count, float *out) {
    int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
#endif
    for (; i < count; i++)
        out[i] = half_at(from + 2 * i);
}

/* Factors and summands of a group of neurons, for columns first .. first + count. */
INLINE void decode_group(int kind, const struct neurons *m, int64_t group, int64_t first, int64_t count, float *factors,
                         float *summands) {
    const int per_block = block_of_kind(kind) / group_of_kind(kind), sub = group % per_block, wrapped = sub % 4;
    const uint8_t *row = m->table + group / per_block * m->table_stride;
    const uint8_t *d = row + 2 * first, *minimum = row + 2 * (m->width + first);
    const uint8_t *scales = row + (kind == Q6_K ? 2 : 4) * m->width + first;
    decode_halves(d, count, factors);
    if (kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K)
        decode_halves(minimum, count, summands);
    if (kind == Q6_K) {
        const int8_t *own = (const int8_t *)scales + sub * m->width;
        for (int64_t i = 0; i < count; i++)
            factors[i] *= (float)own[i];
    }
    if (kind == Q4_K || kind == Q5_K) {
        const uint8_t *top = scales + wrapped * m->width, *second = top + 4 * m->width, *mixed = top + 8 * m->width;
        for (int64_t i = 0; i < count; i++) {
            const int scale = sub < 4 ? top[i] & 63 : (mixed[i] & 15) | (top[i] >> 2 & 48);
            const int low = sub < 4 ? second[i] & 63 : mixed[i] >> 4 | (second[i] >> 2 & 48);
            factors[i] *= (float)scale;
            summands[i] = -(summands[i] * (float)low);
        }
    }
}

/* Weights of a neuron. */
INLINE void decode_neuron(int kind, const uint8_t *codes, int64_t first, int64_t count, const float *factors,
                          const float *summands, float *out) {
    const float centre = kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : kind == Q6_K ? 32 : 0;
    const int has_summand = kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K;
    for (int64_t c = 0; c < count; c += UNIT) {
        const uint8_t *from = codes + (first + c) / UNIT * unit_nbytes(kind);
        floats16 numbers[2];
        if (kind == Q8_0) {
            numbers[0] = signed16(from);
            numbers[1] = signed16(from + 16);
        } else {
            const bytes16 low = load16(from);
            if (unit_nbytes(kind) == 20) {
                numbers[0] = fifth_bits(low & 15, from + 16);
                numbers[1] = fifth_bits(low >> 4, from + 18);
            } else if (kind == Q6_K) {
                numbers[0] = floats_of((low & 15) | two_upper_pairs(from + 16, 0, 1));
                numbers[1] = floats_of(low >> 4 | two_upper_pairs(from + 16, 2, 3));
            } else {
                numbers[0] = floats_of(low & 15);
                numbers[1] = floats_of(low >> 4);
            }
        }
        for (int part = 0; part < 2; part++) {
            const int64_t at = c + part * 16;
            floats16 weights = (numbers[part] - centre) * load_floats16(factors + at);
            if (has_summand)
                weights += load_floats16(summands + at);
            store16(out + at, weights);
        }
    }
}

INLINE const uint8_t *codes_of(const struct neurons *m, int64_t row) { return m->codes + row * m->stride; }

/* Bytes from a file may say anything: a neuron behind the table is the first. */
INLINE int64_t number_of(int kind, const struct neurons *m, int64_t row) {
    const int64_t number = *(const int32_t *)((const uint8_t *)m->numbers + row * m->stride);
    return number >= 0 && number < m->num_blocks * block_of_kind(kind) ? number : 0;
}

struct factors {
    float factors[BLOCK], summands[BLOCK];
    int64_t group; /* whose they are; -1: nobody's */
};

/* Columns first .. first + count of some neurons, BLOCK floats apart. Factors are those of the last group: neighbours share them. */
INLINE void decode_neurons(int kind, const struct neurons *m, int64_t row, int64_t num_rows, int64_t first, int64_t count,
                           struct factors *f, float *weights) {
    for (int64_t j = 0; j < num_rows; j++) {
        const int64_t group = number_of(kind, m, row + j) / group_of_kind(kind);
        if (group != f->group)
            decode_group(kind, m, group, first, count, f->factors, f->summands);
        f->group = group;
        __builtin_prefetch(codes_of(m, smaller(row + j + DOWN_ROWS, m->num_rows - 1)) + first / UNIT * unit_nbytes(kind));
        decode_neuron(kind, codes_of(m, row + j), first, count, f->factors, f->summands, weights + j * BLOCK);
    }
}

/* out += z weights, for num_columns columns, of which there are whole units. */
INLINE void add_neurons(int64_t num_tokens, int64_t num_rows, int64_t num_columns, const float *z, int64_t z_stride,
                        const float *weights, float *out, int64_t out_stride) {
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t c = 0; c < num_columns; c += LANES) {
            vec sum = {0};
            for (int64_t j = 0; j < num_rows; j++)
                sum += *(const vec *)(weights + j * BLOCK + c) * z[t * z_stride + j];
            *(vec_anywhere *)(out + t * out_stride + c) += (vec_anywhere)sum;
        }
}

INLINE void down_columns(int kind, const struct neurons *m, int64_t first, int64_t end, const float *z, int64_t z_stride,
                         int64_t num_tokens, float *out, int64_t out_stride) {
    float weights[DOWN_ROWS * BLOCK] __attribute__((aligned(64)));
    struct factors f;
    for (int64_t column = first; column < end; column += BLOCK) {
        const int64_t count = smaller(BLOCK, end - column);
        f.group = -1;
        for (int64_t row = 0; row < m->num_rows; row += DOWN_ROWS) {
            const int64_t num_rows = smaller(DOWN_ROWS, m->num_rows - row);
            decode_neurons(kind, m, row, num_rows, column, count, &f, weights);
            if (num_rows == DOWN_ROWS)
                add_neurons(num_tokens, DOWN_ROWS, count, z + row, z_stride, weights, out + column, out_stride);
            else
                add_neurons(num_tokens, num_rows, count, z + row, z_stride, weights, out + column, out_stride);
        }
    }
}

static void down_columns_of(const struct neurons *m, int64_t first, int64_t end, const float *z, int64_t z_stride,
                            int64_t num_tokens, float *out, int64_t out_stride) {
#define DOWN(KIND) down_columns(KIND, m, first, end, z, z_stride, num_tokens, out, out_stride)
    FOR_EACH_KIND(DOWN)
}

/* z [num_tokens, num_rows], out [num_tokens, width]: out = z rows. Strides in floats. */
void offload_sirius_block_down(const struct neurons *m, const float *z, int64_t z_stride, int64_t num_tokens, float *out,
                               int64_t out_stride, int num_threads) {
    const int64_t num_units = m->width / UNIT;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++) {
        const int64_t first = num_units * thread / num_threads * UNIT, end = num_units * (thread + 1) / num_threads * UNIT;
        for (int64_t t = 0; t < num_tokens; t++)
            memset(out + t * out_stride + first, 0, (end - first) * sizeof(float));
        down_columns_of(m, first, end, z, z_stride, num_tokens, out, out_stride);
    }
}

INLINE void neuron_weights(int kind, const struct neurons *m, int64_t first_row, int64_t end_row, float *out) {
    float weights[BLOCK];
    struct factors f;
    for (int64_t column = 0; column < m->width; column += BLOCK) {
        const int64_t count = smaller(BLOCK, m->width - column);
        f.group = -1;
        for (int64_t row = first_row; row < end_row; row++) {
            decode_neurons(kind, m, row, 1, column, count, &f, weights);
            memcpy(out + row * m->width + column, weights, count * sizeof(float));
        }
    }
}

static void neuron_weights_of(const struct neurons *m, int64_t first_row, int64_t end_row, float *out) {
#define WEIGHTS(KIND) neuron_weights(KIND, m, first_row, end_row, out)
    FOR_EACH_KIND(WEIGHTS)
}

/* out [num_rows, width], contiguous: the weights. */
void offload_sirius_neuron_weights(const struct neurons *m, float *out, int num_threads) {
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++)
        neuron_weights_of(m, m->num_rows * thread / num_threads, m->num_rows * (thread + 1) / num_threads, out);
}

/* ---- a down projection is regrouped by neuron ---- */

/* Codes of 32 weights of a block. */
INLINE void unit_codes(int kind, const uint8_t *block, int unit, uint8_t *out) {
    if (kind == Q8_0) {
        memcpy(out, block + 2, UNIT);
        return;
    }
    bytes16 codes[2];
    if (kind == Q4_K || kind == Q5_K) {
        const uint8_t *high = block + 16, *low = block + (kind == Q4_K ? 16 : 48) + unit / 2 * UNIT;
        for (int part = 0; part < 2; part++) {
            codes[part] = nibbles16(low + part * 16, unit % 2);
            if (kind == Q5_K)
                codes[part] |= (bytes16)((load16(high + part * 16) & (uint8_t)(1 << unit)) != 0) & 16;
        }
    } else if (kind == Q6_K) {
        const int half = unit / 4, quarter = unit % 4;
        const uint8_t *low = block + half * 64 + quarter % 2 * UNIT, *high = block + 128 + half * UNIT;
        for (int part = 0; part < 2; part++)
            codes[part] = nibbles16(low + part * 16, quarter / 2) | upper_pairs(load16(high + part * 16), quarter);
    } else {
        const uint8_t *low = block + (kind == Q4_0 ? 2 : kind == Q4_1 ? 4 : kind == Q5_0 ? 6 : 8);
        codes[0] = load16(low) & 15;
        codes[1] = load16(low) >> 4;
    }
    memcpy(out, codes, UNIT);
    if (kind == Q5_0 || kind == Q5_1) {
        uint32_t high;
        memcpy(&high, block + (kind == Q5_0 ? 2 : 4), sizeof(high));
        for (int i = 0; i < UNIT; i++)
            out[i] |= (high >> i & 1) << 4;
    }
}

/* Codes of 32 outputs of a neuron as they lie in its record. */
INLINE void write_unit(int kind, const uint8_t *codes, uint8_t *out) {
    if (kind == Q8_0) {
        memcpy(out, codes, UNIT);
        return;
    }
    const bytes16 low = (load16(codes) & 15) | load16(codes + 16) << 4;
    memcpy(out, &low, sizeof(low));
    uint64_t eights[4];
    memcpy(eights, codes, sizeof(eights));
    for (int i = 0; i < 4; i++)
        eights[i] = eights[i] >> 4 & (kind == Q6_K ? UINT64_C(0x0303030303030303) : UINT64_C(0x0101010101010101));
    if (kind == Q6_K) {
        const uint64_t pairs = eights[0] | eights[1] << 2 | eights[2] << 4 | eights[3] << 6;
        memcpy(out + 16, &pairs, sizeof(pairs));
    } else if (unit_nbytes(kind) == 20)
        for (int i = 0; i < 4; i++)
            out[16 + i] = eights[i] * UINT64_C(0x0102040810204080) >> 56; /* bit i is that of byte i */
}

INLINE void regroup(int kind, const uint8_t *stored, int64_t row_nbytes, int64_t num_outputs, int64_t num_blocks, uint8_t *codes,
                    int64_t stride) {
    const int block = block_of_kind(kind);
    const int64_t block_nbytes = row_nbytes / num_blocks;
    for (int64_t b = 0; b < num_blocks; b++)
        for (int unit = 0; unit < block / UNIT; unit++)
            for (int64_t first = 0; first < num_outputs; first += UNIT) {
                uint8_t by_output[UNIT], by_neuron[UNIT][UNIT];
                for (int o = 0; o < UNIT; o++) {
                    unit_codes(kind, stored + (first + o) * row_nbytes + b * block_nbytes, unit, by_output);
                    for (int n = 0; n < UNIT; n++)
                        by_neuron[n][o] = by_output[n];
                }
                for (int n = 0; n < UNIT; n++)
                    write_unit(kind, by_neuron[n], codes + (b * block + unit * UNIT + n) * stride + first / UNIT * unit_nbytes(kind));
            }
}

/* m: where the codes of all neurons go, from the first of the outputs on. stored: rows of num_blocks blocks, contiguous. By the
   thread that calls. */
void offload_sirius_regroup(const struct neurons *m, const uint8_t *stored, int64_t row_nbytes, int64_t num_outputs,
                            int64_t num_blocks) {
#define REGROUP(KIND) regroup(KIND, stored, row_nbytes, num_outputs, num_blocks, (uint8_t *)m->codes, m->stride)
    FOR_EACH_KIND(REGROUP)
}
