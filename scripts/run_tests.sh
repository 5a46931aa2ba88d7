#!/usr/bin/env bash
# The whole test suite in the kit's own environment. Arguments go to unittest: bash scripts/run_tests.sh tests.test_parity
set -euo pipefail
if [ "${1:-}" = --help ]; then
    echo "usage: bash scripts/run_tests.sh [unittest arguments, such as tests.test_config -v]"
    echo "environment variables: TRM_VENV, TRM_PYTHON (see scripts/environment.sh), TRM_PARITY_DIR, TRM_REAL_DATA_DIR (optional test data)"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
set_up_environment requirements.txt requirements-test.txt requirements-analysis.txt
"$PYTHON" -m unittest "$@"
