"""Logs the steps of the training loop."""

import logging
import time

import jax
import numpy as np
from tqdm import tqdm

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.progress import on_terminal, progress_bar
from ttt_e2e.runs.metrics import MetricsWriter, first_not_finite
from ttt_e2e.runs.watchdog import Phases, Watchdog, seconds_alone, seconds_in, seconds_of_step
from ttt_e2e.train.flops import model_flops_per_token, peak_flops

logger = logging.getLogger(__name__)


class StepLog:
    """Logs steps: metrics on disk and a progress bar, in process 0 alone; a profile, when asked for.

    Where stderr is no terminal, there is no bar, but a line for each line of metrics.

    productive_seconds: spent in steps before this start of the run, without steps that were lost and had to be
    repeated. begun: when the run was first started, in seconds since 1970.
    """

    def __init__(self, config: Config, workdir, first_step: int, productive_seconds: float, begun: float):
        self._config, self._workdir, self._first_step = config, workdir, first_step
        self._tokens = config.train.global_batch_size * config.train.seq_len
        self._flops = model_flops_per_token(config) * self._tokens
        is_main = jax.process_index() == 0
        self._writer = MetricsWriter(workdir, config, first_step) if is_main else None
        shown = {"total": config.train.num_steps, "initial": first_step, "desc": "train", "unit": "step"}
        self._bar = progress_bar(**shown, disable=not (is_main and on_terminal()))
        self._has_lines = is_main and not on_terminal()
        self._compiled = 0.0  # when the first step of this start was done
        self._profiling = False
        self._start = time.perf_counter()
        self._begun = begun
        # Seconds [P, F] that each process spent in each phase, of every step since the last line.
        self._since_written: list[np.ndarray] = []
        self.productive_seconds = productive_seconds
        self.phases = Phases()
        self._watchdog = Watchdog(self.phases, config.log.slow_step_factor)
        self.last: dict = {}

    def finish_step(self, step: int, device_metrics: dict, seconds_PF: np.ndarray) -> None:
        """Waits for a step's metrics, checks and logs them; `seconds_PF`: seconds of each process in each phase.

        Raises:
          UserError: one is NaN or infinite; the message names it and the step.
        """
        self.last = {name: float(value) for name, value in device_metrics.items()}
        bad = first_not_finite(self.last)
        self._watchdog.step_done(step, seconds_PF)
        self._since_written.append(seconds_PF)
        if step == self._first_step + 1:
            self._compiled = time.perf_counter()
        else:  # the first step after a start compiles, and is not productive
            self.productive_seconds += float(seconds_in(seconds_PF[jax.process_index()], "compute"))
        self.last |= self._rates() | self._time_use()
        if bad or step % self._config.log.every_steps == 0 or step in (1, self._config.train.num_steps):
            self.write(step, self.last)
            self._since_written = []
            if self._has_lines:
                logger.info("%s", self._line(step))
        self._bar.set_postfix_str(
            f"loss {self.last['loss']:.4f}, {self.last['tokens_per_second']:,.0f} tok/s, "
            f"{self.last['model_flops_per_second'] / 1e9:,.1f} GFLOP/s",
            refresh=False,
        )
        self._bar.update()
        if bad:
            raise UserError(
                f"{bad} is {self.last[bad]} at step {step}; training stopped, earlier checkpoints are whole"
            )

    def write(self, step: int, values: dict) -> None:
        """Writes the metrics of a step."""
        if self._writer:
            self._writer.write(step, values)

    def flush(self) -> None:
        """Returns when all metrics are in the file, which a checkpoint that is saved next shall not be ahead of."""
        if self._writer:
            self._writer.flush()

    def restart_clock(self) -> None:
        """Restarts the clock, so that the next step's time leaves out what came before it (a save, an evaluation)."""
        self._start = time.perf_counter()
        self._watchdog.restart()

    def profile(self, step: int) -> None:
        """Profiles `log.profile_steps` steps into `logs/profile`, after ten steps of compiling and warming up."""
        begin = self._first_step + 11
        if self._config.log.profile_steps and step == begin:
            jax.profiler.start_trace(str(self._workdir / "logs" / "profile"))
            self._profiling = True
        elif self._profiling and step == begin + self._config.log.profile_steps:
            jax.profiler.stop_trace()
            self._profiling = False

    def close(self) -> None:
        """Closes the watchdog, the progress bar, the files, and a profile under way."""
        self._watchdog.close()
        if self._profiling:
            jax.profiler.stop_trace()
        self._bar.close()
        if self._writer:
            self._writer.close()

    def _line(self, step: int) -> str:
        """The line of a step, with an estimate of the time left from the steps of this start, evaluations included."""
        last, left = self.last, "unknown time"
        if done := step - self._first_step - 1:  # since the first, which compiles
            seconds = (time.perf_counter() - self._compiled) / done
            left = tqdm.format_interval(seconds * (self._config.train.num_steps - step))
        mfu = f"{last['mfu']:.1%}" if last["mfu"] else f"unknown ({last['model_flops_per_second'] / 1e9:,.1f} GFLOP/s)"
        return (
            f"step {step} of {self._config.train.num_steps}: loss {last['loss']:.4f}, "
            f"{last['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, {left} left"
        )

    def _rates(self) -> dict:
        """Computes tokens and model FLOPs a second, and the share of the devices' peak (None where it is unknown)."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        flops, peak = self._flops / seconds, peak_flops()
        return {
            "tokens_per_second": self._tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / peak if peak else None,
        }

    def _time_use(self) -> dict:
        """Computes where time went: goodput of the whole run, and two measures of the steps since the last line.

        `data_wait_share`: share of the steps' time that the worst process waited for data. `host_spread_seconds`: mean
        difference between the slowest and the fastest process in the work that waits for no device: input and saves.
        """
        seconds_SPF = np.stack(self._since_written)
        alone_SP = seconds_alone(seconds_SPF)
        wait_P = seconds_in(seconds_SPF, "input").sum(axis=0) / seconds_of_step(seconds_SPF).sum(axis=0)
        return {
            "goodput": self.productive_seconds / (time.time() - self._begun),
            "data_wait_share": float(wait_P.max()),
            "host_spread_seconds": float((alone_SP.max(axis=1) - alone_SP.min(axis=1)).mean()),
        }
