#!/usr/bin/env bash
# The part of the suite that a version can change, on the oldest or the newest that we take:
#
#   tools/versions.sh oldest|newest [pytest arguments]
#
# The oldest is what a machine of a data centre has; both bring torch with its CUDA libraries, some
# gigabytes. PYTHON names another interpreter than the one written here.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  oldest) python=python3.12 pins="torch==2.11.0 triton==3.6.0 numpy==2.5.2" ;;
  newest) python=python3.13 pins="torch==2.14.1 triton numpy>=2.5" ;;
  *) echo "usage: tools/versions.sh oldest|newest [pytest arguments]" >&2; exit 2 ;;
esac
here=build/versions/$1
shift
test -d "$here" || "${PYTHON:-$python}" -m venv "$here"
# shellcheck disable=SC2086 # one word a package
"$here/bin/pip" install --quiet $pins
# shellcheck disable=SC2086
"$here/bin/pip" install --quiet $pins --editable ".[test]"
"$here/bin/python" -c "import torch, triton, numpy, sys; print(sys.version.split()[0], \
  torch.__version__, triton.__version__, numpy.__version__)"
[ $# -gt 0 ] || set -- tests/kernels tests/models tests/runtime tests/compiler tests/test_imports.py
"$here/bin/python" -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder "$@"
