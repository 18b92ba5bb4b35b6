"""Flags of `ttt-e2e evaluate` that ask for evaluations of long contexts, and the settings they make.

The evaluations themselves are imported when they are asked for: they start JAX.
"""

from absl import flags

from ttt_e2e.errors import UserError
from ttt_e2e.flags import integers, sampling, string

# The flags that each evaluation of long contexts takes, after the one that asks for it.
LONG_CONTEXT = {
    "context_lengths": ("scored_tokens", "num_stretches"),
    "needle": ("needle_lengths", "needle_depths", "needle_samples"),
    "generation": (
        *("generation_prompt_tokens", "generation_tokens", "generation_samples"),
        *("temperature", "top_k", "top_p", "seed", "judge"),
    ),
}


def define(values: flags.FlagValues) -> None:
    """Defines them."""
    lengths = "Instead: loss of the same held-out tokens after contexts of these lengths, as 1024,2048,4096."
    flags.DEFINE_list("context_lengths", [], lengths, flag_values=values)
    scored = "Last tokens of a context that the loss is taken of; 0 = as many as the shortest length."
    flags.DEFINE_integer("scored_tokens", 0, scored, flag_values=values)
    stretches = "At most as many stretches of held-out text, each of the longest length; 0 = all."
    flags.DEFINE_integer("num_stretches", 32, stretches, flag_values=values)
    tasks = "Instead: retrieval of 1 = a number in noise, 2 = a number in text, 3 = a UUID in text, as 1,2,3."
    flags.DEFINE_list("needle", [], tasks, flag_values=values)
    lengths = "Tokens of the prompts; default: a quarter, half, one and two of the trained length, where they fit."
    flags.DEFINE_list("needle_lengths", [], lengths, flag_values=values)
    depths = "Where in the text the needle is, in percent."
    flags.DEFINE_list("needle_depths", ["0", "25", "50", "75", "100"], depths, flag_values=values)
    flags.DEFINE_integer("needle_samples", 4, "Prompts for each task, length and depth.", flag_values=values)
    continuations = "Instead: continuations of held-out documents, scored by a judge."
    flags.DEFINE_boolean("generation", False, continuations, flag_values=values)
    prompt = "First tokens of a document to continue; 0 = half the trained length."
    flags.DEFINE_integer("generation_prompt_tokens", 0, prompt, flag_values=values)
    flags.DEFINE_integer("generation_tokens", 128, "Tokens to generate, at most.", flag_values=values)
    flags.DEFINE_integer("generation_samples", 16, "Documents to continue, at most.", flag_values=values)
    sampling(values)
    string(values, "judge", "Run directory of the judge, or a checkpoint in one; default: the model itself.")


def asked(values: flags.FlagValues) -> list:
    """The evaluations that are asked for, each a module with its settings.

    Raises:
      UserError: a flag belongs to one that is not, or is no list of integers where it takes one.
    """
    for evaluation, names in LONG_CONTEXT.items():
        for name in names:
            if values[name].present and not values[evaluation].value:
                raise UserError(f"--{name} belongs to --{evaluation}, which is missing")
    found = []
    if values.context_lengths:
        from ttt_e2e.evaluation import context_lengths

        lengths = integers(values, "context_lengths")
        found.append((context_lengths, context_lengths.Settings(lengths, values.scored_tokens, values.num_stretches)))
    if values.needle:
        from ttt_e2e.evaluation import needle

        lists = (integers(values, name) for name in ("needle", "needle_lengths", "needle_depths"))
        found.append((needle, needle.Settings(*lists, values.needle_samples)))
    if values.generation:
        from ttt_e2e.evaluation import generation
        from ttt_e2e.inference.sampling import Sampling

        sizes = (values.generation_prompt_tokens, values.generation_tokens, values.generation_samples)
        drawn = Sampling(values.temperature, values.top_k, values.top_p)
        found.append((generation, generation.Settings(*sizes, drawn, values.seed, values.judge)))
    return found
