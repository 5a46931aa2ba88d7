"""The rules of the house: what may import what, as docs/architecture.md draws it, and how long a
function may be.

An exception that is no longer needed fails, too.
"""

import ast
import functools
import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION = 60

# {module: what it must not import, directly or by what it imports}
APART = {
    "trm_model": {"storage", "checkpoint_manager"},
    "config": {"torch", "torch_xla"},
    "utils": {"torch", "torch_xla"},
    "startup": {"torch", "torch_xla", "numpy", "yaml"},
}
# packages that a function may import where it needs them: {name: why not at the top}
OPTIONAL = {
    "PIL": "requirements-analysis.txt; only for an animation",
    "google": "takes a second, and a run in a folder of this machine does without",
    "google_crc32c": "comes with google",
    "huggingface_hub": "only for a download",
    "jax": "requirements-tpu.txt; its compiler is wanted in one process only",
    "matplotlib": "requirements-analysis.txt; only for an animation",
    "packaging": "where it is missing, a message says so",
    "requests": "comes with google",
    "tensorboardX": "only where a configuration asks for it",
    "torch_xla": "absent where no TPU is; its import can claim the chips",
    "tqdm": "only on a terminal",
    "urllib3": "comes with google",
}
# {(file, what it imports inside a function, or "*" for anything): why not at the top}
INSIDE = {
    ("device.py", "xla_program"): "needs torch_xla",
    ("mixing.py", "pallas_mixing"): "needs torch_xla and jax",
    ("mixing.py", "xla_mixing"): "needs torch_xla",
    ("scripts/check_devices.py", "benchmark"): "only --steps needs what is in analysis/",
    ("scripts/diagnose_sections.py", "*"): "hosts may be broken: each section imports its own",
    ("scripts/sweep_cells.py", "train_state"): "PyTorch takes seconds; slices do without",
    ("workers.py", "torch"): "torch.distributed takes seconds",
}
# longer than LONGEST_FUNCTION: each tells one story, or lists cases, in order
LONG = {
    "tests/package_index.py __init__",
    "tests/test_config.py test_impossible_combinations",
    "tests/test_gcs_runs.py test_killed_and_resumed_on_another_host_then_used",
    "tests/test_rehearsal.py test_the_whole_day",
    "tests/test_scripts.py test_dry_run_executes_nothing",
    "tests/test_scripts.py test_from_start_to_results",
    "tests/test_scripts.py test_missing_and_wrong",
}


PROCESSES = "tests/processes.py"
PAST = {"subprocess.Popen", "time.sleep", "pty.fork", "pty.openpty", "pty.spawn", "os.killpg"}


def python_files():
    """{path in the repository: its parsed content}, of the product and its tests."""
    paths = [
        path
        for folder in ("", "scripts", "analysis", "tests", "tests/programs")
        for path in sorted((ROOT / folder).glob("*.py"))
    ]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


FILES = python_files()
ROOT_MODULES = {name.removesuffix(".py") for name in FILES if "/" not in name}
SCRIPTS = {Path(name).stem for name in FILES if name.startswith(("scripts/", "analysis/"))}


def imported(node):
    """The modules that an import statement names; [] for any other node."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    return []


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def imports_inside(name):
    """What the functions of a file, or of a root module, import: the first part of each name."""
    tree = FILES[name if name.endswith(".py") else f"{name}.py"]
    return {
        module.split(".")[0]
        for function in functions(tree)
        for node in ast.walk(function)
        for module in imported(node)
    }


@functools.cache
def imports_at_the_top(module):
    """What a root module imports when it is imported itself: the first part of each name."""
    found, waiting = set(), list(FILES[f"{module}.py"].body)
    while waiting:
        node = waiting.pop()
        found |= {name.split(".")[0] for name in imported(node)}
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found


def reached(module, edges):
    """All that `module` imports, directly or not; edges: {root module: what it imports}."""
    found, waiting = set(), [module]
    while waiting:
        new = edges.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def circles():
    """Imports inside functions count: they hide a circle, and do not open it."""
    edges = {name: imports_at_the_top(name) | imports_inside(name) for name in ROOT_MODULES}
    return {name for name in ROOT_MODULES if name in reached(name, edges)}


def not_apart():
    edges = {name: imports_at_the_top(name) for name in ROOT_MODULES}
    return {
        f"{name} imports {other}"
        for name, others in APART.items()
        for other in others & reached(name, edges)
    }


def inside_without_reason():
    return {
        f"{name} imports {module}"
        for name in FILES
        if not name.startswith("tests/")
        for module in imports_inside(name) - set(OPTIONAL)
        if not {(name, module), (name, "*")} & set(INSIDE)
    }


def imports_of_scripts():
    forbidden = SCRIPTS - ROOT_MODULES | {"scripts", "analysis", "tests"}
    return {
        f"{name} imports {other}"
        for name in ROOT_MODULES
        for other in (imports_at_the_top(name) | imports_inside(name)) & forbidden
    }


def starts_or_sleeps():
    """Tests that start a process and leave it running, end a process group, or sleep, past
    tests/processes.py. Programs that tests start are apart."""
    return {
        f"{name}, line {node.lineno}: {node.attr}"
        for name, tree in FILES.items()
        if name.startswith("tests/") and name != PROCESSES and "/programs/" not in name
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and f"{ast.unparse(node.value)}.{node.attr}" in PAST
    }


def long_functions():
    """The functions longer than LONGEST_FUNCTION, those named in LONG among them."""
    return {
        f"{name} {function.name}"
        for name, tree in FILES.items()
        for function in functions(tree)
        if function.end_lineno - function.lineno + 1 > LONGEST_FUNCTION
    }


RULES = {
    "no circle among the root modules": circles,
    "modules that stay apart": not_apart,
    "no import inside a function without a reason": inside_without_reason,
    "no root module imports scripts, analysis or tests": imports_of_scripts,
    f"tests start processes and wait by {PROCESSES}": starts_or_sleeps,
    f"no function over {LONGEST_FUNCTION} lines": lambda: long_functions() - LONG,
}


PAGE = (ROOT / "docs" / "architecture.md").read_text()
DRAWING = re.search(r"^```mermaid\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def boxes():
    """{module: the box that it is drawn in}."""
    found = {}
    for box, text in re.findall(r'^ *(\w+)\["([^"]*)"\]$', DRAWING, re.MULTILINE):
        for module in ROOT_MODULES & set(re.findall(r"\w+", text)):
            found.setdefault(module, set()).add(box)
    return found


def below(box, arrows):
    """`box` and all boxes below it. arrows: (from, to) pairs."""
    found = {box}
    while new := {to for start, to in arrows if start in found} - found:
        found |= new
    return found


class Rules(unittest.TestCase):
    def test_rules_are_kept(self):
        for rule, broken in RULES.items():
            with self.subTest(rule):
                found = sorted(broken())
                self.assertFalse(found, f"{rule}; against it: {found}")

    def test_exceptions_are_needed(self):
        used = {(name, module) for name in FILES for module in imports_inside(name)}
        used |= {(name, "*") for name, _ in used}
        self.assertEqual(set(INSIDE) - used, set(), "take these out of INSIDE")
        self.assertEqual(set(OPTIONAL) - {module for _, module in used}, set())
        self.assertEqual(LONG - long_functions(), set(), "take these out of LONG")


class Drawing(unittest.TestCase):
    def test_every_file_is_in_one_box_and_in_the_table(self):
        found = boxes()
        self.assertEqual(set(found), ROOT_MODULES)
        for module, drawn in found.items():
            self.assertEqual(len(drawn), 1, module)
            self.assertIn(f"`{module}.py`", PAGE)

    def test_imports_follow_the_arrows(self):
        arrows = set(re.findall(r"(\w+) --> (\w+)", DRAWING))
        self.assertGreater(len(arrows), 10)
        for start, end in arrows:
            self.assertNotIn(start, below(end, arrows), f"{start} and {end} go in a circle")
        found = {module: min(drawn) for module, drawn in boxes().items()}
        for module, box in found.items():
            for other in (imports_at_the_top(module) | imports_inside(module)) & ROOT_MODULES:
                with self.subTest(f"{module} imports {other}"):
                    self.assertIn(found[other], below(box, arrows))


if __name__ == "__main__":
    unittest.main()
