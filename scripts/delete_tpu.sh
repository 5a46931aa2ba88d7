#!/usr/bin/env bash
# Delete the slice, and the queued resource that asks for it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/delete_tpu.sh [section.key=value ...] [--config FILE] [--yes] [--if_idle]
           [--dry_run]

Deletes the slice and its queued resource, after a question. What a run wrote into the bucket stays;
what is on the disks of the hosts is lost.

  --config FILE   where `tpu:` is found (default: configs/base_sudoku_tpu.yaml)
  --yes           do not ask
  --if_idle       refuse while a process on the hosts uses the chips, or a run of this kit is alive
  --dry_run       print the commands, execute none

exit status: 0 it is deleted, or was not there; 2 a mistake, or not confirmed; 1 anything else

settings: tpu.project, tpu.zone, tpu.name in the configuration, or the environment variables
TPU_PROJECT, TPU_ZONE, TPU_NAME
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
CONFIG='' DRY_RUN='' yes='' if_idle='' OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --config) need_value "$@"; one_config "$2"; shift ;;
        --yes) yes=yes ;;
        --if_idle) if_idle=yes ;;
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
    "GONE GONE") say "$TPU_NAME is not there in $TPU_ZONE of $TPU_PROJECT: nothing to delete; for another zone say tpu.zone=..."; exit ;;
esac
# a run of the kit holds trm/lock from its start to its end; any other program has a chip's device file open, which root
# alone may see. (Google's tpu-info finds them like this, too.)
find="find /proc/[0-9]*/fd -lname '*/dev/accel[0-9]*' -o -lname '*/dev/vfio/[0-9]*'"
who="if [ -e trm/lock ] && ! flock --shared --nonblock trm/lock true; then echo \"trm: the run \$(cat trm/lock)\";
elif { sudo -n $find || $find; } 2>/dev/null | grep -q .; then echo 'trm: a program that has the chips';
else echo 'trm: nothing'; fi"
if [ -n "$if_idle" ] && [[ $states == *" READY" ]]; then
    ask_hosts "$ANSWER_SECONDS" all "$who" || ANSWER=''
    users=$(sed -n 's/^trm: //p' <<< "$ANSWER" | sort -u)
    case "$users" in
        nothing) ;;
        "") fail 1 "the hosts of $TPU_NAME do not say whether something runs there: it is not deleted" ;;
        *) fail 1 "$TPU_NAME is in use by $(grep -vx nothing <<< "$users" | paste -sd, | sed 's/,/, /g'): it is not deleted" ;;
    esac
fi
if [ -z "$yes" ]; then
    read -r -p "delete $TPU_NAME in $TPU_ZONE of $TPU_PROJECT (queued resource and slice: $states)? [y/N] " yes || true
    case "$yes" in y|Y|yes) ;; *) fail 2 "nothing is deleted: answer y, or give --yes" ;; esac
fi
delete_slice
say "$TPU_NAME is deleted"
