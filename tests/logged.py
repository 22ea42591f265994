"""What fastdiff logs, as warnings: pytest expects, forbids and ignores those by their text."""

import logging
import warnings


class AsWarning(logging.Handler):
    """Warns of each entry where it is logged; a filter of warnings may turn that into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        warnings.warn(record.getMessage(), RuntimeWarning, stacklevel=2)


def as_warnings() -> None:
    """Have the logger "fastdiff" warn in this process."""
    logging.getLogger("fastdiff").addHandler(AsWarning())
