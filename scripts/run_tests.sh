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
set_up_environment requirements.txt requirements-tpu.txt requirements-test.txt requirements-analysis.txt
if [ $# -gt 0 ]; then exec "$PYTHON" -m unittest "$@"; fi
# the whole suite: a process for each module, a few at once, the longest first
longest=(test_xla test_workers test_faults test_tpu_report test_preemption test_cloud_faults test_sweep test_sweep_slices test_commands test_parity)
modules=(tests/test_*.py)
jobs=$(($(nproc) + 1))      # much of a test's time is waiting
failed=$(mktemp)
trap 'rm -f "$failed"' EXIT
export PYTHON failed
# shellcheck disable=SC2016  # expanded by the shells that xargs starts
{ printf 'tests/%s.py\n' "${longest[@]}"; printf '%s\n' "${modules[@]}"; } | awk '!seen[$0]++' | xargs -n 1 -P "$((jobs < 4 ? jobs : 4))" bash -c '
    output=$("$PYTHON" -m unittest "$1" 2>&1) || echo "$1" >> "$failed"
    printf "%s\n%s\n\n" "----- $1" "$output"' module
if [ -s "$failed" ]; then
    echo "failed: $(sort "$failed" | xargs)"
    exit 1
fi
echo "all passed: ${#modules[@]} modules"
