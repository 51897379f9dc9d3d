/* The next token of one row through a whole GPT, for onerow_c.py; the attention of the next tokens
   of many rows, for attention_c.py; and products of many rows in int8, for int8_c.py: on the CPU, on
   all cores, called through ctypes.

   A token's products read every weight once and calculate little, so memory sets the pace. Rows lie
   one after another, and each is asked for LOOK_AHEAD bytes before it is needed: processors look
   ahead too, but not across the ends of short rows and of pages. Sums are written as vectors, so that
   no order of them is left to the compiler: what a row gives does not depend on the threads.
   Names are those of model.py; all vectors are fp32, keys and values fp32 or bf16. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

enum { FP32, BF16, FP16, INT8 };             /* formats of weights */
enum { LAYERNORM, RMSNORM };                 /* norms */
enum { GELU, GELU_TANH, SWIGLU, RELU2 };     /* activations */
enum { LOOK_AHEAD = 4096, TOKENS_AHEAD = 32, CACHE_LINE = 64, MOST_VECTORS = 4 };
/* Where formats and numbers of vectors are constants, loops become straight lines. */
#define INLINE static inline __attribute__((always_inline))

struct product {          /* a linear layer, or several that read the same */
    const void *weight;   /* rows x width; NULL: no such layer */
    const float *bias;    /* rows, or NULL */
    const float *step;    /* int8: what a whole number of each row stands for */
    int64_t rows, width;
    int32_t format;
    int32_t rounds;       /* what it reads and gives is rounded to bf16 */
    float factor;         /* on what it gives, the bias too */
};

struct norm {
    const float *weight, *bias;   /* bias may be NULL */
};

struct block {
    struct norm attn_norm, mlp_norm;
    struct product qkv[3];        /* or one product for all three */
    struct product out, up, gate, down;
    char *keys, *values;          /* (n_kv_head, room, head_dim) */
};

struct rows {             /* new tokens, one of each row, and what came before them */
    const float *q, *k, *v;                /* heads side by side, behind the qk-norm, turned */
    int64_t q_stride, k_stride, v_stride;  /* floats from a row to the next */
    char *keys, *values;                   /* (rows, n_kv_head, room, head_dim) */
    const int64_t *lengths;                /* tokens of each row before the new one */
    float *y, *scratch;                    /* (rows, n_head, head_dim); (threads, room) */
    int64_t rows, n_head, n_kv_head, head_dim, room;
    float scale;
    int32_t cache_format, threads;
};

struct model {
    int64_t n_layer, n_head, n_kv_head, head_dim, n_embd, n_hidden;
    int64_t room;                 /* tokens that the cache has room for */
    int64_t scratch_size;         /* floats of each thread */
    int32_t norm, activation, qk_norm, cache_format, threads;
    float norm_eps, attention_scale;
    const float *cos, *sin;       /* (context_len, head_dim / 2), or NULL */
    struct block *blocks;
    struct norm final_norm;
    struct product head;
    float *x, *normed, *qkv, *mixed, *hidden, *gate, *logits, *scratch;
};

/* Numbers ------------------------------------------------------------------------------------ */

/* Vectors as GCC and Clang know them, as wide as the CPU's registers: wider ones are cut up, and
   what converts them then is three times as slow. */
#ifdef __AVX512F__
enum { VECTOR = 16 };
#else
enum { VECTOR = 8 };
#endif
typedef float floats __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t words __attribute__((vector_size(4 * VECTOR)));
typedef int32_t integers __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t halves __attribute__((vector_size(2 * VECTOR)));
typedef float quad __attribute__((vector_size(16)));

INLINE floats of_fp16(halves numbers)
{
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)numbers);
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)numbers);
#else
    words half = __builtin_convertvector(numbers, words);
    words size = half & 0x7fff, sign = (half & 0x8000) << 16, bits = (size << 13) + (112u << 23);
    bits += (words)(size >= 0x7c00) & (112u << 23);    /* infinite, or no number */
    words small = (words)(__builtin_convertvector((integers)size, floats) * 0x1p-24f);
    words is_small = (words)(size < 0x400);            /* below the normal numbers */
    return (floats)(sign | (is_small & small) | (~is_small & bits));
#endif
}

INLINE floats of_bf16(halves numbers)
{
    return (floats)(__builtin_convertvector(numbers, words) << 16);
}

/* The VECTOR numbers of a row from a place on, in a format known where this is compiled. */
INLINE floats numbers_at(const void *row, int64_t at, int format)
{
    floats numbers;
    halves half;
    if (format == FP32) {
        memcpy(&numbers, (const float *)row + at, sizeof numbers);
        return numbers;
    }
    memcpy(&half, (const uint16_t *)row + at, sizeof half);
    return format == BF16 ? of_bf16(half) : of_fp16(half);
}

/* One number of a row. */
INLINE float number_at(const void *row, int64_t at, int format)
{
    if (format == FP32) return ((const float *)row)[at];
    halves half = {((const uint16_t *)row)[at]};
    return (format == BF16 ? of_bf16(half) : of_fp16(half))[0];
}

INLINE float sum_of(floats numbers)
{
    quad quads[VECTOR / 4];
    memcpy(quads, &numbers, sizeof quads);
    for (int half = VECTOR / 8; half; half /= 2)
        for (int i = 0; i < half; i++) quads[i] += quads[i + half];
    return (quads[0][0] + quads[0][2]) + (quads[0][1] + quads[0][3]);
}

INLINE uint16_t to_bf16(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1); /* from the middle to the even one */
    return isnan(number) ? 0x7fc0 : (uint16_t)(nearest >> 16);
}

INLINE float rounded_to_bf16(float number)
{
    uint32_t bits = (uint32_t)to_bf16(number) << 16;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE int64_t bytes_of(int format) { return format == FP32 ? 4 : format == INT8 ? 1 : 2; }

/* Sums ---------------------------------------------------------------------------------------- */

INLINE void ask_for(const void *memory, int64_t n_bytes)
{
    for (int64_t byte = 0; byte < n_bytes; byte += CACHE_LINE)
        __builtin_prefetch((const char *)memory + byte);
}

/* A row times a vector, in some vectors of sums; asks for what comes `ahead` bytes later, if any. */
INLINE float row_times(const void *row, int format, const float *x, int64_t width, int vectors,
                       int ahead)
{
    floats sums[MOST_VECTORS] = {0};
    float rest = 0;
    int64_t at = 0, step = vectors * VECTOR;
    for (; at + step <= width; at += step) {
        if (ahead) ask_for((const char *)row + at * bytes_of(format) + ahead, step * bytes_of(format));
        for (int i = 0; i < vectors; i++) {
            int64_t from = at + i * VECTOR;
            sums[i] += numbers_at(row, from, format) * numbers_at(x, from, FP32);
        }
    }
    for (; at + VECTOR <= width; at += VECTOR)
        sums[0] += numbers_at(row, at, format) * numbers_at(x, at, FP32);
    for (; at < width; at++) rest += number_at(row, at, format) * x[at];
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

INLINE float dot(const float *a, const float *b, int64_t length)
{
    return row_times(a, FP32, b, length, 1, 0);
}

INLINE int32_t whole_row_times(const int8_t *row, const int16_t *x, int64_t width)
{
    int32_t sum = 0;
    int64_t at = 0;
    for (; at + CACHE_LINE <= width; at += CACHE_LINE) {
        __builtin_prefetch((const char *)(row + at) + LOOK_AHEAD);
        for (int i = 0; i < CACHE_LINE; i++) sum += row[at + i] * x[at + i];
    }
    for (; at < width; at++) sum += row[at] * x[at];
    return sum;
}

/* e^x for x up to 0, to the last digit or two; written such that several are made at once. */
INLINE float exponential(float x)
{
    x = x < -87 ? -87 : x; /* and no less: 1.6e-38 beside a sum of at least 1 */
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f; /* n ln 2 */
    float sum = 1 + r / 7;
    for (int k = 6; k > 0; k--) sum = 1 + sum * r * (1.0f / (float)k);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

INLINE float logistic(float x)
{
    float small = exponential(-fabsf(x)), part = 1 / (1 + small);
    return x < 0 ? small * part : part;
}

/* To a few of the last digits, beyond 4 it is 1. Source: Eigen 3.4, generic_fast_erf_float. */
INLINE float error_function(float x)
{
    x = x > 4 ? 4 : x < -4 ? -4 : x;
    float square = x * x, above = -2.72614225801306e-10f, below = -1.45660718464996e-05f;
    above = above * square + 2.77068142495902e-08f;
    above = above * square - 2.10102402082508e-06f;
    above = above * square - 5.69250639462346e-05f;
    above = above * square - 7.34990630326855e-04f;
    above = above * square - 2.95459980854025e-03f;
    above = above * square - 1.60960333262415e-02f;
    below = below * square - 2.13374055278905e-04f;
    below = below * square - 1.68282697438203e-03f;
    below = below * square - 7.37332916720468e-03f;
    below = below * square - 1.42647390514189e-02f;
    return x * above / below;
}

/* Shares of the threads ----------------------------------------------------------------------- */

struct part {
    int64_t first, end;
};

INLINE void wait_for_all(void)
{
#pragma omp barrier
}

INLINE struct part share(int64_t count, int thread, int threads)
{
    return (struct part){count * thread / threads, count * (thread + 1) / threads};
}

/* Products ------------------------------------------------------------------------------------ */

/* The constants of packed.py, whose arithmetic this is. */
static const float LARGEST = 127, OUTLIER = 16, FINER = 254;

/* In int8 x is whole numbers times a step of its own, and where a few large numbers make that step
   coarse for the others, what rounding left over is multiplied too. */
static void multiply_int8(const struct product *p, const float *x, float *y, int adds,
                          struct part rows, int16_t *whole)
{
    int64_t width = p->width;
    int16_t *rest = whole + width;
    float largest = 1e-30f, squares = 0;
    for (int64_t i = 0; i < width; i++) largest = fmaxf(largest, fabsf(x[i]));
    float fits = LARGEST / largest;
    for (int64_t i = 0; i < width; i++) squares += x[i] * fits * (x[i] * fits);
    if (!(squares < INFINITY)) { /* numbers that are none, which whole numbers would hide */
        for (int64_t row = rows.first; row < rows.end; row++) y[row] = NAN;
        return;
    }
    for (int64_t i = 0; i < width; i++) {
        float scaled = x[i] * fits;
        whole[i] = (int16_t)rintf(scaled);
        rest[i] = (int16_t)rintf((scaled - (float)whole[i]) * FINER);
    }
    int coarse = squares < (float)width * (LARGEST / OUTLIER) * (LARGEST / OUTLIER);
    for (int64_t row = rows.first; row < rows.end; row++) {
        const int8_t *weights = (const int8_t *)p->weight + row * width;
        float sum = (float)whole_row_times(weights, whole, width);
        if (coarse) sum += (float)whole_row_times(weights, rest, width) * (1 / FINER);
        float out = sum * (largest / LARGEST) * p->step[row];
        if (p->bias) out += p->bias[row];
        y[row] = p->factor * out + (adds ? y[row] : 0);
    }
}

/* This thread's rows of the product of p and x, into y or added to it. */
static void multiply(const struct product *p, const float *x, float *y, int adds, int thread,
                     int threads, float *scratch)
{
    struct part rows = share(p->rows, thread, threads);
    if (p->format == INT8) {
        multiply_int8(p, x, y, adds, rows, (int16_t *)scratch);
        return;
    }
    if (p->rounds) {
        for (int64_t i = 0; i < p->width; i++) scratch[i] = rounded_to_bf16(x[i]);
        x = scratch;
    }
    int64_t width = p->width;
    for (int64_t row = rows.first; row < rows.end; row++) {
        const char *weights = (const char *)p->weight + row * width * bytes_of(p->format);
        float out = 0;
        switch (p->format) {
        case FP32: out = row_times(weights, FP32, x, width, MOST_VECTORS, LOOK_AHEAD); break;
        case BF16: out = row_times(weights, BF16, x, width, MOST_VECTORS, LOOK_AHEAD); break;
        case FP16: out = row_times(weights, FP16, x, width, MOST_VECTORS, LOOK_AHEAD); break;
        }
        if (p->bias) out += p->bias[row];
        if (p->rounds) out = rounded_to_bf16(out);
        y[row] = p->factor * out + (adds ? y[row] : 0);
    }
}

/* Tiles of a product, whose sums have room in the registers; and numbers that stay near meanwhile. */
enum { TILE_ROWS = 4, TILE_VECTORS = 2, NEAR = 1 << 17 };

/* Some vectors times some rows of weights. */
INLINE void whole_tile(const int16_t *weights, const int16_t *x, float *y, int64_t all_rows,
                       int64_t width, int rows, int vectors)
{
    int32_t sums[TILE_VECTORS][TILE_ROWS] = {0};
    for (int64_t k = 0; k < width; k++)
        for (int i = 0; i < vectors; i++)
            for (int j = 0; j < rows; j++) sums[i][j] += x[i * width + k] * weights[j * width + k];
    for (int i = 0; i < vectors; i++)
        for (int j = 0; j < rows; j++) y[i * all_rows + j] = (float)sums[i][j];
}

/* y (n, rows) = x (n, width) times weights (rows, width); scratch for TILE_ROWS rows a thread. */
void whole_product(const int8_t *weights, const int16_t *x, float *y, int16_t *scratch, int64_t rows,
                   int64_t width, int64_t n, int64_t threads)
{
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, most = NEAR / width + TILE_VECTORS;
#pragma omp parallel num_threads((int)threads)
    for (int64_t first = 0; first < n; first += most) {
        int16_t *wide = scratch + omp_get_thread_num() * TILE_ROWS * width;
        struct part part = share(tiles, omp_get_thread_num(), omp_get_num_threads());
        int64_t end = first + most < n ? first + most : n;
        for (int64_t row = part.first * TILE_ROWS; row < part.end * TILE_ROWS; row += TILE_ROWS) {
            int64_t some = rows - row < TILE_ROWS ? rows - row : TILE_ROWS, at = first;
            for (int64_t i = 0; i < some * width; i++) wide[i] = weights[row * width + i];
            if (some == TILE_ROWS)
                for (; at + TILE_VECTORS <= end; at += TILE_VECTORS)
                    whole_tile(wide, x + at * width, y + at * rows + row, rows, width, TILE_ROWS,
                               TILE_VECTORS);
            for (; at < end; at++)
                for (int64_t j = 0; j < some; j++)
                    whole_tile(wide + j * width, x + at * width, y + at * rows + row + j, rows, width,
                               1, 1);
        }
    }
}

/* What lies between them ---------------------------------------------------------------------- */

static void normalise(const struct model *m, const struct norm *norm)
{
    float *x = m->x, *y = m->normed, mean = 0;
    int64_t width = m->n_embd;
    if (m->norm == LAYERNORM) {
        double total = 0;
        for (int64_t i = 0; i < width; i++) total += x[i];
        mean = (float)(total / (double)width);
    }
    for (int64_t i = 0; i < width; i++) y[i] = x[i] - mean;
    float mean_square = dot(y, y, width) / (float)width;
    float scale = 1 / sqrtf(mean_square + m->norm_eps);
    /* Where squares overflow, torch's RMSNorm gives 0 and its LayerNorm no numbers. */
    if (m->norm == LAYERNORM && !(mean_square < INFINITY)) scale = NAN;
    for (int64_t i = 0; i < width; i++)
        y[i] = y[i] * scale * norm->weight[i] + (norm->bias ? norm->bias[i] : 0);
}

/* Normalises a head's q or k if the model does so, and turns it by the angles of a position. */
static void place(const struct model *m, float *head, int64_t at)
{
    int64_t size = m->head_dim, half = size / 2;
    if (m->qk_norm) {
        float scale = 1 / sqrtf(dot(head, head, size) / (float)size + m->norm_eps);
        for (int64_t i = 0; i < size; i++) head[i] *= scale;
    }
    if (m->cos) {
        const float *cos = m->cos + at * half, *sin = m->sin + at * half;
        for (int64_t i = 0; i < half; i++) {
            float first = head[i], second = head[half + i];
            head[i] = first * cos[i] - second * sin[i];
            head[half + i] = second * cos[i] + first * sin[i];
        }
    }
}

/* The weighted sum of values (length, size), some vectors of it at a time; gives where it ended. */
INLINE int64_t mix(const float *weights, const char *values, int format, int64_t length,
                   int64_t size, float *y, int64_t from, int vectors)
{
    int64_t token = size * bytes_of(format);
    for (; from + vectors * VECTOR <= size; from += vectors * VECTOR) {
        floats sums[MOST_VECTORS] = {0};
        for (int64_t s = 0; s < length; s++) {
            const char *value = values + s * token;
            if (s + TOKENS_AHEAD < length) ask_for(value + TOKENS_AHEAD * token, token);
            for (int i = 0; i < vectors; i++)
                sums[i] += weights[s] * numbers_at(value, from + i * VECTOR, format);
        }
        memcpy(y + from, sums, (size_t)vectors * sizeof *sums);
    }
    return from;
}

/* What a query of the newest token sees in the keys and values (length, size) so far. */
INLINE void softmax_attention(const float *q, const char *keys, const char *values, int format,
                              int64_t length, int64_t size, float scale, float *y, float *scores)
{
    int64_t token = size * bytes_of(format);
    float top = -INFINITY, total = 0;
    for (int64_t s = 0; s < length; s++) {
        int64_t later = s + TOKENS_AHEAD;
        ask_for(later < length ? keys + later * token : values + (later - length) * token, token);
        scores[s] = row_times(keys + s * token, format, q, size, 1, 0) * scale;
        top = fmaxf(top, scores[s]);
    }
    for (int64_t s = 0; s < length; s++) scores[s] = exponential(scores[s] - top);
    for (int64_t s = 0; s < length; s++) total += scores[s];
    for (int64_t s = 0; s < length; s++) scores[s] /= total;
    int64_t done = mix(scores, values, format, length, size, y, 0, MOST_VECTORS);
    done = mix(scores, values, format, length, size, y, done, 1);
    for (; done < size; done++) {
        y[done] = 0;
        for (int64_t s = 0; s < length; s++)
            y[done] += scores[s] * number_at(values + s * token, done, format);
    }
}

/* Appends a newest key and value (size) to `at` earlier ones, and gives what its queries see. */
static void attend_head(const float *q, const float *k, const float *v, int64_t queries, char *keys,
                        char *values, int format, int64_t at, int64_t size, float scale, float *y,
                        float *scores)
{
    int64_t token = size * bytes_of(format);
    if (format == FP32) {
        memcpy(keys + at * token, k, (size_t)token);
        memcpy(values + at * token, v, (size_t)token);
    } else {
        for (int64_t i = 0; i < size; i++) {
            ((uint16_t *)(keys + at * token))[i] = to_bf16(k[i]);
            ((uint16_t *)(values + at * token))[i] = to_bf16(v[i]);
        }
    }
    for (int64_t n = 0; n < queries; n++, q += size, y += size) {
        if (format == FP32)
            softmax_attention(q, keys, values, FP32, at + 1, size, scale, y, scores);
        else
            softmax_attention(q, keys, values, BF16, at + 1, size, scale, y, scores);
    }
}

/* Attention of the newest token: this thread's heads of keys, and their queries. */
static void attend(const struct model *m, const struct block *b, int64_t at, int thread,
                   int threads, float *scores)
{
    int64_t size = m->head_dim, group = m->n_head / m->n_kv_head;
    struct part heads = share(m->n_kv_head, thread, threads);
    for (int64_t head = heads.first; head < heads.end; head++) {
        float *q = m->qkv + head * group * size, *k = m->qkv + (m->n_head + head) * size;
        const float *v = k + m->n_kv_head * size;
        int64_t start = head * m->room * size * bytes_of(m->cache_format);
        for (int64_t i = 0; i < group; i++) place(m, q + i * size, at);
        place(m, k, at);
        attend_head(q, k, v, group, b->keys + start, b->values + start, m->cache_format, at, size,
                    m->attention_scale, m->mixed + head * group * size, scores);
    }
}

static void activate(const struct model *m, int thread, int threads)
{
    struct part part = share(m->n_hidden, thread, threads);
    float *x = m->hidden;
    const float *gate = m->gate;
    switch (m->activation) {
    case GELU:
        for (int64_t i = part.first; i < part.end; i++)
            x[i] *= 0.5f * (1 + error_function(x[i] * 0.70710678f)); /* x / sqrt(2) */
        break;
    case GELU_TANH: /* (1 + tanh(z)) / 2 is the logistic function of 2z; 2 sqrt(2 / pi) */
        for (int64_t i = part.first; i < part.end; i++)
            x[i] *= logistic(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        break;
    case SWIGLU:
        for (int64_t i = part.first; i < part.end; i++) x[i] *= gate[i] * logistic(gate[i]);
        break;
    case RELU2:
        for (int64_t i = part.first; i < part.end; i++) x[i] *= x[i] < 0 ? 0 : x[i];
        break;
    }
}

/* The model ----------------------------------------------------------------------------------- */

/* Appends the new keys and values of each row, and attends. A row does not depend on the others. */
void attend_rows(const struct rows *r)
{
    int64_t size = r->head_dim, group = r->n_head / r->n_kv_head;
#pragma omp parallel for num_threads(r->threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < r->rows * r->n_kv_head; i++) {
        int64_t row = i / r->n_kv_head, head = i % r->n_kv_head;
        int64_t start = i * r->room * size * bytes_of(r->cache_format);
        attend_head(r->q + row * r->q_stride + head * group * size,
                    r->k + row * r->k_stride + head * size, r->v + row * r->v_stride + head * size,
                    group, r->keys + start, r->values + start, r->cache_format, r->lengths[row], size,
                    r->scale, r->y + (row * r->n_head + head * group) * size,
                    r->scratch + omp_get_thread_num() * r->room);
    }
}

/* From the token's embedding in m->x, at position `at`, to m->logits; appends it to the cache. */
void next_logits(const struct model *m, int64_t at)
{
#pragma omp parallel num_threads(m->threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *scratch = m->scratch + thread * m->scratch_size;
        for (const struct block *b = m->blocks; b < m->blocks + m->n_layer; b++) {
            if (thread == 0) normalise(m, &b->attn_norm);
            wait_for_all();
            float *out = m->qkv;
            for (int i = 0; i < 3 && b->qkv[i].weight; out += b->qkv[i++].rows)
                multiply(&b->qkv[i], m->normed, out, 0, thread, threads, scratch);
            wait_for_all();
            attend(m, b, at, thread, threads, scratch);
            wait_for_all();
            multiply(&b->out, m->mixed, m->x, 1, thread, threads, scratch);
            wait_for_all();
            if (thread == 0) normalise(m, &b->mlp_norm);
            wait_for_all();
            multiply(&b->up, m->normed, m->hidden, 0, thread, threads, scratch);
            if (b->gate.weight)
                multiply(&b->gate, m->normed, m->gate, 0, thread, threads, scratch);
            activate(m, thread, threads); /* each thread what it has just made */
            wait_for_all();
            multiply(&b->down, m->hidden, m->x, 1, thread, threads, scratch);
            wait_for_all();
        }
        if (thread == 0) normalise(m, &m->final_norm);
        wait_for_all();
        multiply(&m->head, m->normed, m->logits, 0, thread, threads, scratch);
    }
}
