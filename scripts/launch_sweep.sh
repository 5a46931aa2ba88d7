#!/usr/bin/env bash
# Train the cells of a study, configuration x grid x seed: see scripts/sweep.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/launch_sweep.sh CONFIG... [section.key=value ...] --local [options]
       bash scripts/launch_sweep.sh CONFIG... [section.key=value ...] --slices SLICE... [options]
           [-- FLAGS]
       bash scripts/launch_sweep.sh [CONFIG...] --status

Trains every configuration (files, or a quoted glob pattern) with every combination of the values of
a grid, if there is one, and with every seed. Such a training is a cell of the sweep. The same
command goes on where it was stopped or killed, on this host or, where logging.output_dir is in a
bucket, on another one: cells that are finished are skipped, and failed ones are tried again. All
configurations are checked before anything starts, each for every slice.

  --local             on this host
  --jobs N            N cells at once (default 1); they share the cores of the host
  --max_steps N       only with --local: stop every cell after step N, as a first look; the same
                      command without it goes on from there
  --slices SLICE...   on these TPU slices, one cell at a time on each. scripts/keep_alive.sh makes
                      them, and makes them again after a preemption
  --delete_when_done  delete a slice, with its queued resource, as soon as no cell is left that could
                      run on it. A slice that another launcher uses, or on which something runs, is
                      left alone; after Ctrl-C nothing is deleted
  --seeds K...        seeds (training.seed); a run is then named CONFIG_seedK (default: the
                      configuration's own seed, and the run is named CONFIG)
  --grid section.key=value,value...
                      a cell for each combination of the values of these knobs; a run is then named
                      CONFIG_keyVALUE_keyVALUE, such as e3_4_lr1e-4_global_batch_size768
  --same examples|steps
                      what cells with different training.global_batch_size have in common. examples
                      (default): they train for the same epochs. steps: training.epochs and
                      evaluation.interval_epochs are scaled with the batch, so that they train and
                      evaluate at the same steps. What is counted in steps, such as
                      training.lr_warmup_steps, is the same in all cells either way
  --max_attempts N    give a cell up after N failures (default 3). A cell that ends by a mistake of
                      its user (status 2) is given up at once
  --retry_failed      try the cells again that were given up
  --dry_run           print the cells, how they stand and their commands, and of a grid also steps
                      and examples; nothing is started
  --status            print how the cells stand as a table. Without CONFIG: all cells in the default
                      logging.output_dir, or in another one by logging.output_dir=...
  -- FLAGS            more flags for scripts/keep_alive.sh, the same for all slices, such as
                      -- --max_hours 100

A SLICE is a NAME, or a NAME with its type, its zone, spot or queued, in any order, each after a
colon. For the rest the configuration and FLAGS hold; a slice is on demand where neither says spot:

  --slices trm-a:v4-64 trm-b:v4-64:spot trm-c:v6e-16:europe-west4-a:spot:queued

A cell stays with the slice that it was begun on while that is one of --slices. Otherwise another
slice goes on with it, whatever its type. Hours on slices of different types do not compare. The
bucket is in one region: traffic between it and a slice in another region is slow and costs money.

Ctrl-C, SIGTERM and the end of the terminal are passed on to the trainings, which save and end; a
run on a slice goes on there. What a cell prints is in the file that the launcher names: output.log
in logging.output_dir/sweep/CELL, or in a local folder where that is in a bucket. At its end a sweep
on slices prints for each slice that is left the command that deletes it.

exit status: 0 every cell is finished (or at step --max_steps); 1 one is not; 2 a mistake in the
command, before anything was started; 130, 143, 129 after Ctrl-C, SIGTERM, the end of the terminal

environment variables: TRM_VENV, TRM_PYTHON (see scripts/environment.sh), TRM_CACHE (folder of local
copies); for slices TPU_PROJECT, TPU_ZONE, TPU_BUCKET
TEXT
}

for argument in "$@"; do
    case "$argument" in --help|-h) usage; exit 0 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
set_up_environment >&2
exec "$PYTHON" scripts/sweep.py "$@"
