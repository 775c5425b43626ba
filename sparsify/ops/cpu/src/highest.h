// The highest of a few (or of all) scores in float32: what bytes cannot tell apart. Equal scores go to the lower position,
// NaN is lowest; the search ends on any numbers.
#pragma once
#include "rows.h"

namespace {

// Scores of the rows keys[0..n) of col (of rows 0..n where keys is null), which are rp apart and have r coordinates, 8 at a
// time; `s` has room for n + 7.
ROUTINE void score_keys(const float* row, const float* col, int64_t r, int64_t rp, const uint16_t* keys, int64_t n, float* s) {
  for (int64_t at = 0; at < n; at += 8) {
    f8 acc[8];
    const float* from[8];
    for (int i = 0; i < 8; i++) {
      int64_t key = min_of(at + i, n - 1);
      from[i] = col + (keys ? int64_t(keys[key]) : key) * rp;
      acc[i] = _mm256_mul_ps(load8(row), load8(from[i]));
    }
    for (int64_t j = 8; j < r; j += 8) {
      f8 x = load8(row + j);
      for (int i = 0; i < 8; i++) acc[i] = _mm256_fmadd_ps(load8(from[i] + j), x, acc[i]);
    }
    store8(s + at, reduce8(acc));
  }
}

INLINE int64_t count_at_least(const float* s, int64_t n, float level) {
  int64_t count = 0;
#if defined(__AVX512F__)
  vf g = set1(level);
  for (int64_t j = 0; j < n; j += 16) {
    __mmask16 lanes = n - j >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - j)) - 1);
    count += __builtin_popcount(_mm512_mask_cmp_ps_mask(lanes, load(s + j), g, _CMP_GE_OQ));
  }
#else
  int64_t j = 0;
  f8 g = set1(level);
  for (; j + 8 <= n; j += 8) count += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(load8(s + j), g, _CMP_GE_OQ)));
  for (; j < n; j++) count += s[j] >= level;
#endif
  return count;
}

// Integers in the order of the scores, and back.
INLINE int64_t to_ordered(float x) {
  int32_t u;
  memcpy(&u, &x, 4);
  return u ^ ((u >> 31) & 0x7fffffff);
}
INLINE float from_ordered(int64_t i) {
  int32_t u = int32_t(i);
  u ^= (u >> 31) & 0x7fffffff;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The `need` highest of n scores, equal ones by the lower position, NaN lowest, appended to `out` as keys[position] (as the
// position where keys is null; nowhere where `out` is null), ascending. A search for the threshold between the lowest and the highest score: by the
// share of scores wanted, then by halves of the order-preserving integers, so that it ends on any numbers. Returns it.
ROUTINE float take_highest(float* s, const uint16_t* keys, int64_t n, int64_t need, uint16_t* out) {
  vf least_of = set1(__builtin_inff()), most_of = set1(-__builtin_inff()), lowest = most_of;
  int64_t whole = n / W * W;
  for (int64_t j = 0; j < whole; j += W) {
    vf x = add(max_ps(load(s + j), lowest), set1(0));  // the second operand where either is NaN; -0 becomes 0
    store(s + j, x), least_of = min_ps(x, least_of), most_of = max_ps(x, most_of);
  }
  float least = -max_lane(sub(set1(0), least_of)), most = max_lane(most_of);
  for (int64_t j = whole; j < n; j++) {
    float x = s[j] != s[j] ? -__builtin_inff() : s[j] + 0.f;
    s[j] = x, least = min_of(least, x), most = max_of(most, x);
  }
  int64_t low = to_ordered(least), high = to_ordered(most) + 1, count_low = n, count_high = 0;
  for (int step = 0; count_low > need && high - low > 1; step++) {  // count(s >= low) >= need > count(s >= high)
    float bottom = from_ordered(low), top = from_ordered(high - 1);
    int64_t at = low + (high - low) / 2;
    if (step % 3 != 2) {
      float share = float(count_low - need) / float(max_of<int64_t>(count_low - count_high, 1));
      float guess = bottom + share * (top - bottom);
      if (guess > bottom && guess < top) at = to_ordered(guess);
    }
    int64_t c = count_at_least(s, n, from_ordered(at));
    if (c >= need) low = at, count_low = c;
    else high = at, count_high = c;
  }
  float threshold = from_ordered(low);
  if (!out) return threshold;
  int64_t at = 0;
  if (count_low == need) {
    for (int64_t j = 0; j < n; j++) out[at] = keys ? keys[j] : uint16_t(j), at += s[j] >= threshold;
  } else {  // equal scores at the threshold
    int64_t ties = need - count_at_least(s, n, from_ordered(low + 1));
    for (int64_t j = 0; j < n; j++) {
      bool tie = s[j] == threshold && ties > 0;
      if (s[j] > threshold || tie) out[at++] = keys ? keys[j] : uint16_t(j);
      ties -= tie;
    }
  }
  return threshold;
}

#if defined(__AVX512VBMI2__)
// The same for at most 32 scores, without a branch: every score's rank is how many are ahead of it.
ROUTINE void take_highest32(const float* s, const uint16_t* keys, int64_t n, int64_t need, uint16_t* out) {
  const uint32_t real = n < 32 ? (1u << n) - 1 : 0xffffffffu;
  vf low = set1(-__builtin_inff());
  vf a = _mm512_mask_loadu_ps(low, __mmask16(real), s), b = _mm512_mask_loadu_ps(low, __mmask16(real >> 16), s + 16);
  a = _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), low);
  b = _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), low);
  alignas(64) float clean[32];
  store(clean, a), store(clean + 16, b);
  vi rank_a = set1i(0), rank_b = set1i(0), one = set1i(1);
  for (int64_t j = 0; j < n; j++) {
    vf x = set1(clean[j]);
    const uint32_t later = ~0u << j << 1;  // positions after j: an equal score there ranks behind
    __mmask16 la = __mmask16(later), lb = __mmask16(later >> 16);
    __mmask16 ma = _mm512_mask_cmp_ps_mask(la, a, x, _CMP_LE_OQ) | _mm512_mask_cmp_ps_mask(__mmask16(~la), a, x, _CMP_LT_OQ);
    rank_a = _mm512_mask_add_epi32(rank_a, ma, rank_a, one);
    if (n > 16) {
      __mmask16 mb = _mm512_mask_cmp_ps_mask(lb, b, x, _CMP_LE_OQ) | _mm512_mask_cmp_ps_mask(__mmask16(~lb), b, x, _CMP_LT_OQ);
      rank_b = _mm512_mask_add_epi32(rank_b, mb, rank_b, one);
    }
  }
  vi limit = set1i(int(need));
  uint32_t won = _mm512_cmplt_epi32_mask(rank_a, limit) | uint32_t(_mm512_cmplt_epi32_mask(rank_b, limit)) << 16;
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(won & real, _mm512_loadu_si512(keys)));
}
#endif

}  // namespace
