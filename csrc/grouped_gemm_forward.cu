// Forward of the experts' linear layers: rows by weights that lie as [columns][reduction].
#include "gemm_tokens.cuh"

EP_MOE_API const char* ep_moe_grouped_gemm_forward(const ep_moe::GroupedGemmArgs* args, cudaStream_t stream) {
  return ep_moe::launch_token_gemm("grouped GEMM", *args, ep_moe::PlainProduct<ep_moe::Major::kReduction>{}, stream);
}

EP_MOE_API size_t ep_moe_grouped_gemm_args_bytes() { return sizeof(ep_moe::GroupedGemmArgs); }
