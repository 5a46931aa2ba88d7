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
if [ $# -gt 0 ]; then exec "$PYTHON" -m unittest "$@"; fi
# the whole suite in two processes, one test after the other in each: most keep one core busy, and wait for their processes besides
beside=(test_xla test_workers test_sweep test_benchmark test_pallas_kernels test_tpu_report)
log=$(mktemp)
trap 'kill $! 2>/dev/null || true; rm -f "$log"' EXIT
nice -n 5 "$PYTHON" -m unittest "${beside[@]/#/tests.}" > "$log" 2>&1 &
modules=()
for file in tests/test_*.py; do
    name=$(basename "$file" .py)
    [[ " ${beside[*]} " == *" $name "* ]] || modules+=("tests.$name")
done
status=0
"$PYTHON" -m unittest "${modules[@]}" || status=$?
wait $! || status=$?
cat "$log"
exit "$status"
