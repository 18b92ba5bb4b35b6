"""Failures of one process are those of all."""

import pytest

from ttt_e2e.cluster import agreement


def test_a_failure_anywhere_is_one_of_all(monkeypatch):
    asked = []
    monkeypatch.setattr(agreement, "any_process", lambda mine: asked.append(mine) or True)
    with pytest.raises(KeyError, match="mine"), agreement.fail_together(KeyError, "elsewhere"):
        raise KeyError("mine")
    with pytest.raises(KeyError, match="elsewhere"), agreement.fail_together(KeyError, "elsewhere"):
        pass
    # Any other exception is this process's own: the others are not asked.
    with pytest.raises(ValueError), agreement.fail_together(KeyError, "elsewhere"):
        raise ValueError
    assert asked == [True, False]
