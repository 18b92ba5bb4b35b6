"""A pass over values and tangents at once is what autodiff makes of the pass over values, in fewer products.

In float64, where agreement up to rounding is agreement.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.tiny import TINY, tiny_model
from ttt_e2e.bench import compiled
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.mixers.attention import KeyValues
from ttt_e2e.model.parameters import Directed, merge, split
from ttt_e2e.model.passes import DualPass, Pass, Recording

pytestmark = pytest.mark.usefixtures("float64")

T, K, D = 4, 6, TINY["hidden_size"]
WINDOW = 5
CONTEXT = Context(start=K - 1)  # one position of the cache is empty
MOVING = pytest.mark.parametrize("moves", [False, True], ids=["x at rest", "x moves"])


@cache
def case():
    """A fast block's structure, and its operands (fast, u, slow, cache, x, tangent of x, cotangents of both)."""
    model = tiny_model(num_hidden_layers=1, num_fast_blocks=1, sliding_window=WINDOW)
    graphdef, fast, slow = split(model.merge().make_suffix().suffix)
    fast, slow = jax.tree.map(lambda a: a[0], (fast, slow))
    random = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape))

    heads = (TINY["num_key_value_heads"], K, TINY["head_dim"])
    u = jax.tree.map(lambda w: draw(*w.shape), fast)
    operands = fast, u, slow, KeyValues(draw(*heads), draw(*heads)), draw(T, D), draw(T, D), (draw(T, D), draw(T, D))
    return graphdef, operands


def by_jvp(fast, u, slow, cache, x_TD, x_dot_TD):
    """Hidden states [T, D] after the block, and their tangents."""

    def run(fast, x_TD):
        return merge(case()[0], fast, slow).extend(x_TD, Pass(), cache, CONTEXT)[0]

    return jax.jvp(run, (fast, x_TD), (u, x_dot_TD))


def by_pass(fast, u, slow, cache, x_JTD, recorded=None):
    """The same."""
    block = merge(case()[0], jax.tree.map(Directed, fast, u), slow)
    y_2TD, entry = block.extend(x_JTD, DualPass(recorded), cache, CONTEXT)
    assert entry.k.shape == (cache.k.shape[0], T, cache.k.shape[2])
    return y_2TD[0], y_2TD[1]


@MOVING
@pytest.mark.parametrize("is_recorded", [False, True], ids=["computed", "recorded"])
def test_a_dual_pass_and_its_reverse_are_those_of_autodiff(moves, is_recorded):
    graphdef, (fast, u, slow, cache, x_TD, x_dot_TD, bars) = case()
    x_dot_TD = x_dot_TD if moves else jnp.zeros_like(x_TD)
    recorded = None
    if is_recorded:
        compute = Recording()
        merge(graphdef, fast, slow).extend(x_TD, compute, cache, CONTEXT)
        recorded = compute.results

    def pulled_back(function, x):
        out, pull = jax.vjp(function, fast, slow, cache, x)
        return out, pull(bars)

    want, (*want_bars, want_x_bar) = jax.jit(
        lambda: pulled_back(lambda fast, slow, cache, x: by_jvp(fast, u, slow, cache, x, x_dot_TD), x_TD)
    )()
    x_JTD = jnp.stack([x_TD, x_dot_TD]) if moves else x_TD[None]
    got, (*got_bars, got_x_bar) = jax.jit(
        lambda: pulled_back(lambda fast, slow, cache, x: by_pass(fast, u, slow, cache, x, recorded), x_JTD)
    )()
    got_all, want_all = (got, got_bars, got_x_bar[0]), (want, want_bars, want_x_bar)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), got_all, want_all)


def test_a_slow_weight_is_read_once_in_each_direction():
    w_DF, x_2TD = jnp.ones((D, 3)), jnp.ones((2, T, D))

    def pulled_back(x_2TD, w_DF):
        y_2TF, pull = jax.vjp(partial(DualPass().product, "w"), x_2TD, w_DF)
        return pull(y_2TF)

    jaxpr = jax.make_jaxpr(pulled_back)(x_2TD, w_DF)
    assert str(jaxpr).count("dot_general") == 3


def test_nothing_is_spent_on_tangents_before_there_are_any():
    """Those of the attention and of the products around it, which come before the fast MLP: more than a third."""
    _, (fast, u, slow, cache, x_TD, x_dot_TD, bars) = case()

    def flops(x_JTD):
        def pulled_back(fast, slow, cache, x_JTD):
            return jax.vjp(lambda *a: by_pass(a[0], u, *a[1:]), fast, slow, cache, x_JTD)[1](bars)

        return compiled.matmul_flops(jax.jit(pulled_back).lower(fast, slow, cache, x_JTD).compile().as_text())

    assert flops(x_TD[None]) < 2 / 3 * flops(jnp.stack([x_TD, x_dot_TD]))
