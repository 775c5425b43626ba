// Gradients of the sparse op, in float32: for each row the kept keys and the cells again, nothing of size N x N.
//
//     w_j = count_j e^{s_j - max},  p = w / sum w,  dp_j = g.v_j,  ds_j = scale p_j (dp_j - sum_j p_j dp_j)
//     dq_i = sum_j ds_j k_j,  dk_j += ds_j q_i,  dv_j += p_j g_i                  g: gradient of the row's output
//
// over the list of the forward (sparse.h); what cells gather goes to their keys, by their share in the means. Which keys were
// kept, and the cell of each, is the forward's word and has no gradient. One head is one piece of work: the sums over rows
// have one order, and results do not depend on threads.
//
// Limit: a kept pair reads a row of K twice, of V once, and adds to a row of each of dK and dV: 7 rows of 4d bytes.
#pragma once
#include "sparse.h"

namespace {

struct BackwardScratch {
  float *q, *g, *dq;         // [BLOCK, dp] queries, gradients of their outputs; [dp] the gradient of one query
  float *s, *w, *dp, *count; // [BLOCK, longest] logits, weights, products of gradient and values, how often keys count
  uint16_t *list, *seen;     // [BLOCK, longest]; [4, M + P]
  float *means, *dK, *dV;    // [2, M, dp]; [N + M + 1, dp] gradients of the packed keys and values
  int64_t longest;
};

// The layout over `base`; the bytes it needs where base is null.
static size_t backward_layout(const Problem& p, void* base, BackwardScratch* scratch) {
  const int64_t dp = padded<float>(p.d), rows = p.N + p.M + 1;
  BackwardScratch x;
  x.longest = round_up(p.P ? max_of(p.budget + p.M + p.P, p.N) : p.budget + p.M, 16) + 64;
  Arena arena(base);
  auto floats = [&](int64_t n) { return (float*)arena.take(n * 4); };
  x.q = floats(BLOCK * dp), x.g = floats(BLOCK * dp), x.dq = floats(dp);
  const int64_t all = BLOCK * x.longest;
  x.s = floats(all), x.w = floats(all), x.dp = floats(all), x.count = floats(all);
  x.list = (uint16_t*)arena.take(all * 2);
  x.seen = (uint16_t*)arena.take(4 * round_up(p.M + p.P, 16) * (p.size ? 8 : 2));
  x.means = floats(2 * p.M * dp), x.dK = floats(rows * dp), x.dV = floats(rows * dp);
  if (scratch) *scratch = x;
  return arena.bytes();
}
static size_t backward_scratch_bytes(const Problem& p) { return backward_layout(p, nullptr, nullptr); }
static int64_t backward_blocks(const Problem&) { return 1; }

static void backward_prepare(const Problem& p, int64_t b, int64_t h, void* base, void* scratch) {
  Head<float> head;
  BackwardScratch x;
  layout<float>(p, h, base, &head), backward_layout(p, scratch, &x);
  pack_rows(p, b, h, head);
  const int32_t* cells = p.cells + (b * p.H + h) * p.N;
  for (int64_t i = 0; i < p.N; i++) head.cell[i] = uint16_t(i < p.P ? p.M + i : p.M ? cells[i] : 0);
  if (p.M == 0) return;
  cell_means(p, sizes_of(p, b), head, x.means);
  if (p.size) pack_masses(p, sizes_of(p, b), head);
}

// to[list_j] += w_j x in C vectors of columns.
template <int C>
ROUTINE void spread_columns(const float* x, const float* w, const uint16_t* list, int64_t n, int64_t dp, float* to) {
  vf all[C];
  for (int c = 0; c < C; c++) all[c] = load(x + c * W);
  for (int64_t j = 0; j < n; j++) {
    float* at = to + list[j] * dp;
    const vf by = set1(w[j]);
    for (int c = 0; c < C; c++) store(at + c * W, fma(all[c], by, load(at + c * W)));
  }
}
INLINE void spread(const float* x, const float* w, const uint16_t* list, int64_t n, int64_t dp, float* to) {
  int64_t column = 0;
  for (; column + 64 <= dp; column += 64) spread_columns<64 / W>(x + column, w, list, n, dp, to + column);
  for (; column < dp; column += 16) spread_columns<16 / W>(x + column, w, list, n, dp, to + column);
}

// From logits and products of the first `length` keys of a list, of which `counted` have counts: w and, in s, ds.
ROUTINE void backward_weights(float scale, float* s, float* w, const float* dp, int64_t length, int64_t counted, const float* count) {
  const int64_t n = round_up(length, 16);
  for (int64_t j = length; j < n; j++) s[j] = -__builtin_inff();
  const vf by = set1(weights(s, n, scale * LOG2E, counted, count, w)), factor = set1(scale);
  vf total = set1(0);
  for (int64_t j = 0; j < n; j += W) {
    const vf p = mul(load(w + j), by);
    store(w + j, p), total = fma(p, load(dp + j), total);
  }
  const vf mean = set1(sum(total));
  for (int64_t j = 0; j < n; j += W) store(s + j, mul(mul(load(w + j), factor), sub(load(dp + j), mean)));
}

INLINE void write_gradient(const View& v, int64_t b, int64_t h, int64_t i, int64_t d, const float* x) {
  void* at = const_cast<void*>(row_of(v, b, h, i));
  int64_t j = 0;
  if (v.bf16) {
    for (; j + 8 <= d; j += 8) _mm_storeu_si128((__m128i*)((bf16*)at + j), narrow8(load8(x + j)));
    for (; j < d; j++) ((bf16*)at)[j] = to_bf16(x[j]);
  } else {
    for (; j + 8 <= d; j += 8) store8((float*)at + j, load8(x + j));
    for (; j < d; j++) ((float*)at)[j] = x[j];
  }
}

// The keys and values of the cells are means: their gradients, shared among the patch keys.
static void share_cells(const Problem& p, const float* size, const Head<float>& head, const BackwardScratch& x) {
  for (int64_t i = p.P; i < p.N; i++) {
    const int64_t to = i * head.dp, from = (p.N + head.cell[i]) * head.dp;
    const float held = head.size[head.cell[i]];
    const vf share = set1((size ? size[i] : 1.f) / (held > 0 ? held : 1.f));
    for (int64_t j = 0; j < head.dp; j += W) {
      store(x.dK + to + j, fma(share, load(x.dK + from + j), load(x.dK + to + j)));
      store(x.dV + to + j, fma(share, load(x.dV + from + j), load(x.dV + to + j)));
    }
  }
}

// The keys of row i as in the forward, filled up with rows of zeros; a prefix row: all keys, no tail.
static void backward_list(const Problem& p, const float* size, int64_t row0, int64_t i, const Head<float>& head,
                          const BackwardScratch& x, uint16_t* list, float* count, int64_t* length, int64_t* counted) {
  if (i < p.P) {
    for (int64_t j = 0; j < round_up(p.N, 16); j++) list[j] = uint16_t(j < p.N ? j : p.N + p.M);
    for (int64_t j = 0; size && j < round_up(p.N, 16); j++) count[j] = j < p.N ? size[j] : 1.f;
    *length = p.N, *counted = size ? p.N : 0;
    return;
  }
  const int32_t* kept = p.kept + (row0 + i) * p.widest;
  for (int64_t j = 0; j < p.budget; j++) list[p.M + j] = uint16_t(kept[j]);
  *length = size ? complete(p, size, head, list, count, (uint64_t*)x.seen) : complete(p, size, head, list, count, x.seen);
  *counted = size ? *length : p.M;
}

static void backward_block(const Problem& p, int64_t b, int64_t h, int64_t, const void* base, void* scratch, const Probe*) {
  Head<float> head;
  BackwardScratch x;
  layout<float>(p, h, const_cast<void*>(base), &head), backward_layout(p, scratch, &x);
  const float* size = sizes_of(p, b);
  const int64_t dp = head.dp, wide = x.longest;
  memset(x.dK, 0, head.rows * dp * 4), memset(x.dV, 0, head.rows * dp * 4);
  int64_t length[BLOCK], counted[BLOCK];
  for (int64_t first = 0; first < p.N; first += BLOCK) {  // each step for all rows: K, V, dK and dV pass in turn
    const int n = int(min_of<int64_t>(BLOCK, p.N - first));
    for (int i = 0; i < n; i++) {
      const int64_t ahead = min_of(first + i + 8, p.N - 1);
      prefetch_row(p.q, b, h, ahead, p.d), prefetch_row(p.grad, b, h, ahead, p.d);
      backward_list(p, size, (b * p.H + h) * p.N, first + i, head, x, x.list + i * wide, x.count + i * wide, length + i, counted + i);
      read_row(p.q, b, h, first + i, p.d, dp, x.q + i * dp), read_row(p.grad, b, h, first + i, p.d, dp, x.g + i * dp);
    }
    auto keys = [&](int i) { return x.list + i * wide; };
    for (int i = 0; i < n; i++) row_logits(x.q + i * dp, head.K, dp, keys(i), round_up(length[i], 16), x.s + i * wide);
    for (int i = 0; i < n; i++) row_logits(x.g + i * dp, head.V, dp, keys(i), round_up(length[i], 16), x.dp + i * wide);
    for (int i = 0; i < n; i++)
      backward_weights(p.scale, x.s + i * wide, x.w + i * wide, x.dp + i * wide, length[i], counted[i], x.count + i * wide);
    for (int i = 0; i < n; i++) {
      weigh(x.s + i * wide, head.K, dp, keys(i), round_up(length[i], 4), x.dq);
      write_gradient(p.dq, b, h, first + i, p.d, x.dq);
    }
    for (int i = 0; i < n; i++) spread(x.q + i * dp, x.s + i * wide, keys(i), length[i], dp, x.dK);
    for (int i = 0; i < n; i++) spread(x.g + i * dp, x.w + i * wide, keys(i), length[i], dp, x.dV);
  }
  if (p.M) share_cells(p, size, head, x);
  for (int64_t i = 0; i < p.N; i++) {
    write_gradient(p.dk, b, h, i, p.d, x.dK + i * head.dp);
    write_gradient(p.dv, b, h, i, p.d, x.dV + i * head.dp);
  }
}

static const Kernels* backward_kernels() {
  static const Kernels k = {head_bytes<float>, backward_scratch_bytes, backward_blocks, backward_prepare, backward_block};
  return &k;
}

}  // namespace
