"""Certificates: the largest step from an original towards its fixed model that breaks at most a share of samples.

Learn then Test: A. Angelopoulos et al.: Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control.
arXiv:2110.01052; fixed-sequence testing on samples that nothing was trained or selected on.
"""

from fixers.certificates.certify import Budget, Calibration, Certificate, certify
from fixers.certificates.division import Division, divide
from fixers.certificates.ladders import LADDERS, RUNGS, Ladder, ladder_between
from fixers.certificates.risk_control import binomial_p, fewest_samples, hoeffding_bentkus_p, most_broken, passed

__all__ = [
    "LADDERS",
    "RUNGS",
    "Budget",
    "Calibration",
    "Certificate",
    "Division",
    "Ladder",
    "binomial_p",
    "certify",
    "divide",
    "fewest_samples",
    "hoeffding_bentkus_p",
    "ladder_between",
    "most_broken",
    "passed",
]
