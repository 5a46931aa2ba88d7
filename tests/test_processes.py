"""The processes of the tests: what they print is shown, and none outlives its test."""

import signal
import sys
import time
import unittest

from tests.processes import begin, is_running, run, wait_until

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
            lambda: process.all_end(0.1),
            lambda: process.says("words", 0.1),
            lambda: wait_until(lambda: False, 0.1),
        ):
            began = time.monotonic()
            with self.assertRaisesRegex(AssertionError, "0.1 s"):
                what()
            self.assertLess(time.monotonic() - began, 5)
        process.send_signal(signal.SIGTERM)
        process.ends(-signal.SIGTERM)
        process.all_end()

    def test_environment(self):
        shown = "import os; print(os.environ.get('A'), os.environ.get('HOME'), flush=True)"
        self.assertEqual(
            run(self, [sys.executable, "-c", shown], environment={"A": 1, "HOME": None}), "1 None\n"
        )


if __name__ == "__main__":
    unittest.main()
