"""Runs whose dataset and folder are in Cloud Storage, which is slow, away, closed or not there: the
real command on the emulator."""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import unittest
from unittest import mock

from checkpoint_manager import load_checkpoint
from storage import join, open_folder
from tests.gcs_server import GCSTest, emulator_port
from tests.processes import pause, run, wait_until
from tests.test_preemption import PreemptionTest

SECRET = "secret-4f1b7c"


class Reader(threading.Thread):
    """Somebody who looks at a run's checkpoints all the time: `wrong` says what was offered and not
    there, or not whole."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.wrong, self.seen, self.ended = folder, [], set(), threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(0.02):
            for name in self.folder.list("checkpoints/"):
                if name.endswith(".json"):
                    with contextlib.suppress(FileNotFoundError):  # retired meanwhile
                        self.look(name)

    def look(self, name):
        marker, token = self.folder.read_version(name)
        marker = json.loads(marker)
        try:
            payload = self.folder.read(name.replace(".json", ".pt"))
        except FileNotFoundError:
            payload = b""
        if self.folder.read_version(name)[1] == token:
            self.seen.add(marker["step"])
            if (len(payload), hashlib.sha256(payload).hexdigest()) != (
                marker["bytes"],
                marker["sha256"],
            ):
                self.wrong.append((name, marker, len(payload)))


class GCSRunTest(GCSTest, PreemptionTest):
    flags = outputs = ()

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls().train("--run_name", "unbroken")
        cls.local = cls.folder

    def setUp(self):
        super().setUp()
        self.runs, self.data = join(self.url, "runs"), join(self.url, "data")
        with mock.patch.dict(
            os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{emulator_port()}"}
        ):
            self.bucket = open_folder(self.url)  # past the proxy
        for path in (self.local / "data").rglob("*"):
            if path.is_file():
                self.bucket.put(path, f"data/{path.relative_to(self.local / 'data').as_posix()}")
        secret = self.folder / "key.json"
        secret.write_text(json.dumps({"type": "service_account", "private_key": SECRET}))
        patch = mock.patch.dict(
            os.environ,
            {
                "TRM_CACHE": str(self.folder / "cache"),
                "TRM_TEST_GCS": "20",
                "GOOGLE_APPLICATION_CREDENTIALS": str(secret),
            },
        )
        patch.start()
        self.addCleanup(patch.stop)
        self.flags = (f"data.dataset_path={self.data}", f"logging.output_dir={self.runs}")

    def begin(self, run_name, pauses, *flags):
        return super().begin(run_name, pauses, *self.flags, *flags)

    def ends(self, process, status=143, **options):
        output = super().ends(process, status, **options)
        self.outputs = [*self.outputs, output]
        return output

    def train(self, *args, **options):
        output = super().train(*self.flags, *args, **options)
        self.outputs = [*self.outputs, output]
        return output

    def saved(self, run_name):
        return sorted(
            int(re.search(r"(\d+)[.]json", name)[1])
            for name in self.bucket.list(f"runs/{run_name}/checkpoints/")
            if name.endswith(".json")
        )

    def fetched(self, name):
        path = self.folder / "fetched" / name
        self.bucket.get(name, path)
        return path

    def same_as_unbroken(self, run_name):
        ours = load_checkpoint(self.fetched(f"runs/{run_name}/checkpoints/checkpoint_step_60.pt"))
        theirs = load_checkpoint(
            self.local / "runs" / "unbroken" / "checkpoints" / "checkpoint_step_60.pt"
        )
        for content in (ours, theirs):
            content["config"]["data"].pop("dataset_path"), content["config"].pop("logging")
        self.same_content(ours, theirs)
        self.fetched(f"runs/{run_name}/metrics.jsonl")
        ours = self.records_in(self.folder / "fetched" / "runs", run_name)
        self.assertEqual(ours, self.records_in(self.local / "runs", "unbroken"))
        self.assertEqual(
            len({(r["step"], r["split"], r.get("weights"), r["count"]) for r in ours}), len(ours)
        )
        results = [
            json.loads(path.read_text())["results"]
            for path in (
                self.fetched(f"runs/{run_name}/eval.json"),
                self.local / "runs" / "unbroken" / "eval.json",
            )
        ]
        self.assertEqual(
            *[
                [
                    (r["step"], r["weights"], r["count"], r["exact_accuracy"], r["lm_loss"])
                    for r in result
                ]
                for result in results
            ]
        )

    def records_in(self, runs, run_name):
        with mock.patch.object(self, "folder", runs.parent):
            return self.records(run_name)

    def whole(self, run_name):
        """Every checkpoint that the bucket offers is what was written."""
        reader = Reader(open_folder(join(self.bucket.url, "runs", run_name)))
        pause(0.2)
        reader.ended.set()
        reader.join()
        self.assertEqual(reader.wrong, [])

    def nothing_secret(self):
        """Neither credentials nor what opens an upload stands in what was printed, uploaded or
        kept."""
        texts = {f"output {k}": output.encode() for k, output in enumerate(self.outputs)}
        texts |= {name: self.bucket.read(name) for name in self.bucket.list()}
        texts |= {
            str(path): path.read_bytes()
            for path in (self.folder / "cache").rglob("*")
            if path.is_file()
        }
        self.assertGreater(len(texts), 10)
        for name, text in texts.items():
            for word in (
                SECRET,
                "key.json",
                "upload_id",
                "upload/storage",
                f":{self.proxy.port}",
                f"port={self.proxy.port}",
                "Authorization",
            ):
                self.assertNotIn(word.encode(), text.replace(str(self.folder).encode(), b""), name)


class Runs(GCSRunTest):
    def test_killed_and_resumed_on_another_host_then_used(self):
        process = self.begin("run", {"train_step": 0.02}, "logging.tensorboard=true")
        self.arrived(process, "train_step", 33)
        process.signal_all(signal.SIGKILL)
        process.ends(-signal.SIGKILL)
        self.assertGreaterEqual(max(self.saved("run")), 21)
        os.environ["TRM_CACHE"] = str(self.folder / "another")
        output = self.train("--run_name", "run", "logging.tensorboard=true")
        self.assertRegex(output, "goes on after step (21|28):")
        self.assertIn(
            f"the last good checkpoint is {self.runs}/run/checkpoints/checkpoint_step_60.pt", output
        )
        self.same_as_unbroken("run")

        kinds = [
            re.sub(r"events.out.tfevents[.].*", "events", name.removeprefix("runs/run/"))
            for name in self.bucket.list("runs/")
        ]
        steps = self.saved("run")
        self.assertEqual(steps[-3:], [49, 56, 60])
        self.assertEqual(
            sorted(kinds),
            sorted(
                [
                    "config.yaml",
                    "eval.json",
                    "metrics.jsonl",
                    "starts.jsonl",
                    *["tensorboard/events"] * 2,
                    *[
                        f"checkpoints/checkpoint_step_{step}.{end}"
                        for step in steps
                        for end in ("json", "pt")
                    ],
                ]
            ),
        )
        self.whole("run")
        starts = [
            json.loads(line) for line in self.bucket.read("runs/run/starts.jsonl").splitlines()
        ]
        self.assertEqual(starts[0]["step"], 0)
        self.assertIn(starts[1]["step"], (21, 28))
        self.assertEqual(len(starts), 2)

        best = max(
            (
                json.loads(self.bucket.read(f"runs/run/checkpoints/checkpoint_step_{step}.json"))
                for step in steps
            ),
            key=lambda marker: (
                (marker["metrics"] or {"exact_accuracy": -1})["exact_accuracy"],
                marker["step"],
            ),
        )["step"]
        self.bucket.delete("runs/run/eval.json")
        self.train("--run_name", "run", "--eval_only", "--checkpoint", "best")
        content = json.loads(self.bucket.read("runs/run/eval.json"))
        self.assertEqual(
            [(r["step"], r["count"]) for r in content["results"]], [(best, 50), (best, 50)]
        )
        self.assertEqual(
            content["checkpoint"], f"{self.runs}/run/checkpoints/checkpoint_step_{best}.pt"
        )

        command = [sys.executable, "analysis/solve.py", "--checkpoint", f"{self.runs}/run"]
        output = run(self, command)
        self.assertIn(f"checkpoint_step_{best}.pt", output)
        self.assertIn("supervision step 3", output)
        source = f"{self.runs}/run/checkpoints/checkpoint_step_60.pt"
        self.assertIn(
            f"initial weights: {source}",
            self.train(
                "--run_name", "from", "--init_from", source, "--max_steps", "1", "training.lr=1e-9"
            ),
        )
        ours, theirs = (
            load_checkpoint(self.fetched(f"runs/{name}.pt"))["model"]
            for name in ("from/checkpoints/checkpoint_step_1", "run/checkpoints/checkpoint_step_60")
        )
        self.assertLess(max((ours[key] - theirs[key]).abs().max().item() for key in ours), 1e-4)
        self.nothing_secret()

    def test_dataset_is_downloaded_once_by_four_workers(self):
        self.train("--run_name", "four", "--max_steps", "1", "training.num_workers=4")
        files = [
            path
            for path in (self.local / "data").rglob("*")
            if path.is_file() and path.suffix in (".npy", ".json")
        ]
        self.assertEqual(
            self.proxy.count("GET", r"/o/[^?]*data(%2F|/)[^?]*[?].*alt=media"), len(files)
        )

    def held(self, run_name, place, count, pauses=None, seconds=20):
        """A run that waits where it comes to `place` for the count-th time, until held.unlink();
        with the real length of an attempt."""
        self.hold = self.folder / f"{run_name}.{count}"
        self.hold.touch()
        with mock.patch.dict(os.environ, TRM_TEST_GCS=str(seconds)):
            process = self.begin(
                run_name, {"train_step": 0, **(pauses or {}), place: str(self.hold.with_suffix(""))}
            )
        self.arrived(process, place, count)
        return process

    def test_away_in_the_middle(self):
        reader = Reader(open_folder(join(self.bucket.url, "runs", "away")))
        self.addCleanup(reader.ended.set)
        process = self.held("away", "train_step", 10, seconds=2)
        process.until(lambda: self.saved("away") == [7])
        process.until(lambda: 7 in reader.seen)
        self.proxy.refuse()
        self.hold.unlink()
        self.arrived(
            process, "train_step", 23
        )  # past the saves of steps 14, 20 and 21, and an evaluation
        self.assertEqual(self.saved("away"), [7])
        self.proxy.fail("cut_upload", 1000, method="PUT", path="upload_id")
        self.proxy.fail(
            "status",
            503,
            method="PUT",
            path="upload_id",
            message="try http://127.0.0.1/upload_id=5",
        )
        self.proxy.accept()
        output = self.ends(process, 0)
        wait_until(lambda: 60 in reader.seen or reader.wrong)
        reader.ended.set()
        reader.join()
        self.assertIn("; training goes on, and the save is tried again every 30 s", output)
        self.assertIn("warning: a newer save takes the place of the one that failed", output)
        self.assertEqual(reader.wrong, [])
        self.assertGreater(self.proxy.count("PUT", "upload_id"), 4)
        self.same_as_unbroken("away")
        self.assertEqual(
            [name for name in self.bucket.list("runs/") if "lock" in name or "tmp" in name], []
        )
        self.nothing_secret()

    def sigterm_in_an_upload(self, run_name, save, pauses=None):
        """SIGTERM while the upload of the save-th checkpoint does not get on."""
        process, go_on = self.held(run_name, "save", save, pauses), threading.Event()
        self.addCleanup(go_on.set)
        before = 7 * (save - 1)
        process.until(lambda: self.saved(run_name)[-1:] == [before])
        fault = self.proxy.fail("hold", go_on, method="PUT", path="upload_id")
        self.hold.unlink()
        process.until(fault.met.is_set)
        if pauses:
            self.arrived(process, "evaluate", 1)
        process.terminate()
        output = self.ends(process)
        self.assertRegex(
            output,
            r"warning: gs://\S*checkpoint_step_\d+[.]pt \(or its evaluation\) is not saved: ",
        )
        self.assertEqual(self.saved(run_name)[-1], before)
        go_on.set()  # the upload arrives after its sender is gone
        self.whole(run_name)
        self.assertIn(f"goes on after step {before}:", self.train("--run_name", run_name))
        self.same_as_unbroken(run_name)

    def test_sigterm_in_an_upload(self):
        self.sigterm_in_an_upload("step", 2)

    def test_sigterm_in_an_evaluation_and_an_upload(self):
        self.sigterm_in_an_upload("evaluation", 3, {"evaluate": 3600})

    def test_sigterm_while_it_is_away(self):
        process = self.held("away", "train_step", 10)
        process.until(lambda: self.saved("away") == [7])
        self.proxy.refuse()
        self.hold.unlink()
        self.arrived(process, "train_step", 17)
        process.terminate()
        output = self.ends(process)
        self.assertRegex(
            output,
            r"warning: gs://\S*checkpoint_step_\d+[.]pt \(or its evaluation\) is not saved: .*; "
            "the run will go on from the checkpoint before",
        )
        self.assertIn("could not be released", output)
        self.proxy.accept()
        self.whole("away")
        self.assertIn("goes on after step 7:", self.train("--run_name", "away", "--max_steps", "8"))

    def test_may_not_write(self):
        for method in ("POST", "PUT"):
            self.proxy.fail(
                "status",
                403,
                times=999,
                method=method,
                message="x does not have storage.objects.create access to the bucket",
            )
        self.user_mistake(
            "--run_name",
            "closed",
            says=["permission denied", "Storage Object Admin", f"{self.runs}/closed"],
        )
        self.assertEqual(self.bucket.list("runs/"), {})

    def test_no_bucket(self):
        self.user_mistake(
            "--run_name",
            "nowhere",
            "logging.output_dir=gs://no-such-bucket/runs",
            says=["there is no bucket 'no-such-bucket'"],
        )
        self.user_mistake(
            "--run_name",
            "nowhere",
            "data.dataset_path=gs://no-such-bucket/data",
            says=["there is no bucket 'no-such-bucket'"],
        )


if __name__ == "__main__":
    unittest.main()
