/* What native.c and fused_layer.c share. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* Numbers in a vector, and the block of a product that fits into the registers: ROWS rows by WIDE vectors. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#define WIDE 2
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define ROWS 4
#define WIDE 3
#else
#define LANES 4
#define ROWS 4
#define WIDE 2
#endif
#define SMALLEST 1e-12f
#define SMALLEST_SIZE 1e-8f /* as in attention.py */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float unaligned_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
  float score;
  int32_t row;
} Ranked;

static inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* The r highest of n scores that are no NaN, best first, and of equal ones the first. */
static inline void rank(const float *score, int64_t n, int64_t r, Ranked *order) {
  for (int64_t i = 0, full = 0; i < n; i++) {
    if (full == r && (r == 0 || score[i] <= order[r - 1].score)) continue;
    int64_t at = full < r ? full++ : r - 1;
    for (; at > 0 && order[at - 1].score < score[i]; at--) order[at] = order[at - 1];
    order[at] = (Ranked){score[i], (int32_t)i};
  }
}

/* Matching splits n tokens, the first `prefix` left alone, at even and odd places: A at first_a, first_a + 2, …, and B.
 * Of A, r leave; behind the merge come the prefix, the rest of A, and B. */
typedef struct {
  int64_t n, prefix, r, first_a, first_b, num_a, num_b, num_kept, left;
} Split;

static inline Split split_of(int64_t n, int64_t prefix, int64_t r) {
  int64_t num_a = (n + 1) / 2 - (prefix + 1) / 2;
  return (Split){n,     prefix,           r,        prefix + prefix % 2, prefix + 1 - prefix % 2,
                 num_a, n - prefix - num_a, num_a - r, n - r};
}

/* Products of ROWS rows of a with a panel b [depth][LANES], added to `sums`: a[q * a_row + k * a_step] * b[k]. */
static inline void outer(const float *a, int64_t a_row, int64_t a_step, int64_t depth, const float *b, lanes *sums) {
  for (int64_t k = 0; k < depth; k++) {
    lanes column = *(const unaligned_lanes *)(b + k * LANES);
    for (int q = 0; q < ROWS; q++) sums[q] += a[q * a_row + k * a_step] * column;
  }
}

/* Where feature k of a column of B lies, in panels [d][LANES]. */
static inline int64_t place_in_b(int64_t column, int64_t k, int64_t d) {
  return (column / LANES * d + k) * LANES + column % LANES;
}

/* Of ROWS rows of A [ROWS][d], the highest product with a column of B, and the first that has it. */
static inline void find_partners(const float *a, const float *b, int64_t d, int64_t num_b, float *best, int64_t *partner) {
  for (int q = 0; q < ROWS; q++) best[q] = -INFINITY, partner[q] = 0;
  for (int64_t j = 0; j < num_b; j += LANES) {
    lanes sums[ROWS] = {{0}};
    outer(a, d, 1, d, b + j * d, sums);
    int64_t inside = num_b - j < LANES ? num_b - j : LANES;
    for (int q = 0; q < ROWS; q++)
      for (int64_t w = 0; w < inside; w++)
        if (sums[q][w] > best[q]) best[q] = sums[q][w], partner[q] = j + w;
  }
}

/* Which r rows of A leave, best first, for which columns of B; and which stay, in their order. */
typedef struct {
  const Ranked *order;
  const int64_t *partner, *kept;
} Chosen;

/* `order` has room for r, `kept` for num_a. */
static inline Chosen choose(const Split *s, const float *best, const int64_t *partner, Ranked *order, int64_t *kept) {
  rank(best, s->num_a, s->r, order);
  memset(kept, 0, sizeof(int64_t) * s->num_a);
  for (int64_t i = 0; i < s->r; i++) kept[order[i].row] = -1;
  for (int64_t i = 0, k = 0; i < s->num_a; i++)
    if (kept[i] == 0) kept[k++] = i;
  return (Chosen){order, partner, kept};
}

static inline void write_indices(const Split *s, const Chosen *c, int64_t *merged, int64_t *target, int64_t *kept) {
  for (int64_t i = 0; i < s->r; i++) merged[i] = c->order[i].row, target[i] = c->partner[c->order[i].row];
  memcpy(kept, c->kept, sizeof(int64_t) * s->num_kept);
}

/* Where the token at a place behind the merge lay in front of it. */
static inline int64_t origin_of(const Split *s, const Chosen *c, int64_t place) {
  if (place < s->prefix) return place;
  int64_t i = place - s->prefix;
  return i < s->num_kept ? s->first_a + 2 * c->kept[i] : s->first_b + 2 * (i - s->num_kept);
}

/* The i-th token that leaves: from where, to which place behind the merge, and where that token lay in front of it. */
typedef struct {
  int64_t from, to, base;
} Step;

static inline Step step_of(const Split *s, const Chosen *c, int64_t i) {
  int64_t column = c->partner[c->order[i].row];
  return (Step){s->first_a + 2 * c->order[i].row, s->prefix + s->num_kept + column, s->first_b + 2 * column};
}

/* What part of a mean it makes: a mean is what moves its target by that, x + sum of m_i (x_i - x) / m'. */
static inline float part_of(const Step *step, const float *sizes, const float *out_sizes) {
  float total = out_sizes[step->to] > SMALLEST ? out_sizes[step->to] : SMALLEST;
  return (sizes ? sizes[step->from] : 1) / total;
}

/* Sizes behind a merge, and their logarithms; `sizes` is NULL where all are 1. */
static inline void weigh(const Split *s, const Chosen *c, const float *sizes, float *out_sizes, float *out_logs) {
  for (int64_t i = 0; i < s->left; i++) out_sizes[i] = sizes ? sizes[origin_of(s, c, i)] : 1;
  for (int64_t i = 0; i < s->r; i++) {
    Step step = step_of(s, c, i);
    out_sizes[step.to] += sizes ? sizes[step.from] : 1;
  }
  for (int64_t i = 0; i < s->left; i++) out_logs[i] = logf(out_sizes[i] > SMALLEST_SIZE ? out_sizes[i] : SMALLEST_SIZE);
}
