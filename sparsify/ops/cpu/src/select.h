// Exact top-b of a row of scores: the b highest, equal scores by the lower key, NaN lowest.
//
// From the bytes of scores.h: a search for the level of the b-th highest (3 to 5 counts), keys that are surely in go out
// with compress instructions, the few around the threshold are scored again in float32. Where a window missed, or
// numbers are not finite, all scores are computed in float32 and their order-preserving integers bisected.
//
// Limit: a count reads N bytes, 64 an instruction; emission the same once: 0.1 and 0.15 cycles a pair at 4 counts.
#pragma once
#include "highest.h"
#include "scores.h"

namespace {

constexpr int CANDIDATES = 512;

INLINE int64_t count_at_least(const uint8_t* x, int64_t n, int level) {
#if defined(__AVX512BW__)
  __m512i g = _mm512_set1_epi8(char(level));
  int64_t a = 0, b = 0, i = 0;
  for (; i + 64 < n; i += 128) {
    a += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(_mm512_loadu_si512(x + i), g));
    b += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(_mm512_loadu_si512(x + i + 64), g));
  }
  if (i < n) a += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(_mm512_loadu_si512(x + i), g));
  return a + b;
#else
  __m256i g = _mm256_set1_epi8(char(level)), total = _mm256_setzero_si256();
  for (int64_t i = 0; i < n;) {
    __m256i part = _mm256_setzero_si256();
    for (int64_t end = min_of<int64_t>(n, i + 32 * 255); i < end; i += 32) {
      __m256i v = _mm256_loadu_si256((const __m256i*)(x + i));
      part = _mm256_sub_epi8(part, _mm256_cmpeq_epi8(_mm256_max_epu8(v, g), v));
    }
    total = _mm256_add_epi64(total, _mm256_sad_epu8(part, _mm256_setzero_si256()));
  }
  alignas(32) int64_t t[4];
  _mm256_store_si256((__m256i*)t, total);
  return t[0] + t[1] + t[2] + t[3];
#endif
}

#if !defined(__AVX512BW__)
// The positions of the bits of every byte, ascending.
struct BitTable {
  uint8_t position[256][8];
  constexpr BitTable() : position() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, at = 0; bit < 8; bit++)
        if (byte >> bit & 1) position[byte][at++] = uint8_t(bit);
  }
};
static constexpr BitTable BITS;
#endif

struct Emitted {
  int64_t sure, candidates;
};

#if defined(__AVX512VBMI2__)
// Positions of the bits of `yes` plus `base`, at `out`; writes up to 64 places. Few bits are the usual case.
INLINE int64_t put(uint64_t yes, __m512i lanes, int64_t base, uint16_t* out) {
  __m512i at = _mm512_maskz_compress_epi8(yes, lanes);
  int64_t k = _mm_popcnt_u64(yes);
  __m256i first = _mm256_cvtepu8_epi16(_mm512_castsi512_si128(at));
  _mm256_storeu_si256((__m256i*)out, _mm256_add_epi16(first, _mm256_set1_epi16(short(base))));
  if (__builtin_expect(k > 16, 0)) {
    __m512i by = _mm512_set1_epi16(short(base));
    _mm512_storeu_si512(out, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(at)), by));
    _mm512_storeu_si512(out + 32, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(at, 1)), by));
  }
  return k;
}
#endif

// Keys with level >= high to `out`, keys with low <= level < high to `candidates`, both ascending; -1 candidates: too many.
INLINE Emitted emit(const uint8_t* x, int64_t n, int low, int high, uint16_t* out, uint16_t* candidates) {
  int64_t sure = 0, found = 0;
#if defined(__AVX512BW__)
  __m512i top = _mm512_set1_epi8(char(high)), bottom = _mm512_set1_epi8(char(low));
#if defined(__AVX512VBMI2__)
  alignas(64) static const uint8_t iota[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                               32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                               48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  __m512i lanes = _mm512_load_si512(iota);
#endif
  for (int64_t i = 0; i < n; i += 64) {
    __m512i v = _mm512_loadu_si512(x + i);
    uint64_t yes = _mm512_cmpge_epu8_mask(v, top), maybe = _mm512_cmpge_epu8_mask(v, bottom) & ~yes;
    if (__builtin_expect(found > CANDIDATES - 64, 0)) return {sure, -1};
#if defined(__AVX512VBMI2__)
    sure += put(yes, lanes, i, out + sure);
    found += put(maybe, lanes, i, candidates + found);
#else
    for (; yes; yes &= yes - 1) out[sure++] = uint16_t(i + __builtin_ctzll(yes));
    for (; maybe; maybe &= maybe - 1) candidates[found++] = uint16_t(i + __builtin_ctzll(maybe));
#endif
  }
#else
  __m256i top = _mm256_set1_epi8(char(high)), bottom = _mm256_set1_epi8(char(low));
  for (int64_t i = 0; i < n; i += 32) {
    __m256i v = _mm256_loadu_si256((const __m256i*)(x + i));
    uint32_t yes = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, top), v)));
    uint32_t maybe = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, bottom), v))) & ~yes;
    if (__builtin_expect(found > CANDIDATES - 64, 0)) return {sure, -1};
    for (int e = 0; e < 4; e++) {
      const uint32_t byte = yes >> 8 * e & 255;
      __m128i at = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)BITS.position[byte]));
      _mm_storeu_si128((__m128i*)(out + sure), _mm_add_epi16(at, _mm_set1_epi16(short(i + 8 * e))));
      sure += __builtin_popcount(byte);
    }
    for (; maybe; maybe &= maybe - 1) candidates[found++] = uint16_t(i + __builtin_ctz(maybe));
  }
#endif
  return {sure, found};
}

// The scores of one query row (Scorer of select_levels and select_exact).
struct RowScorer {
  const float *row, *col;
  int64_t r, rp;
  void operator()(const uint16_t* keys, int64_t n, float* s) const { score_keys(row, col, r, rp, keys, n, s); }
};

// All scores in float32, then the b highest.
template <class Scorer> static void select_exact(const Scorer& score, int64_t N, int64_t b, float* s, uint16_t* out) {
  score(nullptr, N, s);
  take_highest(s, nullptr, N, b, out);
}

// Where the next row's threshold is looked for first: near those of the rows before it.
struct Guess {
  float level = 128, density = 0.5f;  // keys of one level
};

// Levels around the threshold: count(x >= low) >= b > count(x >= high).
struct Bracket {
  int low, high;
  int64_t count_low, count_high;
  bool wide(int64_t enough) const {
    return high - low > 1 && (low == 0 || high == 256 || count_low - count_high > enough);
  }
  int middle(int64_t b) const {
    int at = low + int(float(high - low) * float(count_low - b) / float(max_of<int64_t>(count_low - count_high, 1)));
    return max_of(low + 1, min_of(high - 1, at));
  }
  Bracket with(int level, int64_t count, int64_t b) const {
    if (level <= low || level >= high) return *this;
    return count >= b ? Bracket{level, high, count, count_high} : Bracket{low, level, count_low, count};
  }
};

#if defined(__AVX512BW__)
// Four levels, ascending, counted in one pass.
INLINE Bracket count4(const uint8_t* x, int64_t n, int64_t b, Bracket found, int l0, int l1, int l2, int l3) {
  __m512i g0 = _mm512_set1_epi8(char(l0)), g1 = _mm512_set1_epi8(char(l1)), g2 = _mm512_set1_epi8(char(l2)), g3 = _mm512_set1_epi8(char(l3));
  int64_t c0 = 0, c1 = 0, c2 = 0, c3 = 0;
  for (int64_t i = 0; i < n; i += 64) {
    __m512i v = _mm512_loadu_si512(x + i);
    c0 += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(v, g0)), c1 += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(v, g1));
    c2 += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(v, g2)), c3 += _mm_popcnt_u64(_mm512_cmpge_epu8_mask(v, g3));
  }
  return found.with(l0, c0, b).with(l1, c1, b).with(l2, c2, b).with(l3, c3, b);
}
#endif

// The b keys with the highest scores from their levels x; false where the window missed. `error`: see Window.
template <class Scorer>
ROUTINE bool select_levels(const Scorer& score, int64_t N, int64_t b, const uint8_t* x, int error, Guess* guess, float* s,
                           uint16_t* out) {
  if (error < 0) return false;
  Bracket found{0, 256, N, 0};
  const int64_t enough = 18;
  int at = max_of(32, min_of(224, int(guess->level)));
#if defined(__AVX512BW__)
  if (N <= 1024) {  // few bytes: four counts at once cost less than one after another
    found = count4(x, N, b, found, at - 21, at - 7, at + 7, at + 21);
    if (found.wide(enough)) {
      if (found.low > 0 && found.high < 256) {
        int step = max_of((found.high - found.low) / 5, 1), from = found.low;
        found = count4(x, N, b, found, from + step, from + 2 * step, from + 3 * step, from + 4 * step);
      } else if (found.low > 0) {
        found = count4(x, N, b, found, at + 35, at + 55, at + 80, 250);
      } else {
        found = count4(x, N, b, found, 6, at - 80, at - 55, at - 35);
      }
    }
    at = found.middle(b);
  }
#endif
  while (found.wide(enough)) {
    int64_t c = count_at_least(x, N, at);
    if (c >= b) found.low = at, found.count_low = c;
    else found.high = at, found.count_high = c;
    if (found.low > 0 && found.high < 256) {
      guess->density = 0.75f * guess->density + 0.25f * float(found.count_low - found.count_high) / float(found.high - found.low);
      at = found.middle(b);
    } else {
      int next = at + int(float(c - b) / max_of(guess->density, 0.01f)) + (c >= b ? 3 : -3);
      at = next <= found.low || next >= found.high ? (found.low + found.high) / 2 : next;
    }
  }
  guess->level += 0.4f * (0.5f * float(found.low + found.high) - guess->level);
  const int low = found.low, high = found.high;
  int first = low - error, sure = high + error;
  if (first < 1 || sure > 254) return false;
  alignas(64) uint16_t candidates[CANDIDATES + 64];
  Emitted e = emit(x, N, first, sure, out, candidates);
  int64_t need = b - e.sure;
  if (e.candidates < 0 || need < 0 || need > e.candidates) return false;
  if (need == 0) return true;
  score(candidates, e.candidates, s);
#if defined(__AVX512VBMI2__)
  if (e.candidates <= 32) {
    take_highest32(s, candidates, e.candidates, need, out + e.sure);
    return true;
  }
#endif
  take_highest(s, candidates, e.candidates, need, out + e.sure);
  return true;
}

}  // namespace
