/* Passes over a range of a layer's weights, each of which does the work of several operations of PyTorch.
 * All tensors are contiguous, and all numbers are float unless they are sums. No range shares memory with another. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1024, LANES = 16 }; /* a block is summed in float, lane by lane, and blocks in double */
typedef float Lanes __attribute__((vector_size(4 * LANES)));

/* Settings of a step; the order is that of kernels.Step. */
typedef struct {
    float factor;       /* of the gradients */
    float momentum;
    float weight_decay;
    float lr;
    float threshold;    /* smallest kept score */
    float slope;        /* of the sigmoid */
} Step;

/* Largest power of two, up or down, that `exponential` returns. Were it a constant for the compiler, loops would have a
 * division for each case of `exponential`. */
static const volatile float largest_power = 126.0f;

/* exp(x), within 2 units in the last place between -87 and 87, and that of the nearest bound beyond. NaN stays NaN. */
static inline float exponential(float x, float bound) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: rounds a sum to a whole number */
    float t = x * 1.44269504f;
    t = t < -bound ? -bound : t;
    t = t > bound ? bound : t;
    float shifted = t + magic;
    float r = t - (shifted - magic);
    float p = 1.5403530e-4f;
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    int32_t whole, power;
    memcpy(&whole, &shifted, 4);
    power = (int32_t)((uint32_t)(whole - 0x4B400000 + 127) << 23); /* 0x4B400000 are the bits of `magic` */
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

/* SGD with momentum and weight decay on a scaled gradient: returns the new score. */
static inline float moved(float grad, float *momentum, float score, const Step *step) {
    *momentum = *momentum * step->momentum + (grad * step->factor + score * step->weight_decay);
    return score - step->lr * *momentum;
}

/* Return the sum of squares. */
double square(const float *restrict x, size_t n) {
    double sum = 0;
    for (size_t begin = 0; begin < n; begin += BLOCK) {
        size_t end = begin + BLOCK < n ? begin + BLOCK : n, i = begin;
        Lanes lanes = {0};
        for (; i + LANES <= end; i += LANES) {
            Lanes some;
            memcpy(&some, x + i, sizeof some);
            lanes += some * some;
        }
        for (; i < end; i++) lanes[0] += x[i] * x[i];
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    }
    return sum;
}

/* Move scores. */
void move(const float *restrict grad, float *restrict momentum, float *restrict score, size_t n, const Step *step) {
    const Step s = *step;
    for (size_t i = 0; i < n; i++) {
        float m = momentum[i];
        score[i] = moved(grad[i], &m, score[i], &s);
        momentum[i] = m;
    }
}

/* Move scores, and write the weights under their soft mask. */
void move_softly(const float *restrict grad, float *restrict momentum, float *restrict score, size_t n,
                 const Step *step, const float *restrict weight, float *restrict masked) {
    const Step s = *step;
    const float bound = largest_power;
    for (size_t i = 0; i < n; i++) {
        float m = momentum[i];
        float x = moved(grad[i], &m, score[i], &s);
        momentum[i] = m;
        score[i] = x;
        masked[i] = weight[i] / (1.0f + exponential((s.threshold - x) * s.slope, bound));
    }
}

/* Write what `move` will make of each score of a sample. */
void sample(const float *restrict grad, const float *restrict momentum, const float *restrict score, size_t n,
            const Step *step, size_t stride, float *restrict out) {
    const Step s = *step;
    for (size_t i = 0, place = 0; i < n; i++, place += stride) {
        float m = momentum[place];
        out[i] = moved(grad[place], &m, score[place], &s);
    }
}
