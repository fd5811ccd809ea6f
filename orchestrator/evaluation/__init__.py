"""How good a fixed model is, and at what price: metrics on predictions, attacks, and the evaluation of a trial.

``metrics`` needs NumPy only; ``robustness`` and ``evaluate`` need torch. Nothing is imported here.
"""
