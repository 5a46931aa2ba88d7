#!/usr/bin/env bash
# Bring run folders from the bucket to this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/download_results.sh [RUN ...] [section.key=value ...] [options]

Copies the folders of these runs, or of all, from logging.output_dir in the bucket to runs/: configuration, records, TensorBoard,
eval.json. What is here already and has not changed is not copied again; nothing is deleted.

  --checkpoints   the checkpoints, too (the largest part)
  --to FOLDER     copy to FOLDER/RUN (default: runs)
  --config FILE   where `tpu:` and logging.output_dir are found (default: configs/base_sudoku_tpu.yaml)
  --dry_run       print the commands, execute none

settings: tpu.bucket in the configuration, or the environment variable TPU_BUCKET; or logging.output_dir=gs://...
TEXT
}

CONFIG='' DRY_RUN='' to='' exclude='(.*/)?checkpoints/.*,(.*/)?run\.lock' runs=() OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --checkpoints) exclude='(.*/)?run\.lock' ;;
        --to) to=$(realpath --canonicalize-missing "${2:?--to needs a folder}"); shift ;;
        --config) CONFIG=$(realpath "${2:?--config needs a file}"); shift ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        -*) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
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
    if ! execute gcloud storage ls "$1/" >/dev/null 2>"$SCRATCH/ls"; then
        if grep -q "matched no objects" "$SCRATCH/ls"; then fail 2 "$1: there is nothing in the bucket: see what is there by gcloud storage ls $OUTPUT_DIR/"; fi
        cat "$SCRATCH/ls" >&2
        fail 1 "$1: gcloud storage does not say what is there"
    fi
    execute mkdir -p "$2"
    execute gcloud storage rsync --recursive "--exclude=$exclude" "$1" "$2"
    say "$1: in $2"
}
if [ ${#runs[@]} = 0 ]; then fetch "$OUTPUT_DIR" "$to"; fi
for run in "${runs[@]}"; do fetch "$OUTPUT_DIR/$run" "$to/$run"; done
