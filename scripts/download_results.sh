#!/usr/bin/env bash
# Bring run folders from the bucket to this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/download_results.sh [RUN ...] [section.key=value ...] [options]

Copies the folders of these runs, or of all runs, from logging.output_dir in the bucket to runs/:
configuration, records, TensorBoard, eval.json. Files that are here already and have not changed are
not copied again. Nothing is deleted.

  --checkpoints   also copy the checkpoints (the largest part)
  --to FOLDER     copy to FOLDER/RUN (default: runs)
  --config FILE   where `tpu:` and logging.output_dir are found (default:
                  configs/base_sudoku_tpu.yaml)
  --dry_run       print the commands, execute none

exit status: 0 everything is here; 2 a mistake, such as a run that is not in the bucket; 1 anything
else

settings: tpu.bucket in the configuration, or the environment variable TPU_BUCKET; or
logging.output_dir=gs://...
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
CONFIG='' DRY_RUN='' to='' exclude='(.*/)?checkpoints/.*,(.*/)?run\.lock' runs=() OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --checkpoints) exclude='(.*/)?run\.lock' ;;
        --to) need_value "$@"; to=$(realpath --canonicalize-missing "$2"); shift ;;
        --config) need_value "$@"; one_config "$2"; shift ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        -*) mistake "unknown argument $1; see --help" ;;
        *=*) OVERRIDES+=("$1") ;;
        *) runs+=("$1") ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
: "${to:=runs}"
read_settings "${CONFIG:-configs/base_sudoku_tpu.yaml}" --run_name all --on_slice "${OVERRIDES[@]}"
need_gcloud
case "$OUTPUT_DIR" in gs://*) ;; *) fail 2 "logging.output_dir = $OUTPUT_DIR: is not in a bucket: set it to gs://..., or to a relative path and tpu.bucket" ;; esac

fetch() {     # URL FOLDER
    if ! call_gcloud "$ANSWER_SECONDS" storage ls "$1/" >/dev/null 2>"$SCRATCH/ls"; then
        if grep -qE "matched no objects|not found: 404" "$SCRATCH/ls"; then fail 2 "$1: there is nothing in the bucket: see what is there by gcloud storage ls $OUTPUT_DIR/"; fi
        cat "$SCRATCH/ls" >&2
        fail 1 "$1: gcloud storage does not say what is there"
    fi
    execute mkdir -p "$2"
    call_gcloud 0 storage rsync --recursive "--exclude=$exclude" "$1" "$2"
    say "$1: in $2"
}
if [ ${#runs[@]} = 0 ]; then fetch "$OUTPUT_DIR" "$to"; fi
for run in "${runs[@]}"; do fetch "$OUTPUT_DIR/$run" "$to/$run"; done
