"""Train models: one small loop shared by the zoo's recipes and the training methods."""

from repro.training.loop import Hook, Progress, TrainingConfig, train

__all__ = ["Hook", "Progress", "TrainingConfig", "train"]
