#!/usr/bin/env bash
# From nothing to a trained model on a laptop: environment, dataset, training, evaluation, one puzzle solved.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/quickstart.sh [--max_steps N] [--run_name NAME]

Makes the virtual environment (or reuses it), generates 9x9 Sudokus into data/quickstart, trains
configs/quickstart.yaml on the CPU (under 3 minutes on 2 cores with instructions for bfloat16, about
10 without), evaluates on 1,000 held-out puzzles and shows one of them being solved. May be run
again: what is done is not done twice.

  --max_steps N     stop the training after step N (a quick look: 100)
  --run_name NAME   folder under runs/ (default: quickstart)

environment variables: TRM_VENV (place of the virtual environment), TRM_PYTHON (interpreter it is made with)
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
run_name=quickstart
training_flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        --max_steps) need_number "$@"; training_flags+=(--max_steps "$2"); shift 2 ;;
        --run_name) need_value "$@"; run_name=$2; shift 2 ;;
        --help|-h) usage; exit 0 ;;
        *) mistake "unknown argument $1; see --help" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

echo "== 1/4 environment"
set_up_environment
echo "== 2/4 dataset: 8,000 training and 1,000 held-out puzzles with 36 to 50 clues"
"$PYTHON" scripts/build_sudoku_dataset.py --generate --size 9 --num_train 8000 --num_test 1000 --clues 36 50 --seed 0 --output_dir data/quickstart
echo "== 3/4 training and evaluation"
"$PYTHON" train_tpu.py --config configs/quickstart.yaml --run_name "$run_name" "${training_flags[@]}"
echo "== 4/4 a held-out puzzle, solved step by step"
"$PYTHON" analysis/solve.py --checkpoint "runs/$run_name"
cat <<TEXT

everything of this run is in runs/$run_name:
  metrics.jsonl    one record a line         config.yaml   what ran
  checkpoints/     to go on from, or to solve puzzles with
  tensorboard/     pip install tensorboard && tensorboard --logdir runs
TEXT
if [ ! -e "runs/$run_name/eval.json" ]; then
    echo "The training is not at its end, so there is no final evaluation yet: the same command without --max_steps goes on."
    exit
fi
"$PYTHON" - "runs/$run_name/eval.json" <<'PYTHON'
import json
import sys

for result in json.load(open(sys.argv[1]))["results"]:
    name = {"ema": "averaged weights (EMA)", "raw": "last weights"}[result["weights"]]
    print(f"exact accuracy on {result['count']:,} held-out puzzles, {name}: {result['exact_accuracy']:.1%}")
print(f"({sys.argv[1]}, the final evaluation)")
PYTHON
