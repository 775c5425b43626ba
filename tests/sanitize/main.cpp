// The kernels of every instruction set of this processor under the address and undefined-behaviour sanitizers, without
// torch: small drawn calls on buffers of exactly the bytes that they need. Arguments: number of calls, first seed.
//
// Memory that a kernel must not touch is poisoned: what lies past a row of q, k, v and the predictor's coordinates, and
// past a workspace, which has the bytes that `head_bytes` or `scratch_bytes` asks for and no more (binding.cpp rounds them up
// to 64). Every call runs twice, over workspaces filled with different bytes and with its blocks in the other order, and
// must write all of its output, the same numbers both times: nothing uninitialised is read, no block needs another. Every
// sparse call is followed by its backward, from the keys and cells that it found, under the same rules.
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "layout.h"

namespace {
using namespace sparsify;

typedef std::mt19937_64 Random;

int64_t between(Random& g, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(g); }
bool chance(Random& g, double share) { return std::uniform_real_distribution<double>()(g) < share; }
template <class T> T one_of(Random& g, std::initializer_list<T> from) { return from.begin()[between(g, 0, from.size() - 1)]; }

uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return uint16_t(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Bytes at a multiple of 64 that end where they say.
struct Bytes {
  char* data;
  size_t size;
  Bytes(size_t size, int fill) : size(size) {
    void* got = nullptr;
    if (posix_memalign(&got, 64, size ? size : 1)) abort();
    data = (char*)memset(got, fill, size);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() {
    ASAN_UNPOISON_MEMORY_REGION(data, size);
    free(data);
  }
};

enum Kind { NORMAL, TIES, SPECIAL, HUGE_NUMBERS, EQUAL, KINDS };
const char* const KIND[] = {"normal", "ties", "nan and inf", "huge and tiny", "equal"};

float number(Random& g, Kind kind) {
  float x = std::normal_distribution<float>()(g);
  const float inf = std::numeric_limits<float>::infinity();
  if (kind == TIES) return float(int(x));
  if (kind == SPECIAL && chance(g, 0.02)) return one_of(g, {std::numeric_limits<float>::quiet_NaN(), inf, -inf, 3e38f, 1e-42f, 0.f});
  if (kind == HUGE_NUMBERS) return x * one_of(g, {1e-20f, 1e-3f, 1e10f, 1e25f});
  return kind == EQUAL ? 0.5f : x;
}

// [B, H, N, n] in some layout, the places between the rows poisoned.
struct Rows {
  Bytes bytes;
  View view;
  Rows(Random& g, const Problem& p, int64_t n, bool bf16, Kind kind) : Rows(g, p, n, bf16, kind, pitch(g, n, bf16), chance(g, 0.5)) {}

 private:
  static int64_t pitch(Random& g, int64_t n, bool bf16) {  // poisoned places begin anywhere, rows at multiples of 8 bytes
    const int64_t each = bf16 ? 4 : 2;
    return chance(g, 0.3) ? n : (n + each) / each * each + one_of<int64_t>(g, {0, 8, 64});
  }
  Rows(Random& g, const Problem& p, int64_t n, bool bf16, Kind kind, int64_t pitch, bool heads_inside)
      : bytes(((p.B * p.H * p.N - 1) * pitch + n) * (bf16 ? 2 : 4), 0) {
    view = {bytes.data, p.H * p.N * pitch, heads_inside ? pitch : p.N * pitch, heads_inside ? p.H * pitch : pitch, bf16};
    for (int64_t row = 0; row < p.B * p.H * p.N; row++) {
      char* at = bytes.data + row * pitch * (bf16 ? 2 : 4);
      for (int64_t j = 0; j < n; j++) {
        float x = number(g, kind);
        uint16_t half = to_bf16(x);
        if (bf16) memcpy(at + j * 2, &half, 2);
        else memcpy(at + j * 4, &x, 4);
      }
    }
    if (pitch == n) return;
    for (int64_t row = 0; row + 1 < p.B * p.H * p.N; row++) {
      char* past = bytes.data + (row * pitch + n) * (bf16 ? 2 : 4);
      ASAN_POISON_MEMORY_REGION(past, (pitch - n) * (bf16 ? 2 : 4));
    }
  }
};

const char* now = "";  // the call under way, for messages
[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "%s: %s\n", now, what);
  exit(1);
}

struct Result {
  std::vector<uint32_t> out;
  std::vector<int32_t> kept, cells;
};

// A number of a float32 or bfloat16 array as bits, one NaN for all; 0xfdfd..: it was not written.
uint32_t written(const char* at, int64_t i, bool half) {
  uint32_t bits = 0;
  memcpy(&bits, at + i * (half ? 2 : 4), half ? 2 : 4);
  if (bits == (half ? 0xfdfdu : 0xfdfdfdfdu)) fail("a number of the output was not written");
  if (half) bits <<= 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
}

// All blocks of a call; `again`: other bytes in the workspaces, and the blocks from the last to the first.
Result run(Problem p, const Kernels* k, bool again) {
  const int fill = again ? 0xff : 0x00;
  const int64_t numbers = p.B * p.N * p.H * p.d, rows = p.B * p.H * p.N;
  Bytes out(numbers * (p.out_bf16 ? 2 : 4), 0xfd), kept(rows * p.widest * 4, 0xfd), cells(rows * 4, 0xfd);
  const Probe probe{(int32_t*)kept.data, (int32_t*)cells.data};
  p.out = out.data;
  Bytes scratch(k->scratch_bytes(p), fill);
  const int64_t blocks = k->blocks(p);
  for (int64_t head = 0; head < p.B * p.H; head++) {
    Bytes space(k->head_bytes(p), fill);
    k->prepare(p, head / p.H, head % p.H, space.data, scratch.data);
    for (int64_t i = 0; i < blocks; i++)
      k->block(p, head / p.H, head % p.H, again ? blocks - 1 - i : i, space.data, scratch.data, p.budget ? &probe : nullptr);
  }
  Result found;
  for (int64_t i = 0; i < numbers; i++) {
    found.out.push_back(written(out.data, i, p.out_bf16));
  }
  found.kept.assign(probe.kept, probe.kept + rows * p.widest), found.cells.assign(probe.cells, probe.cells + rows);
  return found;
}

// The gradients of a call from what its forward found, [B, H, N, d] three times.
std::vector<uint32_t> backward(Problem p, const Kernels* k, const Result& forward, const View& grad, bool again) {
  const int fill = again ? 0xff : 0x00;
  const int64_t numbers = p.B * p.N * p.H * p.d, each = p.out_bf16 ? 2 : 4;
  Bytes dq(numbers * each, 0xfd), dk(numbers * each, 0xfd), dv(numbers * each, 0xfd);
  auto view = [&](const Bytes& x) { return View{x.data, p.N * p.H * p.d, p.d, p.H * p.d, p.out_bf16}; };
  p.grad = grad, p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  Bytes kept(forward.kept.size() * 4, 0), cells(forward.cells.size() * 4, 0);
  memcpy(kept.data, forward.kept.data(), kept.size), memcpy(cells.data, forward.cells.data(), cells.size);
  p.kept = (const int32_t*)kept.data, p.cells = (const int32_t*)cells.data;
  const std::vector<int64_t> none(p.H, 0);
  p.ranks = p.feature_dims = none.data(), p.feature_is_col = true, p.shift = nullptr, p.tiles = 0;
  Bytes scratch(k->scratch_bytes(p), fill);
  for (int64_t head = 0; head < p.B * p.H; head++) {
    Bytes space(k->head_bytes(p), fill);
    k->prepare(p, head / p.H, head % p.H, space.data, scratch.data);
    for (int64_t i = 0; i < k->blocks(p); i++) k->block(p, head / p.H, head % p.H, i, space.data, scratch.data, nullptr);
  }
  std::vector<uint32_t> found;
  for (const Bytes* x : {&dq, &dk, &dv})
    for (int64_t i = 0; i < numbers; i++) found.push_back(written(x->data, i, p.out_bf16));
  return found;
}

// [B, N] numbers of each token for which the exact bytes are held, or null.
struct Numbers {
  Bytes bytes;
  const float* data;
  template <class Draw> Numbers(const Problem& p, bool any, Draw draw) : bytes(any ? p.B * p.N * 4 : 0, 0), data(any ? (const float*)bytes.data : nullptr) {
    for (int64_t i = 0; any && i < p.B * p.N; i++) ((float*)bytes.data)[i] = draw();
  }
};

// Mostly sizes as they come from merging; now and then what must do no harm.
float drawn_size(Random& g, Kind kind) {
  const float inf = std::numeric_limits<float>::infinity();
  if (kind == SPECIAL && chance(g, 0.05)) return one_of(g, {0.f, -1.f, inf, std::numeric_limits<float>::quiet_NaN(), 1e-42f});
  if (kind == HUGE_NUMBERS) return one_of(g, {1e-30f, 1.f, 1e20f, 3e38f});
  if (kind == EQUAL) return 2.5f;
  return kind == TIES ? float(between(g, 1, 4)) : std::exp(std::normal_distribution<float>()(g));
}

// b different keys in each patch row, and a cell that there is.
void check(const Problem& p, const Result& x) {
  for (int64_t row = 0; row < p.B * p.H * p.N && p.budget; row++) {
    if (row % p.N < p.P) continue;
    std::vector<int32_t> keys(x.kept.begin() + row * p.widest, x.kept.begin() + row * p.widest + p.budget);
    std::sort(keys.begin(), keys.end());
    if (keys.front() < 0 || keys.back() >= p.N) fail("a kept key is out of range");
    if (std::unique(keys.begin(), keys.end()) != keys.end()) fail("a key was kept twice");
    if (x.cells[row] < 0 || x.cells[row] >= std::max<int64_t>(p.M, 1)) fail("a cell is out of range");
  }
}

void call(uint64_t seed, const Kernels* (*kernels)(bool, Work), const char* isa) {
  Random g(seed);
  Problem p{};
  const bool dense = chance(g, 0.2), storage = chance(g, 0.5), input = chance(g, 0.4);
  const Kernels* k = kernels(storage, dense ? DENSE : SPARSE);
  if (!k) return;
  const int64_t largest = one_of<int64_t>(g, {2, 6, 17});
  const int64_t h = between(g, 1, largest), w = between(g, 1, largest);
  const bool placed = chance(g, 0.4);
  p.P = between(g, 0, 5), p.N = p.P + (placed ? between(g, 1, chance(g, 0.5) ? h * w : largest * largest) : h * w);
  if (p.P > 0 && chance(g, 0.05)) p.N = p.P;
  const int64_t n = p.N - p.P;
  p.B = between(g, 1, 2), p.H = between(g, 1, 3), p.d = chance(g, 0.2) ? 64 : between(g, 1, chance(g, 0.5) ? 20 : 130);
  const Kind kind = chance(g, 0.4) ? NORMAL : Kind(between(g, 1, KINDS - 1));
  const bool folded = chance(g, 0.5);
  std::vector<int64_t> ranks(p.H), dims(p.H, p.d);
  for (auto& r : ranks) r = between(g, 1, folded ? std::min<int64_t>(p.d, 40) : 40);
  const int64_t r = *std::max_element(ranks.begin(), ranks.end());
  Rows q(g, p, p.d, input, kind), key(g, p, p.d, input, kind), v(g, p, p.d, input, kind);
  Rows row(g, p, r, input && chance(g, 0.5), kind), col(g, p, r, row.view.bf16, kind);
  p.q = q.view, p.k = key.view, p.v = v.view, p.row = folded ? q.view : row.view, p.col = folded ? key.view : col.view;
  p.feature_is_col = chance(g, 0.6), p.feature = p.feature_is_col ? p.col : p.k;
  p.ranks = ranks.data(), p.feature_dims = p.feature_is_col ? ranks.data() : dims.data();
  p.scale = 1 / float(p.d), p.out_bf16 = input;
  p.budget = dense ? 0 : chance(g, 0.5) ? std::max<int64_t>(1, p.N / 10) : between(g, 1, p.N);
  p.widest = p.budget + (dense ? 0 : between(g, 0, std::min<int64_t>(3, p.N - p.budget)));  // another head may keep more
  p.tail = dense ? TAIL_NONE : int(between(g, TAIL_NONE, TAIL_CLUSTERS));
  const bool sized = chance(g, 0.5), shifted = !dense && (sized ? chance(g, 0.7) : chance(g, 0.1));
  Numbers size(p, sized, [&] { return drawn_size(g, kind); }), shift(p, shifted, [&] { return number(g, kind) * 5; });
  p.size = size.data, p.shift = shift.data;
  std::vector<int64_t> place;
  for (int64_t i = 0; placed && i < p.B * n; i++) place.push_back(chance(g, 0.7) ? between(g, 0, h * w - 1) : 0);
  const int64_t th = between(g, 1, 7), tw = between(g, 1, 20);
  const bool tiles = !dense && chance(g, 0.4);
  Layout cells_and_tiles;
  lay_out(p, h, w, between(g, 1, 6), between(g, 1, 6), tiles ? th : 0, tw, placed ? place.data() : nullptr, cells_and_tiles);
  static char text[400];
  now = text;
  auto whole = [](int64_t x) { return (long long)x; };
  snprintf(
      text, sizeof text,
      "seed %llu, %s%s%s: B %lld H %lld N %lld d %lld P %lld r %lld b %lld tail %d M %lld tiles %lld (%lldx%lld), input %s, %s%s%s%s",
      (unsigned long long)seed, isa, storage ? " bf16" : "", dense ? " dense" : "", whole(p.B), whole(p.H), whole(p.N),
      whole(p.d), whole(p.P), whole(r), whole(p.budget), p.tail, whole(p.M), whole(p.tiles), whole(th), whole(tw),
      input ? "bf16" : "float32", KIND[kind], sized ? ", sizes" : "", shifted ? ", shift" : "", placed ? ", places" : "");
  if (getenv("VERBOSE")) fprintf(stderr, "%s\n", text);
  const Result once = run(p, k, false), twice = run(p, k, true);
  check(p, once);
  if (once.out != twice.out || once.kept != twice.kept || once.cells != twice.cells)
    fail("another result with other bytes in the workspaces or another order of the blocks");
  if (dense) return;
  const Rows grad(g, p, p.d, input, kind);
  const Kernels* gradients = kernels(storage, BACKWARD);
  if (backward(p, gradients, once, grad.view, false) != backward(p, gradients, once, grad.view, true))
    fail("other gradients with other bytes in the workspaces");
}
}  // namespace

// Called by the sanitizers before they report.
#define SEEN extern "C" __attribute__((visibility("default"))) void
SEEN __asan_on_error() { fprintf(stderr, "while computing %s\n", now); }
SEEN __ubsan_on_report() { __asan_on_error(); }

int main(int count, char** words) {
  const uint64_t calls = count > 1 ? strtoull(words[1], nullptr, 10) : 1000, first = count > 2 ? strtoull(words[2], nullptr, 10) : 0;
  __builtin_cpu_init();
#define HAS(x) __builtin_cpu_supports(x)
  const bool avx2 = HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2");
  const bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
  const bool avx512bf16 = avx512 && HAS("avx512bf16") && HAS("avx512vbmi") && HAS("avx512vbmi2") && HAS("avx512vnni");
#undef HAS
  for (uint64_t seed = first; seed < first + calls; seed++) {
    if (avx2) call(seed, kernels_avx2, "avx2");
    if (avx512) call(seed, kernels_avx512, "avx512");
    if (avx512bf16) call(seed, kernels_avx512bf16, "avx512bf16");
  }
  printf("%llu calls from seed %llu:%s%s%s\n", (unsigned long long)calls, (unsigned long long)first, avx2 ? " avx2" : " no AVX2 here",
         avx512 ? ", avx512" : "", avx512bf16 ? ", avx512bf16" : "");
}
