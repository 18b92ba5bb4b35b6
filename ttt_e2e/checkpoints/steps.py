"""Finds the steps of a directory of checkpoints."""

from etils import epath

from ttt_e2e.errors import UserError
from ttt_e2e.paths import absolute


def saved_steps(directory) -> list[int]:
    """The steps in a directory of checkpoints that were saved whole, ascending; [] if it does not exist.

    Orbax marks them: on a local disk it renames a step when all is written, in a bucket it adds a file to it.
    """
    if not epath.Path(directory).is_dir():
        return []
    import orbax.checkpoint as ocp  # slow to import, and a launcher without any run need not wait for it

    return sorted(step.step for step in ocp.path.step.standard_name_format().find_all(directory))


def is_whole(path) -> bool:
    """Whether Orbax finished what it saved in this directory."""
    import orbax.checkpoint as ocp

    return ocp.path.step.is_path_finalized(absolute(path))


def find_step(path) -> epath.Path:
    """The step directory that a user's path refers to: itself, or the newest step in it, or in its `checkpoints`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = absolute(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / "params").is_dir() and is_whole(path):
        return path
    for directory in (path, path / "checkpoints"):
        if steps := saved_steps(directory):
            return directory / str(steps[-1])
    raise UserError(f"checkpoint {path} holds no complete step: expected a directory with `params`, or of such ones")
