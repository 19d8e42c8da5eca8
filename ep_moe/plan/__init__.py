"""What an expert-parallel group will move, hold and wait for, before it runs: ``python -m ep_moe plan``."""
