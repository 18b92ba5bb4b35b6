"""The training loop: setup, then one step after another, with evaluations, saves and preemption between them."""

import logging
import time
from contextlib import ExitStack, closing

import jax
import numpy as np
from etils import epath
from tqdm.contrib.logging import logging_redirect_tqdm

from ttt_e2e.checkpoints.manager import Checkpoints
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.checkpoints.progress import check_position, progress_of
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.cluster.agreement import Exchange
from ttt_e2e.cluster.mesh import local_rows, make_mesh, shardings, with_shardings
from ttt_e2e.cluster.signals import watch_for_preemption
from ttt_e2e.config import Config
from ttt_e2e.data.pipeline import training_batches
from ttt_e2e.errors import PreemptedError
from ttt_e2e.kernels.attention import choice
from ttt_e2e.model import abstract_model
from ttt_e2e.runs import directory as run_directory
from ttt_e2e.runs.data_record import check_tokenizer, find_data_record, write_data_record
from ttt_e2e.runs.lock import lock_run
from ttt_e2e.train.batches import check_batch, find_alike_tokens, held_out_loss, open_held_out, open_store, to_device
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.policies import check_tables
from ttt_e2e.train.start_check import check_start
from ttt_e2e.train.step_log import StepLog
from ttt_e2e.train.steps import TrainState, init_state, make_eval_step, make_train_step, take_policies

logger = logging.getLogger(__name__)


def train(config: Config, workdir, overrides: list[str] = ()) -> dict:
    """Trains to `config.train.num_steps`, resuming where the run directory left off; returns the last metrics.

    overrides: the command-line overrides that made the config from its file; they are recorded, not applied.

    However the run ends, a save under way is finished and the files are closed. On SIGTERM, SIGUSR1 or Ctrl-C (SIGINT)
    to any process, all processes agree on a step, save it and stop. A signal during an evaluation abandons it; the
    evaluation is made up for when the run is resumed.

    Raises:
      UserError: data, mesh, checkpoint or run directory do not fit the config; another run trains in that directory;
        the initial parameters lost what those of `train.base` have; a metric became NaN or infinite; a save failed.
      PreemptedError: SIGTERM or SIGUSR1 asked to stop, or any signal to another process.
      KeyboardInterrupt: Ctrl-C asked to stop.
    """
    with ExitStack() as stack:
        return _train(config, epath.Path(workdir), list(overrides), stack)


def _train(
    config: Config, workdir: epath.Path, overrides: list[str], stack: ExitStack
) -> dict:  # long: one straight loop
    # ---------------------------------------------------------------- set up
    batch_size, num_steps, started = config.train.global_batch_size, config.train.num_steps, time.time()
    mesh = make_mesh(config.mesh)
    choice.check(config.model)
    check_batch("config.train.global_batch_size", batch_size, mesh, config.train.accumulation_steps)
    check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    is_resumed = bool(saved_steps(workdir / "checkpoints"))
    train_store = open_store(config, config.data.train_split, workdir if is_resumed else "")
    eval_store = open_held_out(config, mesh) if config.eval.every_steps else None
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model, mesh)
    check_tables(config, mesh)
    if not is_resumed:
        for field in ("init_from", "base"):
            record = find_data_record(getattr(config.train, field))
            check_tokenizer(record, train_store, f"the run of config.train.{field}")
    tokenizer = train_store.tokenizer_spec or config.data.tokenizer
    alike_V = None if is_resumed or config.train.init_from else find_alike_tokens(config, tokenizer)
    run_directory.refuse_secrets(config)  # before the lock makes the directory
    preemption = stack.enter_context(watch_for_preemption())
    stack.enter_context(lock_run(workdir))
    run_directory.check(workdir, config)
    policies = take_policies(config, mesh)
    checkpoints = stack.enter_context(closing(Checkpoints(workdir / "checkpoints", config.checkpoint)))
    state, progress = restore_or_init(config, optimizer, mesh, checkpoints, train_store.fingerprint, alike_V)
    if config.train.base and not progress:
        check_start(config, state.params, mesh)
    first_step, next_batch = int(state.step), progress.get("next_batch", 0)
    owes_evaluation = bool(eval_store and progress.get("owes_evaluation"))
    if first_step < num_steps or owes_evaluation:  # otherwise, nothing is done with this config
        run_directory.claim(workdir, config)
        write_data_record(workdir, config, tokenizer)
    run_directory.record_start(workdir, overrides, policies.record(), started)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = make_train_step(config, optimizer, mesh, state_shardings, policies)
    eval_step = make_eval_step(config, mesh, state_shardings.params)
    choose_attention(config, train_step, eval_step, state)
    batches = training_batches(
        train_store,
        seq_len=config.train.seq_len,
        global_batch_size=batch_size,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        start_batch=next_batch,
        rows=local_rows(mesh, batch_size),
        vocab_size=config.model.vocab_size,
        num_workers=config.data.num_workers,
    )
    stack.enter_context(closing(batches))
    productive, first_started = progress.get("productive_seconds", 0.0), run_directory.first_start(workdir)
    log = stack.enter_context(closing(StepLog(config, workdir, first_step, productive, first_started)))
    phases, exchange = log.phases, Exchange()
    stack.enter_context(logging_redirect_tqdm())  # log lines are printed above the progress bar

    def read(tokens, num_sequences):
        return eval_step(state.params, tokens, config.inner.learning_rate, num_sequences)

    def evaluate(step: int) -> bool:
        """Evaluates and writes the losses; returns whether it was finished, not preempted."""
        try:
            with phases.during("evaluate"):
                held_out = held_out_loss(read, eval_store, config, mesh, stop=preemption.poll)
        except PreemptedError:
            return False
        log.restart_clock()
        log.write(step, {"eval_loss": held_out.loss, "eval_token_loss": held_out.token_loss})
        return True

    def finish(step: int, device_metrics: dict, reports) -> bool:
        """Waits for a step and logs it; returns whether any process was asked to stop by then.

        reports: [P, 1 + F], of each process whether it was asked to stop, and its seconds in each phase.
        """
        reports_P = np.asarray(reports)
        log.finish_step(step, device_metrics, reports_P[:, 1:])
        return bool(reports_P[:, 0].any())

    def stopped(step: int) -> BaseException:
        where = f"step {step} is saved in {checkpoints.directory}"
        return preemption.stopped(where if step else "before the first step")

    stop_now = preemption.poll() and first_step < num_steps
    if stop_now or (owes_evaluation and not evaluate(first_step)):
        raise stopped(first_step)
    log.restart_clock()

    # ---------------------------------------------------------------- the loop
    pending, stop = None, False  # pending: arguments of `finish` for a step that the device may still work on
    for step in range(first_step + 1, num_steps + 1):
        log.profile(step)
        with phases.during("input"):
            tokens = to_device(next(batches), mesh, batch_size)
        state, device_metrics = train_step(state, tokens)
        reports = exchange([preemption.requested.is_set(), *phases.take()])

        # The host waits for the step before this one, so that the device always has a step to work on.
        if pending:
            stop = finish(*pending)
        pending = (step, device_metrics, reports)

        evaluate_now = eval_store and (_is_due(step, config.eval.every_steps) or step == num_steps)
        save = stop or _is_due(step, config.checkpoint.every_steps) or step == num_steps
        if save or evaluate_now:
            stop, pending = finish(*pending) or stop, None
        owes_evaluation = evaluate_now and (stop or not evaluate(step))
        stop = stop or owes_evaluation
        if save or stop:
            more = {"data": train_store.fingerprint, "productive_seconds": log.productive_seconds}
            more |= {"owes_evaluation": True} if owes_evaluation else {}
            with phases.during("save"):
                progress = progress_of(step, next_batch + step - first_step, config, **more)
                log.flush()
                checkpoints.save(state, progress, wait=stop or step == num_steps)
        if stop and (step < num_steps or owes_evaluation):
            raise stopped(step)
        if save or evaluate_now:
            log.restart_clock()

    return log.last


def restore_or_init(
    config: Config, optimizer, mesh, checkpoints: Checkpoints, fingerprint: str, alike_V: np.ndarray | None
) -> tuple[TrainState, dict]:
    """Makes the state to start from, sharded, and the progress that its checkpoint recorded, {} without a checkpoint.

    The first that there is: 1. the run's own newest checkpoint, 2. the parameters of `train.init_from` with a fresh
    optimizer, 3. fresh parameters, and for Engram the tokens that are alike (`find_alike_tokens`).
    """
    abstract = jax.eval_shape(lambda: init_state(config, optimizer))
    state_shardings = shardings(abstract, mesh, config.model)
    abstract = with_shardings(abstract, state_shardings)
    if newest := checkpoints.restore_newest(abstract):
        state, progress = newest
        logger.info("resuming from step %d of %s", progress["step"], checkpoints.directory)
        check_position(progress, config, fingerprint)
        return state, progress
    state = jax.jit(lambda: init_state(config, optimizer, alike_V), out_shardings=state_shardings)()
    if config.train.init_from:
        logger.info("taking the initial parameters from %s", config.train.init_from)
        state = state._replace(params=load_params(config.train.init_from, abstract.params))
    return state, {}


def choose_attention(config: Config, train_step, eval_step, state: TrainState) -> None:
    """On an accelerator, checks and times the backends of window attention for the shapes of both steps."""

    def trace():
        batches = (config.train.global_batch_size, config.eval.batch_size)
        train_tokens, eval_tokens = (jax.ShapeDtypeStruct((B, config.train.seq_len + 1), np.int32) for B in batches)
        jax.eval_shape(train_step, state, train_tokens)
        if config.eval.every_steps:
            jax.eval_shape(eval_step, state.params, eval_tokens, config.inner.learning_rate, 0)

    choice.measure(trace)


def _is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 = never."""
    return every > 0 and step % every == 0
