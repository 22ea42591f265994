"""Makes a copy of this project whose slowdowns are set by the variable FASTDIFF_PLANTED.

FASTDIFF_PLANTED="conv=0.1" makes the C++ convolution take 10% longer, "loop=0.1" each step of the
denoising loop; "launch" and "copy" add a launch or a tensor copy to each step, "record" adds a
recording to each picture. Commas join several. The released code contains none of this.
"""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

COPIED = ("fastdiff", "csrc", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")

EDITS = (
    (
        "csrc/bindings.cpp",
        "void execute(const Conv& p) { chosen->conv(p); }",
        """double planted() {
  const char* all = std::getenv("FASTDIFF_PLANTED");
  const char* own = all ? std::strstr(all, "conv=") : nullptr;
  return own ? std::atof(own + 5) : 0.0;
}
void execute(const Conv& p) {
  using clock = std::chrono::steady_clock;
  static const double share = planted();
  const auto start = clock::now();
  chosen->conv(p);
  const auto end = clock::now() + (clock::now() - start) * share;
  while (share && clock::now() < end) {
  }
}""",
    ),
    ("csrc/bindings.cpp", "#include <array>\n", "#include <array>\n#include <chrono>\n"),
    (
        "fastdiff/runtime/loop.py",
        "        buffers, recording = self._step.buffers, self._step.recording\n",
        """        buffers, recording = self._step.buffers, self._step.recording
        start = time.perf_counter()
        if "launch" in PLANTED:
            buffers.step.add_(0)
        if "copy" in PLANTED:
            buffers.sample.clone()
""",
    ),
    (
        "fastdiff/runtime/loop.py",
        "        self.at += 1\n\n    def mark",
        """        spent = time.perf_counter() - start
        end = start + spent * (1 + float(PLANTED.get("loop", 0)))
        while time.perf_counter() < end:
            pass
        self.at += 1

    def mark""",
    ),
    (
        "fastdiff/runtime/loop.py",
        "                step = self._steps.get(key, lambda: self._make(key, device))\n",
        """                kept = (key, time.perf_counter()) if "record" in PLANTED else key
                step = self._steps.get(kept, lambda: self._make(key, device))
""",
    ),
    (
        "fastdiff/runtime/loop.py",
        "\nclass Mark(NamedTuple):",
        """
_ASKED = [item.partition("=") for item in os.environ.get("FASTDIFF_PLANTED", "").split(",")]
PLANTED = {name: value for name, _, value in _ASKED}


class Mark(NamedTuple):""",
    ),
    (
        "fastdiff/runtime/loop.py",
        "import threading\n",
        "import os\nimport threading\nimport time\n",
    ),
)


def plant(folder: Path) -> Path:
    """Copy this project's working tree, without ignored files, into `folder`, and apply EDITS."""
    listed = subprocess.run(
        [*f"git -C {ROOT} ls-files -z --cached --others --exclude-standard".split(), *COPIED],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name, old, new in EDITS:
        path = folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has changed; update EDITS: {old!r}"
        path.write_text(text.replace(old, new))
    return folder
