"""The passes of window attention as kernels for TPUs."""
