"""tpu_types.py: against torch_xla, jax and the TPU compiler; types that do not exist; its users."""

import glob
import importlib.util
import json
import os
import subprocess
import sys
import unittest
from types import SimpleNamespace
from unittest import mock

import device
import tpu_types
import workers
from config import load_config
from tests.helpers import ROOT, FolderTest, write_config
from tests.processes import run
from tpu_types import GENERATIONS, GIB, slice_type

V4, V6E = GENERATIONS["v4"], GENERATIONS["v6e"]


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


class SliceTypeTest(unittest.TestCase):
    def test_chips_hosts_and_shape(self):
        """As Google's pages on each TPU list them."""
        for name, chips, hosts, shape, bounds in (
            ("v4-8", 4, 1, "v4:2x2x1", (2, 2, 1)),
            ("v4-64", 32, 8, "v4:2x4x4", (2, 2, 1)),
            ("v4-128", 64, 16, "v4:4x4x4", (2, 2, 1)),
            ("v4-384", 192, 48, "v4:4x4x12", (2, 2, 1)),
            ("v5p-16", 8, 2, "v5p:2x2x2", (2, 2, 1)),
            ("v5p-1024", 512, 128, "v5p:8x8x8", (2, 2, 1)),
            ("v5p-12288", 6144, 1536, "v5p:16x16x24", (2, 2, 1)),
            ("v5litepod-1", 1, 1, "v5e:1x1", (1, 1, 1)),
            ("v5litepod-8", 8, 1, "v5e:2x4", (2, 4, 1)),
            ("v5litepod-16", 16, 4, "v5e:4x4", (2, 2, 1)),
            ("v6e-4", 4, 1, "v6e:2x2", (2, 2, 1)),
            ("v6e-32", 32, 8, "v6e:4x8", (2, 2, 1)),
        ):
            with self.subTest(name):
                found = slice_type(name)
                self.assertEqual((found.type, found.chips, found.hosts), (name, chips, hosts))
                self.assertEqual((found.topology_name, found.host_bounds), (shape, bounds))
                self.assertEqual(found.chips_per_host * found.hosts, chips)

    def test_types_that_do_not_exist(self):
        cores = r"N TensorCores, 2 a chip: 8, 16, 32, 64, or a multiple of 128 up to 8192\)"
        for name, says in (
            ("v4-9", rf"{cores}: take v4-8 or v4-16$"),
            ("v4-7", "take v4-8$"),
            ("v4-96", "take v4-64 or v4-128$"),
            ("v4-8320", "take v4-8192$"),
            ("v6e-12", r"N chips: 1, 4, 8, .* 256\): take v6e-8 or v6e-16$"),
            ("v6e-512", "take v6e-256$"),
            ("v5litepod-2", "take v5litepod-1 or v5litepod-4$"),
            ("v5e-16", "called v5litepod-N"),
            ("v5p-4", "take v5p-8$"),
            ("v3-8", "such as v4-32, v5litepod-16"),
            ("v4", "such as"),
            ("v4-", "^v4-N has N"),
            ("v4-08", "^v4-N has N"),
            ("v6e-16x", "^v6e-N has N"),
            ("", "such as"),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, says):
                slice_type(name)

    def test_every_type_of_the_examples_exists(self):
        self.assertEqual(
            [slice_type(name).generation.name for name in tpu_types.EXAMPLES.split(", ")],
            ["v4", "v5e", "v5p", "v6e"],
        )

    def test_nothing_but_the_standard_library_is_imported(self):
        code = (
            "import sys; before = set(sys.modules); import tpu_types; "
            "print([name for name in set(sys.modules) - before "
            "if name != 'tpu_types' and name.split('.')[0] not in sys.stdlib_module_names])"
        )
        self.assertEqual(
            subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True), "[]\n"
        )


class Host(FolderTest):
    """A folder like /sys/bus/pci/devices, of a host with a network card and some chips."""

    def bus(self, *devices, vendor=tpu_types.GOOGLE_PCI_VENDOR):
        for k, (this_vendor, device_id) in enumerate(
            [("0x1af4", "0x1000"), *((vendor, device_id) for device_id in devices)]
        ):
            (self.folder / f"bus{len(devices)}/0000:00:{k:02}.0").mkdir(parents=True)
            for name, text in (("vendor", this_vendor), ("device", device_id)):
                (self.folder / f"bus{len(devices)}/0000:00:{k:02}.0/{name}").write_text(f"{text}\n")
        return self.folder / f"bus{len(devices)}"

    def test_chips_of_a_host(self):
        self.assertEqual(
            tpu_types.chips_here(self.bus("0x005e", "0x005e", "0x005e", "0x005e")), (4, V4)
        )
        self.assertEqual(tpu_types.chips_here(self.bus("0x006f")), (1, V6E))
        self.assertEqual(tpu_types.chips_here(self.bus("0x0027", "0x0027")), (0, None))  # TPU v3
        self.assertEqual(tpu_types.chips_here(self.bus()), (0, None))
        self.assertEqual(tpu_types.chips_here(self.folder / "no_such_bus"), (0, None))

    def test_the_device_is_chosen_by_them(self):
        for bus, name in ((self.bus("0x0063"), "tpu"), (self.bus(), "cpu")):
            here = tpu_types.chips_here(bus)
            with (
                mock.patch.object(tpu_types, "chips_here", lambda: here),
                mock.patch("torch.cuda.is_available", lambda: False),
                mock.patch("importlib.util.find_spec", lambda _: True),
            ):
                self.assertEqual(device.resolve_device("auto"), name)
            with (
                mock.patch.object(tpu_types, "chips_here", lambda: here),
                mock.patch("torch.cuda.is_available", lambda: False),
                mock.patch("importlib.util.find_spec", lambda _: None),
            ):
                self.assertEqual(device.resolve_device("auto"), "cpu")  # without torch_xla

    @unittest.skipUnless(installed("torch_xla"), "torch_xla is not installed here")
    def test_torch_xla_counts_the_same_chips(self):
        from torch_xla._internal import tpu

        real = glob.glob
        for k, generation in enumerate(GENERATIONS.values(), 1):
            bus = self.bus(*[generation.pci_device] * k)
            with mock.patch.object(
                tpu.glob,
                "glob",
                lambda pattern: real(pattern.replace("/sys/bus/pci/devices", str(bus))),
            ):
                self.assertEqual(tpu.num_available_chips(), k)
            self.assertEqual(tpu_types.chips_here(bus), (k, generation))

    @unittest.skipUnless(installed("torch_xla"), "torch_xla is not installed here")
    def test_torch_xla_reads_the_types_and_makes_a_device_of_each_chip(self):
        from torch_xla._internal import tpu

        for name in tpu_types.EXAMPLES.split(", "):
            with mock.patch.dict(os.environ, TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=name):
                self.assertEqual(
                    (tpu.get_tpu_type(), tpu.num_logical_cores_per_chip()),
                    (slice_type(name).generation.prefix, 1),
                )
                self.assertGreaterEqual(tpu.version(), 4)

    @unittest.skipUnless(installed("jax"), "jax is not installed here")
    def test_jax_knows_the_chips_by_the_same_ids(self):
        from jax._src import hardware_utils

        self.assertEqual(hardware_utils._GOOGLE_PCI_VENDOR_ID, tpu_types.GOOGLE_PCI_VENDOR)
        for generation in GENERATIONS.values():
            self.assertEqual(
                hardware_utils._TPU_PCI_DEVICE_IDS[generation.pci_device].name, generation.name
            )


@unittest.skipUnless(installed("jax", "libtpu"), "jax and libtpu are not installed here")
class CompilerTest(FolderTest):
    def test_shapes_memory_and_clock_are_the_compiler_s(self):
        kinds = {
            "v4": "TPU v4",
            "v5e": "TPU v5 lite",
            "v5p": "TPU v5",
            "v6e": "TPU v6 lite",
        }  # jax's device kinds
        for types in (
            ("v4-8", "v4-32", "v4-64"),
            ("v5litepod-16", "v5litepod-1", "v5litepod-4", "v5litepod-8", "v5litepod-64"),
            ("v5p-8", "v5p-16", "v5p-32"),
            ("v6e-16", "v6e-1", "v6e-4", "v6e-8", "v6e-32", "v6e-256"),
        ):
            generation = slice_type(types[0]).generation
            with self.subTest(generation.name):
                command = [sys.executable, "tests/programs/ask_the_compiler.py"]
                output = run(self, [*command, *types, self.folder], seconds=600)
                shapes, cycles, usable = json.loads(output.splitlines()[-1])
                for name in types:
                    found = slice_type(name)
                    self.assertEqual(
                        shapes[name],
                        [found.chips, found.hosts, generation.cores, kinds[generation.name]],
                    )
                self.assertAlmostEqual(usable * GIB, generation.usable_hbm_bytes, delta=0.005 * GIB)
                # the clock makes of a large product's cycles most of the peak, and not more
                self.assertTrue(
                    0.8 < 2 * 4096**3 / (cycles / generation.clock_hz) / generation.peak_flops < 1,
                    (cycles, generation),
                )


class ReadersTest(FolderTest):
    def config(self, *overrides):
        return load_config(write_config(self.folder / "a.yaml"), overrides)

    def settings(self, *overrides, **environment):
        path = write_config(self.folder / "a.yaml")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
        done = subprocess.run(
            [sys.executable, "scripts/tpu_settings.py", str(path), *overrides],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={**clean, **environment},
        )
        return (
            done.returncode,
            dict(line.split("=", 1) for line in done.stdout.splitlines()),
            done.stderr,
        )

    def test_settings_of_the_scripts(self):
        for name, generation, chips, hosts, zone, image in (
            ("v4-16", "v4", "8", "2", "us-central2-b", "tpu-ubuntu2204-base"),
            ("v5litepod-8", "v5e", "8", "1", "europe-west4-b", "v2-alpha-tpuv5-lite"),
            ("v5p-32", "v5p", "16", "4", "us-east5-a", "v2-alpha-tpuv5"),
            ("v6e-16", "v6e", "16", "4", "europe-west4-a", "v2-alpha-tpuv6e"),
        ):
            with self.subTest(name):
                status, settings, _ = self.settings(f"tpu.accelerator_type={name}")
                self.assertEqual(status, 0)
                self.assertEqual(
                    [
                        settings[f"TPU_{key}"]
                        for key in (
                            "ACCELERATOR",
                            "GENERATION",
                            "CHIPS",
                            "HOSTS",
                            "ZONE",
                            "RUNTIME",
                        )
                    ],
                    [name, generation, chips, hosts, zone, image],
                )

    def test_what_is_given_goes_before_the_table(self):
        _, settings, _ = self.settings(
            "tpu.accelerator_type=v6e-16", "tpu.runtime_version=another", TPU_ZONE="us-east1-d"
        )
        self.assertEqual((settings["TPU_ZONE"], settings["TPU_RUNTIME"]), ("us-east1-d", "another"))
        _, settings, _ = self.settings(
            "tpu.accelerator_type=v6e-16", "tpu.zone=us-east5-b", TPU_ZONE="us-east1-d"
        )
        self.assertEqual(settings["TPU_ZONE"], "us-east5-b")

    def test_mistakes_are_one_line(self):
        for overrides, environment, says in (
            (["tpu.accelerator_type=v4-9"], {}, "take v4-8 or v4-16"),
            ([], {"TPU_BUCKET": "gs://b/trm"}, "3 to 63 characters"),
            (
                ["tpu.accelerator_type=v6e-8", "tpu.runtime_version=tpu-ubuntu2204-base"],
                {},
                "leave it null",
            ),
        ):
            status, _, said = self.settings(*overrides, **environment)
            self.assertEqual((status, said.count("\n"), said[:7]), (2, 1, "error: "), said)
            self.assertIn(says, said)

    def test_a_wrong_bucket_is_one_mistake_of_a_whole_sweep(self):
        with mock.patch.dict(os.environ, TPU_PROJECT="my-project-1", TPU_BUCKET="gs://b/trm"):
            done = subprocess.run(
                [
                    sys.executable,
                    "scripts/sweep.py",
                    "configs/e2_1.yaml",
                    "configs/e2_3.yaml",
                    "--slices",
                    "trm-a",
                    "--dry_run",
                ],
                cwd=ROOT,
                text=True,
                capture_output=True,
            )
        self.assertEqual(
            (done.returncode, done.stderr.count("error: "), done.stderr.count("\n")),
            (2, 1, 1),
            done.stderr,
        )

    def test_a_run_knows_its_chips(self):
        chips = SimpleNamespace(name="tpu", generation=V6E, workers=SimpleNamespace(world_size=4))
        workers.check_workers(self.config("device=tpu", "tpu.accelerator_type=v6e-4"), chips)
        other = self.config("device=tpu", "tpu.accelerator_type=v4-8")
        self.user_error(
            lambda: workers.check_workers(other, chips),
            "its chips are v4, and those of this host are v6e",
        )
        worker = device.Device("cpu")
        for worker.generation, peak in ((V4, 275e12), (V6E, 918e12)):
            self.assertEqual(
                worker.peak_flops(None), (peak, f"TPU {worker.generation.name} data sheet")
            )


if __name__ == "__main__":
    unittest.main()
