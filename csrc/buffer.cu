// The layout of the symmetric buffer, for the host that allocates it.
#include "buffer.cuh"
#include "launch.cuh"

EP_MOE_API void ep_moe_buffer_layout(const ep_moe::BufferShape* shape, ep_moe::BufferLayout* layout) {
  *layout = ep_moe::buffer_layout(*shape);
}
