"""The outer loop: the loop over steps, the compiled steps, optimizers, policies, batches.

The package can be called: `ttt_e2e.train(config, workdir)` trains, as the command `train` does.
"""

import os
import sys
from types import ModuleType


class _CallablePackage(ModuleType):
    """Gives this package the role of a function too: `ttt_e2e.train` could be only one of the two otherwise."""

    def __call__(self, config, workdir, overrides: dict | None = None, *, progress: bool = False) -> dict:
        """Trains to `train.num_steps`, resuming where the run directory left off; returns the last step's metrics.

        Args:
          config: what `ttt_e2e.load_config` takes: a config file such as "configs/quickstart.py:e2e", a ConfigDict, ...
          workdir: the run directory.
          overrides: config fields, as {"train.num_steps": 100}.
          progress: whether to show a progress bar on stderr.

        Returns:
          `loss`, `grad_norm`, `learning_rate`, ... of the last step as a dict; {} where there was no step left to do.

        Raises:
          UserError: the config is not legal, or does not fit data, devices or run directory; a metric became NaN.
          PreemptedError: SIGTERM or SIGUSR1 asked to stop; what was trained is saved.
        """
        from ttt_e2e.flags import as_arguments
        from ttt_e2e.progress import quietly
        from ttt_e2e.runs.configs import find_config
        from ttt_e2e.train.loop import train

        arguments = as_arguments(overrides)
        with quietly(progress=progress):
            return train(find_config(config, arguments), os.path.expanduser(workdir), arguments)


sys.modules[__name__].__class__ = _CallablePackage
