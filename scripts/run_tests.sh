#!/usr/bin/env bash
# The test suite in the kit's own environment, which is set up first.
#   bash scripts/run_tests.sh                        style checks, then every test
#   bash scripts/run_tests.sh --fast                 the tests that need no more than requirements.txt
#   bash scripts/run_tests.sh tests.test_config -v   what is given to `python -m unittest`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --help ]; then
    cat << 'HELP'
usage: bash scripts/run_tests.sh [--fast | unittest arguments, such as tests.test_config -v]

Without arguments: ruff and mypy, then every test, in about 15 minutes on two cores.
--fast: the tests that need neither the cloud's emulator nor a TPU's compiler, in about 2 minutes.

environment variables:
  TRM_VENV, TRM_PYTHON    the virtual environment, and the Python it is made with (scripts/environment.sh)
  TRM_PARITY_DIR          recordings of the original implementation (without it their tests skip)
  TRM_REAL_DATA_DIR       a dataset built from Sudoku-Extreme (without it its tests skip)
HELP
    exit 0
fi

. scripts/environment.sh
if [ "${1:-}" = --fast ]; then
    if [ $# -gt 1 ]; then echo "error: --fast takes no other argument: '$2'" >&2; exit 2; fi
    set_up_environment requirements.txt
    exec "$PYTHON" -m tests.suite --fast
fi
set_up_environment requirements.txt requirements-tpu.txt requirements-test.txt requirements-analysis.txt
if [ $# -gt 0 ]; then exec "$PYTHON" -m unittest "$@"; fi
"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m mypy
exec "$PYTHON" -m tests.suite
