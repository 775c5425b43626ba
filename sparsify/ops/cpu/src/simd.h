// Vectors of float32 at the width of the instruction set, and what the kernels need of them. Everything is in an anonymous
// namespace and nothing of the C++ library is used, so that code of one instruction set is never linked into another.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))
#define ROUTINE static __attribute__((noinline))  // a loop worth its own registers

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T> INLINE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> INLINE T max_of(T a, T b) { return a < b ? b : a; }
// Arrays one after another, 64-byte aligned; over null it only counts the bytes.
struct Arena {
  char* const base;
  char* at;
  explicit Arena(void* over) : base((char*)over), at((char*)over) {}
  char* take(int64_t bytes) {
    char* got = at;
    at += round_up(bytes, 64);
    return got;
  }
  size_t bytes() const { return size_t(at - base); }
};

INLINE bool finite(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (u & 0x7f800000u) != 0x7f800000u;
}
INLINE float sqrt_of(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE bf16 to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40u);
  return bf16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

typedef __m256 f8;
INLINE f8 load8(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store8(float* p, f8 x) { _mm256_storeu_ps(p, x); }
INLINE f8 widen8(const bf16* p) {  // 8 bfloat16 -> float32
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE __m128i narrow8(f8 x) {  // float32 -> 8 bfloat16, to nearest even, NaN stays NaN
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  return (__m128i)_mm256_cvtneps_pbh(x);
#else
  __m256i u = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x88);
  return _mm256_castsi256_si128(packed);
#endif
}
INLINE float sum8(f8 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#if defined(__AVX512F__)
constexpr int W = 16;
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;
INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf set1(float x) { return _mm512_set1_ps(x); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf max_ps(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf min_ps(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vm less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vf select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE vi select(vm m, vi yes, vi no) { return _mm512_mask_blend_epi32(m, no, yes); }
INLINE vi set1i(int x) { return _mm512_set1_epi32(x); }
INLINE void storei(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vi round_int(vf x) { return _mm512_cvtps_epi32(x); }
INLINE float sum(vf x) { return _mm512_reduce_add_ps(x); }
INLINE float max_lane(vf x) { return _mm512_reduce_max_ps(x); }
INLINE vf widen(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE vf scale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
INLINE vf round_near(vf x) { return _mm512_roundscale_ps(x, 8); }
INLINE vf exponent(vf x) { return _mm512_getexp_ps(x); }
INLINE vf mantissa(vf x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); }
INLINE __m128 low_half(vf x) { return _mm512_castps512_ps128(x); }
#else
constexpr int W = 8;
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;
INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vf set1(float x) { return _mm256_set1_ps(x); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf max_ps(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf min_ps(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vm less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vf select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
INLINE vi select(vm m, vi yes, vi no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
INLINE vi set1i(int x) { return _mm256_set1_epi32(x); }
INLINE void storei(int32_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
INLINE vi round_int(vf x) { return _mm256_cvtps_epi32(x); }
INLINE float sum(vf x) { return sum8(x); }
INLINE float max_lane(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE vf widen(const bf16* p) { return widen8(p); }
INLINE vf scale2(vf x, vf n) {  // x 2^n, n integral in [-127, 127]; 2^-127 is 0
  vi e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
INLINE vf round_near(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf exponent(vf x) {  // of normal numbers above 0
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(127)));
}
INLINE vf mantissa(vf x) {  // in [1, 2)
  return _mm256_or_ps(_mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), set1(1));
}
INLINE __m128 low_half(vf x) { return _mm256_castps256_ps128(x); }
#endif

// 2^x for x <= 0 (2^-125 for what is below: no denormal numbers, which are slow), relative error 2e-7: x = n + f,
// |f| <= 1/2, Taylor in f ln 2.
INLINE vf exp2_neg(vf x) {
  x = max_ps(set1(-125.f), x);  // the order keeps NaN
  vf n = round_near(x), f = sub(x, n);
  vf p = set1(1.5403530e-4f);
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.f));
  return scale2(p, n);
}

// The same to 1e-4: enough before a rounding to bfloat16.
INLINE vf exp2_neg_coarse(vf x) {
  x = max_ps(set1(-125.f), x);
  vf n = round_near(x), f = sub(x, n);
  vf p = set1(5.5828e-2f);
  p = fma(p, f, set1(2.4227e-1f));
  p = fma(p, f, set1(6.93147e-1f));
  p = fma(p, f, set1(9.99927e-1f));
  return scale2(p, n);
}

// log2 x for x >= 0, error 1e-7 of the larger of it and 1; of 1 exactly 0, of 0 (and denormal numbers) -inf. x = 2^n m,
// sqrt(1/2) < m < sqrt(2), ln m = 2 artanh t.
INLINE vf log2_of(vf x) {
  vf n = exponent(x), m = mantissa(x);
  vm large = less(set1(1.41421356f), m);
  n = select(large, add(n, set1(1)), n), m = select(large, mul(m, set1(0.5f)), m);
  vf t = div(sub(m, set1(1)), add(m, set1(1))), u = mul(t, t);
  vf p = set1(0.41219858f);
  p = fma(p, u, set1(0.57707802f));
  p = fma(p, u, set1(0.96179669f));
  p = fma(p, u, set1(2.8853901f));
  return select(less(x, set1(1.17549435e-38f)), set1(-__builtin_inff()), fma(p, t, n));
}

}  // namespace
