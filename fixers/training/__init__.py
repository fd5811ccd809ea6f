"""Training: the loop, keeping the best weights, ensembles, tuning on failures."""

from fixers.training.loop import LossFunction, micro_batches, summed_loss, train

__all__ = ["LossFunction", "micro_batches", "summed_loss", "train"]
