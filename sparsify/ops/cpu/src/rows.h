// Attention of single query rows over gathered keys: logits, softmax with multiplicities, weighted values.
//
// Limit: every kept pair fetches one row of K and one of V, 4d bytes in bfloat16, 8d in float32, used once: at 32 bytes a
// cycle from L2 8 (16) cycles at d = 64, against 4 to 5 (8) of dot products, shuffles and exponentials.
#pragma once
#include "head.h"

namespace {

constexpr float LOG2E = 1.44269504f;

// Sums (or what else `add` does) of 8 vectors, in order: one result lane for each.
template <class Add> INLINE f8 reduce8(const f8* a, Add add) {
  auto pair = [&](f8 x, f8 y) { return add(_mm256_blend_ps(x, y, 0xCC), _mm256_shuffle_ps(x, y, 0x4E)); };
  auto quad = [&](f8 x, f8 y) {
    return add(_mm256_blend_ps(x, y, 0xAA), _mm256_permute_ps(_mm256_blend_ps(x, y, 0x55), 0xB1));
  };
  f8 x = quad(pair(a[0], a[2]), pair(a[1], a[3])), y = quad(pair(a[4], a[6]), pair(a[5], a[7]));
  return add(_mm256_blend_ps(x, y, 0xF0), _mm256_permute2f128_ps(x, y, 0x21));
}
INLINE f8 reduce8(const f8* a) {
  return reduce8(a, [](f8 x, f8 y) { return _mm256_add_ps(x, y); });
}

// Logits (unscaled) of one query against the rows `keys` of K; n is a multiple of 8. C > 0: dp in vectors, else any dp.
template <int C> ROUTINE void logits(const float* q, const float* K, int64_t dp, const uint16_t* keys, int64_t n, float* s) {
  const int64_t chunks = C > 0 ? C : dp / 8;
  for (int64_t at = 0; at < n; at += 8) {
    const float* row[8];
    f8 acc[8];
    for (int i = 0; i < 8; i++) row[i] = K + keys[at + i] * dp, acc[i] = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int64_t c = 0; c < chunks; c++) {
      f8 x = load8(q + 8 * c);
      for (int i = 0; i < 8; i++) acc[i] = _mm256_fmadd_ps(load8(row[i] + 8 * c), x, acc[i]);
    }
    store8(s + at, reduce8(acc));
  }
}

// out[64 columns from `column`] = sum of p_j V[keys_j]; n is a multiple of 4.
ROUTINE void weigh64(const float* p, const float* V, int64_t dp, const uint16_t* keys, int64_t n, int64_t column, float* out) {
  const float* base = V + column;
#if defined(__AVX512F__)
  vf a0 = set1(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (int64_t j = 0; j < n; j += 2) {
    const float *x = base + keys[j] * dp, *y = base + keys[j + 1] * dp;
    vf w = set1(p[j]), u = set1(p[j + 1]);
    a0 = fma(load(x), w, a0), a1 = fma(load(x + 16), w, a1), a2 = fma(load(x + 32), w, a2), a3 = fma(load(x + 48), w, a3);
    b0 = fma(load(y), u, b0), b1 = fma(load(y + 16), u, b1), b2 = fma(load(y + 32), u, b2), b3 = fma(load(y + 48), u, b3);
  }
  store(out, add(a0, b0)), store(out + 16, add(a1, b1)), store(out + 32, add(a2, b2)), store(out + 48, add(a3, b3));
#else
  f8 a[8];
  for (int c = 0; c < 8; c++) a[c] = _mm256_setzero_ps();
  for (int64_t j = 0; j < n; j++) {
    const float* x = base + keys[j] * dp;
    f8 w = _mm256_set1_ps(p[j]);
    for (int c = 0; c < 8; c++) a[c] = _mm256_fmadd_ps(load8(x + 8 * c), w, a[c]);
  }
  for (int c = 0; c < 8; c++) store8(out + 8 * c, a[c]);
#endif
}
ROUTINE void weigh16(const float* p, const float* V, int64_t dp, const uint16_t* keys, int64_t n, int64_t column, float* out) {
  f8 a = _mm256_setzero_ps(), b = a;
  for (int64_t j = 0; j < n; j++) {
    const float* x = V + column + keys[j] * dp;
    f8 w = _mm256_set1_ps(p[j]);
    a = _mm256_fmadd_ps(load8(x), w, a), b = _mm256_fmadd_ps(load8(x + 8), w, b);
  }
  store8(out, a), store8(out + 8, b);
}
INLINE void weigh(const float* p, const float* V, int64_t dp, const uint16_t* keys, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + 64 <= dp; c += 64) weigh64(p, V, dp, keys, n, c, out + c);
  for (; c < dp; c += 16) weigh16(p, V, dp, keys, n, c, out + c);
}
INLINE vf exponential(vf x, float) { return exp2_neg(x); }
INLINE void store_p(float* p, vf x) { store(p, x); }

#if defined(__AVX512F__)
// The same of 16 vectors of 16.
INLINE vf reduce16(const vf* a) {
  auto pair = [](vf x, vf y) { return add(_mm512_mask_blend_ps(0xCCCC, x, y), _mm512_shuffle_ps(x, y, 0x4E)); };
  auto quad = [](vf x, vf y) {
    return add(_mm512_mask_blend_ps(0xAAAA, x, y), _mm512_permute_ps(_mm512_mask_blend_ps(0x5555, x, y), 0xB1));
  };
  auto half = [](vf x, vf y) { return add(_mm512_mask_blend_ps(0xFF00, x, y), _mm512_shuffle_f32x4(x, y, 0x4E)); };
  vf t[4];
  for (int i = 0; i < 4; i++) t[i] = quad(pair(a[4 * i], a[4 * i + 2]), pair(a[4 * i + 1], a[4 * i + 3]));
  vf even = half(t[0], t[2]), odd = half(t[1], t[3]), other = _mm512_mask_blend_ps(0x0F0F, even, odd);
  return add(_mm512_mask_blend_ps(0xF0F0, even, odd), _mm512_shuffle_f32x4(other, other, 0xB1));
}
#endif

#if defined(__AVX512BF16__)
// 16 keys at a time at dp = 64: the most common size.
ROUTINE void logits64(const bf16* q, const bf16* K, const uint16_t* keys, int64_t n, float* s) {
  __m512bh q0 = (__m512bh)_mm512_loadu_si512(q), q1 = (__m512bh)_mm512_loadu_si512(q + 32);
  for (int64_t at = 0; at < n; at += 16) {
    vf a[16];
    for (int i = 0; i < 16; i++) {
      const bf16* row = K + (int64_t(keys[at + i]) << 6);
      a[i] = _mm512_dpbf16_ps(set1(0), (__m512bh)_mm512_load_si512(row), q0);
      a[i] = _mm512_dpbf16_ps(a[i], (__m512bh)_mm512_load_si512(row + 32), q1);
    }
    store(s + at, reduce16(a));
  }
}
template <int C> ROUTINE void logits(const bf16* q, const bf16* K, int64_t dp, const uint16_t* keys, int64_t n, float* s) {
  const int64_t chunks = C > 0 ? C : dp / 16;
  for (int64_t at = 0; at < n; at += 8) {
    const bf16* row[8];
    f8 acc[8];
    for (int i = 0; i < 8; i++) row[i] = K + keys[at + i] * dp, acc[i] = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int64_t c = 0; c < chunks; c++) {
      __m256bh x = (__m256bh)_mm256_loadu_si256((const __m256i*)(q + 16 * c));
      for (int i = 0; i < 8; i++)
        acc[i] = _mm256_dpbf16_ps(acc[i], (__m256bh)_mm256_loadu_si256((const __m256i*)(row[i] + 16 * c)), x);
    }
    store8(s + at, reduce8(acc));
  }
}
INLINE vf dot2(vf c, __m512i a, __m512i b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
INLINE void store_halves(float* out, vf low, vf high) {  // unpacklo / unpackhi order back to the order of the columns
  _mm_storeu_ps(out, _mm512_castps512_ps128(low)), _mm_storeu_ps(out + 4, _mm512_castps512_ps128(high));
  _mm_storeu_ps(out + 8, _mm512_extractf32x4_ps(low, 1)), _mm_storeu_ps(out + 12, _mm512_extractf32x4_ps(high, 1));
  _mm_storeu_ps(out + 16, _mm512_extractf32x4_ps(low, 2)), _mm_storeu_ps(out + 20, _mm512_extractf32x4_ps(high, 2));
  _mm_storeu_ps(out + 24, _mm512_extractf32x4_ps(low, 3)), _mm_storeu_ps(out + 28, _mm512_extractf32x4_ps(high, 3));
}
template <int C>
ROUTINE void weigh_columns(const bf16* p, const bf16* V, int64_t dp, const uint16_t* keys, int64_t n, float* out) {
  vf low[2][C], high[2][C];  // C vectors of 32 columns, two sums each
  for (int c = 0; c < C; c++) low[0][c] = low[1][c] = high[0][c] = high[1][c] = set1(0);
  for (int64_t j = 0; j < n; j += 4)
    for (int e = 0; e < 2; e++) {
      const bf16 *x = V + keys[j + 2 * e] * dp, *y = V + keys[j + 2 * e + 1] * dp;
      int pair;
      memcpy(&pair, p + j + 2 * e, 4);
      __m512i w = _mm512_set1_epi32(pair);
      for (int c = 0; c < C; c++) {
        __m512i a = _mm512_loadu_si512(x + 32 * c), b = _mm512_loadu_si512(y + 32 * c);
        low[e][c] = dot2(low[e][c], _mm512_unpacklo_epi16(a, b), w);
        high[e][c] = dot2(high[e][c], _mm512_unpackhi_epi16(a, b), w);
      }
    }
  for (int c = 0; c < C; c++) store_halves(out + 32 * c, add(low[0][c], low[1][c]), add(high[0][c], high[1][c]));
}
INLINE void weigh(const bf16* p, const bf16* V, int64_t dp, const uint16_t* keys, int64_t n, float* out) {
  int64_t c = 0;
  if (dp == 64) return weigh_columns<2>(p, V, 64, keys, n, out);
  for (; c + 64 <= dp; c += 64) weigh_columns<2>(p, V + c, dp, keys, n, out + c);
  for (; c < dp; c += 32) weigh_columns<1>(p, V + c, dp, keys, n, out + c);
}
INLINE vf exponential(vf x, bf16) { return exp2_neg_coarse(x); }
INLINE void store_p(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

// Logits of a row; n is a multiple of 8.
INLINE void row_logits(const float* q, const float* K, int64_t dp, const uint16_t* keys, int64_t n, float* s) {
  if (dp == 64) logits<8>(q, K, 64, keys, n, s);
  else logits<0>(q, K, dp, keys, n, s);
}
#if defined(__AVX512BF16__)
INLINE void row_logits(const bf16* q, const bf16* K, int64_t dp, const uint16_t* keys, int64_t n, float* s) {
  int64_t whole = dp == 64 ? n / 16 * 16 : 0;
  if (dp == 64) {
    logits64(q, K, keys, whole, s);
    if (whole < n) logits<4>(q, K, 64, keys + whole, n - whole, s + whole);
  } else logits<0>(q, K, dp, keys, n, s);
}
#endif

// Weights 2^(factor (s - max)) of a row's n logits, padded to a multiple of 16 with -inf by the caller; the first `cells` of
// them times `count`, which is 1 from there to a multiple of 16. Returns 1 / sum, 0 for an empty row.
template <class T> ROUTINE float weights(const float* s, int64_t n, float factor, int64_t cells, const float* count, T* p) {
  vf top = set1(-__builtin_inff());
  for (int64_t j = 0; j < n; j += W) top = max_ps(load(s + j), top);
  float most = max_lane(top);
  if (!(most > -__builtin_inff())) most = 0;
  vf by = set1(factor), highest = set1(most), total = set1(0);
  int64_t j = 0;
  for (; j < cells; j += W) {
    vf e = mul(exponential(mul(sub(load(s + j), highest), by), T()), load(count + j));
    store_p(p + j, e), total = add(total, e);
  }
  for (; j < n; j += W) {
    vf e = exponential(mul(sub(load(s + j), highest), by), T());
    store_p(p + j, e), total = add(total, e);
  }
  float z = sum(total);
  return z > 0 || z != z ? 1 / z : 0;
}

INLINE void prefetch_out(const Problem& p, int64_t b, int64_t h, int64_t i) {
  const char* at = (const char*)p.out + ((b * p.N + i) * p.H + h) * p.d * (p.out_bf16 ? 2 : 4);
  for (int64_t byte = 0; byte < p.d * (p.out_bf16 ? 2 : 4); byte += 64) __builtin_prefetch(at + byte, 1);
}

INLINE void write_out(const Problem& p, int64_t b, int64_t h, int64_t i, const float* x, float by) {
  int64_t at = ((b * p.N + i) * p.H + h) * p.d, j = 0;
  f8 f = _mm256_set1_ps(by);
  if (p.out_bf16) {
    bf16* out = (bf16*)p.out + at;
    for (; j + 8 <= p.d; j += 8) _mm_storeu_si128((__m128i*)(out + j), narrow8(_mm256_mul_ps(load8(x + j), f)));
    for (; j < p.d; j++) out[j] = to_bf16(x[j] * by);
  } else {
    float* out = (float*)p.out + at;
    for (; j + 8 <= p.d; j += 8) store8(out + j, _mm256_mul_ps(load8(x + j), f));
    for (; j < p.d; j++) out[j] = x[j] * by;
  }
}

}  // namespace
