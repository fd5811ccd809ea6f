"""VeRe: bound what each neuron could do for the failures over intervals of its values, and refit the best one."""

from fixers.neuron_level.vere.vere import VeRe

__all__ = ["VeRe"]
