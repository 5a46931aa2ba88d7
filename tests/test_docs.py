"""README.md and docs/: every command is one that the kit takes, every file and test that they name
is there, every message they quote is printed by the code.

Rules for the documents. Commands stand in ```bash blocks, one a line; `<!-- needs the cloud -->`
directly above a block says that it cannot be run here. In docs/troubleshooting.md a heading of
level 3 that is a code span quotes a message: `<...>` stands for what the code fills in, ` ...` at
the end for the rest.
"""

import argparse
import ast
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import shutil
import sys
import unittest
from pathlib import Path
from unittest import mock

from config import load_config
from tests.helpers import ROOT, random_pairs, write_split
from tests.processes import run
from tests.slice import SliceTest, installed_commands

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CLOUD = "<!-- needs the cloud -->"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# written by runs and builds, not files of the repository
WRITTEN = {"config.yaml", "report.md"}
# commands of a shell, or of Google's and pip's, of which only the files that they name are looked
# at (gcloud's flags: GCloud)
OTHER = {"export", ".", "pip", "gcloud", "cd", "git", "tensorboard", "ruff", "mypy"}


class Command:
    """One command of a block. words: as the shell splits it; cloud: whether its block is marked."""

    def __init__(self, document, text, cloud):
        self.document, self.text, self.cloud = document, text, cloud
        inner = re.fullmatch(r"[A-Z_]+=\$\((.*)\)", text)
        self.words = shlex.split(os.path.expandvars(inner[1] if inner else text), comments=True)

    def __str__(self):
        return f"{self.document.name}: {self.text}"


def commands():
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for block in FENCE.finditer(text):
            cloud = text[: block.start()].rstrip("\n").endswith(CLOUD)
            if block[1] == "bash":
                lines = block[2].replace("\\\n", " ").splitlines()
                found += [
                    command for line in lines if (command := Command(document, line, cloud)).words
                ]
    return found


def scripts_in(words):
    """The script of the repository that a command runs, or None."""
    return (
        words[1]
        if words[0] in ("bash", "python")
        and len(words) > 1
        and re.fullmatch(r"[\w/.]+\.(sh|py)", words[1])
        else None
    )


class _Parsed(BaseException):
    """The command line was taken; its namespace."""


def parsed_by(script, words):
    """What the script's own parser makes of its command line; nothing else of it runs. Raises
    AssertionError where it refuses."""

    def ending(parse):
        def parse_and_end(self, *args, **kwargs):
            self.allow_abbrev = False  # a page has the flag's name
            raise _Parsed(parse(self, *args, **kwargs))

        return parse_and_end

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", ending(parser.parse_args)),
        mock.patch.object(parser, "parse_intermixed_args", ending(parser.parse_intermixed_args)),
    ):
        try:
            status, output = run_here(script, words)
        except _Parsed as end:
            return end.args[0]
    raise AssertionError(f"{script} ended with status {status}: {output}")


def run_here(script, words):
    """(exit status, what it prints) of a script of the repository, in this process: PyTorch is
    imported once."""
    output, path = io.StringIO(), str(ROOT / script)
    with (
        mock.patch.object(sys, "argv", [path, *words]),
        mock.patch.object(sys, "path", [str(Path(path).parent), str(ROOT), *sys.path]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code or 0, output.getvalue()
    return 0, output.getvalue()


class Commands(SliceTest):
    """In a copy of the kit that is a git repository, with a slice, a bucket and gcloud of this
    machine."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for folder in ("analysis", "configs/mini", "tests"):
            shutil.copytree(
                ROOT / folder,
                cls.kit / folder,
                ignore=shutil.ignore_patterns("__pycache__", "sample_results"),
            )
        cls.git("add", "--all")
        cls.git("commit", "--quiet", "--message=the rest")
        for name, puzzles in (("", 8000), ("-500", 500), ("-2000", 2000)):
            for split, count in (("train", puzzles), ("test", 20)):
                folder = cls.kit / "data" / f"quickstart{name}"
                write_split(folder / split, *random_pairs(9, count))

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.kit)

    def test_each_is_taken(self):
        found = commands()
        for command in found:
            with self.subTest(str(command)):
                self.check(command)
        ran = {scripts_in(command.words) for command in found}
        self.assertLessEqual(
            {
                f"scripts/{name}.sh"
                for name in (
                    "quickstart",
                    "run_tests",
                    "setup_tpu",
                    "launch_experiment",
                    "launch_sweep",
                    "keep_alive",
                    "download_results",
                    "delete_tpu",
                )
            },
            ran,
        )

    def check(self, command):
        words, script = command.words, scripts_in(command.words)
        for word in words:
            if re.fullmatch(
                r"(configs|scripts|analysis|tests)/\S+\.(yaml|sh|py)|[\w-]+\.py|requirements[\w-]*\.txt",
                word,
            ):
                self.assertTrue(list(self.kit.glob(word)), f"there is no {word}")
        if script is None:
            self.assertIn(words[0], OTHER, "no rule says how to check it")
        elif script.endswith(".py"):
            self.check_python(script, words[2:])
        elif script == "scripts/quickstart.sh":
            self.succeeds(
                ["bash", script, *words[2:], "--help"]
            )  # it reads its flags in their order
        elif script == "scripts/run_tests.sh":
            for word in words[2:]:
                self.assertTrue(
                    word in ("-v", "--help") or (ROOT / (word.replace(".", "/") + ".py")).exists(),
                    word,
                )
        else:
            self.check_cloud_script(script, words[2:], command.cloud)

    def check_python(self, script, words):
        arguments = parsed_by(script, words)
        configs = getattr(arguments, "config", None) or []
        for config in [configs] if isinstance(configs, str) else configs:
            load_config(config, getattr(arguments, "overrides", []))
        if "--generate" in words and "4" in words:
            self.succeeds([sys.executable, script, *words])
        elif "--print_config" in words:
            status, output = run_here(script, words)
            self.assertEqual(status, 0, output)
            self.assertIn("# per-worker batch: ", output)

    def check_cloud_script(self, script, words, cloud):
        first, end = words[0] if words else "", words.index("--") if "--" in words else len(words)
        if first == "status":
            self.assertIn("absent: ", self.succeeds(["bash", script, *words], status=6))
        elif "--status" in words:
            self.assertIn(
                "error: no cell of this sweep is in ",
                self.succeeds(["bash", script, *words], status=2),
            )
        else:
            printed = self.succeeds(["bash", script, *words[:end], "--dry_run", *words[end:]])
            self.assertRegex(
                printed,
                r"(?m)^\+ gcloud "
                if cloud and "sweep" not in script
                else "keep_alive.sh|train_tpu.py",
            )
        if (
            words[end + 1 :] and script != "scripts/launch_sweep.sh"
        ):  # the sweep has tried its flags on keep_alive.sh by now
            run_name = words[words.index("--run_name") :][:2] if "--run_name" in words else []
            overrides = [word for word in words[:end] if re.match(r"[a-z_.]+=", word)]
            parsed_by("train_tpu.py", ["--config", first, *run_name, *overrides, *words[end + 1 :]])

    def succeeds(self, words, status=0):
        return run(self, words, status, cwd=".")


class GCloud(unittest.TestCase):
    def test_flags_are_those_of_an_installed_gcloud(self):
        root, checked = installed_commands(self), 0
        for command in [command for command in commands() if command.words[0] == "gcloud"]:
            with self.subTest(str(command)):
                self.assertTrue(command.cloud, "its block is not marked")
                words, node = command.words[1:], root
                while words and words[0] in node["commands"]:
                    node = node["commands"][words.pop(0)]
                self.assertFalse(node["commands"], "it is not a whole command")
                for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
                    self.assertIn(flag, {**root["flags"], **node["flags"]})
                checked += 1
        self.assertGreater(checked, 3)


class Names(unittest.TestCase):
    def each(self, pattern):
        """(document, text found in it)."""
        return [
            (document, found)
            for document in DOCUMENTS
            for found in re.findall(pattern, FENCE.sub("", document.read_text()))
        ]

    def test_blocks_and_marks(self):
        for document in DOCUMENTS:
            text = document.read_text()
            self.assertEqual(text.count("```") % 2, 0, document)
            self.assertLessEqual(
                {block[1] for block in FENCE.finditer(text)},
                {"bash", "yaml", "text", "mermaid", "python"},
                document,
            )  # what a shell runs is never missed
            for block in FENCE.finditer(text):
                if block[1] == "python":
                    ast.parse(block[2])
            self.assertEqual(
                len(re.findall("<!--[^>]*cloud", text)),
                len(re.findall(f"^{CLOUD}\n```bash$", text, re.MULTILINE)),
                document,
            )

    def test_links(self):
        links = [
            (document, link)
            for document, link in self.each(r"\]\(([^)\s]+)\)")
            if not re.match(r"https?://|mailto:", link)
        ]
        self.assertTrue(links)
        for document, link in links:
            with self.subTest(document=document.name, link=link):
                path, _, anchor = link.partition("#")
                target = document.parent / path if path else document
                self.assertTrue(target.exists())
                if anchor:
                    headings = re.findall(
                        r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE
                    )
                    self.assertIn(
                        anchor,
                        [
                            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                            for heading in headings
                        ],
                    )

    def test_files(self):
        """In a code span a name that ends as a file of the repository does is one; without its
        folder where it is the only one."""
        named = [
            (document, name)
            for document, span in self.each(r"(?<!`)`([^`\n]+)`(?!`)")
            for name in re.findall(
                r"(?:^|(?<=[\s=(]))(?:[\w.*-]+/)*[\w.*-]+\.(?:py|sh|yaml|md|ipynb|txt)(?=$|[\s,;:)])",
                span,
            )
        ]
        named = [
            (document, name)
            for document, name in named
            if name not in WRITTEN and not re.match(r"(data|runs)/", name)
        ]
        self.assertGreater(len(named), 30)
        for document, name in named:
            with self.subTest(document=document.name, name=name):
                places = (
                    [name]
                    if "/" in name
                    else [name, f"scripts/{name}", f"analysis/{name}", f"tests/{name}"]
                )
                self.assertTrue(
                    any(
                        list(base.glob(place))
                        for base in (ROOT, document.parent)
                        for place in places
                    )
                )

    def test_tests(self):
        """`test_x` and `Case.test_x` are tests; the page names the file of each."""
        defined = {}
        for path in (ROOT / "tests").glob("test_*.py"):
            for node in ast.parse(path.read_text()).body:
                for item in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                        for name in (item.name, f"{node.name}.{item.name}"):
                            defined.setdefault(name, set()).add(f"tests/{path.name}")
        named = self.each(r"`((?:\w+\.)?test_\w+)`")
        self.assertGreater(len(named), 30)
        for document, name in named:
            with self.subTest(document=document.name, name=name):
                self.assertIn(name, defined)
                self.assertTrue(
                    any(path in document.read_text() for path in defined[name]), defined[name]
                )


HOLE = "\0"  # in the text of a message: what the code fills in
PREFIX = re.compile("^(error|warning): ")  # utils.run_cli and utils.warn print these


def python_texts(source):
    """Every string of a Python file, what it fills in as HOLE, with what is added to it by +."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return HOLE

    return {
        text(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    }


def shell_texts(source):
    """Every string that a shell script says, what it fills in as HOLE."""
    for pattern in (r"\$\([^()]*\)", r"\$\{[^{}]*\}", r"\$\w+"):
        source = re.sub(pattern, HOLE, source)
    source = re.sub(r'"\s*\\\n\s*"', " ", source)  # one text on two lines
    return set(
        re.findall(
            r'\b(?:fail|final|mistake|ended|refuse_uncommitted|say|note|echo)\b[^"\n]*"([^"\n]*)"',
            source,
        )
    )


@functools.cache
def printed_texts():
    texts = set()
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "scripts").iterdir(),
        *(ROOT / "analysis").glob("*.py"),
    ]:
        if path.suffix in (".py", ".sh"):
            texts |= (python_texts if path.suffix == ".py" else shell_texts)(path.read_text())
    return {PREFIX.sub("", text) for text in texts}


def is_printed(message):
    """Whether the code prints `message`: word for word, with one <...> for each thing that it fills
    in."""
    whole = not message.endswith(" ...")
    whole_text = re.sub(r"<[^<>]+>", HOLE, message.removesuffix(" ..."))
    ours = PREFIX.sub("", whole_text)
    if len(whole_text.replace(HOLE, "")) < 20:
        return False  # not enough to know it by
    return any(text == ours if whole else text.startswith(ours) for text in printed_texts())


class Messages(unittest.TestCase):
    def test_quoted_ones_are_printed(self):
        text = (ROOT / "docs" / "troubleshooting.md").read_text()
        quoted = [span for _, span in re.findall(r"^### (`+)(.+)\1$", text, re.MULTILINE)]
        self.assertGreater(len(quoted), 30)
        for message in quoted:
            with self.subTest(message):
                self.assertTrue(is_printed(message))

    def test_the_rule(self):
        """It finds what is printed, and nothing else."""
        self.assertTrue(is_printed("error: worker <rank> was killed by signal <signal>"))
        self.assertTrue(is_printed("error: there is no room for <name> now: <why>. Try ..."))
        for wrong in (
            "error: worker <rank> was ended by signal <signal>",
            "error: worker was killed by signal <signal>",
            "<a>: <b>",
            "error: there is no room for <name> now",
        ):
            self.assertFalse(is_printed(wrong), wrong)


class Hours(unittest.TestCase):
    """The hours of a run stand in its header, in docs/tpu_step.md and in configs/README.md."""

    def tables(self):
        """{slice: {configuration: "0.17 h"}} of docs/tpu_step.md."""
        text = (ROOT / "docs" / "tpu_step.md").read_text()
        study = text.split("## The study, with kernels")[1]
        return {
            section.split(" ", 1)[0]: dict(
                re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){2} ([\d.]+ h) \|", section, re.MULTILINE)
            )
            for section in study.split("\n### ")[1:]
        }

    def test_of_headers_are_those_of_the_report(self):
        tables = self.tables()
        self.assertEqual(set(tables), {"v4-64", "v4-32", "v4-8", "v6e-16", "v5litepod-16"})
        for path in sorted((ROOT / "configs").glob("e?_*.yaml")):
            with self.subTest(path.name):
                header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
                said = {
                    name: hours for hours, name in re.findall(r"([\d.]+ h) on a (v\S+\d)", header)
                }
                known = {
                    name: rows[path.stem] for name, rows in tables.items() if path.stem in rows
                }
                self.assertEqual(said, known)
                self.assertLessEqual({"v4-64", "v6e-16"}, set(known))

    def test_of_the_study_as_a_table(self):
        text = (ROOT / "configs" / "README.md").read_text()
        rows = re.findall(r"^\|[^|]*\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE)
        configs = {path.stem for path in (ROOT / "configs").glob("e?_*.yaml")}
        self.assertEqual({name for name, _ in rows}, configs)
        hours = {name: said for name, said in rows if said != "none"}
        self.assertEqual(hours, self.tables()["v4-32"])


if __name__ == "__main__":
    unittest.main()
