"""The TPU slices of a sweep: how one is written on the command line, what is asked for, and how it
is deleted."""

import dataclasses
import re
import subprocess
from pathlib import Path

import tpu_settings

from config import load_config
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
RULE = (
    "a slice is NAME, or NAME and in any order, each after a colon, its type (v6e-16), its zone "
    "(europe-west4-a), spot, queued: trm-b:v6e-16:europe-west4-a:spot"
)
TYPE = r"v\d+[a-z]*-\d+"
Place = tuple[str, str, str]  # project, accelerator type, zone


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of --slices. accelerator_type, zone: None where the configuration says it."""

    name: str
    accelerator_type: str | None = None
    zone: str | None = None
    spot: bool = False
    queued: bool = False

    @property
    def overrides(self):
        """What of the configuration is this slice's own."""
        own = {"name": self.name, "accelerator_type": self.accelerator_type, "zone": self.zone}
        return [f"tpu.{key}={value}" for key, value in own.items() if value]

    @property
    def flags(self):
        """For scripts/keep_alive.sh."""
        return ["--spot"] * self.spot + ["--queued"] * self.queued


def parse_slices(words):
    """The slices that the words of --slices name. Raises UserError."""
    slices = [_parse_slice(word) for word in words]
    names = [one.name for one in slices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--slices: {', '.join(twice)} is given twice: a slice takes one cell at a time, so "
            "give each a name of its own"
        )
    return slices


def _parse_slice(word):
    name, *parts = word.split(":")
    found = {}
    for part in parts:
        if part in ("spot", "queued"):
            key, value = part, True
        elif re.fullmatch(TYPE, part):
            key, value = "accelerator_type", part
        elif re.fullmatch(tpu_settings.RULES["zone"][0], part):
            key, value = "zone", part
        else:
            raise UserError(
                f"--slices {word}: {part!r} is no type, no zone and neither spot nor queued: {RULE}"
            )
        if key in found:
            kind = key.removeprefix("accelerator_")
            raise UserError(f"--slices {word}: {part!r} is the second {kind} of one slice: {RULE}")
        found[key] = value
    if not re.fullmatch(tpu_settings.RULES["name"][0], name):
        raise UserError(
            f"--slices {word}: {name!r} is no name (small letters, digits and -, a letter first): "
            f"{RULE}"
        )
    return Slice(name, **found)


def configs_on(path, changes, slices):
    """(configuration as it is on the first slice, {name: (project, accelerator type, zone)} of all
    slices, bucket) of a configuration file with overrides; without slices {} and "". Raises
    UserError, a line for every reason why it cannot run on one of the slices."""
    if not slices:
        return load_config(path, changes), {}, ""
    config, places, bucket, wrong = None, {}, "", {}
    for one in slices:
        words = [*changes, *one.overrides]
        try:
            loaded = load_config(path, words)
            if loaded.device == "auto":
                # On a slice this is tpu: the batch has to divide by its chips.
                load_config(path, [*words, "device=tpu"])
            settings = tpu_settings.slice_settings(loaded, words, ["project"])
        except UserError as error:
            wrong.setdefault(str(error).removeprefix(f"{path}: "), []).append(one.name)
            continue
        config, bucket = config or loaded, settings["TPU_BUCKET"]
        places[one.name] = (
            settings["TPU_PROJECT"],
            settings["TPU_ACCELERATOR"],
            settings["TPU_ZONE"],
        )
    if wrong:
        raise UserError(
            "\nerror: ".join(
                f"{path} on {', '.join(names)}: {text}" for text, names in wrong.items()
            )
        )
    return config, places, bucket


def check_one_kind(cells):
    """Raises UserError where the configurations do not agree on what a slice is: it is made once,
    for all of them."""
    wrong = []
    for name in cells[0].places if cells else ():
        kinds = {}
        for cell in cells:
            kinds.setdefault(cell.places[name], cell.path)
        if len(kinds) > 1:
            said = " and ".join(
                f"{kind} in {zone} of {project} by {path}"
                for (project, kind, zone), path in kinds.items()
            )
            wrong.append(
                f"--slices {name}: it is {said}: give its type and zone with its name, as "
                f"{name}:v4-64:us-central2-b"
            )
    if wrong:
        raise UserError("\nerror: ".join(wrong))


def delete_command(name, place):
    """The words that delete a slice. place: (project, accelerator type, zone)."""
    keys = dict(zip(("project", "accelerator_type", "zone"), place))
    return [
        "bash",
        "scripts/delete_tpu.sh",
        f"tpu.name={name}",
        *(f"tpu.{key}={value}" for key, value in keys.items()),
    ]


def delete_if_idle(name, place):
    """(exit status, output) of scripts/delete_tpu.sh, which leaves a slice alone on which something
    runs."""
    # a session of its own: Ctrl-C in the terminal does not leave it half deleted
    done = subprocess.run(
        [*delete_command(name, place), "--yes", "--if_idle"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return done.returncode, done.stdout
