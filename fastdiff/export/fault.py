"""The node at which a file departs from torch, and a sentence about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """The node that exceeds its budget most, on the inputs that it received.

    node, made_by: its name, and the operators that compute its output `value` in the file.
    expected_op: the operator that torch's exporter writes; torch_op, module: what it translates.
    together: torch_op becomes several nodes, each within its budget: either the exporter translates
    it wrongly or their errors add up; `node` is then the last of them.
    error, allowed: largest difference from float64, and its budget; got, expected: the two values
    at the largest difference, which is at `index` (NaN and () if the shapes differ).
    others: how many other operations of torch exceed their budget.
    """

    node: str
    value: str
    made_by: tuple[str, ...]
    expected_op: str
    torch_op: str
    module: str
    together: bool
    error: float
    allowed: float
    got: float
    expected: float
    index: tuple[int, ...]
    got_shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    others: int

    def __str__(self) -> str:
        made = " > ".join(self.made_by) or "nothing"
        instead = f", made by {made}" if self.made_by != (self.expected_op,) else ""
        whose = "with the nodes before it " if self.together else ""
        where = f"{self.expected_op} {self.node}{instead}: {whose}{self.torch_op} in {self.module}"
        if self.got_shape != self.expected_shape:
            shapes = f"{list(self.got_shape)}, expected {list(self.expected_shape)}"
            return f"{where}; {self.value} has the shape {shapes}"
        return (
            f"{where}; {self.value}{list(self.index)} is {self.got:.7g}, expected "
            f"{self.expected:.7g}, off by {self.error:.1e} of {self.allowed:.1e} allowed"
        )
