/* Rows of numbers to their place in a layer, as they are or turned. Compiled on first use by native.py, called by rows.py.

   A piece that has come from a disk is read once and its place not looked at soon, so whole lines of 64 bytes are written past
   the caches where the CPU can do that: what is written otherwise is first read. Turning goes through a square of numbers whose
   columns are one line each. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum { LINE = 64, WORDS = LINE / 2, DWORDS = LINE / 4 };

/* place must be of one line; both may lie anywhere. */
static inline void put_line(char *place, const char *line) {
#if defined(__AVX512BW__)
    if (((uintptr_t)place & (LINE - 1)) == 0) {
        _mm512_stream_si512((void *)place, _mm512_loadu_si512((const void *)line));
        return;
    }
#endif
    memcpy(place, line, LINE);
}

/* Lines written past the caches are seen by other threads from here on. */
static inline void settle(void) {
#if defined(__AVX512BW__)
    _mm_sfence();
#endif
}

void offload_sirius_copy_rows(char *place, int64_t place_stride, const char *rows, int64_t stride, int64_t num_rows, int64_t nbytes) {
    for (int64_t row = 0; row < num_rows; row++) {
        char *to = place + row * place_stride;
        const char *from = rows + row * stride;
        int64_t done = 0;
        for (; done + LINE <= nbytes; done += LINE) put_line(to + done, from + done);
        memcpy(to + done, from + done, nbytes - done);
    }
    settle();
}

#if defined(__AVX512BW__)
/* 32 rows of 32 words, turned in registers: neighbouring rows are interleaved word by word, so that what is left is to turn 16 by
   16 pairs of words, columns 0 to 3 of each lane of 128 bits in one half and 4 to 7 in the other. */
static inline void turn_words(char *place, int64_t place_stride, const char *rows, int64_t stride) {
    __m512i halves[2][DWORDS];
    for (int pair = 0; pair < DWORDS; pair++) {
        __m512i even = _mm512_loadu_si512((const void *)(rows + 2 * pair * stride));
        __m512i odd = _mm512_loadu_si512((const void *)(rows + (2 * pair + 1) * stride));
        halves[0][pair] = _mm512_unpacklo_epi16(even, odd);
        halves[1][pair] = _mm512_unpackhi_epi16(even, odd);
    }
    for (int half = 0; half < 2; half++) {
        __m512i fours[4][4]; /* [column of a lane][four pairs of rows] */
        for (int four = 0; four < 4; four++) {
            const __m512i *pairs = halves[half] + 4 * four;
            __m512i low01 = _mm512_unpacklo_epi32(pairs[0], pairs[1]), high01 = _mm512_unpackhi_epi32(pairs[0], pairs[1]);
            __m512i low23 = _mm512_unpacklo_epi32(pairs[2], pairs[3]), high23 = _mm512_unpackhi_epi32(pairs[2], pairs[3]);
            fours[0][four] = _mm512_unpacklo_epi64(low01, low23);
            fours[1][four] = _mm512_unpackhi_epi64(low01, low23);
            fours[2][four] = _mm512_unpacklo_epi64(high01, high23);
            fours[3][four] = _mm512_unpackhi_epi64(high01, high23);
        }
        for (int column = 0; column < 4; column++) {
            const __m512i *four = fours[column];
            __m512i front01 = _mm512_shuffle_i32x4(four[0], four[1], 0x44), back01 = _mm512_shuffle_i32x4(four[0], four[1], 0xee);
            __m512i front23 = _mm512_shuffle_i32x4(four[2], four[3], 0x44), back23 = _mm512_shuffle_i32x4(four[2], four[3], 0xee);
            __m512i lanes[4] = {
                _mm512_shuffle_i32x4(front01, front23, 0x88),
                _mm512_shuffle_i32x4(front01, front23, 0xdd),
                _mm512_shuffle_i32x4(back01, back23, 0x88),
                _mm512_shuffle_i32x4(back01, back23, 0xdd),
            };
            for (int lane = 0; lane < 4; lane++)
                put_line(place + (8 * lane + 4 * half + column) * place_stride, (const char *)&lanes[lane]);
        }
    }
}
#else
static inline void turn_words(char *place, int64_t place_stride, const char *rows, int64_t stride) {
    uint16_t turned[WORDS][WORDS];
    for (int row = 0; row < WORDS; row++) {
        uint16_t line[WORDS];
        memcpy(line, rows + row * stride, LINE);
        for (int column = 0; column < WORDS; column++) turned[column][row] = line[column];
    }
    for (int column = 0; column < WORDS; column++) put_line(place + column * place_stride, (const char *)turned[column]);
}
#endif

static inline void turn_dwords(char *place, int64_t place_stride, const char *rows, int64_t stride) {
    uint32_t turned[DWORDS][DWORDS];
    for (int row = 0; row < DWORDS; row++) {
        uint32_t line[DWORDS];
        memcpy(line, rows + row * stride, LINE);
        for (int column = 0; column < DWORDS; column++) turned[column][row] = line[column];
    }
    for (int column = 0; column < DWORDS; column++) put_line(place + column * place_stride, (const char *)turned[column]);
}

/* rows [num_rows, width] of numbers of 2 or 4 bytes -> place [width, num_rows]. */
void offload_sirius_turn_rows(
    char *place, int64_t place_stride, const char *rows, int64_t stride, int64_t num_rows, int64_t width, int size
) {
    int64_t side = LINE / size;
    for (int64_t row = 0; row < num_rows; row += side)
        for (int64_t column = 0; column < width; column += side) {
            char *to = place + column * place_stride + row * size;
            const char *from = rows + row * stride + column * size;
            if (row + side <= num_rows && column + side <= width) {
                if (size == 2) turn_words(to, place_stride, from, stride);
                else turn_dwords(to, place_stride, from, stride);
                continue;
            }
            for (int64_t c = 0; c < side && column + c < width; c++)
                for (int64_t r = 0; r < side && row + r < num_rows; r++)
                    memcpy(to + c * place_stride + r * size, from + r * stride + c * size, size);
        }
    settle();
}
