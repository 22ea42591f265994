"""Turns fastdiff's log entries into warnings, which pytest can expect, forbid or ignore."""

import logging
import warnings


class AsWarning(logging.Handler):
    """Issues a warning for each log entry; a warnings filter may turn it into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        warnings.warn(record.getMessage(), RuntimeWarning, stacklevel=2)


def as_warnings() -> None:
    """Have the logger "fastdiff" warn in this process."""
    logging.getLogger("fastdiff").addHandler(AsWarning())
