"""What there is to predict, and what a row can be refused for."""

from __future__ import annotations

from dataclasses import dataclass

from peftune.data.examples import TargetKind


class RowFault(ValueError):
    """A row that cannot become an example: what is wrong, and the mend."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.message, self.mend = message, mend


@dataclass(frozen=True, slots=True)
class Targets:
    """What there is to predict: the kind of target, and the classes in the order of the model's outputs."""

    problem: str
    """single_label | multi_label | regression; bio | bioes; answer | answer_or_none; next_token; preference."""
    names: tuple[str, ...] = ()
    kind: TargetKind = "token"

    @property
    def width(self) -> int:
        """K, the number of outputs of a classifier or regressor; 0 for token targets without classes."""
        return 1 if self.problem == "regression" else len(self.names)
