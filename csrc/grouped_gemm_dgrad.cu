// Gradient of the rows of the experts' linear layers: gradient rows by the forward's weights, which lie as
// [reduction][columns] for this product and are transposed by the multiply.
#include "gemm_tokens.cuh"

EP_MOE_API const char* ep_moe_grouped_gemm_dgrad(const ep_moe::GroupedGemmArgs* args, cudaStream_t stream) {
  return ep_moe::launch_token_gemm("grouped GEMM for the rows' gradient", *args,
                                   ep_moe::PlainProduct<ep_moe::Major::kOuter>{}, stream);
}
