#!/usr/bin/env python3
"""What the shell scripts need to know of a configuration, as NAME=value lines for bash. Needs
PyYAML and numpy alone.

    python scripts/tpu_settings.py configs/e1_1.yaml --need project,name tpu.zone=us-central2-b
    python scripts/tpu_settings.py configs/e1_1.yaml --run_name e1_1_seed1 training.seed=1
    python scripts/tpu_settings.py configs/e1_1.yaml --finished eval.json metrics.jsonl

environment variables: TPU_PROJECT, TPU_ZONE, TPU_NAME and TPU_BUCKET win over the file's
tpu.project, ...; an override on the command line wins over both.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tpu_types
from config import load_config
from metrics_logger import read_records
from storage import GCS_URL, checked_name, is_remote, join
from utils import UserError, run_cli

VARIABLES = {
    "project": "TPU_PROJECT",
    "zone": "TPU_ZONE",
    "name": "TPU_NAME",
    "bucket": "TPU_BUCKET",
}
RULES = {
    "project": (
        r"([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
        "must be the id of a Google Cloud project, as my-project-123",
    ),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z]", "must be a zone, as us-central2-b"),
    "name": (
        r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?",
        "must be the name of a slice: small letters, digits and -, a letter first",
    ),
    "bucket": (
        GCS_URL.pattern,
        "must be gs://bucket or gs://bucket/folder, and a bucket's name has 3 to 63 characters",
    ),
    "runtime_version": (r"[a-z0-9._-]+", "must be an image, as tpu-ubuntu2204-base"),
}
# what follows from the generation of the TPU, if it is not given
DEFAULT_OF_GENERATION = {
    "zone": lambda generation: generation.zones[0],
    "runtime_version": lambda generation: generation.image,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration"
    )
    parser.add_argument(
        "--need", default="", metavar="KEY,...", help="keys of tpu: that must be given"
    )
    parser.add_argument("--run_name", help="also print where this run and its dataset are")
    parser.add_argument(
        "--on_slice", action="store_true", help="with --run_name: for a slice, not for this machine"
    )
    parser.add_argument(
        "--to_launch", action="store_true", help="as --on_slice, and refuse what cannot run there"
    )
    parser.add_argument(
        "--finished",
        nargs=2,
        metavar=("EVAL_JSON", "METRICS_JSONL"),
        help="status 0 if these files of a run say that it is finished, 1 if not",
    )
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if args.finished:
        files = [
            path.read_bytes() if (path := Path(name)).exists() else b"" for name in args.finished
        ]
        return 0 if is_finished(config.training.epochs, *files) else 1
    settings = slice_settings(config, args.overrides, [key for key in args.need.split(",") if key])
    if args.run_name is not None:
        settings |= run_settings(config, settings["TPU_BUCKET"], args)
    for name, value in settings.items():
        print(f"{name}={shlex.quote(value)}")


def slice_settings(config, overrides, need):
    """{shell variable: text} of the slice, "" for what is not given.

    need: keys of `tpu:` that must be given. Raises UserError if one of them is not, or if a value
    breaks its rule.
    """
    overridden = {text.partition("=")[0].strip() for text in overrides}
    slice_ = tpu_types.slice_type(config.tpu.accelerator_type)
    settings = {
        "TPU_ACCELERATOR": slice_.type,
        "TPU_GENERATION": slice_.generation.name,
        "TPU_CHIPS": str(slice_.chips),
        "TPU_HOSTS": str(slice_.hosts),
    }
    for key, (pattern, rule) in RULES.items():
        value, source = getattr(config.tpu, key), f"tpu.{key}"
        variable = VARIABLES.get(key)
        if variable and f"tpu.{key}" not in overridden and os.environ.get(variable):
            value, source = os.environ[variable], variable
        if value is None and key in DEFAULT_OF_GENERATION:
            value = DEFAULT_OF_GENERATION[key](slice_.generation)
        if value is None:
            if key in need:
                raise UserError(
                    f"tpu.{key} is not given: export {variable}=..., or write it into `tpu:` of "
                    f"the configuration (or tpu.{key}=... on the command line)"
                )
        elif not re.fullmatch(pattern, value):
            raise UserError(f"{source} = {value!r}: {rule}")
        settings[variable or "TPU_RUNTIME"] = (value or "").rstrip("/")
    return settings


def run_settings(config, bucket, args):
    """{shell variable: text} of a run: where it writes and reads. On a slice a relative path lies
    in tpu.bucket, so that it outlives the hosts and all of them see it; an absolute one is a folder
    that they share, or a dataset that each has."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.run_name):
        raise UserError(
            f"--run_name {args.run_name!r}: must be one folder name of letters, digits, . _ and -"
        )
    output_dir, dataset = config.logging.output_dir, config.data.dataset_path
    if args.on_slice or args.to_launch:
        output_dir = on_slice("logging.output_dir", output_dir, bucket)
    if args.to_launch:
        dataset = on_slice("data.dataset_path", dataset, bucket)
        if config.device not in ("tpu", "auto"):
            raise UserError(
                f"device = {config.device!r}: on a slice its chips would stand idle: use "
                "device=tpu, or --local"
            )
    return {
        "RUN_NAME": args.run_name,
        "RUN_URL": join(output_dir, args.run_name),
        "OUTPUT_DIR": output_dir,
        "DATASET": dataset,
        "DATASET_HERE": config.data.dataset_path,
    }


def on_slice(key, path, bucket):
    """The path (the value of `key`) as it is on a slice: a relative one is in the bucket.

    Raises UserError if it is relative and there is no bucket.
    """
    if is_remote(path) or os.path.isabs(path):
        return path
    checked_name(path.rstrip("/"), key)
    if not bucket:
        raise UserError(
            f"{key} = {path!r}: on a slice a relative path lies in the bucket, and tpu.bucket is "
            "not given: export TPU_BUCKET=gs://..., or write it into `tpu:` of the configuration; "
            f"or set {key} to a gs:// path or to a folder that all hosts share"
        )
    return join(bucket, path.rstrip("/"))


def is_finished(epochs: float, eval_json: bytes, metrics: bytes) -> bool:
    """Whether eval.json is the evaluation of the last step of a run of so many epochs; metrics: the
    content of metrics.jsonl.

    The evaluation of an earlier checkpoint writes an eval.json, too. A step is the last one if one
    more step would exceed `epochs`. Which epoch a step belongs to is read from metrics.jsonl, so
    that the size of the dataset need not be known.
    """
    try:
        steps = {result["step"] for result in json.loads(eval_json)["results"]}
        return any(
            record["epoch"] * (record["step"] + 1) / record["step"] > epochs
            for record in read_records(metrics, "metrics.jsonl")
            if record["split"] == "train" and record["step"] in steps
        )
    except (ValueError, KeyError, TypeError):
        return False  # half-written


if __name__ == "__main__":
    run_cli(main)
