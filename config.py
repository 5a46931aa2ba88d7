"""Configuration: one YAML file to one dataclass, checked.

Nothing here imports torch or looks at the machine: a configuration is checked before any device is
touched, the scripts read it where PyTorch is not installed, and two machines read the same from the
same file.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

import tpu_types
from utils import UserError

SHIPPED = Path(__file__).resolve().parent / "configs"


# --------------------------------------------------------------------------------------------------
# The settings ("knobs") and their defaults: configs/base_sudoku_tpu.yaml repeats all of them
# --------------------------------------------------------------------------------------------------
def _knob(default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """A field with its rule: choices=(...), or any of gt=, ge=, lt=, le= for numbers."""
    return field(default=default, metadata=rule)


@dataclass(kw_only=True)
class TPUConfig:
    # the type of the slice, one of those in tpu_types.py; one worker runs on each chip
    accelerator_type: str = "v4-64"
    # The rest is for the scripts that work on a slice. The environment variables TPU_PROJECT,
    # TPU_ZONE, TPU_NAME and TPU_BUCKET take precedence over a file's values.
    project: str | None = None  # Google Cloud project
    zone: str | None = None  # null: the first zone that tpu_types.py has for this kind of TPU
    name: str | None = None  # name of the slice (TPU VM)
    # gs://bucket or a folder in it, for datasets and runs, in the region of the slice
    bucket: str | None = None
    # image of the hosts; null: the one that Google names for this kind of TPU
    runtime_version: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    dataset_path: str  # folder that scripts/build_sudoku_dataset.py wrote
    # training puzzles (groups) that the run is planned for; a dataset with another number is
    # refused
    expected_puzzles: int | None = _knob(None, ge=1)
    augment: bool = True  # a random symmetry of a puzzle each time that it is drawn
    # fixed symmetries of each puzzle, one of which (or the puzzle itself) is drawn each time;
    # null: a new one each time
    augmentations: int | None = _knob(None, ge=0)
    prefetch_batches: int = _knob(8, ge=1)  # batches that the loader's thread prepares ahead


@dataclass(kw_only=True)
class ModelConfig:
    hidden_size: int = _knob(512, ge=8)  # D
    num_heads: int = _knob(8, ge=1)  # used by self-attention only
    expansion: float = _knob(4.0, gt=0)  # SwiGLU width: expansion * 2/3 * D, rounded up to 256
    L_layers: int = _knob(2, ge=1)  # blocks of the one network
    H_cycles: int = _knob(3, ge=1)  # T: only the last cycle has a gradient
    L_cycles: int = _knob(6, ge=1)  # n: updates of z_L in a cycle
    mlp_t: bool = True  # mix tokens by an MLP; false: self-attention
    pos_encodings: str = _knob("none", choices=("none", "learned", "rope"))
    puzzle_emb_ndim: int = _knob(512, ge=0)  # 0: no puzzle embedding, no prefix
    puzzle_emb_len: int = _knob(16, ge=0)  # prefix positions; 0: as few as puzzle_emb_ndim needs
    halt_max_steps: int = _knob(16, ge=1)  # N_sup: supervision steps
    # probability that a slot must do a random number of supervision steps before it may halt
    halt_exploration_prob: float = _knob(0.1, ge=0, le=1)
    # dtype of the activations; the weights stay float32. auto: what the checkpoint to resume has;
    # for a new run bfloat16, but float32 on a CPU without instructions for bfloat16
    forward_dtype: str = _knob("bfloat16", choices=("bfloat16", "float32", "auto"))
    # the backward computes the intermediate results of each block again: less memory, more time
    activation_checkpointing: bool = False


@dataclass(kw_only=True)
class Stage:
    """A part of the training with a recursion of its own: an entry of training.curriculum."""

    begin: float = _knob(ge=0, lt=1)  # share of the run's steps that are done before it
    H_cycles: int = _knob(ge=1)
    L_cycles: int = _knob(ge=1)


@dataclass(kw_only=True)
class TrainingConfig:
    seed: int = _knob(0, ge=0, lt=2**63)
    global_batch_size: int = _knob(768, ge=1)  # slots (examples) over all workers
    epochs: float = _knob(50_000, gt=0)  # passes over the puzzles
    optimizer: str = _knob("adam_atan2", choices=("adam_atan2", "adamw"))
    lr: float = _knob(1e-4, gt=0)
    lr_min_ratio: float = _knob(1.0, ge=0, le=1)  # end of the cosine as a share of lr; 1: constant
    lr_warmup_steps: int = _knob(2000, ge=0)
    beta1: float = _knob(0.9, ge=0, lt=1)
    beta2: float = _knob(0.95, ge=0, lt=1)
    weight_decay: float = _knob(1.0, ge=0)  # decoupled: a step multiplies by 1 - lr * weight_decay
    puzzle_emb_lr: float = _knob(1e-4, ge=0)
    puzzle_emb_weight_decay: float = _knob(1.0, ge=0)
    grad_clip_norm: float = _knob(0.0, ge=0)  # of all gradients together, L2; 0: no clipping
    # H_cycles and L_cycles by stage of the training; null: the model's own throughout
    curriculum: list[Stage] | None = None
    # the cell loss of supervision step t counts step_loss_decay^(t - 1)
    step_loss_decay: float = _knob(1.0, gt=0, le=1)
    # adds ponder_cost * (1 - sigmoid(halting logit)) to the loss; 0: nothing
    ponder_cost: float = _knob(0.0, ge=0)
    grad_accumulation_steps: int = _knob(1, ge=1)  # micro-batches of a worker's batch
    # processes of this host on CUDA (one a GPU) and CPU; null: 1. On a TPU there is one for each
    # chip
    num_workers: int | None = _knob(None, ge=1)
    ema: bool = True
    ema_rate: float = _knob(0.999, ge=0, lt=1)
    # which workers keep the average
    ema_strategy: str = _knob("every_worker", choices=("every_worker", "rank0"))
    # torch.compile; auto: on CUDA only
    compile: str = _knob("auto", choices=("auto", "always", "never"))
    # on a TPU: each SwiGLU as one kernel, if it fits the chip and computes the same there
    pallas_kernels: bool = True


@dataclass(kw_only=True)
class CheckpointConfig:
    # a checkpoint is also saved at evaluations, at the last step and on SIGTERM
    interval_steps: int = _knob(5000, ge=1)
    interval_minutes: float | None = _knob(10, gt=0)  # null: by steps only
    keep_last_n: int = _knob(3, ge=1)  # and also the best by exact accuracy


@dataclass(kw_only=True)
class LoggingConfig:
    output_dir: str = "runs"  # a run writes to output_dir/run_name
    interval_steps: int = _knob(50, ge=1)  # steps averaged into one record
    tensorboard: bool = True


@dataclass(kw_only=True)
class EvaluationConfig:
    # the split that is evaluated during training, and by which the best checkpoint is chosen
    split: str = _knob("test", choices=("test", "val"))
    interval_epochs: float = _knob(5000, gt=0)
    batch_size: int = _knob(1024, ge=1)  # puzzles in one batch of a worker
    # puzzles of an evaluation during training; null: all. The final evaluation always takes all of
    # test
    max_examples: int | None = _knob(16384, ge=1)


@dataclass(kw_only=True)
class Config:
    device: str = _knob("auto", choices=("auto", "tpu", "xla_cpu", "cuda", "cpu"))
    tpu: TPUConfig
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    evaluation: EvaluationConfig


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read, inherit, override and check a configuration.

    path: YAML file; `defaults: [name, ...]` in it names files, relative to its folder, whose values
    it takes over. overrides: "section.key=value" strings, the value in YAML. Raises UserError with
    the file, the key, the value, the rule and the nearest valid name.
    """
    flat = _read_yaml(Path(path), [])
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(
                f"command line: {text!r}: an override is written section.key=value, as in "
                "training.lr=2e-4"
            )
        flat[key.strip()] = (_parse_yaml(value, "command line"), "command line")
    return _build(flat, str(path))


def knob_value(key: str, text: str, source: str) -> Any:
    """The value of the setting `key` ("section.name") from `text`, which is YAML.

    Its type and rule are checked, and no combination with other settings. Raises UserError that
    names `source`.
    """
    schema = _schema()
    if key not in schema:
        raise _unknown_key(key, source, schema)
    kind, knob = schema[key]
    return _convert(key, _parse_yaml(text, source), source, kind, knob.metadata)


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """The Config of a `dataclasses.asdict`, as checkpoints store it.

    Raises UserError that names `source`, as load_config does.
    """
    flat = {}
    for key, value in values.items():
        for name, leaf in value.items() if isinstance(value, dict) else [(None, value)]:
            flat[key if name is None else f"{key}.{name}"] = (leaf, source)
    return _build(flat, source)


def config_yaml(config: Config) -> str:
    """The configuration with all its knobs as YAML."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, width=120)


_SCIENTIFIC = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and a duplicate key is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would take for a number."""


_Loader.add_implicit_resolver(*_SCIENTIFIC)
_Dumper.add_implicit_resolver(*_SCIENTIFIC)


def _parse_yaml(text: str | bytes, source: str | Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    # a date of month 13 is a ValueError, and a list as a key a TypeError
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path, chain: list[Path]) -> dict[str, tuple[Any, str]]:
    """Flatten `path` and its defaults into {dotted key: (value, source)}; later files win."""
    if path.resolve() in chain:
        names = " -> ".join(str(p.name) for p in [*chain, path])
        raise UserError(f"{path}: circular `defaults` ({names}): take one of them out")
    try:
        raw = _parse_yaml(path.read_bytes(), path)
    except OSError as error:
        hint = _nearest_file(path)
        raise UserError(
            f"{path}: cannot read this configuration ({error.strerror}){hint}"
        ) from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: a configuration is a mapping of keys to values, not {type(raw).__name__}"
        )
    defaults = raw.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(d, str) for d in defaults):
        raise UserError(
            f"{path}: defaults = {defaults!r}: must be a list of file names, as in "
            "`defaults: [base_sudoku_tpu]`"
        )
    flat = {}
    for name in defaults:
        parent = path.parent / (name if name.endswith((".yaml", ".yml")) else name + ".yaml")
        flat.update(_read_yaml(parent, [*chain, path.resolve()]))
    for key, value in raw.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{k}": (v, str(path)) for k, v in value.items()})
        else:
            flat[str(key)] = (value, str(path))
    return flat


def _nearest_file(path: Path) -> str:
    """ "; did you mean ...?" with a configuration beside `path`, or one that the kit ships, of
    nearly this name; or ""."""
    for folder in (path.parent, SHIPPED):
        names = {file.stem: file for file in folder.glob("*.yaml")}
        if near := difflib.get_close_matches(path.stem, names, 1):
            file = names[near[0]]
            if folder == SHIPPED and SHIPPED.parent == Path.cwd():
                file = file.relative_to(SHIPPED.parent)
            return f"; did you mean {file}?"
    return ""


def _schema() -> dict[str, tuple[Any, dataclasses.Field]]:
    """{dotted key: (type, dataclass field)} of every knob."""
    keys = {}
    for top in dataclasses.fields(Config):
        if dataclasses.is_dataclass(top.type):
            keys.update({f"{top.name}.{f.name}": (f.type, f) for f in dataclasses.fields(top.type)})
        else:
            keys[top.name] = (top.type, top)
    return keys


def _build(flat: dict[str, tuple[Any, str]], path: str) -> Config:
    schema = _schema()
    for key, (_, source) in flat.items():
        if key not in schema:
            raise _unknown_key(key, source, schema)
    sections: dict[str, dict[str, Any]] = {}
    for key, (kind, f) in schema.items():
        if key in flat:
            value = _convert(key, *flat[key], kind, f.metadata)
        elif f.default is not dataclasses.MISSING:
            value = f.default
        else:
            raise UserError(
                f"{path}: {key} is missing, and it has no default: write it, or name a base in "
                "`defaults`"
            )
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    top = sections.pop("")
    types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
    config = Config(**top, **{name: types[name](**values) for name, values in sections.items()})
    _check_combinations(config, lambda key: flat[key][1] if key in flat else path)
    return config


def _unknown_key(key: str, source: str, schema: dict) -> UserError:
    sections = sorted({k.split(".")[0] for k in schema if "." in k})
    if key in sections:
        return UserError(f"{source}: {key}: a section must hold `key: value` lines")
    in_another_section = [k for k in schema if k.split(".")[-1] == key.split(".")[-1]]
    near = (
        difflib.get_close_matches(key, schema, 1, 0.8)
        or in_another_section
        or difflib.get_close_matches(key, schema, 1, 0.6)
    )
    hint = f"; did you mean {near[0]}?" if near else f"; the sections are {', '.join(sections)}"
    return UserError(f"{source}: {key}: there is no such key{hint}")


SYNONYMS = {"gpu": "cuda"}  # for "did you mean" where a value is not valid


def _convert(key: str, value: Any, source: str, kind: Any, rule: typing.Mapping) -> Any:
    """Check one value against its type and rule and return it in that type."""

    def fail(text: str) -> NoReturn:
        raise UserError(f"{source}: {key} = {value!r}: {text}")

    optional = type(None) in typing.get_args(kind)
    if optional and value is None:
        return None
    kind = typing.get_args(kind)[0] if optional else kind
    if typing.get_origin(kind) is list:
        return _convert_list(key, value, source, typing.get_args(kind)[0])
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = is_number and abs(value) < sys.float_info.max
    if kind is bool and not isinstance(value, bool):
        fail("must be true or false")
    elif kind is str and not isinstance(value, str):
        fail("must be text")
    elif kind is int and not (number and float(value).is_integer()):
        fail("must be a whole number" + (" or null" if optional else ""))
    elif kind is float and not number:
        fail("must be a finite number")
    value = kind(value)
    if "choices" in rule and value not in rule["choices"]:
        near = difflib.get_close_matches(SYNONYMS.get(value, value), rule["choices"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        fail(f"must be one of {', '.join(rule['choices'])}{hint}")
    for name, sign, holds in (
        ("gt", ">", lambda a, b: a > b),
        ("ge", ">=", lambda a, b: a >= b),
        ("lt", "<", lambda a, b: a < b),
        ("le", "<=", lambda a, b: a <= b),
    ):
        if name in rule and not holds(value, rule[name]):
            fail(f"must be {sign} {rule[name]}")
    return value


def _convert_list(key: str, values: Any, source: str, kind: Any) -> list[Any]:
    """A list of mappings, each checked and returned as the dataclass `kind`."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    names = ", ".join(fields)
    if not isinstance(values, list) or not values:
        raise UserError(f"{source}: {key} = {values!r}: must be null, or a list of {{{names}}}")
    items = []
    for number, value in enumerate(values):
        place = f"{key}[{number}]"
        if not isinstance(value, dict) or value.keys() != fields.keys():
            raise UserError(f"{source}: {place} = {value!r}: must have {names}, and no others")
        checked = {
            name: _convert(f"{place}.{name}", value[name], source, f.type, f.metadata)
            for name, f in fields.items()
        }
        items.append(kind(**checked))
    return items


# --------------------------------------------------------------------------------------------------
# Rules for several knobs at once
# --------------------------------------------------------------------------------------------------
def _check_combinations(config: Config, source: Callable[[str], str]) -> None:
    _check_slice(config, source)
    _check_model(config, source)
    _check_curriculum(config, source)
    if config.data.augmentations is not None and not config.data.augment:
        rule = "data.augment is false, so no symmetry is drawn: leave this null, or augment"
        raise _refused(config, source, "data.augmentations", rule)
    training, workers = config.training, planned_workers(config)
    if config.device == "xla_cpu" and training.num_workers not in (None, 1):
        raise _refused(
            config, source, "training.num_workers", "device xla_cpu is one worker: use device=cpu"
        )
    slice_text = f"tpu.accelerator_type {config.tpu.accelerator_type} has {workers} chips"
    if config.device == "tpu" and training.num_workers not in (None, workers):
        raise _refused(
            config, source, "training.num_workers", f"{slice_text}, one worker each: leave it null"
        )
    if text := batch_fault(config, workers):
        if config.device == "tpu":
            text += f" ({slice_text}, one worker each)"
        raise _refused(config, source, "training.global_batch_size", text)


def _refused(config: Config, source: Callable[[str], str], key: str, text: str) -> UserError:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return UserError(f"{source(key)}: {key} = {value!r}: {text}")


def batch_fault(config: Config, workers: int) -> str | None:
    """The rule that the global batch breaks with so many workers, or None."""
    parts = config.training.grad_accumulation_steps
    if config.training.global_batch_size % (workers * parts) == 0:
        return None
    return (
        "must be divisible by workers x training.grad_accumulation_steps = "
        f"{workers} x {parts} = {workers * parts}"
    )


def _check_slice(config: Config, source: Callable[[str], str]) -> None:
    try:
        generation = tpu_types.slice_type(config.tpu.accelerator_type).generation
    except ValueError as error:
        raise _refused(config, source, "tpu.accelerator_type", str(error)) from None
    if generation.name == "v6e" and config.tpu.runtime_version == tpu_types.GENERATIONS["v4"].image:
        raise _refused(
            config,
            source,
            "tpu.runtime_version",
            'on a v6e its TPUs do not start ("Failed to get global TPU topology"): '
            f"leave it null, which takes {generation.image}",
        )


def _check_model(config: Config, source: Callable[[str], str]) -> None:
    model, fault = config.model, None
    if model.mlp_t and model.pos_encodings == "rope":
        fault = (
            "model.pos_encodings",
            "rotary positions act in self-attention: use model.mlp_t=false, or none or learned",
        )
    elif not model.mlp_t and model.hidden_size % model.num_heads:
        fault = "model.hidden_size", f"must be divisible by model.num_heads = {model.num_heads}"
    elif not model.mlp_t and model.pos_encodings == "rope":
        if model.hidden_size // model.num_heads % 2:
            fault = (
                "model.num_heads",
                f"rope needs an even head size, and {model.hidden_size}/{model.num_heads} is odd",
            )
    if fault:
        raise _refused(config, source, *fault)
    if 0 < model.puzzle_emb_len * model.hidden_size < model.puzzle_emb_ndim:
        raise _refused(
            config,
            source,
            "model.puzzle_emb_len",
            f"times model.hidden_size = {model.hidden_size} must hold model.puzzle_emb_ndim = "
            f"{model.puzzle_emb_ndim}; 0 takes as many as it needs",
        )


def _check_curriculum(config: Config, source: Callable[[str], str]) -> None:
    model, stages = config.model, config.training.curriculum
    if not stages:
        return
    begins = [stage.begin for stage in stages]
    fault = None
    if begins[0] != 0:
        fault = f"the first stage begins at {begins[0]:g}, and must begin at 0"
    elif any(first >= second for first, second in zip(begins, begins[1:])):
        fault = f"each stage must begin after the one before, not at {begins}"
    elif (stages[-1].H_cycles, stages[-1].L_cycles) != (model.H_cycles, model.L_cycles):
        fault = (
            f"the last stage has H_cycles {stages[-1].H_cycles}, L_cycles {stages[-1].L_cycles}, "
            f"and must have those of the model, {model.H_cycles} and {model.L_cycles}, with which "
            "it is evaluated"
        )
    if fault:
        raise UserError(f"{source('training.curriculum')}: training.curriculum: {fault}")


# --------------------------------------------------------------------------------------------------
# What follows from a configuration
# --------------------------------------------------------------------------------------------------
# Settings of the sections model and training that a run may change when it is resumed: they change
# how numbers are computed, and not the numbers.
SAME_NUMBERS = {
    "model.activation_checkpointing",
    "training.compile",
    "training.pallas_kernels",
    "training.num_workers",
    "training.ema_strategy",
}


def planned_workers(config: Config, device: str | None = None) -> int:
    """Workers of the configuration: one for each chip on a TPU slice, otherwise
    training.num_workers.

    device: in place of the configuration's own device, which may be "auto".
    """
    if (device or config.device) != "tpu":
        return config.training.num_workers or 1
    return tpu_types.slice_type(config.tpu.accelerator_type).chips


def with_forward_dtype(config: Config, forward_dtype: str) -> Config:
    """The configuration with another model.forward_dtype."""
    model = dataclasses.replace(config.model, forward_dtype=forward_dtype)
    return dataclasses.replace(config, model=model)


def differences(config: Config, saved: dict[str, Any], sections: Iterable[str]) -> str:
    """What in these sections differs from `saved` (a dict, as checkpoints hold it): "section.key
    old -> new; ...".

    Settings that change no number are left out. So is a forward_dtype "auto", because it takes the
    saved one.
    """
    free = {"data.dataset_path", "data.prefetch_batches", *SAME_NUMBERS}
    if config.model.forward_dtype == "auto":
        free.add("model.forward_dtype")
    changes = []
    for section in sections:
        knobs = getattr(config, section)
        # a knob that is newer than the checkpoint had its default
        old = {f.name: f.default for f in dataclasses.fields(knobs)} | saved[section]
        changes += [
            f"{section}.{key} {old[key]!r} -> {value!r}"
            for key, value in dataclasses.asdict(knobs).items()
            if old[key] != value and f"{section}.{key}" not in free
        ]
    return "; ".join(changes)
