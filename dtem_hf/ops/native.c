/* Matching and merging of a few images on a CPU in one pass (METHOD.md section 3); native.py compiles and calls it.
 *
 * The arithmetic is that of matching.py and merging.py in float32: cosines of A and B, the first of equal maxima, the r
 * best rows (equal scores by position), means as what they move their targets by. Rows are padded to whole vectors, so
 * that every column of scores is computed by the same instructions, and equal tokens have equal scores.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define ROWS 4
#define SMALLEST 1e-12f
#define SMALLEST_SIZE 1e-8f /* as in attention.py */

/* The processor that runs it need not be the one that compiled it: caches lie in homes that machines share. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FAST __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define FAST
#endif

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float unaligned_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
  float score;
  int32_t row;
} Ranked;

static int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Bytes that dtem_match_and_merge needs beside its output, for n tokens that are compared by d numbers. */
int64_t dtem_scratch_bytes(int64_t n, int64_t d) {
  int64_t half = n / 2 + 1, columns = padded(half, LANES), rows = padded(half, ROWS);
  return 4 * d * (columns + rows + 1) + rows * (int64_t)(sizeof(float) + sizeof(int64_t) + sizeof(Ranked)) + 256;
}

/* The r highest of n scores that are no NaN, best first, and of equal ones the first. */
static void rank(const float *score, int64_t n, int64_t r, Ranked *order) {
  for (int64_t i = 0, full = 0; i < n; i++) {
    if (full == r && (r == 0 || score[i] <= order[r - 1].score)) continue;
    int64_t at = full < r ? full++ : r - 1;
    for (; at > 0 && order[at - 1].score < score[i]; at--) order[at] = order[at - 1];
    order[at] = (Ranked){score[i], (int32_t)i};
  }
}

/* The sum of a token's heads, as `row`; returns what brings it to length 1. */
FAST static float sum_heads(const float *token, int64_t heads, int64_t d, float *row) {
  float squares = 0;
  memcpy(row, token, sizeof(float) * d);
  for (int64_t h = 1; h < heads; h++)
    for (int64_t k = 0; k < d; k++) row[k] += token[h * d + k];
  for (int64_t k = 0; k < d; k++) squares += row[k] * row[k];
  float norm = sqrtf(squares);
  return 1 / (norm > SMALLEST ? norm : SMALLEST);
}

/* Of every row of a [rows, d], the highest product with a column of b [d, columns], and the first that has it. */
FAST static void best_partner(const float *a, const float *b, int64_t rows, int64_t width, int64_t columns, int64_t d,
                              float *best, int64_t *partner) {
  for (int64_t i = 0; i < rows; i += ROWS) {
    for (int q = 0; q < ROWS; q++) best[i + q] = -INFINITY, partner[i + q] = 0;
    for (int64_t j = 0; j < columns; j += LANES) {
      lanes sums[ROWS] = {{0}};
      for (int64_t k = 0; k < d; k++) {
        lanes column = *(const unaligned_lanes *)(b + k * columns + j);
        for (int q = 0; q < ROWS; q++) sums[q] += a[(i + q) * d + k] * column;
      }
      int64_t inside = width - j < LANES ? width - j : LANES;
      for (int q = 0; q < ROWS; q++)
        for (int64_t w = 0; w < inside; w++)
          if (sums[q][w] > best[i + q]) best[i + q] = sums[q][w], partner[i + q] = j + w;
    }
  }
}

FAST static void move(float *out, const float *from, const float *base, float share, int64_t width) {
  for (int64_t k = 0; k < width; k++) out[k] += (from[k] - base[k]) * share;
}

/* metric [batch, n, heads * d], x [batch, n, width], sizes [batch, n] or NULL; strides in numbers, the last ones 1.
 * Out: out [batch, n - r, width], out_sizes [batch, n - r], their logarithms, and the indices of a Matching. */
void dtem_match_and_merge(const float *metric, int64_t metric_image, int64_t metric_token, int64_t heads, int64_t d,
                          const float *x, int64_t x_image, int64_t x_token, int64_t width, const float *sizes,
                          int64_t sizes_image, int64_t batch, int64_t n, int64_t prefix, int64_t r, float *out,
                          float *out_sizes, float *out_logs, int64_t *merged, int64_t *target, int64_t *kept, char *scratch) {
  int64_t first_a = prefix + prefix % 2, first_b = prefix + 1 - prefix % 2;
  int64_t num_a = (n + 1) / 2 - (prefix + 1) / 2, num_b = n - prefix - num_a, num_kept = num_a - r;
  int64_t columns = padded(num_b, LANES), rows = padded(num_a, ROWS);
  int64_t *partner = (int64_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  Ranked *order = (Ranked *)(partner + rows);
  float *b = (float *)(order + rows), *a = b + d * columns, *row = a + d * rows, *best = row + d;
  memset(b, 0, sizeof(float) * d * (columns + rows));
  for (int64_t image = 0; image < batch; image++) {
    for (int64_t i = 0; i < num_a; i++) {
      float unit = sum_heads(metric + (first_a + 2 * i) * metric_token, heads, d, a + i * d);
      for (int64_t k = 0; k < d; k++) a[i * d + k] *= unit;
    }
    for (int64_t j = 0; j < num_b; j++) {
      float unit = sum_heads(metric + (first_b + 2 * j) * metric_token, heads, d, row);
      for (int64_t k = 0; k < d; k++) b[k * columns + j] = row[k] * unit;
    }
    best_partner(a, b, rows, num_b, columns, d, best, partner);

    rank(best, num_a, r, order);
    for (int64_t i = 0; i < r; i++) {
      merged[i] = order[i].row;
      target[i] = partner[merged[i]];
      partner[merged[i]] = -1; /* it leaves */
    }
    for (int64_t i = 0, k = 0; i < num_a; i++)
      if (partner[i] >= 0) kept[k++] = i;

    for (int64_t i = 0; i < n - r; i++) {
      int64_t from = i < prefix              ? i
                     : i < prefix + num_kept ? first_a + 2 * kept[i - prefix]
                                             : first_b + 2 * (i - prefix - num_kept);
      memcpy(out + i * width, x + from * x_token, sizeof(float) * width);
      out_sizes[i] = sizes ? sizes[from] : 1;
    }
    float *out_b = out + (prefix + num_kept) * width, *sizes_b = out_sizes + prefix + num_kept;
    for (int64_t i = 0; i < r; i++) sizes_b[target[i]] += sizes ? sizes[first_a + 2 * merged[i]] : 1;
    for (int64_t i = 0; i < r; i++) {
      int64_t from = first_a + 2 * merged[i], to = target[i];
      float total = sizes_b[to] > SMALLEST ? sizes_b[to] : SMALLEST;
      move(out_b + to * width, x + from * x_token, x + (first_b + 2 * to) * x_token,
           (sizes ? sizes[from] : 1) / total, width);
    }

    for (int64_t i = 0; i < n - r; i++) out_logs[i] = logf(out_sizes[i] > SMALLEST_SIZE ? out_sizes[i] : SMALLEST_SIZE);

    metric += metric_image, x += x_image, out += (n - r) * width, out_sizes += n - r, out_logs += n - r;
    merged += r, target += r, kept += num_kept;
    if (sizes) sizes += sizes_image;
  }
}
