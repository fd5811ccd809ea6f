"""HybridRepair: few labels propagated to clusters of doubtful images, and consistency on images that are not."""

from fixers.model_level.hybridrepair.hybridrepair import HybridRepair

__all__ = ["HybridRepair"]
