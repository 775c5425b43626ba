// The sparse op, a key set for each query: blocks of query rows go through scores, selection, logits, values.
#pragma once
#include "cells.h"
#include "rows.h"
#include "select.h"

namespace {

constexpr int SAMPLE = 4;   // rows whose exact thresholds tell where the others' are

template <class T> struct Scratch {
  float* row;          // [BLOCK or a tile's rows, rp]
  float* sigma;        // [the same]
  Packed packed;       // [BLOCK, words]
  uint8_t* level;      // [BLOCK, level_stride]
  uint16_t* keys;      // [BLOCK, capacity]
  T* p;                // [BLOCK, capacity]
  float* s;            // [BLOCK, capacity] logits
  float* order;        // [N] scores of an exact selection
  float* count;        // [BLOCK, counts] times that each key of a list counts: dropped keys of each cell; sizes
  uint16_t* seen;      // [4, M + P] kept keys of each cell
  uint64_t* masses;    // the same of their masses, instead, where there are sizes
  float* floats;       // what `prepare` needs
  int64_t capacity, counts;
};

template <class T> static size_t scratch_layout(const Problem& p, void* base, Scratch<T>* scratch) {
  int64_t r = 1, f = 1;
  for (int64_t h = 0; h < p.H; h++) r = max_of(r, coordinates(p, h)), f = max_of(f, p.feature_dims[h]);
  Scratch<T> x;
  Arena arena(base);
  x.capacity = round_up(p.budget + p.M + p.P, 16) + 64;
  int64_t longest = max_of(x.capacity, round_up(p.N, 16) + 64);
  const int64_t rows = max_of<int64_t>(BLOCK, p.tile_rows);
  x.counts = p.size ? x.capacity : round_up(p.M, 16);
  x.row = (float*)arena.take(round_up(rows, BLOCK) * round_up(r, W) * 4);
  x.sigma = (float*)arena.take((round_up(rows, BLOCK) + W) * 4);
  x.packed = {(Word*)arena.take((BLOCK * r + 16) * 4), (float*)arena.take(BLOCK * 4), 0};
  x.level = (uint8_t*)arena.take(BLOCK * level_stride(p.N));
  x.keys = (uint16_t*)arena.take(max_of(BLOCK * x.capacity, longest) * 2);
  x.p = (T*)arena.take(max_of(BLOCK * x.capacity, longest) * sizeof(T));
  x.s = (float*)arena.take(max_of(BLOCK * x.capacity, longest) * 4);
  x.order = (float*)arena.take(longest * 4);
  x.count = (float*)arena.take(max_of(BLOCK * x.counts, p.size ? longest : 0) * 4 + 64);
  x.seen = (uint16_t*)arena.take(4 * round_up(p.M + p.P, 16) * (p.size ? 8 : 2) + 64), x.masses = (uint64_t*)x.seen;
  x.floats = (float*)arena.take(max_of(cells_scratch<T>(p, f) * 4, p.N * round_up(r, W)));
  if (scratch) *scratch = x;
  return arena.bytes();
}

// The pooled scores of a tile: the highest of its rows' scores in standard deviations (Scorer of select.h).
template <class T> struct TileScorer {
  const Head<T>& head;
  const float *rows, *sigma;
  int64_t n;
  float* spare;  // [keys + 8]
  void operator()(const uint16_t* keys, int64_t count, float* s) const {
    for (int64_t i = 0; i < n; i++) {
      const float by = sigma[i] > 0 ? 1 / sigma[i] : 0;
      score_keys(rows + i * head.rp, head.col, head.r, head.rp, keys, count, i ? spare : s);
      if (i) for (int64_t j = 0; j < count; j++) s[j] = max_of(s[j], spare[j] * by);
      else for (int64_t j = 0; j < count; j++) s[j] *= by;
    }
  }
};

// The tiles of an image, if there are any.
struct Tiles {
  const int32_t *start, *token;
};
INLINE Tiles tiles_of(const Problem& p, int64_t b) {
  const int64_t image = p.placed && p.tiles ? b : 0;
  return {p.tile_start + image * (p.tiles + 1), p.tile_token + image * (p.N - p.P)};
}

// Where the thresholds of a head's rows (or tiles) lie, in standard deviations of a row's scores: those of a few, over a
// sample of the keys.
template <class T>
ROUTINE void expect_thresholds(const Problem& p, int64_t b, int64_t h, const Head<T>& head, const Scratch<T>& x) {
  const Tiles tiles = tiles_of(p, b);
  int64_t n = p.tiles ? p.tiles : p.N - p.P;
  while (p.tiles && tiles.start[n - 1] == tiles.start[n]) n--;  // the empty ones come last
  const int64_t samples = min_of<int64_t>(p.tiles ? 2 : SAMPLE, n);
  const int64_t keys = min_of<int64_t>(p.N, p.tiles && p.N < 1024 ? 64 : 128);
  const int64_t need = max_of<int64_t>(1, min_of(keys, (p.budget * keys + p.N / 2) / p.N));
  float mean = 0, square = 0, found = 0;
  for (int64_t j = 0; j < keys; j++) x.keys[j] = uint16_t(j * p.N / keys);
  for (int64_t i = 0; i < samples; i++) {
    const int64_t at = (2 * i + 1) * n / (2 * samples);
    const int32_t first = p.tiles ? tiles.start[at] : 0;
    const int rows = p.tiles ? int(min_of<int32_t>(16, tiles.start[at + 1] - first)) : 1;
    for (int j = 0; j < rows; j++)
      read_query(p, b, h, p.tiles ? tiles.token[first + j] : p.P + at, head, x.row + j * head.rp);
    deviations(head, x.row, rows, p.tiles > 0, x.sigma);
    TileScorer<T>{head, x.row, x.sigma, rows, x.s}(x.keys, keys, x.order);
    float z = take_highest(x.order, nullptr, keys, need, nullptr);
    if (finite(z)) mean += z, square += z * z, found += 1;
  }
  mean = found > 0 ? mean / found : 0, square = found > 0 ? square / found - mean * mean : 16;
  head.state[THRESHOLD] = mean;
  head.state[SPREAD] = min_of(8.f, 0.75f + 2.f * sqrt_of(max_of(square, 0.f)));
}

template <class T> static void prepare(const Problem& p, int64_t b, int64_t h, void* base, void* scratch) {
  Head<T> head;
  Scratch<T> x;
  layout<T>(p, h, base, &head), scratch_layout<T>(p, scratch, &x);
  pack_rows(p, b, h, head);
  pack_coordinates(p, b, h, head, (uint8_t*)x.floats);
  make_cells(p, b, h, head, x.floats);
  if (p.tiles) pack_covariance(p, head);
  if (p.budget < p.N) expect_thresholds(p, b, h, head, x);
}

// What a key adds to the counter of its cell, the four counters of every cell added up, and what each cell has lost of its
// keys: numbers of keys, or masses where there are sizes.
template <class T> INLINE uint16_t seen_of(const Head<T>&, int64_t, uint16_t) { return 1; }
template <class T> INLINE uint64_t seen_of(const Head<T>& head, int64_t key, uint64_t) { return head.mass[key]; }
INLINE void add_up(uint16_t* seen, int64_t wide) {
  for (int64_t c = 0; c < wide; c += 16) {
    auto at = [&](int e) { return _mm256_loadu_si256((__m256i*)(seen + e * wide + c)); };
    _mm256_storeu_si256((__m256i*)(seen + c), _mm256_add_epi16(_mm256_add_epi16(at(0), at(1)), _mm256_add_epi16(at(2), at(3))));
  }
}
INLINE void add_up(uint64_t* seen, int64_t wide) {
  for (int64_t c = 0; c < wide; c++) seen[c] += seen[wide + c] + seen[2 * wide + c] + seen[3 * wide + c];
}
template <class T> INLINE void count_dropped(const Head<T>& head, const uint16_t* seen, int64_t M, float* count) {
  for (int64_t c = 0; c < M; c += 8) {
    __m128i kept = _mm_loadu_si128((__m128i*)(seen + c));
    store8(count + c, _mm256_sub_ps(load8(head.size + c), _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(kept))));
  }
}
template <class T> INLINE void count_dropped(const Head<T>& head, const uint64_t* seen, int64_t M, float* count) {
  const float quantum = head.state[QUANTUM];
  for (int64_t c = 0; c < M; c++) count[c] = float(int64_t(head.held[c] - seen[c]) >> 16) * quantum;
}

// Of the list of one row's keys, [M cells, kept keys, dropped prefix keys (each its own cell), zero rows up to a multiple of
// 16], all but the kept keys; and how many times each counts: a cell as many times as it lost keys, a key its `size` (where
// there are none, the cells alone have counts). Returns the list's length before the padding.
template <class T, class Seen>
ROUTINE int64_t complete(const Problem& p, const float* size, const Head<T>& head, uint16_t* list, float* count, Seen* seen) {
  uint16_t* keys = list + p.M;
  int64_t b = p.budget, length = p.M + b;
  if (p.tail != TAIL_NONE) {
    const int64_t wide = round_up(p.M + p.P, 16);
    memset(seen, 0, 4 * wide * sizeof(Seen));
    auto see = [&](Seen* counter, int64_t key) { counter[head.cell[key]] += seen_of(head, key, Seen()); };
    int64_t j = 0;
    for (; j + 4 <= b; j += 4)  // four counters of every cell: neighbours in the list are often of one cell
      for (int e = 0; e < 4; e++) see(seen + e * wide, keys[j + e]);
    for (; j < b; j++) see(seen, keys[j]);
    add_up(seen, wide);
    for (int64_t i = 0; i < p.P; i++)
      if (!seen[p.M + i]) list[length++] = uint16_t(i);
    count_dropped(head, seen, p.M, count);
    for (int64_t c = p.M; c < round_up(p.M, 16); c++) count[c] = 1;
    for (int64_t c = 0; c < p.M; c++) list[c] = uint16_t(p.N + c);
  }
  for (int64_t j = length; j < round_up(length, 16); j++) list[j] = uint16_t(p.N + p.M);
  if (sizeof(Seen) == 8) {
#pragma GCC unroll 4
    for (int64_t j = p.M; j < length; j++) count[j] = size[list[j]];
    for (int64_t j = 0; j < 16; j += W) store(count + length + j, set1(1));
  }
  return length;
}
template <class T>
INLINE int64_t complete(const Problem& p, int64_t b, const Head<T>& head, const Scratch<T>& x, uint16_t* list, float* count) {
  const float* size = sizes_of(p, b);
  return size ? complete(p, size, head, list, count, x.masses) : complete(p, size, head, list, count, x.seen);
}

template <class T>
INLINE void row_scores(const Problem& p, const Head<T>& head, int64_t b, int64_t h, int64_t i, const uint16_t* list,
                       int64_t length, float* s) {
  alignas(64) T q[1024];
  read_row_as(p.q, b, h, i, p.d, head.dp, q);
  row_logits(q, head.K, head.dp, list, round_up(length, 8), s);
  for (int64_t j = length; j < round_up(length, 16); j++) s[j] = -__builtin_inff();
}

// `cells`: how many times the first keys of the list count where there are no sizes; all others count once.
template <class T>
INLINE float row_weights(const Problem& p, float* s, int64_t length, int64_t cells, const float* count, T* weight) {
  return weights(s, round_up(length, 16), p.scale * LOG2E, p.size ? length : cells, count, weight);
}

// A prefix token: all keys, no tail.
template <class T>
static void dense_row(const Problem& p, int64_t b, int64_t h, int64_t i, const Head<T>& head, const Scratch<T>& x) {
  alignas(64) float out[1024];
  for (int64_t j = 0; j < p.N; j++) x.keys[j] = uint16_t(j);
  for (int64_t j = p.N; j < round_up(p.N, 16); j++) x.keys[j] = uint16_t(p.N + p.M);
  if (const float* size = sizes_of(p, b))
    for (int64_t j = 0; j < round_up(p.N, 16); j++) x.count[j] = j < p.N ? size[j] : 1.f;
  row_scores(p, head, b, h, i, x.keys, p.N, x.s);
  float by = row_weights(p, x.s, p.N, 0, x.count, x.p);
  weigh(x.p, head.V, head.dp, x.keys, round_up(p.N, 4), out);
  write_out(p, b, h, i, out, by);
}

static int64_t blocks(const Problem& p) { return p.P + (p.N - p.P + BLOCK - 1) / BLOCK; }

template <class T>
static void block(const Problem& p, int64_t b, int64_t h, int64_t which, const void* base, void* scratch, const Probe* probe) {
  Head<T> head;
  Scratch<T> x;
  layout<T>(p, h, const_cast<void*>(base), &head), scratch_layout<T>(p, scratch, &x);
  if (which < p.P) return dense_row(p, b, h, which, head, x);
  int64_t first = p.P + (which - p.P) * BLOCK;
  int n = int(min_of<int64_t>(BLOCK, p.N - first));
  int error[BLOCK];
  Guess guess;
  alignas(64) float by[BLOCK];
  int64_t length[BLOCK];
  const int64_t stride = level_stride(p.N);
  bool all = p.budget >= p.N;
  for (int i = 0; i < n; i++) prefetch_row(p.row, b, h, first + i, p.ranks[h]);
  if (!all) {
    for (int i = 0; i < n; i++) read_query(p, b, h, first + i, head, x.row + i * head.rp);
    deviations(head, x.row, n, false, x.sigma);
    make_windows(head, x.row, x.sigma, n, error, &x.packed);
    score_levels<false>(head, p.N, x.packed, n, x.level);
  }
  for (int i = 0; i < n; i++) {
    uint16_t* keys = x.keys + i * x.capacity + p.M;
    const RowScorer score{x.row + i * head.rp, head.col, head.r, head.rp};
    if (all)
      for (int64_t j = 0; j < p.N; j++) keys[j] = uint16_t(j);
    else if (!select_levels(score, p.N, p.budget, x.level + i * stride, error[i], &guess, x.order, keys))
      select_exact(score, p.N, p.budget, x.order, keys);
    if (probe) {
      int64_t at = (b * p.H + h) * p.N + first + i;
      for (int64_t j = 0; j < p.budget; j++) probe->kept[at * p.widest + j] = keys[j];
      probe->cells[at] = head.cell[first + i];
    }
  }
  const int64_t wide = x.capacity, counts = x.counts;
  for (int i = 0; i < n; i++) length[i] = complete(p, b, head, x, x.keys + i * wide, x.count + i * counts);
  for (int i = 0; i < n; i++) row_scores(p, head, b, h, first + i, x.keys + i * wide, length[i], x.s + i * wide);
  for (int i = 0; i < n; i++) {
    prefetch_out(p, b, h, first + i);
    by[i] = row_weights(p, x.s + i * wide, length[i], p.M, x.count + i * counts, x.p + i * wide);
  }
  alignas(64) float out[1024];
  for (int i = 0; i < n; i++) {
    weigh(x.p + i * wide, head.V, head.dp, x.keys + i * wide, round_up(length[i], 4), out);
    write_out(p, b, h, first + i, out, by[i]);
  }
}

template <class T> static size_t head_bytes(const Problem& p) {
  size_t most = 0;
  for (int64_t h = 0; h < p.H; h++) most = max_of(most, layout<T>(p, h, nullptr, (Head<T>*)nullptr));
  return most;
}
template <class T> static size_t scratch_bytes(const Problem& p) { return scratch_layout<T>(p, nullptr, (Scratch<T>*)nullptr); }

}  // namespace
