"""The processes of the tests: what they print is shown, and none outlives its test."""

import os
import signal
import sys
import time
import unittest

from tests.processes import begin, is_running, run, stays, wait_until

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('child', flush=True); time.sleep(60)"
)
# starts a child in a session of its own and ends when it is told to
PARENT = f"""
import subprocess, sys
command = [sys.executable, "-c", {STUBBORN!r}]
print(subprocess.Popen(command, start_new_session=True).pid, flush=True)
sys.stdin.readline()
print("last words")
"""


class Processes(unittest.TestCase):
    def in_a_test(self, function):
        """Run `function(test)` as a test of its own; returns its result."""

        class Inner(unittest.TestCase):
            def runTest(inner):
                function(inner)

        return Inner().run()

    def test_children_end_with_the_test(self):
        pids = []

        def body(test):
            waiting, ended = (begin(test, [sys.executable, "-c", PARENT], feed=True) for _ in "12")
            pids.extend([waiting.pid, int(waiting.line()), int(ended.line())])
            ended.feed()
            self.assertIn("last words", ended.ends())
            self.assertTrue(all(map(is_running, pids)))

        self.assertTrue(self.in_a_test(body).wasSuccessful())
        self.assertEqual([pid for pid in pids if is_running(pid)], [])

    def test_failures_show_the_output(self):
        def wrong(what):
            def body(test):
                what(begin(test, [sys.executable, "-c", "print('its words'); exit(3)"]))

            result = self.in_a_test(body)
            self.assertEqual((len(result.failures), len(result.errors)), (1, 0))
            return result.failures[0][1]

        self.assertRegex(wrong(lambda process: process.ends()), "status 3, not 0: its words")
        for what in (
            lambda process: process.says("other words"),
            lambda process: (process.line(), process.line()),
            lambda process: process.until(lambda: False),
        ):
            self.assertIn("ended with 3 too soon: its words", wrong(what))

    def test_what_takes_too_long_fails(self):
        process = begin(self, [sys.executable, "-c", "import time; time.sleep(60)"])
        for what in (
            lambda: process.ends(seconds=0.1),
            lambda: process.all_end(seconds=0.1),
            lambda: process.says("words", 0.1),
            lambda: wait_until(lambda: False, 0.1),
        ):
            began = time.monotonic()
            with self.assertRaisesRegex(AssertionError, "0.1 s"):
                what()
            self.assertLess(time.monotonic() - began, 5)
        process.send_signal(signal.SIGTERM)
        process.all_end(-signal.SIGTERM)

    def test_a_condition_that_must_stay(self):
        looks = iter([True] * 3 + [False] * 99)
        with self.assertRaisesRegex(AssertionError, "true no more before 30 s were over"):
            stays(lambda: next(looks), 30)
        began = time.monotonic()
        stays(lambda: True, 0.2)
        self.assertGreaterEqual(time.monotonic() - began, 0.2)

    def test_the_end_of_all(self):
        """That of a child in a session of its own, too."""
        process = begin(self, [sys.executable, "-c", PARENT], feed=True)
        child = int(process.line())
        process.feed()
        self.assertIn("last words", process.ends())
        with self.assertRaisesRegex(AssertionError, f"{child}. still run"):
            process.all_end(seconds=0.1)
        os.kill(child, signal.SIGKILL)
        with self.assertRaisesRegex(AssertionError, "status 0, not 1"):
            process.all_end(1)

    def test_a_terminal(self):
        """It gets keys, has a size, and a program that prints more than a terminal holds ends."""
        code = "import os; print(os.get_terminal_size(), input(), '.' * 100_000)"
        process = begin(self, [sys.executable, "-c", code], terminal=True)
        process.press(b"word\n")
        self.assertRegex(process.ends(), r"columns=100, lines=24\) word \.{100000}")
        process = begin(self, ["sleep", "60"], terminal=True)
        process.press(b"\x03")
        process.ends(-signal.SIGINT)
        process = begin(self, ["sleep", "60"], terminal=True)
        process.hang_up()
        process.ends(-signal.SIGHUP)

    def test_an_answer(self):
        self.assertEqual(run(self, ["cat"], answer="yes\n"), "yes\n")
        self.assertEqual(run(self, ["cat"]), "")
        run(self, ["true"], answer="nobody reads this\n")

    def test_environment(self):
        shown = "import os; print(os.environ.get('A'), os.environ.get('HOME'), flush=True)"
        self.assertEqual(
            run(self, [sys.executable, "-c", shown], environment={"A": 1, "HOME": None}), "1 None\n"
        )


if __name__ == "__main__":
    unittest.main()
