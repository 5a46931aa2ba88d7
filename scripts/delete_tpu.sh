#!/usr/bin/env bash
# Delete the slice, and the queued resource that asks for it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/delete_tpu.sh [section.key=value ...] [--config FILE] [--yes] [--dry_run]

Deletes the slice and its queued resource, after asking. What a run wrote into the bucket stays; what lies on the hosts is lost.

  --config FILE   where `tpu:` is found (default: configs/base_sudoku_tpu.yaml)
  --yes           do not ask
  --dry_run       print the commands, execute none

settings: tpu.project, tpu.zone, tpu.name in the configuration, or the environment variables TPU_PROJECT, TPU_ZONE, TPU_NAME
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
CONFIG='' DRY_RUN='' yes='' OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --config) need_value "$@"; one_config "$2"; shift ;;
        --yes) yes=yes ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        *=*) OVERRIDES+=("$1") ;;
        *) mistake "unknown argument $1; see --help" ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
read_settings "${CONFIG:-configs/base_sudoku_tpu.yaml}" --need project,name "${OVERRIDES[@]}"
need_gcloud

if [ -n "$DRY_RUN" ]; then
    delete_slice
    exit
fi
look_at_queue
describe tpu-vm 'value(state)'
states="$QUEUED $ANSWER"
case "$states" in
    *NO_ANSWER*) fail 1 "gcloud gives no answer about $TPU_NAME: nothing is deleted" ;;
    "GONE GONE") say "$TPU_NAME is not there: nothing to delete"; exit ;;
esac
if [ -z "$yes" ]; then
    read -r -p "delete $TPU_NAME in $TPU_ZONE of $TPU_PROJECT (queued resource and slice: $states)? [y/N] " yes || true
    case "$yes" in y|Y|yes) ;; *) fail 2 "nothing is deleted: answer y, or give --yes" ;; esac
fi
delete_slice
say "$TPU_NAME is deleted"
