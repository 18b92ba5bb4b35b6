"""Sequence mixers: one file each, named as `config.model.mixer` names it."""

from ttt_e2e.model.mixers.base import Context, Mixer, make_mixer, register

__all__ = ["Context", "Mixer", "make_mixer", "register"]
