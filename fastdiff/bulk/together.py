"""The ranks of torchrun, for commands that draw."""

from dataclasses import replace

from fastdiff.bench.pipelines import check_device
from fastdiff.bulk.painter import Setup
from fastdiff.compiler.options import DATA, GUIDANCE, PARALLELS
from fastdiff.errors import UserError
from fastdiff.runtime import ranks
from fastdiff.runtime.ranks import Ranks


def joined(setup: Setup, parallel: str | None, otherwise: str) -> tuple[Setup, Ranks | None, str]:
    """Join the ranks that torchrun started.

    Args:
        parallel: --parallel.
        otherwise: its default.

    Returns:
        The setup on this rank's device, the ranks (None if there is only one process), and what
        they share.
    """
    if parallel not in (None, *PARALLELS):
        raise UserError(f"--parallel is {parallel!r}; choose {' or '.join(PARALLELS)}")
    shared = parallel or otherwise
    count = ranks.launched()
    if count == 1:
        if parallel is not None:
            raise UserError(
                f"--parallel {parallel} needs ranks; start them by torchrun --nproc-per-node 2 -m"
                " fastdiff generate and so on"
            )
        return setup, None, shared
    if shared == GUIDANCE and (setup.eager or count != 2):
        why = "--eager has none" if setup.eager else f"it has two halves; got {count} ranks"
        raise UserError(f"ranks cannot share guidance: {why}; give --parallel {DATA}")
    found, device = ranks.joined(check_device(setup.device))
    return replace(setup, device=device), found, shared
