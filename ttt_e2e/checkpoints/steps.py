"""Which steps a directory holds checkpoints of."""

from etils import epath

from ttt_e2e.errors import UserError


def saved_steps(directory) -> list[int]:
    """The steps of a directory of checkpoints that were saved whole, in their order; none where it does not exist.

    Orbax says which: on a local disk it renames a step when all is written, in a bucket it adds a file to it.
    """
    if not epath.Path(directory).is_dir():
        return []
    import orbax.checkpoint as ocp  # slow to import, which a launcher that finds no run need not wait for

    return sorted(step.step for step in ocp.path.step.standard_name_format().find_all(directory))


def find_step(path) -> epath.Path:
    """The step directory that a user's path means: itself, the newest step below it, or below its `checkpoints`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = epath.Path(path).resolve()
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / "params").is_dir():
        return path
    for directory in (path, path / "checkpoints"):
        if steps := saved_steps(directory):
            return directory / str(steps[-1])
    raise UserError(f"checkpoint {path} holds no complete step: expected a directory with `params`, or of such ones")
