// The tail: a partition of the patch keys into M cells, and the mean key and value of each (tails.py is the specification).
#pragma once
#include "head.h"

namespace {

// Sums of the features of every cell's patch keys, each `size` times, [M, f], and of their sizes.
template <class T>
ROUTINE void feature_sums(const Problem& p, const float* size, const Head<T>& head, const float* rows, int64_t stride, float* total) {
  int64_t fp = round_up(head.f, W);
  memset(total, 0, p.M * fp * 4), memset(head.size, 0, (p.M + 16) * 4);
  for (int64_t i = p.P; i < p.N; i++) {
    float *to = total + head.cell[i] * fp;
    const float *from = rows + i * stride, n = size ? size[i] : 1.f;
    const vf by = set1(n);
    for (int64_t j = 0; j < fp; j += W) store(to + j, fma(load(from + j), by, load(to + j)));
    head.size[head.cell[i]] += n;
  }
}

// Every patch key to the cell with the nearest mean, ties to the lower cell; empty cells get none. `words`: coordinates of
// the panels of features, of which the first f count.
template <class T>
ROUTINE void assign_nearest(const Problem& p, const Head<T>& head, int64_t words, float* centre, float* offset) {
  int64_t f = head.f, fp = round_up(f, W);
  for (int64_t c = 0; c < p.M; c++) {  // distance less |f|^2: |centre|^2 - 2 f.centre
    float* x = centre + c * fp;
    for (int64_t j = f; j < fp; j++) x[j] = 0;
    vf scale = set1(head.size[c] > 0 ? 1.f / head.size[c] : 0.f), norm = set1(0);
    for (int64_t j = 0; j < fp; j += W) {
      vf m = mul(load(x + j), scale);
      norm = fma(m, m, norm);
      store(x + j, mul(m, set1(-2.f)));
    }
    offset[c] = head.size[c] > 0 ? sum(norm) : __builtin_inff();
  }
  for (int64_t panel = 0; panel < head.panels; panel++) {
    const float* x = head.feature + panel * words * PANEL;
    vf best[4];
    vi which[4];
    for (int a = 0; a < 4; a++) best[a] = set1(__builtin_inff()), which[a] = set1i(0);
    for (int64_t c = 0; c < p.M; c++) {
      const float* y = centre + c * fp;
      vf d0 = set1(offset[c]), d1 = d0, d2 = d0, d3 = d0;
      for (int64_t j = 0; j < f; j++) {
        vf s = set1(y[j]);
        const float* from = x + j * PANEL;
        d0 = fma(s, load(from), d0), d1 = fma(s, load(from + W), d1);
        d2 = fma(s, load(from + 2 * W), d2), d3 = fma(s, load(from + 3 * W), d3);
      }
      vf d[4] = {d0, d1, d2, d3};
      for (int a = 0; a < 4; a++) {
        vm nearer = less(d[a], best[a]);
        best[a] = select(nearer, d[a], best[a]);
        which[a] = select(nearer, set1i(int(c)), which[a]);
      }
    }
    alignas(64) int32_t found[PANEL];
    for (int a = 0; a < 4; a++) storei(found + a * W, which[a]);
    for (int slot = 0; slot < PANEL; slot++) {
      int64_t key = panel * PANEL + panel_key(slot);
      if (key >= p.P && key < p.N) head.cell[key] = uint16_t(found[slot]);
    }
  }
}

// Mean keys and values of the cells, as packed rows N..N+M-1. An empty cell, which has no weight in any row, has the key of
// another, so that its logit is no row's largest.
template <class T> ROUTINE void cell_means(const Problem& p, const float* size, const Head<T>& head, float* total) {
  int64_t dp = head.dp;
  memset(total, 0, 2 * p.M * dp * 4), memset(head.size, 0, (p.M + 16) * 4);
  for (int64_t i = p.P; i < p.N; i++) {
    float *k = total + 2 * head.cell[i] * dp, *v = k + dp;
    const T *from_k = head.K + i * dp, *from_v = head.V + i * dp;
    const float n = size ? size[i] : 1.f;
    const vf by = set1(n);
    for (int64_t j = 0; j < dp; j += W) {
      store(k + j, fma(wide(from_k + j), by, load(k + j)));
      store(v + j, fma(wide(from_v + j), by, load(v + j)));
    }
    head.size[head.cell[i]] += n;
  }
  for (int64_t c = 0; c < p.M; c++) {
    float *k = total + 2 * c * dp, *v = k + dp, n = head.size[c] > 0 ? head.size[c] : 1.f;
    for (int64_t j = 0; j < dp; j++) k[j] /= n, v[j] /= n;
    write_row(k, dp, head.K + (p.N + c) * dp), write_row(v, dp, head.V + (p.N + c) * dp);
  }
  const T* some = head.K + (p.N + head.cell[p.P]) * dp;
  for (int64_t c = 0; c < p.M; c++)
    if (head.size[c] == 0) memcpy(head.K + (p.N + c) * dp, some, dp * sizeof(T));
}

// Sizes as integers, 2^47 to all of an image, with a count of keys below: what a cell's kept keys take from its total is
// exact, and nothing is left where all are kept.
template <class T> ROUTINE void pack_masses(const Problem& p, const float* size, const Head<T>& head) {
  double total = 0;
  for (int64_t i = 0; i < p.N; i++) total += size[i];
  const double units = double(1ll << 47) / total;
  head.state[QUANTUM] = float(1 / units);
  memset(head.held, 0, p.M * 8);
  for (int64_t i = 0; i < p.N; i++) {
    const double x = size[i] * units;
    head.mass[i] = (x > 0 && x < 1e15 ? uint64_t(x + 0.5) << 16 : 0) + 1;  // no integer for a size of NaN
    if (i >= p.P) head.held[head.cell[i]] += head.mass[i];
  }
}

// Floats of scratch that `make_cells` needs.
template <class T> static int64_t cells_scratch(const Problem& p, int64_t f) {
  int64_t fp = round_up(f, W);
  return p.M * (max_of(fp, 2 * padded<T>(p.d)) + 1) + (p.tail == TAIL_CLUSTERS ? p.N * fp : 0) + 64;
}

// NaN to 0, infinities to the largest numbers: what the clusters compare is always finite.
static void sanitize(const float* from, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j++) {
    float x = from[j];
    to[j] = x != x ? 0.f : max_of(-__FLT_MAX__, min_of(__FLT_MAX__, x));
  }
}

template <class T> static void make_cells(const Problem& p, int64_t b, int64_t h, const Head<T>& head, float* scratch) {
  for (int64_t i = 0; i < p.P; i++) head.cell[i] = uint16_t(p.M + i);
  const int32_t* start = p.start_cell + (p.placed && p.start_cell ? b * (p.N - p.P) : 0);
  for (int64_t i = p.P; i < p.N; i++) head.cell[i] = p.tail <= TAIL_MEAN ? 0 : uint16_t(start[i - p.P]);
  if (p.M == 0) return;
  const float* size = sizes_of(p, b);
  float *total = scratch, *offset = total + p.M * max_of(round_up(head.f, W), 2 * head.dp);
  if (p.tail == TAIL_CLUSTERS) {
    const float* rows = head.col;
    int64_t stride = head.rp, words = head.r;
    if (!p.feature_is_col || head.state[EXACT]) {
      float* own = offset + p.M;
      stride = round_up(head.f, W), words = head.f;
      for (int64_t i = 0; i < p.N; i++) {
        float* to = own + i * stride;
        read_row(p.feature, b, h, i, head.f, stride, to), sanitize(to, stride, to);
      }
      pack_panels(own, stride, p.N, head.f, head.feature);
      rows = own;
    }
    for (int step = 0; step < 2; step++) {  // tails.LLOYD_STEPS
      feature_sums(p, size, head, rows, stride, total);
      assign_nearest(p, head, words, total, offset);
    }
  }
  cell_means(p, size, head, total);
  if (size) pack_masses(p, size, head);
}

}  // namespace
