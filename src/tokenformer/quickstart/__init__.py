"""The main job in small: train, grow, train on, and compare with training from scratch at equal cost."""

from tokenformer.quickstart.job import quickstart, sweep

__all__ = ["quickstart", "sweep"]
