/* int4 rows from float weights: what weights/quant.py says in torch, operation for operation, and the same bits. Compiled on first
   use by native.py, without contracting products and sums, called by cpu.py.

   There a weight is passed over some hundred times, here a group stays in the nearest cache. Plain loops, which compilers make
   vectors of. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { BLOCK = 32, MAX_GROUP = 128, MAX_INTEGER = 15, ZERO_STEPS = 16, OUTLIER_NBYTES = 4, NUM_ITERATIONS = 10, NOT_A_NUMBER = 0x7e00 };

static const float BETA = 3.0f, SMALLEST_SCALE = 0x1p-24f, LEAST_DIVISOR = 1e-6f;

static uint16_t half_of(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, sizeof(bits));
    return bits;
#endif
}

static float from_half(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    _Float16 value;
    memcpy(&value, &half, sizeof(half));
    return (float)value;
#endif
}

static float clamped(float value, float least, float most) {
    value = value > least ? value : least;
    return value < most ? value : most;
}

static float stored_scale(float scale) { return from_half(half_of(scale > SMALLEST_SCALE ? scale : SMALLEST_SCALE)); }

static float stored_zero(float zero) { return clamped(rintf(zero * ZERO_STEPS), 0, 255) / ZERO_STEPS; }

/* Added in halves; overwrites them. */
static float sum_of(float *values, int count) {
    while (count > 1) {
        int half = count / 2;
        float last = values[count - 1];
        for (int i = 0; i < half; i++)
            values[i] += values[half + i];
        if (count % 2)
            values[0] += last;
        count = half;
    }
    return values[0];
}

struct coding {
    float scale, zero;
};

static struct coding covering(const float *weights, int count) {
    float lowest = 0, highest = 0;
    for (int i = 0; i < count; i++) {
        lowest = weights[i] < lowest ? weights[i] : lowest;
        highest = weights[i] > highest ? weights[i] : highest;
    }
    struct coding c = {stored_scale((highest - lowest) / MAX_INTEGER), 0};
    c.zero = stored_zero(-lowest * (1 / c.scale));
    return c;
}

static struct coding solved(const float *weights, int count) {
    float steps[MAX_GROUP], integers[MAX_GROUP], residuals[MAX_GROUP], targets[MAX_GROUP], sums[MAX_GROUP], more[MAX_GROUP];
    struct coding c = covering(weights, count), best = c;
    float least = INFINITY;
    for (int iteration = 0; iteration <= NUM_ITERATIONS; iteration++) {
        const float inverse = 1 / c.scale;
        for (int i = 0; i < count; i++) {
            steps[i] = weights[i] * inverse;
            integers[i] = clamped(rintf(steps[i] + c.zero), 0, MAX_INTEGER);
            residuals[i] = steps[i] - (integers[i] - c.zero);
            sums[i] = residuals[i] * residuals[i];
        }
        const float error = sum_of(sums, count) * (c.scale * c.scale);
        if (error < least) {
            least = error;
            best = c;
        }
        if (iteration == NUM_ITERATIONS)
            break;
        for (int i = 0; i < count; i++) {
            const float size = fabsf(residuals[i]), left = size - 1 / sqrtf(size) * (1 / BETA);
            targets[i] = steps[i] - copysignf(left > 0 ? left : 0, residuals[i]);
            sums[i] = integers[i] - targets[i];
        }
        c.zero = stored_zero(sum_of(sums, count) / (float)count);
        for (int i = 0; i < count; i++) {
            const float shifted = integers[i] - c.zero;
            sums[i] = targets[i] * shifted;
            more[i] = shifted * shifted;
        }
        const float factor = sum_of(sums, count), divisor = sum_of(more, count);
        c.scale = stored_scale(c.scale * (factor / (divisor > LEAST_DIVISOR ? divisor : LEAST_DIVISOR)));
    }
    return best;
}

static int all_finite(const float *weights, int count) {
    float nothing = 0;
    for (int i = 0; i < count; i++)
        nothing += weights[i] * 0;
    return nothing == 0;
}

static void quantise_row(const float *weights, int64_t width, int group, char *row) {
    const int64_t padded = (width + BLOCK - 1) / BLOCK * BLOCK, num_groups = (width + group - 1) / group;
    uint16_t *scales = (uint16_t *)(row + padded / 2);
    uint8_t *zeros = (uint8_t *)(scales + num_groups) + OUTLIER_NBYTES;
    for (int64_t index = 0; index < num_groups; index++) {
        const int64_t first = index * group;
        const int count = width - first < group ? width - first : group;
        uint8_t integers[MAX_GROUP] = {0};
        if (!all_finite(weights + first, count)) {
            scales[index] = NOT_A_NUMBER;
            continue;
        }
        const struct coding c = solved(weights + first, count);
        const float inverse = 1 / c.scale;
        for (int i = 0; i < count; i++)
            integers[i] = (uint8_t)clamped(rintf(weights[first + i] * inverse + c.zero), 0, MAX_INTEGER);
        scales[index] = half_of(c.scale);
        zeros[index] = (uint8_t)(c.zero * ZERO_STEPS);
        for (int block = 0; block < count; block += BLOCK)
            for (int i = 0; i < BLOCK / 2; i++)
                row[(first + block) / 2 + i] = (char)(integers[block + i] | integers[block + BLOCK / 2 + i] << 4);
    }
}

/* weights [num_rows, width], w_stride floats from row to row; rows stride bytes apart, and zeros. A group with weights that are not
   finite gets a scale that is no number. */
void offload_sirius_quantise_int4(const float *weights, int64_t w_stride, int64_t num_rows, int64_t width, int group, char *rows,
                                  int64_t stride, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t row = 0; row < num_rows; row++)
        quantise_row(weights + row * w_stride, width, group, rows + row * stride);
}
