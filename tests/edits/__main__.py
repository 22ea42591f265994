"""`python -m edits [WORD …]` applies each edit whose id contains one of the words, once after and
once before compile; `python -m edits random [COUNT]` applies random sequences. It prints faults."""

import logging
import sys
import time

from edits import TABLE
from edits.sequences import alone, drawn_at_random, first_fault


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


logging.getLogger("fastdiff").setLevel(logging.ERROR)  # hides warnings of eager parts
words = sys.argv[1:]
if words[:1] == ["random"]:
    sequences = [drawn_at_random(number) for number in range(int((words[1:] or ["300"])[0]))]
else:
    chosen = [e for e in TABLE.values() if not words or any(word in e.id for word in words)]
    sequences = [alone(edit, when) for when in (0, 1) for edit in chosen]
began, faults = time.time(), 0
for sequence in sequences:
    found = first_fault(sequence)
    if found:
        faults += 1
        say(f"{sequence}\n    {found}")
say(f"{faults} faults in {len(sequences)}, {time.time() - began:.0f} s")
