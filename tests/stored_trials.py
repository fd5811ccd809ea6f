"""Rows to store, and storage that fails on purpose."""

import numpy as np

from orchestrator.storage.patience import Patience

N_TEST = 50


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now, self.waits = 1000.0, []

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def patience(self, **options):
        return Patience(sleep=self.sleep, clock=lambda: self.now, **options)


def failing(*errors, result="done"):
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return result

    action.left = left
    return action


def write(store, number, **columns):
    trial_id = f"{number * 2654435761 % 2**32:08x}"
    labels = np.arange(N_TEST) % 10
    predictions = {"sample_id": np.arange(N_TEST), "label": labels, "group": [None] * N_TEST}
    predictions |= {"original": labels, "fixed": (labels + (np.arange(N_TEST) == number % N_TEST)) % 10}
    row = {"trial_id": trial_id, "outcome": "OK", "seed": number}
    row |= {"fixer": f"fixer{number % 4}", "subject": f"subject{number % 3}", **columns}
    store.write_trial(row, predictions, {"step": [1], "metric": ["loss"], "value": [0.5], "seconds": [0.1]})
    return trial_id


def left_over(store):
    return [path.name for path in store.local_path.rglob("*.tmp-*")]
