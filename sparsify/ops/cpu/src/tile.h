// Attention of a tile of query rows over one list of keys, in blocks that stay in L1, with a running softmax: the dense
// kernel (the list is all keys) and the attention of granularity `tile` (kept keys and cells, gathered once for a tile).
//
// Limit at d = 64 and one 512-bit instruction a cycle: 8 (bfloat16: 4) cycles of multiply-adds a pair, half for the logits and
// half for the values, and 0.9 (0.5) for the exponential.
#pragma once
#include "rows.h"

namespace {

constexpr int TILE = 32;        // query rows of one pass
constexpr int KEYS = 2 * PANEL;  // keys of one block: scores [TILE, KEYS] stay in L1

// Keys and values of one list. Columns of V past a whole panel are zeros.
struct Panels {
  Word* K;  // [key panels, words, PANEL]
  Word* V;  // [column panels, words of the keys, PANEL]
  int64_t keys, words, columns;  // keys, padded to KEYS; words of a head; panels of columns
};

template <class T> INLINE size_t panels_bytes(int64_t n, int64_t dp) {
  int64_t keys = round_up(n, KEYS);
  return (keys * words_of<T>(dp) + (dp + PANEL - 1) / PANEL * words_of<T>(keys) * PANEL) * 4 + 128;
}
template <class T> INLINE Panels panels_at(void* base, int64_t n, int64_t dp) {
  Panels x;
  x.keys = round_up(n, KEYS), x.words = words_of<T>(dp), x.columns = (dp + PANEL - 1) / PANEL;
  x.K = (Word*)base, x.V = x.K + round_up(x.keys * x.words, 16);
  return x;
}

// A vector of columns of two keys' values as words.
INLINE void store_words(const float* a, const float*, Word* out) { store((float*)out, load(a)); }
INLINE void store_words(const bf16* a, const bf16* b, Word* out) {
#if defined(__AVX512F__)
  __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  for (int j = 0; j < W; j++) out[j] = a[j] | Word(b[j]) << 16;
#endif
}

// Rows of K and V (those that `list` names, or 0..n), `stride_k` and `stride_v` apart, into panels. Rows have dp numbers.
template <class T>
ROUTINE void pack_list(const T* K, int64_t stride_k, const T* V, int64_t stride_v, int64_t dp, const uint16_t* list, int64_t n,
                       const Panels& x) {
  const int64_t each = sizeof(T) == 2 ? 2 : 1;
  transpose((const Word*)K, stride_k / each, list, n, x.words, x.K, [](int j) { return j; });
  alignas(64) static const T zero[W] = {};
  for (int64_t panel = 0; panel < x.columns; panel++)
    for (int64_t j = 0; j < x.keys; j += each) {
      const T* a = V + (list && j < n ? int64_t(list[j]) : j) * stride_v;
      const T* b = V + (list && j + 1 < n ? int64_t(list[j + 1]) : j + 1) * stride_v;
      Word* out = x.V + (panel * (x.keys / each) + j / each) * PANEL;
      for (int c = 0; c < 4; c++) {
        int64_t column = panel * PANEL + c * W;
        store_words(j < n && column < dp ? a + column : zero, j + 1 < n && column < dp ? b + column : zero, out + c * W);
      }
    }
}

template <class T> struct TileScratch {
  T* q;       // [TILE, dp]
  float* s;   // [TILE, KEYS]
  T* p;       // [TILE, KEYS]
  float* out;  // [TILE, columns * PANEL]
};
template <class T> INLINE size_t tile_scratch(int64_t dp, void* base, TileScratch<T>* x) {
  Arena arena(base);
  TileScratch<T> y;
  y.q = (T*)arena.take(TILE * dp * sizeof(T)), y.s = (float*)arena.take(TILE * KEYS * 4), y.p = (T*)arena.take(TILE * KEYS * sizeof(T));
  y.out = (float*)arena.take(TILE * round_up(dp, PANEL) * 4);
  if (x) *x = y;
  return arena.bytes();
}

// Products of `rows` queries with one panel of keys, of which NV vectors hold any.
template <int NV, class T>
ROUTINE void key_panel(const Word* panel, int64_t words, const T* q, int64_t dp, int rows, float* s) {
  auto some = [&](auto count, int at) {
    constexpr int NQ = decltype(count)::value;
    vf acc[NQ][4];
    for (int i = 0; i < NQ; i++)
      for (int a = 0; a < NV; a++) acc[i][a] = set1(0);
    accumulate<NQ, NV, T>(acc, panel, words, (const Word*)(q + at * dp), words_of<T>(dp));
    for (int i = 0; i < NQ; i++)
      for (int a = 0; a < NV; a++) store(s + (at + i) * KEYS + a * W, acc[i][a]);
  };
  int i = 0;
  for (; i + ROWS <= rows; i += ROWS) some(Count<ROWS>(), i);
  for (; i < rows; i++) some(Count<1>(), i);
}
// out += p V for `rows` rows and one panel of columns.
template <class T>
ROUTINE void value_panel(const Word* panel, int64_t words, const T* p, int rows, float* out, int64_t stride) {
  auto some = [&](auto count, int at) {
    constexpr int NQ = decltype(count)::value;
    vf acc[NQ][4];
    for (int i = 0; i < NQ; i++)
      for (int a = 0; a < 4; a++) acc[i][a] = load(out + (at + i) * stride + a * W);
    accumulate<NQ, 4, T>(acc, panel, words, (const Word*)(p + at * KEYS), words_of<T>(KEYS));
    for (int i = 0; i < NQ; i++)
      for (int a = 0; a < 4; a++) store(out + (at + i) * stride + a * W, acc[i][a]);
  };
  int i = 0;
  for (; i + ROWS <= rows; i += ROWS) some(Count<ROWS>(), i);
  for (; i < rows; i++) some(Count<1>(), i);
}

// Rows x.q [rows, dp] over the `n` keys of the panels; logits times `factor` (log2 e / sqrt d) plus `bias` [n to a multiple
// of W] (null: none) are exponents of 2. The result is x.out [rows, columns * PANEL] times by[row].
template <class T>
ROUTINE void attend_tile(const Panels& k, int64_t n, const float* bias, int64_t dp, int rows, float factor,
                         const TileScratch<T>& x, float* by) {
  alignas(64) float most[TILE], total[TILE];
  const int64_t width = k.columns * PANEL, each = sizeof(T) == 2 ? 2 : 1;
  for (int i = 0; i < rows; i++) most[i] = -__builtin_inff(), total[i] = 0;
  memset(x.out, 0, rows * width * 4);
  const vf scale = set1(factor), by_factor = bias ? set1(1) : scale;
  for (int64_t at = 0; at < n; at += KEYS) {
    const int64_t here = min_of<int64_t>(KEYS, n - at), padded = round_up(here, W);
    for (int64_t key = 0; key < here; key += PANEL) {
      const Word* panel = k.K + (at + key) * k.words;
      float* s = x.s + key;
      switch (min_of<int64_t>(4, (here - key + W - 1) / W)) {
        case 1: key_panel<1>(panel, k.words, x.q, dp, rows, s); break;
        case 2: key_panel<2>(panel, k.words, x.q, dp, rows, s); break;
        case 3: key_panel<3>(panel, k.words, x.q, dp, rows, s); break;
        default: key_panel<4>(panel, k.words, x.q, dp, rows, s);
      }
    }
    for (int i = 0; i < rows; i++) {
      float* s = x.s + i * KEYS;
      T* p = x.p + i * KEYS;
      for (int64_t j = here; j < padded; j++) s[j] = -__builtin_inff();
      vf top = set1(-__builtin_inff());
      if (bias) {
        for (int64_t j = 0; j < padded; j += W) {
          vf t = fma(load(s + j), scale, load(bias + at + j));
          store(s + j, t), top = max_ps(t, top);
        }
      } else {
        for (int64_t j = 0; j < padded; j += W) top = max_ps(load(s + j), top);
      }
      float now = max_of(most[i], max_lane(top));
      if (!(now > -__builtin_inff())) now = 0;
      if (now != most[i]) {
        vf shrink = exponential(mul(set1(most[i] - now), by_factor), float());
        if (at > 0) {
          for (int64_t c = 0; c < width; c += W) store(x.out + i * width + c, mul(load(x.out + i * width + c), shrink));
          total[i] *= _mm_cvtss_f32(low_half(shrink));
        }
        most[i] = now;
      }
      vf highest = set1(now), sums = set1(0);
      for (int64_t j = 0; j < padded; j += W) {
        vf e = exponential(mul(sub(load(s + j), highest), by_factor), T());
        store_p(p + j, e), sums = add(sums, e);
      }
      total[i] += sum(sums);
      for (int64_t j = padded; j < round_up(padded, each * W); j += W) store_p(p + j, set1(0));
    }
    for (int64_t c = 0; c < k.columns; c++) {
      const Word* panel = k.V + (c * (k.keys / each) + at / each) * PANEL;
      float* out = x.out + c * PANEL;
      value_panel(panel, padded / each, x.p, rows, out, width);
    }
  }
  for (int i = 0; i < rows; i++) by[i] = total[i] > 0 || total[i] != total[i] ? 1 / total[i] : 0;
}

}  // namespace
