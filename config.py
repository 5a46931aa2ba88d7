"""Configuration: one YAML file to one dataclass, checked.

Nothing here imports torch or looks at the machine: a configuration is checked before any device is touched, and the scripts
read it where PyTorch is not installed.
"""

import dataclasses
import difflib
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import tpu_types
from utils import UserError


# ---------------------------------------------------------------------------------------------------------
# The configuration
# ---------------------------------------------------------------------------------------------------------
def _knob(default=dataclasses.MISSING, **rule):
    """A field with its rule: choices=(...), or any of gt=, ge=, lt=, le= for numbers."""
    return field(default=default, metadata=rule)


@dataclass(kw_only=True)
class TPUConfig:
    accelerator_type: str = "v4-8"  # slice to run on, of those in tpu_types.py; one worker a chip
    # for the scripts that work on a slice; TPU_PROJECT, TPU_ZONE, TPU_NAME and TPU_BUCKET go before a file's values
    project: str | None = None  # Google Cloud project
    zone: str | None = None  # null: the first in tpu_types.py of this kind of TPU
    name: str | None = None  # of the slice
    bucket: str | None = (
        None  # gs://bucket or a folder in it, of the slice's region: datasets and runs
    )
    runtime_version: str | None = (
        None  # image of the hosts; null: the one that Google names for this kind of TPU
    )


@dataclass(kw_only=True)
class DataConfig:
    dataset_path: str  # folder that scripts/build_sudoku_dataset.py wrote
    expected_puzzles: int | None = _knob(
        None, ge=1
    )  # train puzzles (groups) the run is planned for; a dataset with another number is refused
    augment: bool = True  # augment training puzzles on the fly
    prefetch_batches: int = _knob(8, ge=1)  # batches prepared ahead by the loader's thread


@dataclass(kw_only=True)
class ModelConfig:
    hidden_size: int = _knob(512, ge=8)
    num_heads: int = _knob(8, ge=1)  # used by self-attention only
    expansion: float = _knob(4.0, gt=0)  # SwiGLU width: expansion * 2/3, rounded up to 256
    L_layers: int = _knob(2, ge=1)  # blocks of the one network
    H_cycles: int = _knob(3, ge=1)  # T: the last cycle alone has a gradient
    L_cycles: int = _knob(6, ge=1)  # n: updates of z_L in a cycle
    mlp_t: bool = True  # mix tokens by an MLP; false: self-attention
    pos_encodings: str = _knob("none", choices=("none", "learned", "rope"))
    puzzle_emb_ndim: int = _knob(512, ge=0)  # 0: no puzzle embedding, no prefix
    puzzle_emb_len: int = _knob(16, ge=0)  # prefix positions; 0: as few as puzzle_emb_ndim needs
    halt_max_steps: int = _knob(16, ge=1)  # N_sup: supervision steps
    halt_exploration_prob: float = _knob(0.1, ge=0, le=1)
    # of activations; weights stay float32. auto: bfloat16, but float32 on a CPU without instructions for bfloat16
    forward_dtype: str = _knob("bfloat16", choices=("bfloat16", "float32", "auto"))
    activation_checkpointing: bool = False  # the backward computes each block's intermediate results anew: less memory, more time


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
    weight_decay: float = _knob(1.0, ge=0)  # decoupled, times lr
    puzzle_emb_lr: float = _knob(1e-4, ge=0)
    puzzle_emb_weight_decay: float = _knob(1.0, ge=0)
    grad_clip_norm: float = _knob(0.0, ge=0)  # 0: no clipping
    grad_accumulation_steps: int = _knob(1, ge=1)  # parts of a worker's batch, one after the other
    num_workers: int | None = _knob(
        None, ge=1
    )  # processes of this host on CUDA (one a GPU) and CPU; null: 1. On a TPU: one a chip
    ema: bool = True
    ema_rate: float = _knob(0.999, ge=0, lt=1)
    ema_strategy: str = _knob(
        "every_worker", choices=("every_worker", "rank0")
    )  # which workers keep the average
    compile: str = _knob(
        "auto", choices=("auto", "always", "never")
    )  # torch.compile; auto: on CUDA only
    pallas_kernels: bool = (
        True  # on a TPU: each SwiGLU as one kernel, if it fits the chip and computes the same there
    )


@dataclass(kw_only=True)
class CheckpointConfig:
    interval_steps: int = _knob(
        1000, ge=1
    )  # also saved: at evaluations, at the last step and on SIGTERM
    interval_minutes: float | None = _knob(
        None, gt=0
    )  # since the last checkpoint; whichever comes first
    keep_last_n: int = _knob(3, ge=1)  # the best by exact accuracy is kept besides


@dataclass(kw_only=True)
class LoggingConfig:
    output_dir: str = "runs"  # a run writes to output_dir/run_name
    interval_steps: int = _knob(50, ge=1)  # steps averaged into one record
    tensorboard: bool = True


@dataclass(kw_only=True)
class EvaluationConfig:
    split: str = _knob(
        "test", choices=("test", "val")
    )  # looked at during training, and the best is chosen by it
    interval_epochs: float = _knob(5000, gt=0)
    batch_size: int = _knob(1024, ge=1)  # puzzles
    max_examples: int | None = _knob(
        None, ge=1
    )  # during training only; null: all. The end always takes all


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


# ---------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------
_SCIENTIFIC = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would take for a number."""


_Loader.add_implicit_resolver(*_SCIENTIFIC)
_Dumper.add_implicit_resolver(*_SCIENTIFIC)


def _parse_yaml(text, source):
    try:
        return yaml.load(text, Loader=_Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
    ) as error:  # a date of month 13 or a list as a key is not a YAMLError
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path, chain):
    """Flatten `path` and its defaults into {dotted key: (value, source)}; later files win."""
    path = Path(path)
    if path.resolve() in chain:
        names = " -> ".join(str(p.name) for p in [*chain, path])
        raise UserError(f"{path}: `defaults` go round in a circle ({names}): take one of them out")
    try:
        raw = _parse_yaml(path.read_bytes(), path)
    except OSError as error:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}.yaml?" if near else ""
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
            f"{path}: defaults = {defaults!r}: must be a list of file names, as in `defaults: [base_sudoku_tpu]`"
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


def _schema():
    """{dotted key: (type, dataclass field)} of every knob."""
    keys = {}
    for top in dataclasses.fields(Config):
        if dataclasses.is_dataclass(top.type):
            keys.update({f"{top.name}.{f.name}": (f.type, f) for f in dataclasses.fields(top.type)})
        else:
            keys[top.name] = (top.type, top)
    return keys


def _unknown_key(key, source, schema):
    sections = sorted({k.split(".")[0] for k in schema if "." in k})
    if key in sections:
        return UserError(f"{source}: {key}: a section must hold `key: value` lines")
    same_name = [k for k in schema if k.split(".")[-1] == key.split(".")[-1]]  # in another section
    near = (
        difflib.get_close_matches(key, schema, 1, 0.8)
        or same_name
        or difflib.get_close_matches(key, schema, 1, 0.6)
    )
    hint = f"; did you mean {near[0]}?" if near else f"; the sections are {', '.join(sections)}"
    return UserError(f"{source}: {key}: there is no such key{hint}")


OTHER_NAMES = {"gpu": "cuda"}  # of values: what is meant by them


def _convert(key, value, source, kind, rule):
    """Check one value against its type and rule and return it in that type."""

    def fail(text):
        raise UserError(f"{source}: {key} = {value!r}: {text}")

    optional = type(None) in typing.get_args(kind)
    if optional and value is None:
        return None
    kind = typing.get_args(kind)[0] if optional else kind
    number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < sys.float_info.max
    )
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
        near = difflib.get_close_matches(OTHER_NAMES.get(value, value), rule["choices"], 1)
        fail(
            f"must be one of {', '.join(rule['choices'])}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    for name, sign, holds in (
        ("gt", ">", lambda a, b: a > b),
        ("ge", ">=", lambda a, b: a >= b),
        ("lt", "<", lambda a, b: a < b),
        ("le", "<=", lambda a, b: a <= b),
    ):
        if name in rule and not holds(value, rule[name]):
            fail(f"must be {sign} {rule[name]}")
    return value


def load_config(path, overrides=(), settle=True):
    """Read, inherit, override and check a configuration.

    path: YAML file; `defaults: [name, ...]` in it names files (relative to its folder) that it builds on.
    overrides: "section.key=value" strings, the value in YAML.
    settle: whether a forward_dtype "auto" becomes that of this machine.
    Returns Config. Raises UserError naming file, key, value, rule and the nearest valid name.
    """
    flat = _read_yaml(path, [])
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(
                f"command line: {text!r}: an override is written section.key=value, as in training.lr=2e-4"
            )
        flat[key.strip()] = (_parse_yaml(value, "command line"), "command line")
    config = _build(flat, str(path))
    if (
        settle and config.model.forward_dtype == "auto"
    ):  # from here on what is computed, in the run's records as well
        from device import native_dtype

        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, forward_dtype=native_dtype(config.device)),
        )
    return config


def config_from_dict(values, source):
    """Rebuild a Config from `dataclasses.asdict` of one (as checkpoints store it); raises UserError."""
    flat = {}
    for key, value in values.items():
        for name, leaf in value.items() if isinstance(value, dict) else [(None, value)]:
            flat[key if name is None else f"{key}.{name}"] = (leaf, source)
    return _build(flat, source)


def _build(flat, path):
    schema = _schema()
    for key, (_, source) in flat.items():
        if key not in schema:
            raise _unknown_key(key, source, schema)
    sections = {}
    for key, (kind, f) in schema.items():
        if key in flat:
            value = _convert(key, *flat[key], kind, f.metadata)
        elif f.default is not dataclasses.MISSING:
            value = f.default
        else:
            raise UserError(
                f"{path}: {key} is missing: it has no default, write it or name a base in `defaults`"
            )
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    top = sections.pop("")
    config = Config(
        **top, **{name: _section_type(name)(**values) for name, values in sections.items()}
    )
    _check_combinations(config, lambda key: flat[key][1] if key in flat else path)
    return config


def _section_type(name):
    return next(f.type for f in dataclasses.fields(Config) if f.name == name)


def _check_combinations(config, source):
    model, training = config.model, config.training

    def fail(key, value, text):
        raise UserError(f"{source(key)}: {key} = {value!r}: {text}")

    try:
        generation = tpu_types.slice_type(config.tpu.accelerator_type).generation
    except ValueError as error:
        fail("tpu.accelerator_type", config.tpu.accelerator_type, str(error))
    if generation.name == "v6e" and config.tpu.runtime_version == tpu_types.GENERATIONS["v4"].image:
        fail(
            "tpu.runtime_version",
            config.tpu.runtime_version,
            'on a v6e its TPUs do not start ("Failed to get global TPU topology"): '
            f"leave it null, which takes {generation.image}",
        )
    if not model.mlp_t and model.hidden_size % model.num_heads:
        fail(
            "model.hidden_size",
            model.hidden_size,
            f"must be divisible by model.num_heads = {model.num_heads}",
        )
    if (
        not model.mlp_t
        and model.pos_encodings == "rope"
        and model.hidden_size // model.num_heads % 2
    ):
        fail(
            "model.num_heads",
            model.num_heads,
            f"rope needs an even head size, and {model.hidden_size}/{model.num_heads} is odd",
        )
    if model.mlp_t and model.pos_encodings == "rope":
        fail(
            "model.pos_encodings",
            "rope",
            "rotary positions act in self-attention: use model.mlp_t=false, or none or learned here",
        )
    if (
        model.puzzle_emb_ndim
        and model.puzzle_emb_len * model.hidden_size < model.puzzle_emb_ndim
        and model.puzzle_emb_len
    ):
        fail(
            "model.puzzle_emb_len",
            model.puzzle_emb_len,
            f"times model.hidden_size = {model.hidden_size} must hold model.puzzle_emb_ndim = {model.puzzle_emb_ndim}; 0 takes as many as it needs",
        )
    if config.device == "xla_cpu" and training.num_workers not in (None, 1):
        fail(
            "training.num_workers",
            training.num_workers,
            "device xla_cpu is one worker: use device=cpu for several",
        )
    if config.device == "tpu" and training.num_workers not in (None, planned_workers(config)):
        fail(
            "training.num_workers",
            training.num_workers,
            f"tpu.accelerator_type {config.tpu.accelerator_type} has {planned_workers(config)} chips, one worker each: leave it null",
        )
    workers, parts = planned_workers(config), training.grad_accumulation_steps
    if training.global_batch_size % (workers * parts):
        fail(
            "training.global_batch_size",
            training.global_batch_size,
            f"must be divisible by workers x training.grad_accumulation_steps = {workers} x {parts} = {workers * parts}"
            + (
                f" (tpu.accelerator_type {config.tpu.accelerator_type} has {workers} chips, one worker each)"
                if config.device == "tpu"
                else ""
            ),
        )


# of the sections model and training: keys that change how numbers are computed, and not the numbers
SAME_NUMBERS = {
    "model.activation_checkpointing",
    "training.compile",
    "training.pallas_kernels",
    "training.num_workers",
    "training.ema_strategy",
}


def planned_workers(config, device=None):
    """Workers the configuration is planned for: one a chip on a TPU slice, otherwise training.num_workers."""
    if (device or config.device) != "tpu":
        return config.training.num_workers or 1
    return tpu_types.slice_type(config.tpu.accelerator_type).chips


def total_steps(config, num_puzzles):
    """Optimizer steps of the whole run: floor(epochs * puzzles / global batch)."""
    return int(config.training.epochs * num_puzzles // config.training.global_batch_size)


def evaluation_interval_steps(config, num_puzzles):
    """`evaluation.interval_epochs` in optimizer steps, at least one."""
    return max(
        1,
        round(config.evaluation.interval_epochs * num_puzzles / config.training.global_batch_size),
    )


def differences(config, saved, sections):
    """ "section.key old -> new" of what in these sections differs from `saved` (a dict, as checkpoints hold it), as one text, but for
    what changes no number."""
    free = {"data.dataset_path", "data.prefetch_batches", *SAME_NUMBERS}
    return "; ".join(
        f"{section}.{key} {saved[section].get(key)!r} -> {value!r}"
        for section in sections
        for key, value in dataclasses.asdict(getattr(config, section)).items()
        if saved[section].get(key) != value and f"{section}.{key}" not in free
    )


def config_yaml(config):
    """The resolved configuration as YAML text."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, width=120)
