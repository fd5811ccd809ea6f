"""Sweeps of hyper-parameters on valid, and the choice they lead to."""
