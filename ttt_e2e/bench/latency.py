"""`ttt-e2e bench latency`: seconds of prefill and of decoding per token, against the length of the context.

Shapes: `B` batch, `V` vocabulary, `b` mini-batch.
"""

import itertools
import time
from dataclasses import dataclass

import jax
import numpy as np
import optax

from ttt_e2e.bench import compiled, table
from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, override
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.model import abstract_model
from ttt_e2e.progress import progress_bar
from ttt_e2e.train.steps import init_state

WINDOW = 256
# The models that are measured by default, (fields of the model, mini-batch): of about equally many parameters.
_SHAPE = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_LEARNS = {"intermediate_size": 256, "num_fast_blocks": 1, "sliding_window": WINDOW}
BUILT_IN = {
    "e2e": (_LEARNS, 64),
    "e2e_hybrid": (_LEARNS | {"mixer": "window,attention,window,window"}, 64),
    "window": ({"intermediate_size": 320, "sliding_window": WINDOW}, 256),
    "full": ({"intermediate_size": 320}, 256),
}
COSTS = {"prefill": "prefill_seconds_per_1k_tokens", "decode": "decode_milliseconds_per_token"}


@dataclass(frozen=True)
class Variant:
    """A model to measure, with its reader."""

    name: str
    config: Config
    reader: Reader
    num_new: int  # tokens to generate, whole mini-batches


def run(
    output,
    *,
    configs=tuple(BUILT_IN),
    context_lengths=tuple(WINDOW * 2**i for i in range(1, 7)),
    new_tokens: int = 256,
    batch: int = 1,
    repeats: int = 5,
) -> list[dict]:
    """Measures models with random weights at every context length; writes the results to `output`, returns the rows.

    Every part of the text is read and continued `repeats` times, models in turn. The shortest time of each piece and of
    each token counts; the shortest time of a long run as a whole would grow with its length on a machine that is not
    quiet. Each generated token is waited for, as when text is streamed.

    Args:
      output: directory for the results.
      configs: config files, FILE.py[:ARG], or the small built-in models e2e, e2e_hybrid, window and full.
      context_lengths: in tokens, multiples of the models' mini-batches.
      new_tokens: to generate after each context, rounded up to whole mini-batches: each bears its share of inner steps.
      batch: sequences at once.
      repeats: how often each part is measured.

    Returns:
      A row for each model and context length: `prefill_seconds_per_1k_tokens`, the mean over the whole context;
      `decode_milliseconds_per_token`; `prefill_tokens_per_second` and `decode_tokens_per_second` of the batch;
      `state_bytes` after the context; and what `program_figures` counts at the end of the context.
    """
    for name, value in {"--new_tokens": new_tokens, "--batch": batch, "--repeats": repeats}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, but it must be at least 1")
    for name, values in {"--configs": configs, "--context_lengths": context_lengths}.items():
        if not values:
            raise UserError(f"{name} is empty: give one at least, or leave it out")
    lengths = sorted(set(context_lengths))
    variants = [_variant(spec, lengths, new_tokens) for spec in configs]
    times, states = _measure(variants, lengths, batch, repeats)
    rows = []
    for variant in variants:
        figures, prefill_seconds = {}, 0.0
        for length in lengths:
            state, seconds = states[variant.name, length], times[variant.name, length]
            prefill_seconds += seconds["prefill"]
            size = state_bytes(state)
            if size not in figures:  # else the programs are the same
                figures[size] = program_figures(variant.reader, state)
            row = {"variant": variant.name, "context_length": length, "batch": batch}
            row |= {
                COSTS["prefill"]: prefill_seconds / length * 1000,
                COSTS["decode"]: seconds["decode"] / variant.num_new * 1000,
                "prefill_tokens_per_second": batch * length / prefill_seconds,
                "decode_tokens_per_second": batch * variant.num_new / seconds["decode"],
                "state_bytes": size,
            }
            rows.append(row | figures[size])
    print(table.write(output, rows, "Latency", notes=notes(variants, rows)))
    return rows


def state_bytes(state: ReaderState) -> int:
    """Total bytes of all arrays of a state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def program_figures(reader: Reader, state: ReaderState) -> dict:
    """Figures of the compiled programs that continue a state, none of which is run.

    They are `peak_bytes`: parameters, state, and the most that any program needs besides, its results included;
    `prefill_flops_per_token` and `decode_flops_per_token` of matrix products (decoding includes a token's share of
    running its mini-batch when it is full); `compile_seconds` of all programs.
    """
    B, b = state.tokens.shape
    programs = {name: compiled.measure(function, *a) for name, (function, a) in reader.programs(state).items()}
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves((reader.params, state)))
    prepared = programs["prepare"].call.memory_analysis().output_size_in_bytes
    results = {name: program.call.memory_analysis().output_size_in_bytes for name, program in programs.items()}
    return {
        "peak_bytes": resident + prepared + max(program.temp_bytes + results[n] for n, program in programs.items()),
        "prefill_flops_per_token": programs["mini_batch"].flops / (B * b),
        "decode_flops_per_token": programs["predict"].flops / B + programs["mini_batch"].flops / (B * b),
        "compile_seconds": sum(program.trace_seconds + program.compile_seconds for program in programs.values()),
    }


def crossover(lengths: list[int], costs: list[float], others: list[float]) -> float | None:
    """The context length beyond which `costs` stay below `others`, interpolated linearly between `lengths`.

    It is the first length if they are below at all of them, and None if they are not below at the last.
    """
    differences = [cost - other for cost, other in zip(costs, others)]
    dearer = [i for i, difference in enumerate(differences) if difference >= 0]
    if not dearer:
        return float(lengths[0])
    i = dearer[-1]
    if i + 1 == len(lengths):
        return None
    share = differences[i] / (differences[i] - differences[i + 1])
    return lengths[i] + share * (lengths[i + 1] - lengths[i])


def notes(variants: list[Variant], rows: list[dict]) -> str:
    """Markdown: each model's spread of costs over lengths, and where learning becomes cheaper than full attention."""
    costs = {
        (variant.name, kind): [row[figure] for row in rows if row["variant"] == variant.name]
        for variant in variants
        for kind, figure in COSTS.items()
    }
    lengths = sorted({row["context_length"] for row in rows})
    lines = []
    for variant in variants:
        spread = {kind: max(costs[variant.name, kind]) / min(costs[variant.name, kind]) for kind in COSTS}
        lines.append(
            f"- {variant.name}: dearest over cheapest context length: prefill {spread['prefill']:.2f}, "
            f"decode {spread['decode']:.2f}."
        )
    learning = [v.name for v in variants if v.config.model.num_fast_blocks]
    full = [v.name for v in variants if not v.config.model.num_fast_blocks and v.reader.grows]
    for ours, other, kind in itertools.product(learning, full, COSTS):
        at = crossover(lengths, costs[ours, kind], costs[other, kind])
        where = f"from about {at:.0f} tokens on" if at else f"not up to {lengths[-1]} tokens"
        where = "at every length measured" if at == lengths[0] else where
        lines.append(f"- {kind}: {ours} costs less per token than {other} {where}.")
    return "\n".join(lines)


def _variant(spec: str, lengths: list[int], new_tokens: int) -> Variant:
    """The model of a config file or of a built-in name, with random weights. Raises `UserError` for any other name."""
    if spec in BUILT_IN:
        model, b = BUILT_IN[spec]
        config = from_config_dict({"model": _SHAPE | model, "inner": {"mini_batch_size": b}, "train": {"seq_len": b}})
    elif not spec.partition(":")[0].endswith(".py"):
        raise UserError(f"--configs={spec}: it takes config files, FILE.py[:ARG], and {', '.join(BUILT_IN)}")
    else:
        config = override(load_config_file(spec), [])
    graphdef, _ = abstract_model(config.model)
    params = jax.jit(lambda: init_state(config, optax.identity()).params)()
    reader = Reader(graphdef, params, config, max_length=lengths[-1] + new_tokens + config.inner.mini_batch_size)
    b = reader.mini_batch_size
    for length in lengths:
        if length < 1 or length % b:
            raise UserError(f"--context_lengths={length}: it takes multiples of {b}, the mini-batch of {spec}")
    return Variant(spec, config, reader, -(-new_tokens // b) * b)


def _measure(variants: list[Variant], lengths: list[int], batch: int, repeats: int):
    """Measures all (variant, length): ({pair: {"prefill", "decode"} in seconds}, {pair: state after the context}).

    Both are sums of the shortest times: "decode" of every token, "prefill" of every piece of the part between the
    previous length and this one. All pieces are equally long.
    """
    seconds, states, random = {}, {}, np.random.default_rng(0)
    piece = int(np.gcd.reduce(lengths))
    rounds = itertools.product(range(repeats + 1), itertools.pairwise([0, *lengths]), variants)
    total = (repeats + 1) * len(lengths) * len(variants)
    for i, (begin, end), variant in progress_bar(rounds, desc="bench latency", unit="part", total=total):
        reader, vocab_size = variant.reader, variant.config.model.vocab_size
        state = states[variant.name, begin] if begin else reader.start(variant.config.data.bos_id, batch)
        tokens = random.integers(0, vocab_size, (batch, end - begin))
        state, prefill = _read(reader, state, tokens, piece)
        states[variant.name, end] = state
        decode = _generate(reader, state, variant.num_new)
        if i:  # the first round compiles
            before = seconds.get((variant.name, end), (np.inf, np.inf))
            seconds[variant.name, end] = [np.minimum(*pair) for pair in zip((prefill, decode), before)]
    return {key: dict(zip(COSTS, (times.sum() for times in of))) for key, of in seconds.items()}, states


def _read(reader: Reader, state: ReaderState, tokens: np.ndarray, piece: int):
    """Reads tokens [B, n] in pieces: (the state after them, seconds of each piece)."""
    seconds = []
    for begin in range(0, tokens.shape[1], piece):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(reader.read(state, tokens[:, begin : begin + piece]))
        seconds.append(time.perf_counter() - start)
    return state, np.array(seconds)


def _generate(reader: Reader, state: ReaderState, count: int) -> np.ndarray:
    """Generates tokens: seconds of each. When a mini-batch is full, its inner step is timed with the next token."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        state, token_B, _ = reader.step(state, _likeliest)
        jax.device_get(token_B)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    jax.block_until_ready(state)
    seconds[-1] += time.perf_counter() - start
    return np.array(seconds)


@jax.jit
def _likeliest(logits_BV):
    return logits_BV.argmax(-1)
