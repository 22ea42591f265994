"""What a comparison times of kernels, in the interpreter of either state; see `worker`."""

from typing import Any


class Suite:
    """Each kernel's cases from real models, with the implementation that the device uses."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from fastdiff.bench import kernels

        self.kernels = kernels
        self.dtype = getattr(torch, settings["dtype"])
        self.device = torch.device(settings["device"])
        self.cases = {
            name: (kernel, case)
            for kernel, case in kernels.cases(settings["device"])
            # the name includes the sizes, so changed sizes make another row
            if settings["filter"] in (name := f"{kernel.spec.name} · {case!r}")
        }
        self.runners: list[Any] = []

    def start(self) -> dict[str, Any]:
        self.runners = [
            self.kernels.runner(*self.arguments(kernel, case))
            for kernel, case in self.cases.values()
        ]
        return {"groups": [[name] for name in self.cases], "once": {}}

    def run(self, group: int) -> dict[str, float]:
        return {list(self.cases)[group]: self.runners[group]()}

    def check(self) -> dict[str, str]:
        """The cases that exceed the error budget."""
        wrong = {}
        for name, (kernel, case) in self.cases.items():
            try:
                self.kernels.check(*self.arguments(kernel, case))
            except self.kernels.OutOfBudget as error:
                wrong[name] = str(error)
        return wrong

    def count(self) -> dict[str, tuple[float, str]]:
        return {}

    def arguments(self, kernel: Any, case: Any) -> tuple[Any, ...]:
        return kernel, case, self.dtype, self.device, self.kernels.chosen(kernel, self.device)
