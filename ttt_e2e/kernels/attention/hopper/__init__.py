"""The passes of window attention as kernels for NVIDIA GPUs of the Hopper generation."""
