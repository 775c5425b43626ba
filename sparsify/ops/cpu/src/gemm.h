// One register block of a matrix product, in float32 or with bf16 dot products: the only inner loop of scores.h and tile.h.
//
//     acc[q][:] += sum over words j of rows[q][j] * panel[j][:]        panel [words, PANEL], rows [NQ, words]
//
// A word is one float32, two bfloat16 whose products are added in float32, or four bytes (panel unsigned, rows signed) whose
// products are added as integers; the latter's sums are integers in the same registers.
// Limit: one multiply-add instruction a cycle at 512 bits (two at 256).
#pragma once
#include "simd.h"

namespace {

constexpr int PANEL = 4 * W;  // columns of one panel: four vectors

typedef uint32_t Word;

#if defined(__AVX512F__)
constexpr int ROWS = 4;  // rows of a register block
#else
constexpr int ROWS = 2;
#endif

template <int N> struct Count {
  static constexpr int value = N;
};

struct Bytes {
  int8_t value;
};
template <class T> constexpr int64_t words_of(int64_t n) {
  return (n + 4 / int(sizeof(T)) - 1) / (4 / int(sizeof(T)));
}

INLINE vf word(const Word* at, float) { return set1(*(const float*)at); }
INLINE vf multiply_add(vf a, vf b, vf c, float) { return fma(a, b, c); }
#if defined(__AVX512BF16__)
INLINE vf word(const Word* at, bf16) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(*at))); }
INLINE vf multiply_add(vf a, vf b, vf c, bf16) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#if defined(__AVX512VNNI__)
INLINE vf word(const Word* at, Bytes) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(*at))); }
INLINE vf multiply_add(vf a, vf b, vf c, Bytes) {
  return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(c), _mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#endif
#endif

// NV of the panel's four vectors are used.
template <int NQ, int NV, class T>
INLINE void accumulate(vf (*acc)[4], const Word* panel, int64_t words, const Word* rows, int64_t stride) {
  for (int64_t j = 0; j < words; j++, panel += PANEL) {
    vf x[4];
    for (int a = 0; a < NV; a++) x[a] = load((const float*)panel + W * a);
    for (int q = 0; q < NQ; q++) {
      vf s = word(rows + q * stride + j, T());
      for (int a = 0; a < NV; a++) acc[q][a] = multiply_add(x[a], s, acc[q][a], T());
    }
  }
}

// 32-bit words x [n, words] (rows of `stride` words, or those that `rows` names) transposed into panels [words, PANEL] of
// PANEL rows each, zeros past n. `slot` places row j of a panel.
template <class Slot>
INLINE void transpose(const Word* x, int64_t stride, const uint16_t* rows, int64_t n, int64_t words, Word* out, Slot slot) {
  for (int64_t at = 0; at < n; at += PANEL, out += words * PANEL)
    for (int j = 0; j < PANEL; j += 4) {  // four rows to four neighbouring slots
      const int64_t row = at + j;
      Word* to = out + slot(j);
      const float* from[4];
      for (int e = 0; e < 4; e++) {
        int64_t i = min_of(row + e, n - 1);
        from[e] = (const float*)x + (rows ? int64_t(rows[i]) : i) * stride;
      }
      const bool whole = row + 4 <= n;
      int64_t w = 0;
      for (; whole && w + 4 <= words; w += 4, to += 4 * PANEL) {
        __m128 a = _mm_loadu_ps(from[0] + w), b = _mm_loadu_ps(from[1] + w);
        __m128 c = _mm_loadu_ps(from[2] + w), d = _mm_loadu_ps(from[3] + w);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps((float*)to, a), _mm_storeu_ps((float*)to + PANEL, b);
        _mm_storeu_ps((float*)to + 2 * PANEL, c), _mm_storeu_ps((float*)to + 3 * PANEL, d);
      }
      for (; w < words; w++, to += PANEL)
        for (int e = 0; e < 4; e++) memcpy(to + e, row + e < n ? from[e] + w : (const float*)"\0\0\0", 4);
    }
}

}  // namespace
