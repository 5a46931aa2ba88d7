"""The TPU kernels: what they compute, and that the TPU compiler accepts them.

The cases are in tests/kernel_cases.py and tests/programs/compile_kernels.py.
"""

import importlib.util
import sys
import unittest

from tests.processes import run


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


class Kernels(unittest.TestCase):
    def output(self, *command):
        command = [sys.executable, "-m", *command]
        return run(self, command, seconds=900, environment={"JAX_PLATFORMS": "cpu"})

    @unittest.skipUnless(installed("jax", "torch_xla"), "jax and torch_xla are not installed here")
    def test_they_compute_what_the_model_does(self):
        output = self.output("unittest", "tests.kernel_cases")
        self.assertRegex(output, r"Ran 12 tests in .*\n\nOK$")

    @unittest.skipUnless(installed("jax", "libtpu"), "jax and libtpu are not installed here")
    def test_they_compile_with_the_installed_libtpu(self):
        """Each of them at the widths of the study's models.

        The libtpu of requirements-tpu.txt is the one that torch_xla uses on a TPU VM. A v6e has one
        core a chip, and enough VMEM also for the widest channel mixing.
        """
        # a v5e refuses that one unless it is told that the kernel may take more than 16 MiB
        for words, kernels in ((("v4-8",), 6), (("v6e-8",), 7), (("v5litepod-8", "--last"), 1)):
            with self.subTest(words):
                self.assertEqual(
                    self.output("tests.programs.compile_kernels", *words).count("compiled"), kernels
                )


if __name__ == "__main__":
    unittest.main()
