"""Records: what survives a resume, the event files, the lines for people."""

import contextlib
import io
import json
import struct
import unittest
from unittest import mock

from tensorboardX.proto.event_pb2 import Event

from metrics_logger import MetricsLogger, console_line
from tests.helpers import FolderTest


def training(step, loss=1.5):
    return {
        "step": step,
        "split": "train",
        "loss": loss,
        "exact_accuracy": 0.25,
        "cell_accuracy": 0.5,
        "mean_steps": 3.25,
        "lr": 1e-4,
        "steps_per_second": 2.0,
        "examples_per_second": 1234.5,
        "wall_time": 1000.0 + step,
    }


def evaluation(step, weights="ema"):
    return {
        "step": step,
        "split": "test",
        "weights": weights,
        "count": 12345,
        "exact_accuracy": 0.875,
        "cell_accuracy": 0.95,
        "q_halt_accuracy": 0.9,
        "exact_accuracy_by_step": [0.5, 0.875],
        "puzzles_per_second": 1234.5,
        "wall_time": 1000.0 + step,
    }


class LoggerTest(FolderTest):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "metrics.jsonl"

    def logged(self, *records, start_step=0, evaluated=False, tensorboard=False):
        """Log `records` as a run begun at `start_step`; returns what the console showed."""
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            logger = MetricsLogger(self.folder, start_step, evaluated, 100, tensorboard)
            for record in records:
                logger.log(record)
            logger.close()
        return stdout.getvalue()

    def records(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Records(LoggerTest):
    def test_records_survive_as_they_are(self):
        records = [training(10), training(20, 1 / 3), evaluation(20)]
        said = self.logged(*records)
        self.assertEqual(self.records(), records)
        self.assertEqual(said.splitlines(), [console_line(r, 100) for r in records])
        self.assertEqual([p.name for p in self.folder.iterdir()], ["metrics.jsonl"])

    def test_every_record_is_on_its_way_at_once(self):
        with contextlib.redirect_stdout(io.StringIO()):
            logger = MetricsLogger(self.folder, 0, False, 100, tensorboard=False)
            self.addCleanup(logger.close)
            logger.log(training(10))
        self.assertEqual(self.records(), [training(10)])  # before any flush: a kill loses none

    def test_resuming_drops_what_comes_after_the_checkpoint(self):
        before = [training(10), training(20), evaluation(20), training(30), evaluation(30)]
        for start_step, evaluated, kept in [
            (30, True, before),
            (30, False, before[:4]),  # its own evaluation was not finished: it is done again
            (20, True, before[:3]),
            (20, False, before[:2]),
            (25, True, before[:3]),
            (25, False, before[:3]),
            (10, False, before[:1]),
            (0, False, []),
            (99, False, before),
        ]:
            with self.subTest(start_step=start_step, evaluated=evaluated):
                self.path.write_text("".join(json.dumps(r) + "\n" for r in before))
                self.logged(
                    training(start_step + 10, 0.5), start_step=start_step, evaluated=evaluated
                )
                self.assertEqual(self.records(), [*kept, training(start_step + 10, 0.5)])

    def test_a_torn_last_line_is_dropped(self):
        whole = json.dumps(training(10)) + "\n"
        for torn in (json.dumps(training(20))[:40], json.dumps(training(20)), "{", "\0\0\0\0"):
            self.path.write_text(whole + torn)
            self.logged(training(20, 0.5), start_step=20)
            self.assertEqual(self.records(), [training(10), training(20, 0.5)])

    def test_any_other_damage_is_said(self):
        whole = json.dumps(training(10)) + "\n"
        for damaged in (whole[:40] + "\n", "\0\0\n", "[1]\n", "\n", "\udcff\n"):
            text = whole + damaged + whole
            self.path.write_text(text, errors="surrogateescape")
            self.user_error(
                lambda: self.logged(start_step=20),
                f"{self.path}: a record is damaged (line 2: ",
                "take that line out",
            )
            self.assertEqual(self.path.read_text(errors="surrogateescape"), text)

    def test_a_new_run_begins_with_nothing(self):
        self.logged(start_step=0)
        self.assertEqual(self.path.read_text(), "")


class EventFiles(LoggerTest):
    def scalars(self):
        """{(tag, step): value} of all event files: records of length, its CRC, an Event, its
        CRC."""
        found = {}
        for path in sorted((self.folder / "tensorboard").glob("events*")):
            content, at = path.read_bytes(), 0
            while at < len(content):
                (length,) = struct.unpack_from("<Q", content, at)
                event = Event.FromString(content[at + 12 : at + 12 + length])
                at += 16 + length
                for value in event.summary.value:
                    found[value.tag, event.step] = value.simple_value, event.wall_time
            self.assertEqual(at, len(content))
        return found

    def test_scalars_can_be_read_back(self):
        self.logged(
            training(10), training(20, 0.5), evaluation(20), evaluation(20, "raw"), tensorboard=True
        )
        scalars = self.scalars()
        for tag, step, value in [
            ("train/loss", 10, 1.5),
            ("train/loss", 20, 0.5),
            ("train/exact_accuracy", 20, 0.25),
            ("test_ema/exact_accuracy", 20, 0.875),
            ("test_raw/exact_accuracy", 20, 0.875),
            ("test_ema/count", 20, 12345),
        ]:
            self.assertEqual(scalars[tag, step], (value, 1000.0 + step))
        tags = {tag for tag, _ in scalars}
        self.assertFalse(
            {"train/step", "train/wall_time", "train/split", "test_ema/exact_accuracy_by_step"}
            & tags,
            tags,
        )

    def test_none_where_it_is_switched_off(self):
        self.logged(training(10), tensorboard=False)
        self.assertFalse((self.folder / "tensorboard").exists())


class Console(LoggerTest):
    def test_lines(self):
        self.assertEqual(
            console_line(training(10)),
            "step     10  loss 1.5000  exact 25.0%  cells 50.0%  steps 3.2  lr 1.0e-04  1,234 ex/s",
        )
        self.assertEqual(
            console_line(training(10), 3000),
            "step     10 of 3,000  loss 1.5000  exact 25.0%  cells 50.0%  steps 3.2  lr 1.0e-04  "
            "1,234 ex/s  25 min left",
        )
        nobody = dict.fromkeys(("exact_accuracy", "cell_accuracy", "mean_steps"))
        self.assertIn("exact -  cells -  steps -  lr", console_line(training(10) | nobody, 10))
        self.assertNotIn("left", console_line(training(10), 10))
        self.assertEqual(
            console_line(evaluation(20)),
            "step     20  test (ema weights, 12,345 puzzles)  exact 87.50%  cells 95.00%  "
            "halting head 90.0%  1,234 puzzles/s",
        )

    def test_the_bar_on_a_terminal(self):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        with (
            mock.patch("sys.stderr", terminal),
            contextlib.redirect_stdout(io.StringIO()) as stdout,
        ):
            logger = MetricsLogger(self.folder, 40, False, 100, tensorboard=False)
            logger.log(training(50))
            logger.advance(60)
            self.assertEqual((logger.bar.n, logger.bar.total), (60, 100))
            logger.close()
        self.assertIn(console_line(training(50), 100), terminal.getvalue())
        self.assertEqual(stdout.getvalue(), "")


if __name__ == "__main__":
    unittest.main()
