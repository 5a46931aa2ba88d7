#!/usr/bin/env bash
# Start an experiment on a TPU slice or on this machine, and look after it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/launch_experiment.sh CONFIG [section.key=value ...] [options] [-- FLAGS]
       bash scripts/launch_experiment.sh status [RUN] [section.key=value ...] [--config FILE]
       bash scripts/launch_experiment.sh logs|stop RUN [section.key=value ...] [--config FILE]

Checks the configuration, sends the committed code to all hosts of the slice (scripts/setup_tpu.sh
makes it), and starts train_tpu.py there, so that it continues without this connection. Then it
shows the log until the run ends; Ctrl-C ends only the display. The same command again resumes a
run. A relative logging.output_dir or data.dataset_path is a folder in the bucket; a dataset that is
on this machine is copied there.

  --run_name NAME   folder under logging.output_dir (default: the configuration's name)
  --detach          do not show the log
  --dirty           send the working tree as it is, and note this in starts.jsonl of the run
                    (default: uncommitted changes are refused)
  --commit SHA      send this commit
  --local           run it on this machine, in the foreground, in an environment that is made first
                    if there is none; ends with the training's exit status
  --dry_run         print the commands, execute none
  -- FLAGS          more flags for train_tpu.py, such as -- --max_steps 100

  status RUN        one line, and the exit status: finished 0, running 3, failed 4, preempted 5,
                    absent 6, stopped 7; 1: no answer
  status            one line for each run that this slice has had
  logs RUN          what it has printed since its last start, until it ends; logs --all RUN: since
                    its first start
  stop RUN          SIGTERM: it saves a checkpoint and ends
  --config FILE     where status, logs and stop find `tpu:` and logging.output_dir (default:
                    configs/base_sudoku_tpu.yaml)

Without --detach the exit status is that of `status RUN`. 2: a mistake, nothing was started.

settings: tpu.project, tpu.zone, tpu.name, tpu.bucket in the configuration, or the environment
variables TPU_PROJECT, TPU_ZONE, TPU_NAME, TPU_BUCKET. TRM_VENV, TRM_PYTHON: see
scripts/environment.sh. TRM_GCLOUD_SSH_FLAGS: more flags for every ssh and scp. TRM_ANSWER_SECONDS:
how long to wait for an answer of gcloud or of a host (120).
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
command='' CONFIG='' RUN_NAME='' DRY_RUN='' detach='' dirty='' commit='' local='' all='' OVERRIDES=() FLAGS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --run_name) need_value "$@"; RUN_NAME=$2; shift ;;
        --config) need_value "$@"; one_config "$2"; shift ;;
        --commit) need_value "$@"; commit=$2; shift ;;
        --detach) detach=yes ;;
        --dirty) dirty=yes ;;
        --local) local=yes ;;
        --all) all=all ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        --) FLAGS=("${@:2}"); break ;;
        -*) mistake "unknown argument $1; see --help" ;;
        status|logs|stop) command=$1 ;;
        *=*) OVERRIDES+=("$1") ;;
        *) if [ -z "$command" ]; then one_config "$1"
           elif [ -n "$RUN_NAME" ]; then mistake "$command $RUN_NAME $1: one run at a time"
           else RUN_NAME=$1
           fi ;;
    esac
    shift
done
case "$RUN_NAME" in */*|*.yaml|*.yml) mistake "$RUN_NAME: is no name of a run; did you mean $(basename "${RUN_NAME%.*}")?" ;; esac
case "$command$RUN_NAME" in logs|stop) mistake "$command needs the name of a run; bash scripts/launch_experiment.sh status lists them" ;; esac
if [ -z "$CONFIG" ] && [ -z "$command" ]; then mistake "which configuration? see --help"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh

report() {      # say how the run is, and end with the status that stands for it
    look_at_run
    echo "$RUN_STATE: $RUN_NAME on ${TPU_NAME}, $RUN_WHY"
    if [ "$RUN_STATE" = running ]; then MAY_EXIST=''; fi
    case "$RUN_STATE" in finished) exit 0 ;; running) exit 3 ;; failed) exit 4 ;; preempted) exit 5 ;; absent) exit 6 ;; stopped) exit 7 ;; *) exit 1 ;; esac
}

if [ -n "$command" ]; then
    if [ -z "$RUN_NAME" ]; then command=list; fi
    read_settings "${CONFIG:-configs/base_sudoku_tpu.yaml}" --need project,name --run_name "${RUN_NAME:-any}" --on_slice "${OVERRIDES[@]}"
    need_gcloud
    case "$command" in
        list)
            ask_hosts "$ANSWER_SECONDS" 0 "$(host_command list)" || fail 1 "the hosts of $TPU_NAME do not answer"
            sed -n 's/^trm: //p' <<< "$ANSWER" ;;
        status) report ;;
        logs) on_hosts 0 all "$(host_command follow "$RUN_NAME" $all)" ;;
        stop) on_hosts 0 all "$(host_command stop "$RUN_NAME")"; [ -n "$DRY_RUN" ] || report ;;
    esac
    exit
fi
: "${RUN_NAME:=$(basename "${CONFIG%.*}")}"

if [ -n "$local" ]; then
    if [ -z "$DRY_RUN" ]; then set_up_environment; fi       # first: reading a configuration takes PyYAML
    read_settings "$CONFIG" --run_name "$RUN_NAME" "${OVERRIDES[@]}"
    training=(train_tpu.py --config "$CONFIG" --run_name "$RUN_NAME" "${OVERRIDES[@]}" "${FLAGS[@]}")
    if [ -n "$DRY_RUN" ]; then execute python "${training[@]}"; exit; fi
    rm -rf "$SCRATCH"
    exec "$PYTHON" "${training[@]}"         # signals for this process are for the training
fi

# ----- what would run: the configuration as it is in the code that is sent -----
CONFIG=$(in_repository "$CONFIG")
choose_code "$commit"
case "$COMMIT$dirty" in *-dirty) refuse_uncommitted "commit them, or give --dirty to run them as they are" ;; esac
unpack_here
read_settings "$CONFIG" --need project,name --run_name "$RUN_NAME" --to_launch "${OVERRIDES[@]}"
need_gcloud
say "$RUN_NAME: commit $COMMIT on $TPU_NAME ($TPU_ACCELERATOR, $TPU_HOSTS host(s)), to $RUN_URL"

# ----- whether it can -----
same="$CONFIG${OVERRIDES[*]:+ ${OVERRIDES[*]}}"
if [ -z "$DRY_RUN" ]; then
    look_at_run
    check_type
    case "$NODE" in
        READY) ;;
        NO_ANSWER) fail 1 "gcloud gives no answer about the slice $TPU_NAME" ;;
        *)  # Under scripts/keep_alive.sh, which has just made the slice: it went away since then.
            # With status 3 keep_alive.sh requests it again
            if [ -n "${TRM_KEPT_ALIVE:-}" ]; then fail 3 "the slice $TPU_NAME is $NODE before the run could start"; fi
            fail 2 "the slice $TPU_NAME is $NODE, not READY: bash scripts/setup_tpu.sh $same (with --spot where the grant is for spot slices)" ;;
    esac
    if [ -n "$SILENT" ]; then fail 1 "$RUN_WHY: look by $(how_to_look)"; fi
    case "$RUN_STATE" in running) fail 2 "$RUN_NAME runs on $TPU_NAME already ($RUN_WHY): see its log by bash scripts/launch_experiment.sh logs $RUN_NAME" ;; esac
fi
check_bucket
case "$DATASET" in gs://*)
    if [ "$DATASET" != "$DATASET_HERE" ] && [ -d "$DATASET_HERE" ]; then
        say "copying $DATASET_HERE to $DATASET, what is not there yet"
        call_gcloud 0 storage rsync --recursive "$DATASET_HERE" "$DATASET" || fail 1 "$DATASET_HERE could not be copied to $DATASET: gcloud's message is above"
    elif ! call_gcloud "$ANSWER_SECONDS" storage ls "$DATASET/train/dataset.json" >/dev/null 2>"$SCRATCH/ls"; then
        if ! grep -qE "matched no objects|not found: 404" "$SCRATCH/ls"; then
            cat "$SCRATCH/ls" >&2
            fail 1 "$DATASET: gcloud storage does not say what is there"
        fi
        fail 2 "data.dataset_path: there is no dataset in $DATASET: build one by scripts/build_sudoku_dataset.py --output_dir $DATASET_HERE"
    fi ;;
esac

# ----- start it -----
send_code
status=0 id=$(date +%s)-$$
on_hosts 0 all "$(unpack_code) && $(host_command start "$RUN_NAME" "$id" --config "$CONFIG" --run_name "$RUN_NAME" "${OVERRIDES[@]}" \
    "logging.output_dir=$OUTPUT_DIR" "data.dataset_path=$DATASET" "${FLAGS[@]}")" || status=$?
if [ "$status" != 0 ]; then
    say "not started on every host: stopping it on the others"
    on_hosts 0 all "$(host_command stop "$RUN_NAME" "$id")" || true
    if [ "$status" = 2 ]; then exit 2; fi       # a host has said why
    fail 1 "$RUN_NAME was not started on $TPU_NAME (status $status)"
fi
say "started; Ctrl-C and lost connections leave it alone: bash scripts/launch_experiment.sh status|logs|stop $RUN_NAME"
if [ -n "$detach" ]; then exit; fi
on_hosts 0 all "$(host_command follow "$RUN_NAME")" || true
[ -n "$DRY_RUN" ] || report
