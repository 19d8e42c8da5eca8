"""ep_moe: an expert-parallel Mixture-of-Experts layer for training and inference."""
