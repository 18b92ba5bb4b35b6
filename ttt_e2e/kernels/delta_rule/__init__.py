"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a memory that is corrected where it predicts values wrong.

    S_t' = a_t S_{t-1}                              [K, V] for each head, with a decay a_t in [0, 1]
    u_t  = beta_t (v_t - S_t'^T k_t)                what the memory lacks of the value of k_t
    S_t  = S_t' + k_t u_t^T
    o_t  = S_t^T q_t

`reference.py` is this and nothing else; `chunked.py` computes it by matrix products, a chunk of tokens at a time.
"""

from ttt_e2e.kernels.delta_rule.chunked import delta_rule

__all__ = ["delta_rule"]
