"""The sections of a config. Their docstrings and help texts are Markdown: docs/configuration.md is made from them.

In every field 0 or "" means "off" or "derived", as its help says; no field is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_e2e.config.fields import FREE, LOGGED, field, file_names

DTYPES = ("float32", "bfloat16", "float16", "float64")
MIXER_FILES = [name for name in file_names("model/mixers") if name != "base"]
MIXERS = list(MIXER_FILES)  # and those that are registered elsewhere
MIXER_SECTIONS: dict[str, type] = {}  # of mixers that have fields of their own, once their files are imported
GRADIENTS = ("exact", "first_order", "reference")
TRAJECTORIES = ("auto", "store", "delta", "segment")
ATTENTION_BACKENDS = ("auto", "reference", "xla", "pallas_tpu", "mosaic_gpu", "cudnn", "splash")
REMATS = ("auto", "keep", "mini_batch", "block")
PREFIXES = ("auto", "sequence", "matrices")
OPTIMIZERS = file_names("train/optimizers")


@dataclass(frozen=True)
class EngramConfig:
    """[Engram](engram.md): tables of n-grams of two and three tokens, which some blocks look up by a hash."""

    blocks: str = field(
        "",
        'the blocks that have one, as comma-separated indices that count from 0 over all blocks, such as `"2,6"`; '
        "empty = none. They must be blocks without a fast MLP.",
    )
    table_size: int = field(
        65_536,
        "rows of a table: at least as many, as the tables of all heads have different primes. All tables of a block "
        "together must have fewer than 2**31 rows.",
        least=1,
    )
    num_heads: int = field(
        8, "heads for the n-grams of either length, each with a hash and a table of its own.", least=1, most=1024
    )
    head_dim: int = field(64, "width of a row.", least=1)
    conv_width: int = field(4, "positions that the causal convolution sees, each the third before the next.", least=1)
    compress_tokens: bool = field(
        True,
        "tokens whose texts differ in case and surrounding white space only, and otherwise in what Unicode calls "
        "compatible (NFKC), are one token in n-grams. A run finds them when it begins, by `data.tokenizer`, or the "
        "tokenizer that the token store names, and keeps them with its parameters; without a tokenizer there are none.",
    )
    zero_init: bool = field(
        False,
        "start with a projection of 0, so that the model computes at first exactly what it does without Engram. It "
        "learns from there.",
    )
    one_row: bool = field(
        False,
        "a control: tables of one row, for all n-grams alike. What is better without it is due to the memory, not to "
        "the other parameters.",
    )

    @property
    def block_indices(self) -> tuple[int, ...]:
        """Indices of the blocks, in order."""
        return tuple(sorted(map(int, self.blocks.split(",")))) if self.blocks else ()


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network. Names are those of Hugging Face configurations where one exists."""

    vocab_size: int = field(
        257,
        "entries of the vocabulary; 257 is 256 bytes and BOS. Above `data.bos_id`, and not below the vocabulary of the "
        "token store.",
        least=1,
    )
    hidden_size: int = field(128, "width of the residual stream.", least=1)
    intermediate_size: int = field(352, "width of the slow MLPs.", least=1)
    num_hidden_layers: int = field(4, "blocks in all, prefix and suffix.", least=1)
    num_attention_heads: int = field(4, "query heads. Must divide `hidden_size` unless `head_dim` is set.", least=1)
    num_key_value_heads: int = field(
        0,
        "key and value heads, fewer than query heads in grouped-query attention; 0 = `num_attention_heads`. Must "
        "divide `num_attention_heads`.",
        least=1,
    )
    head_dim: int = field(0, "width of a head; 0 = `hidden_size / num_attention_heads`. Must be even.", least=1)
    sliding_window: int = field(
        0, "the window k, in positions that a token attends to, itself included; 0 = full attention.", least=0
    )
    attention_sinks: int = field(
        0,
        "first positions of a sequence that window attention sees beside its window, as if they stood just before it; "
        "models that were trained with full attention need a few.",
        least=0,
    )
    rope_theta: float = field(500_000.0, "base of the RoPE frequencies.", above=0)
    rope_style: str = field(
        "interleaved",
        'which channels of a head rotate together: adjacent pairs, or, with `"half"`, pairs half a head apart, as in '
        "Hugging Face weights.",
        choices=("interleaved", "half"),
    )
    rope_scaling_factor: float = field(
        0.0,
        "factor by which slow rotations are slowed down, for longer contexts, as in Llama 3.1; 0 = off.",
        least=0,
    )
    rope_low_freq_factor: float = field(
        1.0, "rotations that turn less often than this within `rope_original_positions` are slow.", above=0
    )
    rope_high_freq_factor: float = field(
        4.0,
        "those that turn more often than this stay as they are; those in between are interpolated. Above "
        "`rope_low_freq_factor`.",
        above=0,
    )
    rope_original_positions: int = field(8192, "length of the context before scaling.", least=1)
    rms_norm_eps: float = field(1e-6, "epsilon of every RMSNorm, QK-norm included.", above=0)
    initializer_range: float = field(0.02, "standard deviation of the normal that every matrix starts from.", least=0)
    tie_word_embeddings: bool = field(
        True, "the head is the transposed embedding; otherwise it is a matrix of its own."
    )
    attention_bias: bool = field(False, "queries, keys and values have biases.")
    qk_norm: bool = field(True, "RMSNorm over each query and key head, before RoPE.")
    post_norm: bool = field(
        True,
        "RMSNorm after attention and after each MLP, before the residual is added. (The one before them is always "
        "there.)",
    )
    num_fast_blocks: int = field(
        0,
        "the suffix: how many of the last blocks carry a fast MLP; 0 = no fast weights. At most `num_hidden_layers`. "
        "The paper takes a quarter.",
        least=0,
    )
    fast_intermediate_size: int = field(0, "width of the fast MLPs; 0 = `intermediate_size`.", least=1)
    fast_layer_scale: float = field(
        0.0,
        "initial value of a number, learned in each block, that multiplies the output of its fast MLP; 0 = none. A "
        "small one keeps inner steps small in a model that was not trained for them.",
        least=0,
    )
    compute_dtype: str = field(
        "float32",
        "dtype of the residual stream, matrix products and window caches. Norms, RoPE, logits and losses are computed "
        'in float32 whatever it is. `"float32"` means products in float32 on accelerators, too, not in TF32 or '
        "bfloat16, and is slow there.",
        choices=DTYPES,
    )
    param_dtype: str = field(
        "float32",
        "dtype that parameters are stored in. Fast weights are float32 (or wider) while they change.",
        choices=DTYPES,
    )
    attention_backend: str = field(
        "auto",
        'who computes attention. `"auto"`: on CPUs `xla`, on an accelerator [the fastest one that is found '
        "correct there](kernels.md#backends). `cudnn` and `splash` serve passes that are differentiated once, such as "
        'the prefix; for the others, `"auto"` chooses.',
        choices=ATTENTION_BACKENDS,
        resume=FREE,
    )
    mixer: str = field(
        "",
        "the mixer of each block, as a comma-separated pattern that is repeated over the blocks, such as "
        '`"window,window,attention"`; empty = the same in all, by `sliding_window`. `window` is window attention and '
        "needs `sliding_window` above 0; `attention` is full attention. The pattern's length must divide "
        "`num_hidden_layers`.",
    )

    engram: EngramConfig = EngramConfig()

    # Fields of mixers that have some of their own, as (name of the mixer, its section): `config.model.NAME.FIELD`.
    mixer_sections: tuple[tuple[str, object], ...] = ()

    @property
    def num_prefix_blocks(self) -> int:
        """Number of blocks without a fast MLP."""
        return self.num_hidden_layers - self.num_fast_blocks

    def section(self, mixer: str):
        """The fields that a mixer declared for itself."""
        return dict(self.mixer_sections)[mixer]

    @property
    def mixers(self) -> tuple[str, ...]:
        """Kind of mixer of each block of the pattern, which repeats over the blocks."""
        return tuple(self.mixer.split(",")) if self.mixer else ("window" if self.sliding_window else "attention",)

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows of the pattern's mixers that have one."""
        return tuple(self.sliding_window for name in self.mixers if name == "window")


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop: one SGD step on the fast weights per mini-batch of the text being read.

    Models without fast weights use `mini_batch_size` only, as the unit of which a sequence's loss is the mean.
    """

    mini_batch_size: int = field(128, "b, in tokens. Must divide `train.seq_len`.", least=1)
    learning_rate: float = field(1.0, "the inner learning rate η. 0 reads without learning.", least=0)
    clip_norm: float = field(
        1.0,
        "the inner gradient is scaled down to this norm, taken over all fast weights of a sequence; 0 = off.",
        least=0,
    )
    warmup_steps: int = field(
        0,
        "outer steps over which η rises linearly from `warmup_init` to `learning_rate`; 0 = off. It affects training "
        "only: evaluation, in the loop too, uses the full η.",
        least=0,
        resume=LOGGED,
    )
    warmup_init: float = field(0.1, "η at the beginning of that warm-up.", least=0, resume=LOGGED)
    gradient: str = field(
        "exact",
        'how the meta-gradient is computed. `"exact"`: through every inner step, by a reverse pass of its own that '
        'holds the residuals of one mini-batch at a time. `"reference"`: the same gradient by plain autodiff; slower, '
        'for tests; `trajectory` and `remat` do not apply. `"first_order"`: the inner updates count as constants; '
        "cheaper, and not the gradient of the loss.",
        choices=GRADIENTS,
    )
    trajectory: str = field(
        "auto",
        'what the backward pass rebuilds the fast weights W_i from. `"store"`: all are kept, in float32. `"delta"`: '
        "every update is kept, rounded to bfloat16, at half the memory; reading applies the rounded update, in "
        'evaluation too. `"segment"`: every `segment_length`-th W_i is kept, and those in between are computed again. '
        '`"auto"`: see `memory_budget_bytes`.',
        choices=TRAJECTORIES,
        resume=LOGGED,  # "delta" rounds updates
    )
    segment_length: int = field(
        0,
        'mini-batches of a segment, for the trajectory `"segment"`. A divisor of the number of mini-batches of a '
        "sequence; 0 = the one nearest to its square root.",
        least=0,
        resume=FREE,
    )
    remat: str = field(
        "auto",
        'what the backward pass computes again (rematerialisation). `"keep"`: no matrix product and no attention, in '
        'suffix and prefix. `"mini_batch"`: the forward pass of a mini-batch; in the prefix, of a block. `"block"`: '
        'also each block within the mini-batch, for less memory and more time. `"auto"`: see `memory_budget_bytes`.',
        choices=REMATS,
        resume=FREE,
    )
    memory_budget_bytes: int = field(
        0,
        'bytes of a device that the temporaries of a training step may take. With `"auto"`, the fastest pair of '
        "`trajectory` and `remat` whose estimate fits is taken, and logged; if none fits, the smallest. The "
        'estimate counts the residuals that a device saves for the backward pass. `"delta"` rounds, and so `"auto"` '
        "never takes it. 0 = what the device reports to have, on CPU half of the machine's memory, less "
        "parameters, their gradients and AdamW's moments. The choice is in `starts.jsonl`, too.",
        least=0,
        most=2**63 - 1,
        resume=FREE,
    )
    truncate: int = field(
        0,
        "truncates the meta-gradient: mini-batches are taken in groups of this many, and it does not flow back through "
        "the fast weights from one group to the one before; 0 = no truncation.",
        least=0,
    )


@dataclass(frozen=True)
class TrainConfig:
    """The outer loop."""

    seq_len: int = field(
        1024,
        "T, tokens of a sequence. A multiple of `inner.mini_batch_size`. Evaluation reads sequences of this length, "
        "too.",
        least=1,
    )
    global_batch_size: int = field(
        8,
        "sequences of an outer step, over all devices and accumulation steps. A multiple of `accumulation_steps` times "
        "the size of the mesh axis `data`.",
        least=1,
    )
    accumulation_steps: int = field(
        1, "parts that a batch is read in, one after the other, to save memory.", least=1, resume=FREE
    )
    num_steps: int = field(100, "outer steps in all, those before a resume included.", least=1, resume=FREE)
    seed: int = field(0, "random seed of the initial parameters.", least=0, most=2**32 - 1)
    init_from: str = field(
        "",
        "checkpoint to take the initial parameters from, with a fresh optimizer, at step 0 and the beginning of the "
        "data; empty = fresh parameters. A step directory, a directory of steps (the newest is taken), or a run "
        "directory. Ignored where the run has a checkpoint of its own.",
        resume=LOGGED,
        is_path=True,
    )
    base: str = field(
        "",
        "run directory of the model that `init_from` was made of, such as a pretrained one: before the first step, "
        "held-out losses are compared with its own, and a difference of more than 0.05 nats ends the run; empty = no "
        "comparison.",
        resume=FREE,
        is_path=True,
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the outer loop, after a clip of the global norm, under a linear warm-up and cosine decay.

    Every parameter that is trained decays. Steps count from 0, so the first update has rate 0 where there is a warm-up.
    """

    name: str = field(
        "adamw",
        'the optimizer. `"adamw"`: AdamW with epsilon 1e-8. `"muon"`: Muon for the matrices of the '
        "blocks, fast MLPs included. The momentum of each block's matrix (decay 0.95, Nesterov) is orthogonalized by "
        "five Newton-Schulz steps, and scaled to a root mean square of 0.2, about that of AdamW's updates, so that the "
        "same `learning_rate` and `weight_decay` serve. Embedding, head and norms are left to AdamW.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = field(1e-3, "peak of the learning rate.", least=0, resume=LOGGED)
    end_learning_rate: float = field(1e-5, "learning rate after the decay.", least=0, resume=LOGGED)
    warmup_steps: int = field(10, "steps from rate 0 to the peak. Below `decay_steps`.", least=0, resume=LOGGED)
    decay_steps: int = field(
        0, "length of the schedule, warm-up included; 0 = `train.num_steps`.", least=1, resume=LOGGED
    )
    b1: float = field(0.9, 'decay of AdamW\'s first moment. Under `"muon"` of what is left to AdamW.', least=0, below=1)
    b2: float = field(0.95, "decay of its second moment, likewise.", least=0, below=1)
    weight_decay: float = field(0.1, "decoupled weight decay; it is multiplied by the learning rate.", least=0)
    clip_norm: float = field(
        1.0, "largest global norm of the meta-gradient, over all trained parameters; 0 = off.", least=0
    )
    fast_rate: float = field(
        1.0,
        "factor on the learning rate of fast MLPs, their norms and scales. Above 1 where they are new in a model that "
        "was trained before.",
        above=0,
        resume=LOGGED,
    )
    train_only: str = field(
        "",
        "regular expression, searched for in the names of the parameters, such as `slow.prefix.attention.wq`; what "
        "does not match stays as it is. Empty = train all. Must match at least one.",
    )


@dataclass(frozen=True)
class DataConfig:
    """The token store, and the order in which it is read."""

    path: str = field(
        "",
        "the token store: a directory made by `prepare`, or a `gs://` or `s3://` URL. Or a mixture of several with one "
        'tokenizer, `"a:0.7,b:0.3"`: of 10 sequences, 7 are from a. Needed.',
        resume=FREE,
        is_path=True,
    )  # the token store's fingerprint is in the checkpoint
    train_split: str = field("train", "split to train on.", resume=FREE)  # so is that of the split
    eval_split: str = field("val", "split to evaluate on.", resume=LOGGED)
    tokenizer: str = field(
        "",
        '`"bytes"`, a SentencePiece `.model` file or a `tokenizer.json`; empty = as the token store records. '
        "Training and evaluation work on tokens and do not read it.",
        resume=FREE,  # compared with the token store
        is_path=True,
    )
    bos_id: int = field(
        0,
        "the BOS token. Targets equal to it are masked: they count in no loss; 0 = mask none. Below "
        "`model.vocab_size`, and the one that the token store records, if it records one.",
        least=0,
    )
    bos_is_zero: bool = field(
        False,
        "whether the BOS token is token 0, as in some models of Hugging Face: then targets equal to it are masked. "
        "`bos_id` cannot say that, as its 0 = mask none.",
    )
    shuffle: bool = field(
        True, "read the sequences in a random order, another one each epoch. Otherwise in the store's order."
    )
    seed: int = field(0, "random seed of that order.", least=0, most=2**32 - 1)
    num_workers: int = field(0, "processes that read ahead; 0 = threads only.", least=0, resume=FREE)

    @property
    def masked_id(self) -> int:
        """The token that losses mask, as `is_target` (data/masking.py) takes it: 0 = none, -1 = token 0."""
        return -1 if self.bos_is_zero else self.bos_id


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh.

    Parameters and optimizer state are sharded over both axes, sequences over `data`, the matrices of a sequence's fast
    weights over `model`.
    """

    data: int = field(
        0,
        "devices along the axis `data`; 0 = all that `model` leaves. `train.global_batch_size` (per accumulation step) "
        "and `eval.batch_size` must be multiples of it.",
        least=0,
        resume=FREE,
    )
    model: int = field(
        1,
        "devices along the axis `model`, for tensor parallelism. The product of the two must not exceed the devices "
        "there are. Key/value heads that it does not divide evenly are computed by all of its devices alike.",
        least=1,
        resume=FREE,
    )
    prefix: str = field(
        "auto",
        'what the axis `model` divides in the prefix. `"matrices"`: heads and MLP width; every device has all '
        'positions. `"sequence"`: the positions, and every device fetches the matrices of one block at a time; '
        '`train.seq_len` must be a multiple of `model`. `"auto"`: what makes devices receive less, which is logged; '
        "matrices where `model` does not divide `train.seq_len`.",
        choices=PREFIXES,
        resume=FREE,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep. Saving runs in the background; a step that is listed is complete."""

    every_steps: int = field(
        100,
        "outer steps from one checkpoint to the next; 0 = only at the end. The last step is always saved.",
        least=0,
        resume=FREE,
    )
    keep: int = field(2, "number of the newest checkpoints that are kept.", least=1, resume=FREE)
    keep_every: int = field(
        0, "checkpoints at steps that are multiples of it are never deleted; 0 = off.", least=0, resume=FREE
    )


@dataclass(frozen=True)
class LogConfig:
    """Metrics and profiles. `metrics.jsonl` is always written, the others if they are asked for."""

    every_steps: int = field(
        10,
        "outer steps from one line to the next; the first and the last step are always written.",
        least=1,
        resume=FREE,
    )
    profile_steps: int = field(
        0, "steps to capture a profile of, after the first ten, into `logs/profile`; 0 = off.", least=0, resume=FREE
    )
    slow_step_factor: float = field(
        5.0,
        "a step that takes more than this many times the median step, and more than ten seconds, is logged, [with "
        "what held it up](launching.md#where-the-time-goes); 0 = off.",
        least=0,
        resume=FREE,
    )
    tensorboard: bool = field(
        False, "copy the metrics into `logs/` for TensorBoard (extra `tensorboard`).", resume=FREE
    )
    wandb: str = field(
        "", "copy the metrics to this Weights & Biases project (extra `wandb`); empty = off.", resume=FREE
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text, in the loop and by the command `evaluate`."""

    every_steps: int = field(
        0,
        "outer steps from one evaluation in the loop to the next, and after the last step; 0 = only by the command.",
        least=0,
        resume=FREE,
    )
    num_sequences: int = field(
        0,
        "how many sequences to read, the first of the split; 0 = all. Where there are fewer, those.",
        least=0,
        resume=LOGGED,
    )
    batch_size: int = field(8, "sequences read at once. A multiple of the mesh axis `data`.", least=1, resume=FREE)


@dataclass(frozen=True)
class Config:
    """A validated run configuration."""

    model: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
