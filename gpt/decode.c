/* The next token of one row through a whole GPT, for onerow_c.py, and the attention of the next
   tokens of many rows, for kvcache.py: on the CPU, on all cores, called through ctypes.

   A token's products read every weight once and calculate little, so memory sets the pace. Rows lie
   one after another, and each is asked for LOOK_AHEAD bytes before it is needed: processors look
   ahead too, but not across the ends of short rows and of pages. Sums are kept in LANES parts, in
   whose order no rounding is left to the compiler: what a row gives does not depend on the threads.
   Names are those of model.py; all vectors are fp32. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

enum { FP32, BF16, FP16, INT8 };             /* formats of weights */
enum { LAYERNORM, RMSNORM };                 /* norms */
enum { GELU, GELU_TANH, SWIGLU, RELU2 };     /* activations */
enum { LANES = 64, FEW_LANES = 16, LOOK_AHEAD = 4096, TOKENS_AHEAD = 32 };
enum { CACHE_LINE = 64 };

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
    float *keys, *values;         /* (n_kv_head, room, head_dim) */
};

struct rows {             /* new tokens, one of each row, and what came before them */
    const float *q, *k, *v;                /* heads side by side, behind the qk-norm, turned */
    int64_t q_stride, k_stride, v_stride;  /* floats from a row to the next */
    float *keys, *values;                  /* (rows, n_kv_head, room, head_dim) */
    const int64_t *lengths;                /* tokens of each row before the new one */
    float *y, *scratch;                    /* (rows, n_head, head_dim); (threads, room) */
    int64_t rows, n_head, n_kv_head, head_dim, room;
    float scale;
    int32_t threads;
};

struct model {
    int64_t n_layer, n_head, n_kv_head, head_dim, n_embd, n_hidden;
    int64_t room;                 /* tokens that the cache has room for */
    int64_t scratch_size;         /* floats of each thread */
    int32_t norm, activation, qk_norm, threads;
    float norm_eps, attention_scale;
    const float *cos, *sin;       /* (context_len, head_dim / 2), or NULL */
    struct block *blocks;
    struct norm final_norm;
    struct product head;
    float *x, *normed, *qkv, *mixed, *hidden, *gate, *logits, *scratch;
};

/* Numbers of 16 bits ------------------------------------------------------------------------- */

static inline float of_fp32(float number) { return number; }

static inline float of_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline float of_fp16(uint16_t half)
{
    uint32_t size = half & 0x7fff, bits = (size << 13) + (112u << 23);
    if (size >= 0x7c00) bits += 112u << 23;    /* infinite, or no number */
    float number, small = (float)(int32_t)size * 0x1p-24f;
    memcpy(&number, &bits, sizeof number);
    number = size < 0x400 ? small : number;    /* below the normal numbers */
    return half & 0x8000 ? -number : number;
}

static inline float rounded_to_bf16(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1); /* to the nearest, from the middle to the even one */
    uint16_t half = (uint16_t)(bits >> 16);
    return isnan(number) ? NAN : of_bf16(half);
}

/* Sums ---------------------------------------------------------------------------------------- */

static inline float sum_of(float *lanes, int count)
{
    for (int half = count / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

static inline void ask_for(const float *numbers, int64_t count)
{
    for (int64_t i = 0; i < count; i += CACHE_LINE / (int)sizeof *numbers)
        __builtin_prefetch(numbers + i);
}

#define ROW_TIMES_VECTOR(name, type, value)                                                        \
    static inline float name(const type *row, const float *x, int64_t width)                       \
    {                                                                                              \
        float lanes[LANES] = {0};                                                                  \
        int64_t at = 0;                                                                            \
        for (; at + LANES <= width; at += LANES) {                                                 \
            for (int byte = 0; byte < LANES * (int)sizeof(type); byte += CACHE_LINE)               \
                __builtin_prefetch((const char *)(row + at) + LOOK_AHEAD + byte);                  \
            for (int lane = 0; lane < LANES; lane++)                                               \
                lanes[lane] += value(row[at + lane]) * x[at + lane];                               \
        }                                                                                          \
        for (; at < width; at++) lanes[at % LANES] += value(row[at]) * x[at];                      \
        return sum_of(lanes, LANES);                                                               \
    }

ROW_TIMES_VECTOR(fp32_row, float, of_fp32)
ROW_TIMES_VECTOR(bf16_row, uint16_t, of_bf16)
ROW_TIMES_VECTOR(fp16_row, uint16_t, of_fp16)

static inline int32_t int8_row(const int8_t *row, const int16_t *x, int64_t width)
{
    int32_t sum = 0;
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) {
        __builtin_prefetch((const char *)(row + at) + LOOK_AHEAD);
        for (int lane = 0; lane < LANES; lane++) sum += row[at + lane] * x[at + lane];
    }
    for (; at < width; at++) sum += row[at] * x[at];
    return sum;
}

static inline float dot(const float *a, const float *b, int64_t length)
{
    float lanes[FEW_LANES] = {0};
    int64_t at = 0;
    for (; at + FEW_LANES <= length; at += FEW_LANES)
        for (int lane = 0; lane < FEW_LANES; lane++) lanes[lane] += a[at + lane] * b[at + lane];
    for (; at < length; at++) lanes[at % FEW_LANES] += a[at] * b[at];
    return sum_of(lanes, FEW_LANES);
}

/* e^x for x up to 0, to the last digit or two; written such that several are made at once. */
static inline float exponential(float x)
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

/* Shares of the threads ----------------------------------------------------------------------- */

struct part {
    int64_t first, end;
};

static inline void wait_for_all(void)
{
#pragma omp barrier
}

static inline struct part share(int64_t count, int thread, int threads)
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
        float sum = (float)int8_row(weights, whole, width);
        if (coarse) sum += (float)int8_row(weights, rest, width) * (1 / FINER);
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
    for (int64_t row = rows.first; row < rows.end; row++) {
        int64_t start = row * p->width;
        float out = p->bias ? p->bias[row] : 0;
        if (p->format == FP32) out += fp32_row((const float *)p->weight + start, x, p->width);
        if (p->format == BF16) out += bf16_row((const uint16_t *)p->weight + start, x, p->width);
        if (p->format == FP16) out += fp16_row((const uint16_t *)p->weight + start, x, p->width);
        if (p->rounds) out = rounded_to_bf16(out);
        y[row] = p->factor * out + (adds ? y[row] : 0);
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

/* What the queries (count, size) of the newest token see in the `length` keys and values so far. */
static void softmax_attention(const float *q, int64_t count, const float *keys, const float *values,
                              int64_t length, int64_t size, float scale, float *y, float *scores)
{
    for (; count > 0; count--, q += size, y += size) {
        float top = -INFINITY, total = 0;
        for (int64_t s = 0; s < length; s++) {
            int64_t later = s + TOKENS_AHEAD;
            ask_for(later < length ? keys + later * size : values + (later - length) * size, size);
            scores[s] = dot(q, keys + s * size, size) * scale;
            top = fmaxf(top, scores[s]);
        }
        for (int64_t s = 0; s < length; s++) scores[s] = exponential(scores[s] - top);
        for (int64_t i = 0; i < size; i++) y[i] = 0;
        for (int64_t s = 0; s < length; s++) {
            if (s + TOKENS_AHEAD < length) ask_for(values + (s + TOKENS_AHEAD) * size, size);
            total += scores[s];
            for (int64_t i = 0; i < size; i++) y[i] += scores[s] * values[s * size + i];
        }
        for (int64_t i = 0; i < size; i++) y[i] /= total;
    }
}

/* Appends the newest token's keys and values, and attends: this thread's heads of keys. */
static void attend(const struct model *m, const struct block *b, int64_t at, int thread,
                   int threads, float *scores)
{
    int64_t size = m->head_dim, group = m->n_head / m->n_kv_head;
    struct part heads = share(m->n_kv_head, thread, threads);
    for (int64_t head = heads.first; head < heads.end; head++) {
        float *new_key = m->qkv + (m->n_head + head) * size;
        const float *new_value = m->qkv + (m->n_head + m->n_kv_head + head) * size;
        float *keys = b->keys + head * m->room * size, *values = b->values + head * m->room * size;
        place(m, new_key, at);
        memcpy(keys + at * size, new_key, (size_t)size * sizeof *keys);
        memcpy(values + at * size, new_value, (size_t)size * sizeof *values);
        float *queries = m->qkv + head * group * size;
        for (int64_t i = 0; i < group; i++) place(m, queries + i * size, at);
        softmax_attention(queries, group, keys, values, at + 1, size, m->attention_scale,
                          m->mixed + head * group * size, scores);
    }
}

static void activate(const struct model *m, int thread, int threads)
{
    struct part part = share(m->n_hidden, thread, threads);
    for (int64_t i = part.first; i < part.end; i++) {
        float x = m->hidden[i];
        switch (m->activation) {
        case GELU: x *= 0.5f * (1 + erff(x * 0.70710678f)); break;
        case GELU_TANH: x *= 0.5f * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); break;
        case SWIGLU: x *= m->gate[i] / (1 + expf(-m->gate[i])); break;
        case RELU2: x = x > 0 || isnan(x) ? x * x : 0; break;
        }
        m->hidden[i] = x;
    }
}

/* The model ----------------------------------------------------------------------------------- */

/* Appends the new keys and values of each row, and attends. A row does not depend on the others. */
void attend_rows(const struct rows *r)
{
    int64_t size = r->head_dim, group = r->n_head / r->n_kv_head;
#pragma omp parallel for num_threads(r->threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < r->rows * r->n_kv_head; i++) {
        int64_t row = i / r->n_kv_head, head = i % r->n_kv_head, at = r->lengths[row];
        float *keys = r->keys + i * r->room * size, *values = r->values + i * r->room * size;
        memcpy(keys + at * size, r->k + row * r->k_stride + head * size, (size_t)size * sizeof *keys);
        memcpy(values + at * size, r->v + row * r->v_stride + head * size, (size_t)size * sizeof *values);
        softmax_attention(r->q + row * r->q_stride + head * group * size, group, keys, values, at + 1,
                          size, r->scale, r->y + (row * r->n_head + head * group) * size,
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
