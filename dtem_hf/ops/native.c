/* Matching and merging of a few images on a CPU in one pass (METHOD.md section 3); native.py compiles and calls it.
 *
 * The arithmetic is that of matching.py and merging.py in float32: cosines of A and B, the first of equal maxima, the r
 * best rows (equal scores by position), means as what they move their targets by. Rows are padded to whole vectors, so
 * that every column of scores is computed by the same instructions, and equal tokens have equal scores.
 */
#include "native.h"

/* Bytes that dtem_match_and_merge needs beside its output, for n tokens that are compared by d numbers. */
int64_t dtem_scratch_bytes(int64_t n, int64_t d) {
  int64_t half = n / 2 + 1, columns = padded(half, LANES), rows = padded(half, ROWS);
  return 4 * d * (columns + rows + 1) + rows * (int64_t)(sizeof(float) + 2 * sizeof(int64_t) + sizeof(Ranked)) + 64;
}

/* The sum of a token's heads, as `row`; returns what brings it to length 1. */
static float sum_heads(const float *token, int64_t heads, int64_t d, float *row) {
  float squares = 0;
  memcpy(row, token, sizeof(float) * d);
  for (int64_t h = 1; h < heads; h++)
    for (int64_t k = 0; k < d; k++) row[k] += token[h * d + k];
  for (int64_t k = 0; k < d; k++) squares += row[k] * row[k];
  float norm = sqrtf(squares);
  return 1 / (norm > SMALLEST ? norm : SMALLEST);
}

/* metric [batch, n, heads * d], x [batch, n, width], sizes [batch, n] or NULL; strides in numbers, the last ones 1.
 * Out: out [batch, n - r, width], out_sizes [batch, n - r], their logarithms, and the indices of a Matching. */
void dtem_match_and_merge(const float *metric, int64_t metric_image, int64_t metric_token, int64_t heads, int64_t d,
                          const float *x, int64_t x_image, int64_t x_token, int64_t width, const float *sizes,
                          int64_t sizes_image, int64_t batch, int64_t n, int64_t prefix, int64_t r, float *out,
                          float *out_sizes, float *out_logs, int64_t *merged, int64_t *target, int64_t *kept, char *scratch) {
  Split s = split_of(n, prefix, r);
  int64_t columns = padded(s.num_b, LANES), rows = padded(s.num_a, ROWS);
  int64_t *partner = (int64_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63), *staying = partner + rows;
  Ranked *order = (Ranked *)(staying + rows);
  float *b = (float *)(order + rows), *a = b + d * columns, *row = a + d * rows, *best = row + d;
  memset(b, 0, sizeof(float) * d * (columns + rows));
  for (int64_t image = 0; image < batch; image++) {
    for (int64_t i = 0; i < s.num_a; i++) {
      float unit = sum_heads(metric + (s.first_a + 2 * i) * metric_token, heads, d, a + i * d);
      for (int64_t k = 0; k < d; k++) a[i * d + k] *= unit;
    }
    for (int64_t j = 0; j < s.num_b; j++) {
      float unit = sum_heads(metric + (s.first_b + 2 * j) * metric_token, heads, d, row);
      for (int64_t k = 0; k < d; k++) b[place_in_b(j, k, d)] = row[k] * unit;
    }
    for (int64_t i = 0; i < rows; i += ROWS) find_partners(a + i * d, b, d, s.num_b, best + i, partner + i);

    Chosen chosen = choose(&s, best, partner, order, staying);
    write_indices(&s, &chosen, merged, target, kept);
    weigh(&s, &chosen, sizes, out_sizes, out_logs);
    for (int64_t i = 0; i < s.left; i++)
      memcpy(out + i * width, x + origin_of(&s, &chosen, i) * x_token, sizeof(float) * width);
    for (int64_t i = 0; i < r; i++) {
      Step step = step_of(&s, &chosen, i);
      const float *leaving = x + step.from * x_token, *stays = x + step.base * x_token;
      float part = part_of(&step, sizes, out_sizes), *joined = out + step.to * width;
      for (int64_t k = 0; k < width; k++) joined[k] += (leaving[k] - stays[k]) * part;
    }

    metric += metric_image, x += x_image, out += s.left * width, out_sizes += s.left, out_logs += s.left;
    merged += r, target += r, kept += s.num_kept;
    if (sizes) sizes += sizes_image;
  }
}
