// AVX-512 without bfloat16 dot products: float32 storage only.
#include "backward.h"
#include "dense.h"
#include "tiles.h"

namespace sparsify {
const Kernels* kernels_avx512(bool bf16_storage, Work work) {
  if (work == BACKWARD) return backward_kernels();
  if (bf16_storage) return nullptr;
  return work == DENSE ? dense_kernels<float>() : sparse_kernels<float>();
}
}  // namespace sparsify
