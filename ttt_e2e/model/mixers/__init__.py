"""Sequence mixers, one in each file, which has the name that `config.model.mixer` asks for."""

from ttt_e2e.model.mixers.base import Context, Mixer, make_mixer, register

__all__ = ["Context", "Mixer", "make_mixer", "register"]
