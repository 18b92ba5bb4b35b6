"""State space duality (SSD), the recurrence of Mamba-2 (arXiv 2405.21060), with one group: B and C serve all heads.

    S_t = a_t S_{t-1} + x_t B_t^T        [H, S] for each head, with a decay a_t in [0, 1]
    y_t = S_t C_t                        [H]

`reference.py` is this and nothing else; `chunked.py` computes it by matrix products, a chunk of tokens at a time.
"""

from ttt_e2e.kernels.ssd.chunked import ssd

__all__ = ["ssd"]
