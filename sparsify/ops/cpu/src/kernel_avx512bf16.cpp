// AVX-512 with bfloat16 dot products and byte compression (Zen 4, Cooper Lake, Sapphire Rapids and later).
#include "backward.h"
#include "dense.h"
#include "tiles.h"

namespace sparsify {
const Kernels* kernels_avx512bf16(bool bf16_storage, Work work) {
  if (work == BACKWARD) return backward_kernels();
  return work == DENSE ? (bf16_storage ? dense_kernels<bf16>() : dense_kernels<float>())
                       : (bf16_storage ? sparse_kernels<bf16>() : sparse_kernels<float>());
}
}  // namespace sparsify
