// One sparse (or dense) attention call as plain data: what binding.cpp hands to the kernels of each instruction set. Heads
// that differ in budget or cells have a Problem each, which says the same of all heads but for these.
// Sizes are the paper's letters: B images, H heads, N tokens, d head size, P prefix tokens, M cells, b budget, r rank.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace sparsify {

enum Tail { TAIL_NONE = 0, TAIL_MEAN = 1, TAIL_CELLS = 2, TAIL_CLUSTERS = 3 };

// [B, H, N, *], strides in elements, last dimension contiguous; bfloat16 or float32.
struct View {
  const void* data;
  int64_t stride_b, stride_h, stride_n;
  bool bf16;
};

struct Problem {
  int64_t B, H, N, d, P, M, budget;
  int64_t widest;             // largest budget of all heads: the row of a list of kept keys
  View q, k, v;
  View row, col;              // coordinates whose product ranks the keys: row [.., r], col [.., r]
  View feature;               // what `clusters` compares: [.., r or d]
  bool feature_is_col;
  const int64_t* ranks;       // [H] r of each head
  const int64_t* feature_dims;  // [H]
  const float* size;          // [B, N] tokens that each key stands for; null: 1 each
  const float* shift;         // [B, N] added to the scores of each key; null: nothing
  float scale;
  int tail;
  bool placed;                // the next four (layout.h) are of each image; else the same for all
  const int32_t* start_cell;  // [N - P] cell of each patch key on the grid
  int64_t tiles;              // 0: one key set for each query; an image may have fewer: its last ones are empty
  const int32_t* tile_start;  // [tiles + 1] into tile_token
  const int32_t* tile_token;  // [N - P] tokens, tile by tile
  int64_t tile_rows;          // tokens of the largest tile
  void* out;                  // [B, N, H*d]
  bool out_bf16;
  // Of a backward call alone, with `kept` and `cells` as the Probe of the forward got them.
  View grad, dq, dk, dv;      // gradient of the output, read; of queries, keys and values, written
  const int32_t *kept, *cells;
};

// What the tests and the backward read: the kept keys of every row and the cell of every key.
struct Probe {
  int32_t* kept;   // [B, H, N, widest]; rows of prefix tokens are not written, nor what lies past a head's budget
  int32_t* cells;  // [B, H, N]
};

// The kernels of one instruction set and storage. A head workspace is written by `prepare` and only read afterwards; a
// scratch belongs to one thread. Both are 64-byte aligned and need no initialisation.
struct Kernels {
  size_t (*head_bytes)(const Problem&);
  size_t (*scratch_bytes)(const Problem&);
  int64_t (*blocks)(const Problem&);  // independent pieces of work of one head
  void (*prepare)(const Problem&, int64_t b, int64_t h, void* head, void* scratch);
  void (*block)(const Problem&, int64_t b, int64_t h, int64_t block, const void* head, void* scratch, const Probe*);
};

enum Work { SPARSE, DENSE, BACKWARD };  // BACKWARD: float32 storage whatever is asked

const Kernels* kernels_avx2(bool bf16, Work work);        // nullptr: no such storage on this instruction set
const Kernels* kernels_avx512(bool bf16, Work work);
const Kernels* kernels_avx512bf16(bool bf16, Work work);

}  // namespace sparsify
