"""What the training loop says of its steps."""

import time

import jax
from tqdm import tqdm

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.outer.metrics import MetricsWriter, first_not_finite, model_flops_per_token, peak_flops


class StepLog:
    """What the loop says of its steps: metrics on disk, a progress bar, a profile when asked; only process 0 does."""

    def __init__(self, config: Config, workdir, first_step: int):
        self._config, self._workdir, self._first_step = config, workdir, first_step
        self._tokens = config.train.global_batch_size * config.train.seq_len
        self._flops = model_flops_per_token(config) * self._tokens
        is_main = jax.process_index() == 0
        self._writer = MetricsWriter(workdir, config, first_step) if is_main else None
        self._bar = tqdm(
            total=config.train.num_steps, initial=first_step, desc="train", unit="step", disable=not is_main
        )
        self._profiling = False
        self._start = time.perf_counter()
        self.last: dict = {}

    def finish_step(self, step: int, device_metrics: dict) -> None:
        """Waits for a step's metrics, checks and logs them.

        Raises:
          UserError: one is NaN or infinite; the message names it and the step.
        """
        self.last = {name: float(value) for name, value in device_metrics.items()}
        bad = first_not_finite(self.last)
        self.last |= self._rates()
        if bad or step % self._config.log.every_steps == 0 or step in (1, self._config.train.num_steps):
            self.write(step, self.last)
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

    def restart_clock(self) -> None:
        """Leaves what has happened since the last step out of the next one's time."""
        self._start = time.perf_counter()

    def profile(self, step: int) -> None:
        """Captures `log.profile_steps` steps into `logs/profile`, after ten that compile and warm up."""
        begin = self._first_step + 11
        if self._config.log.profile_steps and step == begin:
            jax.profiler.start_trace(str(self._workdir / "logs" / "profile"))
            self._profiling = True
        elif self._profiling and step == begin + self._config.log.profile_steps:
            jax.profiler.stop_trace()
            self._profiling = False

    def close(self) -> None:
        """Ends the bar, the files and a profile under way."""
        if self._profiling:
            jax.profiler.stop_trace()
        self._bar.close()
        if self._writer:
            self._writer.close()

    def _rates(self) -> dict:
        """Tokens and model FLOPs a second, and their share of the devices' peak (None where that is not known)."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        flops, peak = self._flops / seconds, peak_flops()
        return {
            "tokens_per_second": self._tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / peak if peak else None,
        }
