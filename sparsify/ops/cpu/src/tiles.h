// The sparse op with one key set for each tile of neighbouring queries: a key's score is the highest, over the tile's rows, of
// its score in standard deviations of the row. The kept keys and the cells are gathered once for all rows of the tile.
#pragma once
#include "sparse.h"
#include "tile.h"

namespace {

template <class T> struct TilesScratch {
  Scratch<T> rows;
  TileScratch<T> attend;
  uint8_t* pooled;  // [level_stride]
  float* bias;      // [capacity]
  void* panels;
};

template <class T> static size_t tiles_layout(const Problem& p, void* base, TilesScratch<T>* scratch) {
  TilesScratch<T> x;
  Arena arena(base);
  const int64_t dp = padded<T>(p.d);
  char* rows = arena.take(scratch_layout<T>(p, nullptr, (Scratch<T>*)nullptr));
  scratch_layout<T>(p, base ? rows : nullptr, &x.rows);
  char* attend = arena.take(tile_scratch<T>(dp, nullptr, nullptr));
  tile_scratch<T>(dp, base ? attend : nullptr, &x.attend);
  x.pooled = (uint8_t*)arena.take(level_stride(p.N));
  x.bias = (float*)arena.take(x.rows.capacity * 4);
  x.panels = arena.take(panels_bytes<T>(x.rows.capacity, dp));
  if (scratch) *scratch = x;
  return arena.bytes();
}
template <class T> static size_t tiles_scratch_bytes(const Problem& p) {
  return tiles_layout<T>(p, nullptr, (TilesScratch<T>*)nullptr);
}
static int64_t tiles_blocks(const Problem& p) { return p.P + p.tiles; }

// The highest level of every key over the rows.
INLINE void pool_levels(const uint8_t* level, int64_t stride, int n, bool first, uint8_t* pooled) {
  for (int64_t j = 0; j < stride; j += 64) {
    auto at = [&](const uint8_t* x) { return _mm256_loadu_si256((const __m256i*)x); };
    const uint8_t* from = level + j;
    __m256i low = first ? _mm256_setzero_si256() : at(pooled + j), high = first ? low : at(pooled + j + 32);
    for (int i = 0; i < n; i++, from += stride) low = _mm256_max_epu8(low, at(from)), high = _mm256_max_epu8(high, at(from + 32));
    _mm256_storeu_si256((__m256i*)(pooled + j), low), _mm256_storeu_si256((__m256i*)(pooled + j + 32), high);
  }
}

// The pooled scores by their definition, where no window can be placed: a row's scores less their mean over their standard
// deviation, both over its finite scores, which alone count; -inf where no row of the tile has one.
template <class T> static void pool_scores(const TileScorer<T>& tile, int64_t N, float* s) {
  for (int64_t j = 0; j < N; j++) s[j] = -__builtin_inff();
  for (int64_t i = 0; i < tile.n; i++) {
    float *x = tile.spare, mean = 0, square = 0, count = 0;
    score_keys(tile.rows + i * tile.head.rp, tile.head.col, tile.head.r, tile.head.rp, nullptr, N, x);
    for (int64_t j = 0; j < N; j++)
      if (finite(x[j])) mean += x[j], count += 1;
    mean /= max_of(count, 1.f);
    for (int64_t j = 0; j < N; j++)
      if (finite(x[j])) square += (x[j] - mean) * (x[j] - mean);
    const float sd = sqrt_of(square / max_of(count, 1.f)), by = sd > 0 ? 1 / sd : 1;
    for (int64_t j = 0; j < N; j++)
      if (finite(x[j])) s[j] = max_of(s[j], (x[j] - mean) * by);
  }
}

template <class T>
static void select_tile(const Problem& p, int64_t b, int64_t h, const Head<T>& head, const int32_t* token, int64_t n,
                        const TilesScratch<T>& x, uint16_t* keys) {
  if (p.budget >= p.N) {
    for (int64_t j = 0; j < p.N; j++) keys[j] = uint16_t(j);
    return;
  }
  for (int64_t i = 0; i < n; i++) read_query(p, b, h, token[i], head, x.rows.row + i * head.rp);
  int error[BLOCK], worst = 0;
  bool usable = true;
  Guess guess;
  Packed packed = x.rows.packed;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int here = int(min_of<int64_t>(BLOCK, n - at));
    const float* rows = x.rows.row + at * head.rp;
    deviations(head, rows, here, true, x.rows.sigma + at);
    make_windows(head, rows, x.rows.sigma + at, here, error, &packed);
    for (int i = 0; i < here; i++) worst = max_of(worst, error[i]), usable &= error[i] >= 0;
    const int written = score_levels<true>(head, p.N, packed, here, x.rows.level);
    pool_levels(x.rows.level, level_stride(p.N), written, at == 0, x.pooled);
  }
  const TileScorer<T> score{head, x.rows.row, x.rows.sigma, n, x.rows.s};
  if (!usable) {
    pool_scores(score, p.N, x.rows.order);
    take_highest(x.rows.order, nullptr, p.N, p.budget, keys);
  } else if (!select_levels(score, p.N, p.budget, x.pooled, worst, &guess, x.rows.order, keys))
    select_exact(score, p.N, p.budget, x.rows.order, keys);
}

template <class T>
static void tiles_block(const Problem& p, int64_t b, int64_t h, int64_t which, const void* base, void* scratch, const Probe* probe) {
  Head<T> head;
  TilesScratch<T> x;
  layout<T>(p, h, const_cast<void*>(base), &head), tiles_layout<T>(p, scratch, &x);
  if (which < p.P) return dense_row(p, b, h, which, head, x.rows);
  const Tiles tiles = tiles_of(p, b);
  const int32_t* token = tiles.token + tiles.start[which - p.P];
  const int64_t n = tiles.start[which - p.P + 1] - tiles.start[which - p.P];
  if (n == 0) return;
  uint16_t *list = x.rows.keys, *keys = list + p.M;
  select_tile(p, b, h, head, token, n, x, keys);
  if (probe)
    for (int64_t i = 0; i < n; i++) {
      int64_t at = (b * p.H + h) * p.N + token[i];
      for (int64_t j = 0; j < p.budget; j++) probe->kept[at * p.widest + j] = keys[j];
      probe->cells[at] = head.cell[token[i]];
    }
  const int64_t length = complete(p, b, head, x.rows, list, x.rows.count);
  const int64_t counted = round_up(p.size ? length : p.M, 16);  // the others count once
  for (int64_t j = 0; j < counted; j += W) store(x.bias + j, log2_of(load(x.rows.count + j)));
  for (int64_t j = counted; j < round_up(length, 16); j++) x.bias[j] = 0;
  Panels panels = panels_at<T>(x.panels, length, head.dp);
  pack_list(head.K, head.dp, head.V, head.dp, head.dp, list, length, panels);
  alignas(64) float by[TILE];
  for (int64_t at = 0; at < n; at += TILE) {
    const int rows = int(min_of<int64_t>(TILE, n - at));
    for (int i = 0; i < rows; i++) {
      read_row_as(p.q, b, h, token[at + i], p.d, head.dp, x.attend.q + i * head.dp);
      prefetch_out(p, b, h, token[at + i]);
    }
    attend_tile(panels, length, counted > 0 ? x.bias : nullptr, head.dp, rows, p.scale * LOG2E, x.attend, by);
    for (int i = 0; i < rows; i++) write_out(p, b, h, token[at + i], x.attend.out + i * panels.columns * PANEL, by[i]);
  }
}

// The kernels of the sparse op: `scratch` and `block` look at the granularity.
template <class T> static size_t any_scratch_bytes(const Problem& p) {
  return p.tiles ? tiles_scratch_bytes<T>(p) : scratch_bytes<T>(p);
}
static int64_t any_blocks(const Problem& p) { return p.tiles ? tiles_blocks(p) : blocks(p); }
template <class T>
static void any_block(const Problem& p, int64_t b, int64_t h, int64_t which, const void* head, void* scratch, const Probe* probe) {
  if (p.tiles) tiles_block<T>(p, b, h, which, head, scratch, probe);
  else block<T>(p, b, h, which, head, scratch, probe);
}
template <class T> static const Kernels* sparse_kernels() {
  static const Kernels k = {head_bytes<T>, any_scratch_bytes<T>, any_blocks, prepare<T>, any_block<T>};
  return &k;
}

}  // namespace
