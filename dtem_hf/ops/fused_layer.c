/* A pre-norm transformer layer that merges, on a CPU in float32, in one call (METHOD.md section 1); fused_layer.py calls it.
 *
 *     x += scale1 * o(attention(norm1(x), bias));  x, sizes = merge(x, sizes);  x += scale2 * fc2(act(fc1(norm2(x))))
 *
 * Tokens lie in panels of LANES, [features][LANES], so that every step runs along tokens and none has to turn a matrix:
 * a product takes weights as they lie, one number at a time, times a vector of tokens. Images are shared out among
 * threads whole while there are enough of them; those that are left over are computed by all threads together.
 */
#include "native.h"

/* The threads of the OpenMP that torch has loaded: another one's would wait beside them, and take their cores. */
#ifdef __linux__
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern void GOMP_barrier(void) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));
#define HAS_THREADS (GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_num_threads)
#else /* a linker that wants all names */
static inline void GOMP_barrier(void) {}
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
static inline void GOMP_parallel(void (*run)(void *), void *of, unsigned threads, unsigned flags) {
  (void)threads, (void)flags;
  run(of);
}
#define HAS_THREADS 0
#endif

typedef float half_lanes __attribute__((vector_size(2 * LANES)));
typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES)));

#define LOG2_E 1.44269504088896341f
#define LN_2_HIGH 0.693359375f
#define LN_2_LOW -2.12194440e-4f
#define DEPTH 256
#define NEAR (1 << 17) /* numbers that a core's own cache holds beside what else it needs */
#define ROUNDING 12582912.0f /* 1.5 * 2^23: what is added to it is rounded to a whole number */

static inline lanes splat(float value) { return value - (lanes){0}; }

static inline lanes where(whole_lanes mask, lanes yes, lanes no) {
  return (lanes)((mask & (whole_lanes)yes) | (~mask & (whole_lanes)no));
}

/* NaN stays NaN. */
static inline lanes clamp(lanes x, float low, float high) {
  x = where(x < low, splat(low), x);
  return where(x > high, splat(high), x);
}

/* exp to 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], fitted to a relative error of 3e-9. */
static inline lanes exponential(lanes x) {
  x = clamp(x, -87, 88);
  lanes shifted = x * LOG2_E + ROUNDING;
  lanes n = shifted - ROUNDING;
  lanes rest = (x - n * LN_2_HIGH) - n * LN_2_LOW;
  lanes series = splat(1.3814471894875169e-3f);
  series = series * rest + 8.368780836462975e-3f;
  series = series * rest + 4.166839271783829e-2f;
  series = series * rest + 0.1666651964187622f;
  series = series * rest + 0.4999999403953552f;
  series = series * rest + 1;
  series = series * rest + 1;
  return series * (lanes)(((whole_lanes)shifted << 23) + 0x3f800000);
}

/* max(x, 0) - |x| Phi(-|x|), which loses nothing where x is far from 0: Phi(-a) is exp(-a^2 / 2) times a polynomial in
 * 1 / (1 + 0.35 a), fitted to a relative error of 3e-7. */
static inline lanes gelu(lanes x) {
  lanes a = clamp((lanes)((whole_lanes)x & 0x7fffffff), 0, 14);
  lanes t = 1 / (1 + 0.35f * a);
  lanes tail = splat(4.894290491938591e-2f);
  tail = tail * t - 0.20212115347385406f;
  tail = tail * t + 0.2406439483165741f;
  tail = tail * t - 1.7026212066411972e-2f;
  tail = tail * t + 0.15596288442611694f;
  tail = tail * t + 0.13335469365119934f;
  tail = tail * t + 0.14027039706707f;
  tail = tail * t - 2.731906351982616e-5f;
  return where(x > 0, x, splat(0)) - a * tail * exponential(-0.5f * a * a);
}

enum { METRIC, MERGING }; /* what is timed */

enum { NO_ACTIVATION = -1, GELU = 0, GELU_TANH = 1, QUICK_GELU = 2 };

static inline lanes activate(lanes x, int activation) {
  if (activation == GELU) return gelu(x);
  if (activation == GELU_TANH) return x / (1 + exponential(x * (x * x * -0.07135481627f - 1.59576912161f)));
  if (activation == QUICK_GELU) return x / (1 + exponential(-1.702f * x));
  return x;
}

typedef struct {
  const float *weight, *bias; /* [out, in] and [out], or no bias */
  int64_t in, out;
} Linear;

/* As fused_layer.py fills it. Pointers that need not be there are NULL. */
typedef struct {
  Linear query, key, value, output, embedding, grow, shrink;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias, *scale1, *scale2;
  float norm1_eps, norm2_eps, scaling;
  int64_t heads, activation;
  /* One pass: x [batch, n, width], sizes [batch, n], bias [batch or 1, heads or 1, n]; strides in numbers. */
  const float *x, *sizes, *bias;
  int64_t x_image, x_token, sizes_image, bias_image, bias_head;
  int64_t batch, n, prefix, r, rows; /* `rows` first tokens are computed: n of them, or fewer where r is 0 */
  const float *norm_power;           /* the share of lost length that means are given back */
  float *out, *out_sizes, *out_logs; /* [batch, rows - r, width], and [batch, rows - r] where r is not 0 */
  int64_t *merged, *target, *kept;
  char *scratch;
  int64_t threads;
  double *seconds; /* spent on the embedding, and on matching and merging, where somebody asks */
} Layer;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t panels_of(int64_t n) { return (n + LANES - 1) / LANES; }
static inline float *aligned(float *p) { return (float *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

/* Where things lie in the memory of one image, and how many numbers it and what each thread has for itself take. */
typedef struct {
  int64_t x, normed, grown, merged, a, b, best, partner, total, scores, order;
} Room;

static inline int64_t metric_width(const Layer *l) {
  return l->embedding.weight ? l->embedding.out : l->query.out / l->heads;
}

static Room room_of(const Layer *l) {
  int64_t width = l->query.in, inner = l->query.out, tokens = panels_of(l->n) * LANES;
  int64_t half = l->n / 2 + 1, rows = padded(half, ROWS), at = 0;
  Room room;
#define TAKE(name, count) room.name = at, at += padded(count, 16)
  TAKE(x, tokens * width);
  TAKE(normed, tokens * most(width, inner));
  TAKE(grown, tokens * most(3 * inner + l->embedding.out, l->grow.out));
  TAKE(merged, tokens * width);
  TAKE(a, metric_width(l) * rows);
  TAKE(b, metric_width(l) * padded(half, LANES));
  TAKE(best, rows);
  TAKE(partner, 2 * rows);
#undef TAKE
  room.total = at;
  room.scores = padded((padded(l->n, LANES) + ROWS) * LANES, 16);
  room.order = padded(4 * rows, 16); /* an int64 and a Ranked for each */
  return room;
}

/* A room for each image that is computed at a time, and what every thread has for itself. */
int64_t dtem_layer_scratch_bytes(const Layer *l) {
  Room room = room_of(l);
  int64_t rooms = l->batch < l->threads ? l->batch : l->threads;
  return 4 * (rooms * room.total + l->threads * (room.scores + room.order)) + 64;
}

static inline void wait_for_all(int team) {
  if (team > 1) GOMP_barrier();
}

static inline void share(int64_t count, int me, int team, int64_t *first, int64_t *last) {
  *first = count * me / team, *last = count * (me + 1) / team;
}

/* LayerNorm of the tokens of one panel: x [width][LANES] -> out. What rounding leaves of a mean is taken off it, or a
 * token that is the same throughout would become that, divided by the root of eps. */
static void normalise(const float *x, int64_t width, const float *weight, const float *bias, float eps, float *out) {
  lanes mean = {0}, rest = {0}, variance = {0};
  for (int64_t f = 0; f < width; f++) mean += *(const lanes *)(x + f * LANES);
  mean /= (float)width;
  for (int64_t f = 0; f < width; f++) rest += *(const lanes *)(x + f * LANES) - mean;
  mean += rest / (float)width;
  for (int64_t f = 0; f < width; f++) {
    lanes off = *(const lanes *)(x + f * LANES) - mean;
    variance += off * off;
  }
  lanes scale;
  for (int i = 0; i < LANES; i++) scale[i] = 1 / sqrtf(variance[i] / (float)width + eps);
  for (int64_t f = 0; f < width; f++) {
    lanes value = (*(const lanes *)(x + f * LANES) - mean) * scale;
    if (weight) value *= weight[f];
    if (bias) value += bias[f];
    *(lanes *)(out + f * LANES) = value;
  }
}

/* What is done to a product before it is stored: its place in `out`, and what is added to it there. */
typedef struct {
  const Linear *linear;
  float *out;          /* panels of [rows][LANES], `out_panel` numbers apart */
  int64_t out_panel;
  int activation;
  const float *scale;  /* [out] or NULL */
  int accumulates;     /* the product is added to what is there */
} Product;

static inline void finish(const Product *p, int64_t row, float *out, lanes value) {
  if (p->activation != NO_ACTIVATION) value = activate(value, p->activation);
  if (p->scale) value *= p->scale[row];
  if (p->accumulates) value += *(lanes *)out;
  *(lanes *)out = value;
}

/* Rows [row, row + ROWS) of a product for PANELS panels of tokens; the last half of the lanes of a half panel holds no
 * token. Sums are made of sums of DEPTH, which round less than one long sum. */
#define DEFINE_PRODUCT(NAME, VECTOR, COUNT, PANELS)                                                               \
  static void NAME(const Product *p, const float *in, int64_t in_panel, int64_t row, float *out) {                \
    VECTOR totals[COUNT][PANELS];                                                                                 \
    const float *weight = p->linear->weight + row * p->linear->in, *bias = p->linear->bias;                       \
    int64_t depth = p->linear->in;                                                                                \
    for (int q = 0; q < COUNT; q++)                                                                               \
      for (int t = 0; t < PANELS; t++) totals[q][t] = (bias ? bias[row + q] : 0) - (VECTOR){0};                   \
    for (int64_t from = 0; from < depth; from += DEPTH) {                                                         \
      int64_t to = from + DEPTH < depth ? from + DEPTH : depth;                                                   \
      VECTOR sums[COUNT][PANELS] = {{{0}}};                                                                       \
      for (int64_t k = from; k < to; k++) {                                                                       \
        VECTOR tokens[PANELS];                                                                                    \
        for (int t = 0; t < PANELS; t++) tokens[t] = *(const VECTOR *)(in + t * in_panel + k * LANES);            \
        for (int q = 0; q < COUNT; q++)                                                                           \
          for (int t = 0; t < PANELS; t++) sums[q][t] += weight[q * depth + k] * tokens[t];                       \
      }                                                                                                           \
      for (int q = 0; q < COUNT; q++)                                                                             \
        for (int t = 0; t < PANELS; t++) totals[q][t] += sums[q][t];                                              \
    }                                                                                                             \
    for (int q = 0; q < COUNT; q++)                                                                               \
      for (int t = 0; t < PANELS; t++) {                                                                          \
        lanes value = {0};                                                                                        \
        *(VECTOR *)&value = totals[q][t];                                                                         \
        finish(p, row + q, out + t * p->out_panel + (row + q) * LANES, value);                                    \
      }                                                                                                           \
  }

DEFINE_PRODUCT(product_wide, lanes, ROWS, WIDE)
DEFINE_PRODUCT(product_one, lanes, ROWS, 1)
DEFINE_PRODUCT(product_half, half_lanes, ROWS, 1)
DEFINE_PRODUCT(product_row_wide, lanes, 1, WIDE)
DEFINE_PRODUCT(product_row_one, lanes, 1, 1)

/* Rows [row, row + count) of a product, count ROWS or 1, for tokens in panels [first, last), of n tokens in all. */
static void multiply(const Product *p, const float *in, int64_t in_panel, int64_t row, int count, int64_t first,
                     int64_t last, int64_t n) {
  int64_t t = first;
  int half = last * LANES >= n + LANES / 2; /* the last panel has no token in its second half */
  for (; t + WIDE <= last - half; t += WIDE)
    (count == 1 ? product_row_wide : product_wide)(p, in + t * in_panel, in_panel, row, p->out + t * p->out_panel);
  for (; t < last; t++)
    (count == 1              ? product_row_one
     : half && t == last - 1 ? product_half
                             : product_one)(p, in + t * in_panel, in_panel, row, p->out + t * p->out_panel);
}

/* Ask for the weights of the rows that come next, which are as good as never in a near cache. */
static inline void fetch(const Linear *linear, int64_t row) {
  int64_t count = linear->out - row < ROWS ? linear->out - row : ROWS;
  const float *weights = linear->weight + row * linear->in;
  for (int64_t i = 0; i < count * linear->in; i += 16) __builtin_prefetch(weights + i, 0, 2);
}

/* A thread's share of a product, blocks of rows [first, last): all of it for as many tokens as a near cache holds, then
 * for the next ones. */
static void multiply_blocks(const Product *p, int64_t first, int64_t last, const float *in, int64_t in_panel, int64_t n) {
  int64_t panels = panels_of(n), chunk = padded(NEAR / (p->linear->in * LANES) + 1, WIDE);
  for (int64_t from = 0; from < panels; from += chunk) {
    int64_t to = from + chunk < panels ? from + chunk : panels;
    for (int64_t block = first; block < last; block++) {
      int64_t row = block * ROWS, end = row + ROWS;
      fetch(p->linear, end);
      if (end <= p->linear->out)
        multiply(p, in, in_panel, row, ROWS, from, to, n);
      else
        for (; row < p->linear->out; row++) multiply(p, in, in_panel, row, 1, from, to, n);
    }
  }
}

/* Products of the same tokens, of the first tokens[i] of them each, shared out by rows. */
static void multiply_all(const Product *products, const int64_t *tokens, int count, const float *in, int64_t in_panel,
                         int me, int team) {
  int64_t blocks = 0, first, last;
  for (int i = 0; i < count; i++) blocks += (products[i].linear->out + ROWS - 1) / ROWS;
  share(blocks, me, team, &first, &last);
  for (int i = 0; i < count && last > 0; i++) {
    int64_t own = (products[i].linear->out + ROWS - 1) / ROWS;
    multiply_blocks(products + i, first, last < own ? last : own, in, in_panel, tokens[i]);
    first = most(first - own, 0), last -= own;
  }
}

/* As `outer`, for a panel whose second half holds no token. */
static inline void outer_half(const float *a, int64_t a_row, int64_t a_step, int64_t depth, const float *b, half_lanes *sums) {
  for (int64_t k = 0; k < depth; k++) {
    half_lanes column = *(const half_lanes *)(b + k * LANES);
    for (int q = 0; q < ROWS; q++) sums[q] += a[q * a_row + k * a_step] * column;
  }
}

/* Attention of the queries in one panel, in one head: query, key, value [dim][LANES] by panel -> out [dim][LANES]. */
static void attend(const float *query, const float *key, const float *value, int64_t panel, int64_t dim, int64_t n,
                   int half, const float *bias, float scaling, float *scores, float *out) {
  lanes highest = splat(-INFINITY), total = {0};
  for (int64_t j = 0; j < n; j += ROWS) {
    const float *keys = key + j / LANES * panel + j % LANES;
    lanes sums[ROWS] = {{0}};
    if (half) {
      half_lanes few[ROWS] = {{0}};
      outer_half(keys, 1, LANES, dim, query, few);
      for (int q = 0; q < ROWS; q++) *(half_lanes *)&sums[q] = few[q];
    } else
      outer(keys, 1, LANES, dim, query, sums);
    for (int q = 0; q < ROWS; q++) {
      if (j + q >= n) break;
      lanes score = sums[q] * scaling;
      if (bias) score += bias[j + q];
      highest = where(score > highest, score, highest);
      *(lanes *)(scores + (j + q) * LANES) = score;
    }
  }
  for (int64_t j = 0; j < n; j++) {
    lanes weight = exponential(*(lanes *)(scores + j * LANES) - highest);
    total += weight;
    *(lanes *)(scores + j * LANES) = weight;
  }
  lanes unit = 1 / total;
  for (int64_t m = 0; m < dim; m += ROWS) {
    int64_t count = dim - m < ROWS ? dim - m : ROWS;
    lanes sums[ROWS] = {{0}};
    for (int64_t j = 0; j < n; j += LANES) {
      const float *values = value + j / LANES * panel + m * LANES;
      int64_t depth = n - j < LANES ? n - j : LANES;
      if (count < ROWS)
        for (int64_t k = 0; k < depth; k++)
          for (int64_t q = 0; q < count; q++) sums[q] += values[q * LANES + k] * *(lanes *)(scores + (j + k) * LANES);
      else
        outer(values, LANES, 1, depth, scores + j * LANES, sums);
    }
    for (int64_t q = 0; q < count; q++) *(lanes *)(out + (m + q) * LANES) = sums[q] * unit;
  }
}

/* What A and B are compared by, brought to length 1, of the tokens in panel t: a [rows][dim], b by panel [dim][LANES]. */
static void prepare_metric(const float *metric, int64_t panel, int64_t heads, int64_t dim, const Split *s, int64_t t,
                           float *a, float *b) {
  lanes squares = {0}, unit;
  const float *from = metric + t * panel;
  int64_t tokens = s->n - t * LANES < LANES ? s->n - t * LANES : LANES;
  for (int64_t k = 0; k < dim; k++) {
    lanes sum = *(const lanes *)(from + k * LANES);
    for (int64_t h = 1; h < heads; h++) sum += *(const lanes *)(from + (h * dim + k) * LANES);
    squares += sum * sum;
    for (int64_t i = 0; i < tokens; i++) {
      int64_t token = t * LANES + i;
      if (token < s->prefix) continue;
      if ((token - s->first_a) % 2 == 0)
        a[(token - s->first_a) / 2 * dim + k] = sum[i];
      else
        b[place_in_b((token - s->first_b) / 2, k, dim)] = sum[i];
    }
  }
  for (int i = 0; i < LANES; i++) {
    float norm = sqrtf(squares[i]);
    unit[i] = 1 / (norm > SMALLEST ? norm : SMALLEST);
  }
  for (int64_t i = 0; i < tokens; i++) {
    int64_t token = t * LANES + i;
    if (token < s->prefix) continue;
    if ((token - s->first_a) % 2 == 0)
      for (int64_t k = 0; k < dim; k++) a[(token - s->first_a) / 2 * dim + k] *= unit[i];
    else
      for (int64_t k = 0; k < dim; k++) b[place_in_b((token - s->first_b) / 2, k, dim)] *= unit[i];
  }
}

static inline float length_of(const float *token, int64_t width) {
  float squares = 0;
  for (int64_t f = 0; f < width; f++) squares += token[f * LANES] * token[f * LANES];
  return sqrtf(squares);
}

/* One image, and one of the `team` threads that work on it: each calls every step, and does its share. */
typedef struct {
  const Layer *l;
  Split s;
  int64_t image, width, inner, rows, row_panels, normed_panel, grown_panel;
  float *x, *normed, *grown, *merged, *a, *b, *best, *scores;
  int64_t *partner, *kept;
  Ranked *order;
  int me, team;
  double *seconds; /* of the one thread that takes the time */
} Image;

static Image image_of(const Layer *l, const Room *room, int64_t image, float *memory, float *own, int me, int team,
                      double *seconds) {
  int64_t width = l->query.in, inner = l->query.out;
  int64_t *kept = (int64_t *)(own + room->scores);
  return (Image){
      .l = l,
      .s = split_of(l->n, l->prefix, l->r),
      .image = image,
      .width = width,
      .inner = inner,
      .rows = l->rows,
      .row_panels = panels_of(l->rows),
      .normed_panel = most(width, inner) * LANES,
      .grown_panel = (3 * inner + l->embedding.out) * LANES,
      .x = memory + room->x,
      .normed = memory + room->normed,
      .grown = memory + room->grown,
      .merged = memory + room->merged,
      .a = memory + room->a,
      .b = memory + room->b,
      .best = memory + room->best,
      .partner = (int64_t *)(memory + room->partner),
      .scores = own,
      .kept = kept,
      .order = (Ranked *)(kept + padded(l->n / 2 + 1, ROWS)),
      .me = me,
      .team = team,
      .seconds = seconds,
  };
}

static inline double start(const Image *i) { return i->seconds ? now() : 0; }
static inline void stop(const Image *i, int part, double started) {
  if (i->seconds) i->seconds[part] += now() - started;
}

/* Where the features of a token lie in panels of some width, LANES apart. */
static inline float *token_in(float *panels, int64_t width, int64_t token) {
  return panels + token / LANES * width * LANES + token % LANES;
}

static void load_tokens(const Image *i) {
  const Layer *l = i->l;
  const float *tokens = l->x + i->image * l->x_image;
  int64_t first, last;
  share(panels_of(l->n), i->me, i->team, &first, &last);
  for (int64_t t = first; t < last; t++) {
    float *panel = i->x + t * i->width * LANES;
    for (int64_t w = 0; w < LANES; w++) {
      const float *token = tokens + (t * LANES + w) * l->x_token;
      if (t * LANES + w < l->n)
        for (int64_t f = 0; f < i->width; f++) panel[f * LANES + w] = token[f];
      else
        for (int64_t f = 0; f < i->width; f++) panel[f * LANES + w] = 0;
    }
    normalise(panel, i->width, l->norm1_weight, l->norm1_bias, l->norm1_eps, i->normed + t * i->normed_panel);
  }
}

/* Queries, keys, values and, where tokens are compared by one, the embedding. */
static void project(const Image *i) {
  const Layer *l = i->l;
  const Linear *linears[] = {&l->query, &l->key, &l->value, &l->embedding};
  int64_t tokens[] = {i->rows, l->n, l->n, l->n};
  Product products[4];
  for (int p = 0; p < 4; p++)
    products[p] = (Product){linears[p], i->grown + p * i->inner * LANES, i->grown_panel, NO_ACTIVATION, 0, 0};
  int embeds = l->embedding.weight && l->r, timed = l->seconds != 0;
  multiply_all(products, tokens, embeds && !timed ? 4 : 3, i->normed, i->normed_panel, i->me, i->team);
  if (embeds && timed) { /* by itself, to be told apart */
    double started = start(i);
    multiply_all(products + 3, tokens + 3, 1, i->normed, i->normed_panel, i->me, i->team);
    stop(i, METRIC, started);
  }
}

/* Attention of all heads, which takes the place of the normed tokens; and what tokens are compared by. */
static void attend_all(const Image *i) {
  const Layer *l = i->l;
  int64_t dim = i->inner / l->heads, first, last;
  if (l->r) {
    double started = start(i);
    int embeds = l->embedding.weight != 0;
    const float *metric = i->grown + (embeds ? 3 : 1) * i->inner * LANES;
    share(panels_of(l->n), i->me, i->team, &first, &last);
    for (int64_t t = first; t < last; t++)
      prepare_metric(metric, i->grown_panel, embeds ? 1 : l->heads, metric_width(l), &i->s, t, i->a, i->b);
    stop(i, MERGING, started);
  }
  share(i->row_panels * l->heads, i->me, i->team, &first, &last);
  for (int64_t item = first; item < last; item++) {
    int64_t head = item / i->row_panels, t = item % i->row_panels;
    const float *query = i->grown + head * dim * LANES, *key = query + i->inner * LANES, *value = key + i->inner * LANES;
    const float *bias = l->bias ? l->bias + i->image * l->bias_image + head * l->bias_head : 0;
    attend(query + t * i->grown_panel, key, value, i->grown_panel, dim, l->n, i->rows - t * LANES <= LANES / 2, bias,
           l->scaling, i->scores, i->normed + t * i->normed_panel + head * dim * LANES);
  }
}

/* The tokens behind attention, and the partners of those that may leave. */
static void add_attention(const Image *i) {
  const Layer *l = i->l;
  if (l->r) {
    double started = start(i);
    int64_t dim = metric_width(l), first, last;
    share((i->s.num_a + ROWS - 1) / ROWS, i->me, i->team, &first, &last);
    for (int64_t row = first * ROWS; row < last * ROWS; row += ROWS)
      find_partners(i->a + row * dim, i->b, dim, i->s.num_b, i->best + row, i->partner + row);
    stop(i, MERGING, started);
  }
  Product attended = {&l->output, i->x, i->width * LANES, NO_ACTIVATION, l->scale1, 1};
  multiply_all(&attended, &i->rows, 1, i->normed, i->normed_panel, i->me, i->team);
}

/* Give the means in a panel back what they lost of their length. */
static void lengthen(const Image *i, const Chosen *c, const float *sizes, const float *out_sizes, int64_t t, float *panel) {
  float lengths[LANES];
  for (int w = 0; w < LANES; w++) lengths[w] = -1; /* of a token that nobody joined */
  for (int64_t k = 0; k < i->s.r; k++) {
    Step step = step_of(&i->s, c, k);
    if (step.to / LANES != t) continue;
    float *length = lengths + step.to % LANES, stays = length_of(token_in(i->x, i->width, step.base), i->width);
    if (*length < 0) *length = stays;
    *length += (length_of(token_in(i->x, i->width, step.from), i->width) - stays) * part_of(&step, sizes, out_sizes);
  }
  for (int w = 0; w < LANES; w++) {
    if (lengths[w] < 0) continue;
    float is = length_of(panel + w, i->width), was = lengths[w] > SMALLEST ? lengths[w] : SMALLEST;
    float factor = powf(was / (is > SMALLEST ? is : SMALLEST), *i->l->norm_power);
    for (int64_t f = 0; f < i->width; f++) panel[f * LANES + w] *= factor;
  }
}

/* Panel t of the merged tokens. */
static void merge_panel(const Image *i, const Chosen *c, const float *sizes, const float *out_sizes, int64_t t) {
  float *panel = i->merged + t * i->width * LANES;
  const float *from[LANES];
  for (int64_t w = 0; w < LANES; w++) {
    int64_t place = t * LANES + w;
    from[w] = token_in(i->x, i->width, place < i->s.left ? origin_of(&i->s, c, place) : 0);
  }
  for (int64_t f = 0; f < i->width; f++)
    for (int w = 0; w < LANES; w++) panel[f * LANES + w] = from[w][f * LANES];
  for (int64_t k = 0; k < i->s.r; k++) {
    Step step = step_of(&i->s, c, k);
    if (step.to / LANES != t) continue;
    const float *leaving = token_in(i->x, i->width, step.from), *stays = token_in(i->x, i->width, step.base);
    float part = part_of(&step, sizes, out_sizes), *joined = panel + step.to % LANES;
    for (int64_t f = 0; f < i->width; f++) joined[f * LANES] += (leaving[f * LANES] - stays[f * LANES]) * part;
  }
  if (i->l->norm_power) lengthen(i, c, sizes, out_sizes, t, panel);
}

/* The merge. Rows are ranked by every thread for itself, so that none has to wait for another's order. */
static void merge(const Image *i) {
  const Layer *l = i->l;
  double started = start(i);
  Chosen chosen = choose(&i->s, i->best, i->partner, i->order, i->kept);
  const float *sizes = l->sizes ? l->sizes + i->image * l->sizes_image : 0;
  float *out_sizes = l->out_sizes + i->image * i->s.left;
  if (i->me == 0) {
    int64_t r = i->s.r, num_kept = i->s.num_kept;
    write_indices(&i->s, &chosen, l->merged + i->image * r, l->target + i->image * r, l->kept + i->image * num_kept);
    weigh(&i->s, &chosen, sizes, out_sizes, l->out_logs + i->image * i->s.left);
  }
  wait_for_all(i->team);
  int64_t first, last;
  share(panels_of(i->s.left), i->me, i->team, &first, &last);
  for (int64_t t = first; t < last; t++) merge_panel(i, &chosen, sizes, out_sizes, t);
  stop(i, MERGING, started);
}

/* The MLP's norm of the panels that this thread has merged, or, where nothing is merged, of its share of all. */
static void normalise_again(const Image *i, float *tokens, int64_t count) {
  const Layer *l = i->l;
  int64_t first, last;
  share(panels_of(count), i->me, i->team, &first, &last);
  for (int64_t t = first; t < last; t++)
    normalise(tokens + t * i->width * LANES, i->width, l->norm2_weight, l->norm2_bias, l->norm2_eps,
              i->normed + t * i->normed_panel);
}

static void store_tokens(const Image *i, float *tokens, int64_t count) {
  int64_t first, last;
  share(count, i->me, i->team, &first, &last);
  for (int64_t k = first; k < last; k++) {
    float *token = i->l->out + (i->image * count + k) * i->width;
    const float *from = token_in(tokens, i->width, k);
    for (int64_t f = 0; f < i->width; f++) token[f] = from[f * LANES];
  }
}

static void run_image(const Image *i) {
  const Layer *l = i->l;
  load_tokens(i);
  wait_for_all(i->team);
  project(i);
  wait_for_all(i->team);
  attend_all(i);
  wait_for_all(i->team);
  add_attention(i);
  wait_for_all(i->team);

  float *tokens = l->r ? i->merged : i->x;
  int64_t count = i->rows - l->r;
  if (l->r) merge(i);
  normalise_again(i, tokens, count);
  wait_for_all(i->team);
  Product grow = {&l->grow, i->grown, l->grow.out * LANES, (int)l->activation, 0, 0};
  multiply_all(&grow, &count, 1, i->normed, i->normed_panel, i->me, i->team);
  wait_for_all(i->team);
  Product shrink = {&l->shrink, tokens, i->width * LANES, NO_ACTIVATION, l->scale2, 1};
  multiply_all(&shrink, &count, 1, i->grown, l->grow.out * LANES, i->me, i->team);
  wait_for_all(i->team);
  store_tokens(i, tokens, count);
}

typedef struct {
  const Layer *layer;
  Room room;
} Work;

static void run_images(const Work *work, int me, int team) {
  const Layer *l = work->layer;
  int64_t rooms = l->batch < l->threads ? l->batch : l->threads;
  float *first = aligned((float *)l->scratch), *mine = first + me * work->room.total;
  float *own = first + rooms * work->room.total + me * (work->room.scores + work->room.order);
  double *seconds = me == 0 ? l->seconds : 0;
  int64_t whole = l->batch / team * team;
  for (int64_t image = me; image < whole; image += team) {
    Image alone = image_of(l, &work->room, image, mine, own, 0, 1, seconds);
    run_image(&alone);
  }
  for (int64_t image = whole; image < l->batch; image++) {
    wait_for_all(team); /* the room of the first thread is free */
    Image together = image_of(l, &work->room, image, first, own, me, team, seconds);
    run_image(&together);
  }
}

static void run_thread(void *work) { run_images(work, omp_get_thread_num(), omp_get_num_threads()); }

/* Whether several threads can be had, and products are made of wide vectors. */
int dtem_layer_is_fast(void) {
  return HAS_THREADS && LANES >= 8;
}

void dtem_layer(const Layer *l) {
  Work work = {l, room_of(l)};
  if (l->threads > 1)
    GOMP_parallel(run_thread, &work, (unsigned)l->threads, 0);
  else
    run_images(&work, 0, 1);
}
