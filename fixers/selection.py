"""The choice on valid among an approach's candidates: whether the original is one of them, and what goes in a tie."""

import math


class Choice:
    """The best candidate on valid so far.

    Three rules are the same for every approach that chooses on valid:

    - In a tie with the original a repair is taken, for the original repairs nothing.
    - A candidate that fixes no failure and is exactly as accurate on valid as the original is the original in disguise,
      and is never taken.
    - Without the original among the candidates the best repair is taken, even one that is less accurate; the original
      is left only where no candidate changes anything. That is how the study chose: its rows lose accuracy.

    Args:
        accuracy: of the original on valid.
        original: whether the original is a candidate.
    """

    def __init__(self, accuracy: float, *, original: bool) -> None:
        self._accuracy = accuracy
        self._best = (accuracy if original else -math.inf, -math.inf)
        self.original_kept = True
        """Whether no candidate has been taken; belongs into the notes of the fix."""

    def offer(self, accuracy: float, *, fixed: float, tie: float) -> bool:
        """Take a candidate if it is better than all before.

        Args:
            accuracy: on valid.
            fixed: failures of the repair split that it gets right, a number or a share.
            tie: the larger one decides between candidates of the same accuracy; if that is equal, too, the earlier
                candidate stays.

        Returns:
            Whether it is the best now.
        """
        disguised = fixed == 0 and accuracy == self._accuracy
        better = not disguised and (accuracy, tie) > self._best
        if better:
            self._best, self.original_kept = (accuracy, tie), False
        return better
