"""FSGMix: mix training images under the guidance of a few failures, and fine-tune on the mixes."""

from fixers.model_level.fsgmix.fsgmix import FSGMix

__all__ = ["FSGMix"]
