"""docs/architecture.md: its drawing has every file of the top level, and imports follow it."""

import ast
import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
DRAWING = re.search(r"^```mermaid\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
MODULES = {path.stem for path in ROOT.glob("*.py")}


def boxes():
    """{module: the box that it is drawn in}."""
    found = {}
    for box, text in re.findall(r'^ *(\w+)\["([^"]*)"\]$', DRAWING, re.MULTILINE):
        for module in MODULES & set(re.findall(r"\w+", text)):
            found.setdefault(module, set()).add(box)
    return found


def reached(box, arrows):
    """`box` and all boxes below it. arrows: (from, to) pairs."""
    found = {box}
    while new := {to for start, to in arrows if start in found} - found:
        found |= new
    return found


def imports(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = [
        [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    return {name for found in names for name in found} & MODULES


class Drawing(unittest.TestCase):
    def test_every_file_is_in_one_box_and_in_the_table(self):
        found = boxes()
        self.assertEqual(set(found), MODULES)
        for module, drawn in found.items():
            self.assertEqual(len(drawn), 1, module)
            self.assertIn(f"`{module}.py`", PAGE)

    def test_imports_follow_the_arrows(self):
        arrows = set(re.findall(r"(\w+) --> (\w+)", DRAWING))
        self.assertGreater(len(arrows), 10)
        for start, end in arrows:
            self.assertNotIn(start, reached(end, arrows), f"{start} and {end} go in a circle")
        found = {module: min(drawn) for module, drawn in boxes().items()}
        for module, box in found.items():
            for other in imports(module):
                with self.subTest(f"{module} imports {other}"):
                    self.assertIn(found[other], reached(box, arrows))


if __name__ == "__main__":
    unittest.main()
