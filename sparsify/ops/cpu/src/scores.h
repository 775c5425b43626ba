// The predictor's scores of a block of queries, never written out in full width: one byte for each pair, the score in
// units of a step within a window around the row's expected threshold (0 and 255: outside). select.h settles exactly what
// bytes cannot tell apart.
//
// Limit: r/2 bf16 dot products (r fused multiply-adds in float32) of W lanes for 4W pairs and 11 more instructions for 4W
// pairs: at r = 16 and AVX-512 0.5 (1.0) and 0.17 cycles a pair at one instruction a cycle.
#pragma once
#include "rows.h"

namespace {

constexpr int BLOCK = 32;  // query rows of one piece of work

// Keys of the last panel fill its vectors in groups of four: how many vectors hold any.
INLINE int vectors_of(int64_t keys) { return keys >= 13 ? 4 : int((keys + 3) / 4); }

// W lanes x 4 vectors of rounded scores -> 4W bytes in the order of the keys, clamped to 0..255.
INLINE void store_levels(vf a, vf b, vf c, vf d, uint8_t* out) {
#if defined(__AVX512F__)
  vi ab = _mm512_packs_epi32(round_int(a), round_int(b)), cd = _mm512_packs_epi32(round_int(c), round_int(d));
  _mm512_storeu_si512(out, _mm512_packus_epi16(ab, cd));
#else
  vi ab = _mm256_packs_epi32(round_int(a), round_int(b)), cd = _mm256_packs_epi32(round_int(c), round_int(d));
  _mm256_storeu_si256((__m256i*)out, _mm256_packus_epi16(ab, cd));
#endif
}

INLINE const Word* panels_of(const Head<float>& head) { return (const Word*)head.panel; }
INLINE const Word* panels_of(const Head<bf16>& head) { return (const Word*)head.panel8; }

// What the products of a storage type are made of: float32, or bytes.
template <class T> struct Scoring {
  typedef T type;
};
template <> struct Scoring<bf16> {
  typedef Bytes type;
};

// Rows ready for the products: words of coordinates over the step of their windows, and where their sums start.
struct Packed {
  Word* words;   // [rows, words]
  float* start;  // [rows]
  int shift;     // bytes: the sums are levels times 2^shift, and `start` holds integers
};

INLINE vf start_of(float x, float) { return set1(x); }
#if defined(__AVX512VNNI__)
INLINE vf start_of(float x, Bytes) {
  int i;
  memcpy(&i, &x, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(i));
}
INLINE void store_sums(const vf* x, int shift, uint8_t* out, Bytes) {
  __m128i by = _mm_cvtsi32_si128(shift);
  auto level = [&](int a) { return _mm512_sra_epi32(_mm512_castps_si512(x[a]), by); };
  vi ab = _mm512_packs_epi32(level(0), level(1)), cd = _mm512_packs_epi32(level(2), level(3));
  _mm512_storeu_si512(out, _mm512_packus_epi16(ab, cd));
}
INLINE vf higher(vf a, vf b, Bytes) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#endif
INLINE void store_sums(const vf* x, int, uint8_t* out, float) { store_levels(x[0], x[1], x[2], x[3], out); }
INLINE vf higher(vf a, vf b, float) { return max_ps(a, b); }

// Levels of NQ queries against one panel of keys, of which NV vectors hold any; pooled: the highest of the NQ alone.
template <int NQ, int NV, bool POOLED, class T>
INLINE void score_panel(const Word* panel, int64_t words, const Packed& rows, int first, uint8_t* out, int64_t stride) {
  vf acc[NQ][4];
  for (int q = 0; q < NQ; q++)
    for (int a = 0; a < 4; a++) acc[q][a] = a < NV ? start_of(rows.start[first + q], T()) : set1(0);
  accumulate<NQ, NV, T>(acc, panel, words, rows.words + first * words, words);
  if (POOLED)
    for (int q = 1; q < NQ; q++)
      for (int a = 0; a < NV; a++) acc[0][a] = higher(acc[q][a], acc[0][a], T());
  for (int q = 0; q < (POOLED ? 1 : NQ); q++) store_sums(acc[q], rows.shift, out + q * stride, T());
}

INLINE int64_t level_stride(int64_t N) { return round_up(N, 64) + 64; }

// Standard deviations of the rows' scores over all keys: from the coordinates' variances alone (enough to place windows), or
// from their covariance (exact: what tiles compare).
template <class T> static void deviations(const Head<T>& head, const float* rows, int n, bool exact, float* sigma) {
  const int64_t rp = head.rp;
  for (int at = 0; at < n; at += 8) {
    f8 square[8];
    for (int i = 0; i < 8; i++) {
      const float* row = rows + min_of(at + i, n - 1) * rp;
      square[i] = _mm256_setzero_ps();
      for (int64_t j = 0; !exact && j < rp; j += 8)
        square[i] = _mm256_fmadd_ps(_mm256_mul_ps(load8(row + j), load8(row + j)), load8(head.variance + j), square[i]);
    }
    if (exact)
      for (int64_t j = 0; j < rp; j += W) {  // row' C, a vector of columns of all eight rows at a time
        vf acc[8];
        for (int i = 0; i < 8; i++) acc[i] = set1(0);
        for (int64_t c = 0; c < head.r; c++) {
          vf x = load(head.covariance + c * rp + j);
          for (int i = 0; i < 8; i++) acc[i] = fma(x, set1(rows[min_of(at + i, n - 1) * rp + c]), acc[i]);
        }
        for (int i = 0; i < 8; i++) {
          alignas(64) float y[W];
          store(y, mul(acc[i], load(rows + min_of(at + i, n - 1) * rp + j)));
          for (int e = 0; e < W; e += 8) square[i] = _mm256_add_ps(square[i], load8(y + e));
        }
      }
    store8(sigma + at, _mm256_sqrt_ps(_mm256_max_ps(reduce8(square), _mm256_setzero_ps())));
  }
}

// Rows over the steps of their windows as words, and where the sums of their levels start. Rows with error < 0 are zeros:
// they are scored with the others, and never looked at.
INLINE void pack_words(const Head<float>& head, const float* rows, int n, const float* inverse, const float* start, int* error,
                       Packed* to) {
  for (int i = 0; i < n; i++) {
    const bool usable = error[i] >= 0;
    float* words = (float*)to->words + i * head.r;
    for (int64_t j = 0; j < head.r; j += W) store(words + j, usable ? mul(load(rows + i * head.rp + j), set1(inverse[i])) : set1(0));
    to->start[i] = usable ? start[i] : 0;
  }
}
#if defined(__AVX512VNNI__)
INLINE f8 halves(vf x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
INLINE f8 higher_half(vf x) { return _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }

// Bytes: coordinates in levels of one unit of a key's byte, times the 2^shift that keeps all of them within -127..127.
INLINE void pack_words(const Head<bf16>& head, const float* rows, int n, const float* inverse, const float* start, int* error,
                       Packed* to) {
  const int64_t rp = head.rp, words = words_of<Bytes>(head.r);
  alignas(32) float largest[BLOCK], noise[BLOCK], offset[BLOCK];
  float most = 1e-30f;
  for (int at = 0; at < n; at += 8) {
    f8 top[8], square[8];
    for (int i = 0; i < 8; i++) {
      vf x = set1(0), squares = set1(0);
      const float* row = rows + min_of(at + i, n - 1) * rp;
      for (int64_t j = 0; j < rp; j += W) {
        vf y = mul(load(row + j), load(head.unit + j));
        x = max_ps(_mm512_abs_ps(y), x), squares = fma(y, y, squares);
      }
      top[i] = higher_half(x), square[i] = halves(squares);
    }
    store8(noise + at, _mm256_sqrt_ps(reduce8(square)));
    store8(largest + at, reduce8(top, [](f8 a, f8 b) { return _mm256_max_ps(a, b); }));
  }
  for (int i = 0; i < n; i++) {
    const float levels = noise[i] * inverse[i] * 0.29f;  // standard deviation of the keys' rounding: 1/sqrt(12) of a unit
    if (error[i] >= 0) error[i] = largest[i] * inverse[i] <= 127.f && levels < 6.f ? 1 + int(levels) : -1;
    if (error[i] >= 0) most = max_of(most, largest[i] * inverse[i]);
  }
  to->shift = 0;
  while (to->shift < 14 && most * float(2 << to->shift) <= 127.f) to->shift++;
  const float power = float(1 << to->shift);
  for (int at = 0; at < n; at += 8) {
    f8 sums[8];
    for (int i = 0; i < 8; i++) {
      const int row = min_of(at + i, n - 1);
      const bool usable = error[row] >= 0;
      vf total = set1(0), by = set1(inverse[row] * power);
      char* out = (char*)(to->words + row * words);
      if (!usable) memset(out, 0, words * 4);
      for (int64_t j = 0; usable && j < rp; j += W) {
        vi x = round_int(mul(mul(load(rows + row * rp + j), load(head.unit + j)), by));
        total = fma(_mm512_cvtepi32_ps(x), load(head.zero + j), total);
        if (j < words * 4) _mm_mask_storeu_epi8(out + j, __mmask16((1u << min_of<int64_t>(16, words * 4 - j)) - 1), _mm512_cvtsepi32_epi8(x));
      }
      sums[i] = halves(total);
    }
    store8(offset + at, reduce8(sums));
  }
  for (int i = 0; i < n; i++) {  // half a level: the shift rounds down
    int first = error[i] >= 0 ? int((start[i] + 0.5f) * power - offset[i]) : 0;
    memcpy(to->start + i, &first, 4);
  }
}
#endif

// Windows of a block of rows: a row's threshold is expected `state[THRESHOLD]` standard deviations above the mean of its
// scores (which is 0: the keys' coordinates are centred). `error` of a row: the levels by which the scores of two keys may
// be swapped by rounding. In float32 one level, a proof. With bytes one more than the standard deviation of their rounding,
// usually 1 to 2 levels (1 % of a row's), so that keys whose scores differ by little may change places. -1: no window.
template <class T>
static void make_windows(const Head<T>& head, const float* rows, const float* sigma, int n, int* error, Packed* packed) {
  alignas(64) float bound[BLOCK], inverse[BLOCK], start[BLOCK];
  const int64_t rp = head.rp;
  const vf rounding = set1(sizeof(T) == 4 ? 2.4e-7f * head.r * head.state[COL_MAX] : 0.f);
  for (int at = 0; at < n; at += 8) {
    f8 norm[8];
    for (int i = 0; i < 8; i++) {
      const float* row = rows + min_of(at + i, n - 1) * rp;
      norm[i] = _mm256_setzero_ps();
      for (int64_t j = 0; sizeof(T) == 4 && j < rp; j += 8) norm[i] = _mm256_fmadd_ps(load8(row + j), load8(row + j), norm[i]);
    }
    store8(bound + at, _mm256_sqrt_ps(reduce8(norm)));
  }
  for (int at = 0; at < n; at += W) {
    vf s = load(sigma + at), by = div(set1(1), mul(s, set1(head.state[SPREAD] * (1.f / 120))));
    store(inverse + at, by), store(bound + at, mul(mul(load(bound + at), rounding), by));
    store(start + at, sub(set1(128), mul(mul(s, set1(head.state[THRESHOLD])), by)));
  }
  for (int i = 0; i < n; i++) {
    bool usable = sigma[i] > 0 && finite(inverse[i]) && finite(start[i]) && bound[i] < 0.9f && !head.state[EXACT];
    error[i] = usable ? 1 : -1;
  }
  pack_words(head, rows, n, inverse, start, error, packed);
}

template <int NV, bool POOLED, class T>
ROUTINE void score_rows(const Word* panel, int64_t words, const Packed& rows, int n, uint8_t* out, int64_t stride) {
  const int64_t group = (POOLED ? 1 : ROWS) * stride;
  int q = 0;
  for (; q + ROWS <= n; q += ROWS, out += group) score_panel<ROWS, NV, POOLED, T>(panel, words, rows, q, out, stride);
  for (; q < n; q++, out += stride) score_panel<1, NV, POOLED, T>(panel, words, rows, q, out, stride);
}

// Levels of `n` packed rows against all keys, [rows, level_stride], 0 from N on; POOLED: the rows in groups, one row of the
// highest levels for each. Returns the rows written.
template <bool POOLED, class S> static int score_levels(const Head<S>& head, int64_t N, const Packed& rows, int n, uint8_t* out) {
  typedef typename Scoring<S>::type T;
  const int64_t words = words_of<T>(head.r), stride = level_stride(N), size = words * PANEL;
  const Word* panel = panels_of(head);
  int64_t at = 0;
  for (; at + PANEL <= N; at += PANEL, panel += size) score_rows<4, POOLED, T>(panel, words, rows, n, out + at, stride);
  if (at < N) {
    int vectors = vectors_of(N - at);
    if (vectors == 1) score_rows<1, POOLED, T>(panel, words, rows, n, out + at, stride);
    else if (vectors == 2) score_rows<2, POOLED, T>(panel, words, rows, n, out + at, stride);
    else score_rows<4, POOLED, T>(panel, words, rows, n, out + at, stride);
  }
  const int written = POOLED ? n / ROWS + n % ROWS : n;
  for (int q = 0; q < written; q++) memset(out + q * stride + N, 0, stride - N);
  return written;
}

}  // namespace
