"""The network written out naively: a loop over blocks and heads, dense masks, RoPE as complex numbers at
absolute positions. It takes our parameters and shares no code with the package.

Shapes: `T` positions, `D` model width, `N` query heads, `G` key/value heads, `H` head width, `V` vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp


def rms_norm(x, weight, eps):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x_TH, theta):
    """Adjacent channels as complex numbers, turned by position * theta^(-2i/H)."""
    T, H = x_TH.shape
    angles = jnp.arange(T)[:, None] * theta ** (-jnp.arange(0, H, 2) / H)
    turned = (x_TH[:, 0::2] + 1j * x_TH[:, 1::2]) * jnp.exp(1j * angles)
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(T, H)


def attention(p, x_TD, config, window):
    T, H = x_TD.shape[0], config.head_dim
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    visible = (j <= i) & (i - j < window)
    heads = []
    for n in range(config.num_attention_heads):
        g = n // (config.num_attention_heads // config.num_key_value_heads)
        q_TH = x_TD @ p["wq"][:, n * H : (n + 1) * H]
        k_TH = x_TD @ p["wk"][:, g * H : (g + 1) * H]
        v_TH = x_TD @ p["wv"][:, g * H : (g + 1) * H]
        if config.qk_norm:
            q_TH = rms_norm(q_TH, p["q_norm"]["weight"], config.rms_norm_eps)
            k_TH = rms_norm(k_TH, p["k_norm"]["weight"], config.rms_norm_eps)
        scores = rotate(q_TH, config.rope_theta) @ rotate(k_TH, config.rope_theta).T / H**0.5
        weights = jnp.where(visible, jnp.exp(scores), 0)
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v_TH)
    return jnp.concatenate(heads, axis=-1) @ p["wo"]


def swiglu(p, x_TD):
    gate = x_TD @ p["w1"]
    return (gate / (1 + jnp.exp(-gate)) * (x_TD @ p["w3"])) @ p["w2"]


def block(p, x_TD, config, window):
    """One block over a whole sequence; it has a fast MLP where `p` has one."""

    def add(x_TD, name, f):
        y_TD = f(rms_norm(x_TD, p[f"{name}_norm"]["weight"], config.rms_norm_eps))
        if config.post_norm:
            y_TD = rms_norm(y_TD, p[f"{name}_post_norm"]["weight"], config.rms_norm_eps)
        return x_TD + y_TD

    x_TD = add(x_TD, "attention", lambda y_TD: attention(p["attention"], y_TD, config, window))
    if "fast_mlp" in p:
        x_TD = add(x_TD, "fast_mlp", lambda y_TD: swiglu(p["fast_mlp"], y_TD))
    return add(x_TD, "mlp", lambda y_TD: swiglu(p["mlp"], y_TD))


def _blocks(tree, part):
    """Parameters of each block of a part, first to last; neighbouring stacks of the same length take turns."""
    names = sorted(name for name in tree if name.split("_")[0] == part)
    blocks = []
    for length, group in itertools.groupby(names, key=lambda name: len(jax.tree.leaves(tree[name])[0])):
        stacks = [tree[name] for name in group]
        blocks += [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(length) for stack in stacks]
    return blocks


def prefix_blocks(slow, config):
    """The parameters of each prefix block, first to last."""
    return _blocks(slow, "prefix")


def suffix_blocks(fast, slow, config):
    """The parameters of each suffix block, first to last, the fast ones among them."""
    return [{**s, **f} for s, f in zip(_blocks(slow, "suffix"), _blocks(fast, "suffix"), strict=True)]


def nll(slow, config, x_TD, targets_T):
    """Negative log likelihood [T] from the last block's hidden states."""
    head_DV = slow["embedding"].T if config.tie_word_embeddings else slow["head"]
    p_TV = jnp.exp(rms_norm(x_TD, slow["final_norm"]["weight"], config.rms_norm_eps) @ head_DV)
    return -jnp.log(p_TV[jnp.arange(len(targets_T)), targets_T] / p_TV.sum(axis=-1))


def plain_nll(params, config, tokens_T1, windows):
    """Negative log likelihood [T] of a sequence under the network with all its weights static.

    windows: of each block; T or more = full attention.
    """
    fast, slow = params["fast"], params["slow"]
    x_TD = slow["embedding"][tokens_T1[:-1]]
    blocks = prefix_blocks(slow, config) + suffix_blocks(fast, slow, config)
    for p, window in zip(blocks, windows, strict=True):
        x_TD = block(p, x_TD, config, window)
    return nll(slow, config, x_TD, tokens_T1[1:])
