"""`ttt-e2e bench mixers`: what a training step costs with each sequence mixer, against the length of the sequence."""

import jax

from ttt_e2e.bench import table
from ttt_e2e.bench.meta_gradient import measure_gradient
from ttt_e2e.cluster.mesh import make_mesh
from ttt_e2e.config import MIXERS, Config, MeshConfig, from_config_dict, suggestion
from ttt_e2e.errors import UserError
from ttt_e2e.model import abstract_model, state_bytes
from ttt_e2e.progress import progress_bar
from ttt_e2e.train.steps import make_gradient, take_policies

E2E = "e2e"  # window attention, and a fast MLP in each block


def run(  # noqa: PLR0913 -- each is a flag
    output,
    *,
    mixers=(*MIXERS, E2E),
    lengths=(1024, 2048, 4096, 8192, 16384),
    width: int = 256,
    num_heads: int = 4,
    mlp_width: int = 512,
    num_blocks: int = 2,
    vocab: int = 512,
    window: int = 256,
    mini_batch: int = 1024,
    batch: int = 1,
    dtype: str = "float32",
    repeats: int = 3,
) -> list[dict]:
    """Measures loss and gradient of a small model of each mixer; writes the results to `output`, returns the rows.

    All blocks of a model have the same mixer, with the defaults of its config section, but for Gated DeltaNet's heads,
    which are as many as those of attention. Blocks are rematerialised (`inner.remat="mini_batch"`). The mixer `e2e` is
    `window` with a fast MLP in every block, and the meta-gradient through an inner step on each `mini_batch` tokens.

    Returns:
      A row for each mixer and length: `num_parameters`; `flops` of the compiled program's matrix products, `temp_bytes`
      without arguments and results, `compile_seconds`, `step_seconds`; and `state_bytes`, of the States of one sequence
      after that many tokens, fast weights included.
    """
    for name in mixers:
        if name not in (*MIXERS, E2E):
            raise UserError(f"--mixers={name}: {suggestion(name, (*MIXERS, E2E))}")
    mesh = make_mesh(MeshConfig(data=1))
    model = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": num_blocks}
    model |= {"num_attention_heads": num_heads, "sliding_window": window, "compute_dtype": dtype}
    rows = []
    for name in progress_bar(mixers, desc="bench mixers", unit="mixer"):
        for length in lengths:
            train = {"seq_len": length, "global_batch_size": batch}
            config = _config(name, model, train, mini_batch)
            policies = take_policies(config, mesh)
            gradient = make_gradient(policies.config, mesh, policies.division)
            figures = measure_gradient(gradient, policies.config, mesh, repeats)
            del figures["trace_seconds"]
            _, params = abstract_model(config.model)
            sizes = {"num_parameters": sum(x.size for x in jax.tree.leaves(params)), "width": width, "batch": batch}
            row = (
                {"variant": name, "seq_len": length}
                | sizes
                | figures
                | {"state_bytes": state_bytes(config.model, length)}
            )
            rows.append(row)
    print(table.write(output, rows, "Mixers", notes=_notes(rows)))
    return rows


def _config(name: str, model: dict, train: dict, mini_batch: int) -> Config:
    """The configuration of a model all of whose blocks have this mixer."""
    learns = name == E2E
    if name == "gated_deltanet":
        heads, width = model["num_attention_heads"], model["hidden_size"]
        model = model | {name: {"num_heads": heads, "head_dim": max(1, 3 * width // (4 * heads))}}
    fields = {"mixer": "window" if learns else name, "num_fast_blocks": model["num_hidden_layers"] if learns else 0}
    # Rematerialised, as long sequences are trained; otherwise "auto" keeps everything that this machine has memory for.
    inner = {
        "mini_batch_size": min(mini_batch, train["seq_len"]) if learns else train["seq_len"],
        "remat": "mini_batch",
    }
    return from_config_dict({"model": model | fields, "inner": inner, "train": train, "mesh": {"data": 1}})


def _notes(rows: list[dict]) -> str:
    """Markdown: how the time of each mixer grows from the shortest to the longest sequence."""
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        first, *_, last = [row for row in rows if row["variant"] == name] * 2
        longer, dearer = (last[key] / first[key] for key in ("seq_len", "step_seconds"))
        lines.append(f"- {name}: {dearer:.1f} times the time for {longer:g} times the tokens.")
    return "\n".join(lines)
