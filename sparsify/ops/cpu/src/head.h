// What is computed once for each image and head, before its queries: keys and values packed row by row in the storage
// type, the predictor's key coordinates in panels, the cells of the tail and their mean keys and values.
#pragma once
#include "gemm.h"
#include "problem.h"

namespace {
using namespace sparsify;

// Where key j of a panel lies, so that packing four vectors of scores to bytes leaves them in the order of the keys.
INLINE int panel_slot(int j) { return (j % 16) / 4 * W + 4 * (j / 16) + j % 4; }
INLINE int panel_key(int slot) { return 16 * (slot % W / 4) + 4 * (slot / W) + slot % 4; }

template <class T> struct Head {
  int64_t dp, rows, panels, r, rp, f;  // padded head size; packed rows; panels; coordinates; padded; feature dimensions
  T* K;             // [rows, dp]: N keys, M cell means, one row of zeros
  T* V;             // [rows, dp]
  float* col;       // [N, rp] coordinates less their mean
  float* panel;     // [panels, r, PANEL] the same in panels, where `needs_panel`
  uint8_t* panel8;  // [panels, ceil(r/4), PANEL, 4] the same as bytes, unit[j] each (bf16 storage)
  float* unit;      // [rp]
  float* zero;      // [rp] the byte of 0
  float* feature;   // [panels, f, PANEL]; = panel where the features are the coordinates
  float* variance;  // [rp] of each coordinate
  float* covariance;  // [r, rp] (tiles only)
  float* size;      // [M] tokens of each cell: its keys, or the sum of their sizes
  uint64_t* mass;   // [N] of each key: its size over `state[QUANTUM]`, times 2^16, plus 1 (sizes only)
  uint64_t* held;   // [M] sums over the keys of each cell (sizes only)
  uint16_t* cell;   // [N] cell of each key, prefix key i: M + i
  float* state;     // largest |col_j| (float32 storage); threshold of the scores in standard deviations: mean and spread; 1: exact only
};

enum { COL_MAX = 0, THRESHOLD = 1, SPREAD = 2, EXACT = 3, QUANTUM = 4, STATES = 5 };

template <class T> INLINE int64_t padded(int64_t d) { return round_up(d, sizeof(T) == 2 ? 32 : 16); }

// Whether the coordinates are wanted in float32 panels: to be scored, or to be compared by the clusters.
template <class T> INLINE bool needs_panel(const Problem& p) {
  return sizeof(T) == 4 || (p.tail == TAIL_CLUSTERS && p.feature_is_col);
}

// A shift of the scores is one coordinate more, after those of the predictor: 1 in every row, the shift in every key.
INLINE int64_t coordinates(const Problem& p, int64_t h) { return p.ranks[h] + (p.shift ? 1 : 0); }

INLINE const float* sizes_of(const Problem& p, int64_t b) { return p.size ? p.size + b * p.N : nullptr; }

// The layout over `base`; the bytes it needs where base is null.
template <class T> static size_t layout(const Problem& p, int64_t h, void* base, Head<T>* head) {
  Head<T> x;
  int64_t r = coordinates(p, h), f = p.feature_dims[h];
  x.dp = padded<T>(p.d), x.rows = p.N + p.M + 1, x.panels = (p.N + PANEL - 1) / PANEL;
  x.r = r, x.rp = round_up(r, W), x.f = f;
  bool own = p.tail == TAIL_CLUSTERS && !p.feature_is_col;
  Arena arena(base);
  x.K = (T*)arena.take(x.rows * x.dp * sizeof(T)), x.V = (T*)arena.take(x.rows * x.dp * sizeof(T));
  x.col = (float*)arena.take(p.N * x.rp * 4);
  x.panel = (float*)arena.take(needs_panel<T>(p) ? x.panels * PANEL * r * 4 : 0);
  x.panel8 = (uint8_t*)arena.take(sizeof(T) == 2 ? x.panels * PANEL * round_up(r, 4) : 0);
  x.unit = (float*)arena.take(x.rp * 4), x.zero = (float*)arena.take(x.rp * 4);
  x.feature = own ? (float*)arena.take(x.panels * PANEL * f * 4) : x.panel;
  x.variance = (float*)arena.take(x.rp * 4);
  x.covariance = (float*)arena.take(p.tiles ? r * x.rp * 4 : 0);
  x.size = (float*)arena.take((p.M + 16) * 4);
  x.mass = (uint64_t*)arena.take(p.size ? p.N * 8 : 0), x.held = (uint64_t*)arena.take(p.size ? p.M * 8 : 0);
  x.cell = (uint16_t*)arena.take(p.N * 2);
  x.state = (float*)arena.take(STATES * 4);
  if (head) *head = x;
  return arena.bytes();
}

INLINE const void* row_of(const View& v, int64_t b, int64_t h, int64_t i) {
  int64_t at = b * v.stride_b + h * v.stride_h + i * v.stride_n;
  return v.bf16 ? (const void*)((const bf16*)v.data + at) : (const void*)((const float*)v.data + at);
}

INLINE void prefetch_row(const View& v, int64_t b, int64_t h, int64_t i, int64_t n) {
  const char* at = (const char*)row_of(v, b, h, i);
  for (int64_t byte = 0; byte < n * (v.bf16 ? 2 : 4); byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

// n numbers of one token as float32, zeros up to `to`.
INLINE void read_row(const View& v, int64_t b, int64_t h, int64_t i, int64_t n, int64_t to, float* out) {
  const void* at = row_of(v, b, h, i);
  int64_t j = 0;
  if (v.bf16)
    for (; j + 8 <= n; j += 8) store8(out + j, widen8((const bf16*)at + j));
  else
    for (; j + 8 <= n; j += 8) store8(out + j, load8((const float*)at + j));
  for (; j < n; j++) out[j] = v.bf16 ? to_float(((const bf16*)at)[j]) : ((const float*)at)[j];
  for (; j < to; j++) out[j] = 0;
}

// The coordinates of one query, zeros up to `rp`.
template <class T>
INLINE void read_query(const Problem& p, int64_t b, int64_t h, int64_t i, const Head<T>& head, float* out) {
  read_row(p.row, b, h, i, p.ranks[h], head.rp, out);
  if (p.shift) out[p.ranks[h]] = 1;
}

INLINE void write_row(const float* x, int64_t n, float* out) {
  for (int64_t j = 0; j < n; j += 8) store8(out + j, load8(x + j));
}
INLINE void write_row(const float* x, int64_t n, bf16* out) {
  for (int64_t j = 0; j < n; j += 8) _mm_storeu_si128((__m128i*)(out + j), narrow8(load8(x + j)));
}
INLINE vf wide(const float* p) { return load(p); }
INLINE vf wide(const bf16* p) { return widen(p); }

INLINE void read_row_as(const View& v, int64_t b, int64_t h, int64_t i, int64_t n, int64_t to, float* out) {
  read_row(v, b, h, i, n, to, out);
}
INLINE void read_row_as(const View& v, int64_t b, int64_t h, int64_t i, int64_t n, int64_t to, bf16* out) {
  if (v.bf16 && n == to) {
    const bf16* at = (const bf16*)row_of(v, b, h, i);
    for (int64_t j = 0; j < n; j += 16) _mm256_storeu_si256((__m256i*)(out + j), _mm256_loadu_si256((const __m256i*)(at + j)));
  } else {
    alignas(64) float x[1024];
    read_row(v, b, h, i, n, to, x), write_row(x, to, out);
  }
}

// Keys and values, row by row; the last row zero.
template <class T> ROUTINE void pack_rows(const Problem& p, int64_t b, int64_t h, const Head<T>& head) {
  for (int64_t i = 0; i < p.N; i++) {
    int64_t ahead = min_of(i + 8, p.N - 1);
    prefetch_row(p.k, b, h, ahead, p.d), prefetch_row(p.v, b, h, ahead, p.d);
    read_row_as(p.k, b, h, i, p.d, head.dp, head.K + i * head.dp);
    read_row_as(p.v, b, h, i, p.d, head.dp, head.V + i * head.dp);
  }
  memset(head.K + (p.N + p.M) * head.dp, 0, head.dp * sizeof(T));
  memset(head.V + (p.N + p.M) * head.dp, 0, head.dp * sizeof(T));
}

// Coordinates x [N, n] (rows of `stride`) into panels [panels, n, PANEL].
static void pack_panels(const float* x, int64_t stride, int64_t N, int64_t n, float* out) {
  transpose((const Word*)x, stride, nullptr, N, n, (Word*)out, panel_slot);
}

// The centred coordinates as bytes between each one's lowest and highest, in panels of four side by side. `bytes`: [N, rp].
template <class T> static void pack_bytes(const Problem& p, const Head<T>& head, uint8_t* bytes) {
  const int64_t rp = head.rp;
  for (int64_t j = 0; j < rp; j += W) {
    vf least = set1(0), most = set1(0);
    for (int64_t i = 0; i < p.N; i++) {
      vf x = load(head.col + i * rp + j);
      least = min_ps(x, least), most = max_ps(x, most);
    }
    vf unit = max_ps(mul(sub(most, least), set1(1.f / 255)), set1(1e-30f)), by = div(set1(1), unit);
    vf zero = mul(sub(set1(0), least), by);
    store(head.unit + j, unit), store(head.zero + j, zero);
    for (int64_t i = 0; i < p.N; i++) {
      alignas(64) int32_t level[W];
      storei(level, round_int(fma(load(head.col + i * rp + j), by, zero)));
      for (int e = 0; e < W; e++) bytes[i * rp + j + e] = uint8_t(level[e]);
    }
  }
  transpose((const Word*)bytes, rp / 4, nullptr, p.N, words_of<Bytes>(head.r), (Word*)head.panel8, panel_slot);
}

// The predictor's key coordinates: less their mean (which no ranking sees), as rows and as panels; their variances.
template <class T>
ROUTINE void pack_coordinates(const Problem& p, int64_t b, int64_t h, const Head<T>& head, uint8_t* bytes) {
  const int64_t N = p.N, rp = head.rp, r = p.ranks[h];
  for (int64_t i = 0; i < N; i++) read_row(p.col, b, h, i, r, rp, head.col + i * rp);
  for (int64_t i = 0; p.shift && i < N; i++) head.col[i * rp + r] = p.shift[b * N + i];
  bool good = true;
  for (int64_t j = 0; j < rp; j += W) {  // column by column of vectors: the sums stay in registers
    float* column = head.col + j;
    vf total = set1(0), other = total;
    int64_t i = 0;
    for (; i + 2 <= N; i += 2) total = add(total, load(column + i * rp)), other = add(other, load(column + (i + 1) * rp));
    if (i < N) total = add(total, load(column + i * rp));
    vf mean = mul(add(total, other), set1(1.f / N));
    if (!finite(sum(mul(mean, set1(0))))) mean = set1(0), good = false;
    vf square = set1(0);
    for (i = 0; i < N; i++) {
      vf x = sub(load(column + i * rp), mean);
      store(column + i * rp, x), square = fma(x, x, square);
    }
    square = mul(square, set1(1.f / N));
    good &= finite(sum(square));
    store(head.variance + j, square);
  }
  float largest = 0;
  if (sizeof(T) == 4)
    for (int64_t i = 0; i < N; i++) {
      vf norm = set1(0);
      for (int64_t j = 0; j < rp; j += W) norm = fma(load(head.col + i * rp + j), load(head.col + i * rp + j), norm);
      largest = max_of(largest, sum(norm));
    }
  head.state[COL_MAX] = sqrt_of(largest);
  head.state[EXACT] = good && finite(largest) ? 0.f : 1.f;
  if (needs_panel<T>(p)) pack_panels(head.col, rp, N, head.r, head.panel);
  if (sizeof(T) == 2 && !head.state[EXACT]) pack_bytes(p, head, bytes);
}

// Covariance of the centred coordinates: standard deviations of scores follow from it without a pass over the keys.
template <class T> static void pack_covariance(const Problem& p, const Head<T>& head) {
  const int64_t rp = head.rp;
  memset(head.covariance, 0, head.r * rp * 4);
  for (int64_t i = 0; i < p.N; i++) {
    const float* x = head.col + i * rp;
    for (int64_t c = 0; c < head.r; c++) {
      float* to = head.covariance + c * rp;
      vf s = set1(x[c] / p.N);
      for (int64_t j = 0; j < rp; j += W) store(to + j, fma(load(x + j), s, load(to + j)));
    }
  }
}

}  // namespace
