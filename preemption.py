"""SIGTERM, to one worker or to all: a checkpoint, then exit status 143, within seconds. The same after SIGHUP, and on
Google Cloud after the metadata server's notice that a host is preempted. Ctrl-C (SIGINT) of a run that is one process:
the same with 130; of several, their parent answers it (workers.py).

A signal that is only looked at between training steps is lost on a process that compiles or evaluates. So a thread
listens: while there is nothing to save it ends the process by itself, once every worker has nothing to save; else
the loop saves, at a step on which all workers agree.

The same thread ends this worker when another has failed or is not heard of any more: a collective may not notice that
for minutes, and one of a TPU not at all.
"""

import contextlib
import http.client
import os
import signal
import socket
import sys
import threading
import time

import torch

EXIT_STATUS = 143  # 128 + SIGTERM
AGREE_STEPS = 4  # steps between two votes; the result of a vote is read when the next one is due
POLL_SECONDS = 0.25  # between looks at the other workers
BEAT_SECONDS = 5  # between two signs of life
SILENT_LOOKS = (
    10  # in a row that met none, BEAT_SECONDS apart: with a look's own delay less than a minute
)
METADATA_SERVER = (
    "169.254.169.254"  # by number: where a name is not known, to ask for it may take half a minute
)
METADATA_SECONDS = 60  # after which the metadata server answers though nothing has changed
BACK_OFF_SECONDS = 10  # at most, between two requests to a metadata server that fails

_signals = None  # read end of a pipe into which a signal's number is written as it arrives
_arrived = threading.Event()
_which, _cause = signal.SIGTERM, "SIGTERM"  # what arrived, once it has, and its name
_heeded = {signal.SIGTERM}
_arriving = threading.Lock()
_at_once = True  # nothing here would be lost, and nobody else ends this process


def listen():
    """From now on SIGTERM ends this process with status 143, whatever it is doing: at once, until let_others_end_it() or
    a Preemption takes care of it. So does SIGHUP, unless this process was told to ignore it (nohup): where a host shuts
    down, it comes to a login's processes right after SIGTERM. To be called in the main thread; more than once is fine.

    Python runs a signal's handler in the main thread, between two bytecodes: during a compile that is much too late.
    The number that set_wakeup_fd writes is there at once, for any thread.
    """
    global _signals
    if _signals is None:
        _signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            _heeded.add(signal.SIGHUP)
            signal.signal(signal.SIGHUP, lambda *_: None)
        threading.Thread(target=_read_signals, name="signals", daemon=True).start()


def listen_to_keyboard():
    """From now on Ctrl-C, too, unless this process was told to ignore it; a second one is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _heeded.add(signal.SIGINT)
        signal.signal(
            signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler)
        )


def _read_signals():
    while True:
        come = _heeded.intersection(os.read(_signals, 64))
        if signal.SIGINT in come:
            _arrive("SIGINT", signal.SIGINT)
        elif come:
            _arrive("SIGTERM" if signal.SIGTERM in come else "SIGHUP")


def _arrive(cause, which=signal.SIGTERM):
    """Take note of the first that comes, by any of the ways. which: the signal that it counts as."""
    global _which, _cause
    with _arriving:
        if _arrived.is_set():
            return
        _which, _cause = which, cause
        _arrived.set()
    if _at_once:
        _say(f"{cause}: nothing is unsaved; status {exit_status()}")
        os._exit(exit_status())
    if which == signal.SIGINT:
        _say("interrupted: it saves and ends; once more to kill it")


def _say(text):
    with contextlib.suppress(
        OSError
    ):  # the terminal may be gone, and what follows must happen all the same
        print(text, file=sys.stderr, flush=True)


def listen_to_metadata_server():
    """From now on, on Google Cloud, the notice that this host is preempted counts as SIGTERM; elsewhere this does
    nothing. For one process of a host. A server that fails is asked again, without a word and without end.

    The value is `instance/preempted`: https://cloud.google.com/compute/docs/instances/spot (Compute Engine gives about
    30 s; the pages of Cloud TPU promise none). GCE_METADATA_HOST names another server, as for Google's own libraries.
    """
    host = os.environ.get("GCE_METADATA_HOST") or (METADATA_SERVER if _on_google_cloud() else None)
    if host:
        threading.Thread(target=_read_metadata, args=(host,), name="metadata", daemon=True).start()


def _on_google_cloud():
    if os.environ.get("PJRT_DEVICE") == "TPU":
        return True
    try:
        with open("/sys/class/dmi/id/product_name") as file:
            return file.read().startswith("Google")
    except OSError:
        return False


def _read_metadata(host):
    """Wait for the notice of preemption, as `_read_signals` waits for a signal."""
    # an ETag that no value has: the first answer comes at once, and a notice from before is not missed
    etag, pause = "0", 1
    while True:
        try:
            value, etag = _metadata(host, etag)
            if value == b"TRUE":
                return _arrive(f"the notice that {socket.gethostname()} is preempted")
            pause = 1  # and not 0, for a server that does not wait
        except (OSError, http.client.HTTPException):  # 503 while it is restarted; or it is none
            pause = min(2 * pause, BACK_OFF_SECONDS)
        time.sleep(pause)


def _metadata(host, etag):
    """(value, its ETag) of `instance/preempted`, once that is another than `etag` or METADATA_SECONDS have passed."""
    # http.client heeds no proxy's settings
    with contextlib.closing(
        http.client.HTTPConnection(host, timeout=METADATA_SECONDS + 10)
    ) as connection:
        connection.request(
            "GET",
            f"/computeMetadata/v1/instance/preempted?wait_for_change=true&last_etag={etag}"
            f"&timeout_sec={METADATA_SECONDS}",
            headers={"Metadata-Flavor": "Google"},
        )
        answer = connection.getresponse()
        # whoever else answers at that address does not know this header
        if answer.status != 200 or answer.getheader("Metadata-Flavor") != "Google":
            raise http.client.HTTPException(f"status {answer.status}")
        return answer.read(16).strip(), answer.getheader("ETag", "0")


def let_others_end_it():
    """From now on somebody else ends this process after a SIGTERM: the workers it waits for, or a Preemption."""
    global _at_once
    _at_once = False


def requested():
    """Whether this process, or a fellow worker's, has received a signal to end."""
    return _arrived.is_set()


def cause():
    """What has come, for messages: a signal's name, or which host's notice."""
    return _cause


def exit_status():
    """Of a process that has ended because of it: 143 or 130."""
    return 128 + _which


def wait():
    """Return when this process has received SIGTERM."""
    _arrived.wait()


class Preemption:
    """How one worker's training ends on SIGTERM, or on what else is listened to.

    device: device.Device, joined with its fellow workers. hurry(): called when SIGTERM has come. leave(): called before
    the process ends outside of the loop, for what must not be cut off, as an upload; returns whether nothing was.
    """

    def __init__(self, device, hurry, leave):
        let_others_end_it()
        self.device, self.hurry, self.leave = device, hurry, leave
        # nothing trained is unsaved: true before the first step is done, and while a saved state is evaluated
        self.nothing_to_lose = True
        self.vote, self.met = (
            None,
            False,
        )  # (work, votes) under way, and whether a checkpoint has been made since it began
        self.store = device.second_store()
        self.beats = 0  # of this worker
        self.heard = {}  # rank: what its last sign of life was, "number host"
        self.silent = {}  # rank: looks in a row at which there was no new one
        self.asked = None  # the round of questions that the store has to answer, while it does
        self.closed, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self.guard = threading.Thread(target=self._watch_store, name="store", daemon=True)
        self.thread.start()
        self.guard.start()

    def close(self):
        """Stop listening. A thread that is in the store's C++ code when the interpreter ends would abort the process."""
        self.closed.set()
        self.thread.join()
        self.ended.set()
        self.guard.join()

    def alone(self):
        """The fellow workers have ended, and all went well: there is nobody to agree with any more."""
        self.store = None

    def first_failure(self, status):
        """Tell the others, which end then, that this worker fails with `status`. None, or the status of one that was first."""
        try:
            if self.store is None or self.store.add("failures", 1) == 1:
                if self.store:
                    self.store.set("failed", str(status))
                return None
            return int(self.store.get("failed"))
        except RuntimeError:
            return None

    def saved(self):
        """A checkpoint has been made, on every worker at this step: a wish for one that is under way is met."""
        self.met = True

    def poll(self, step, save_due):
        """(stop, save): whether to save and end after `step`, and whether to save. The same on every worker at the same step.

        save_due: this worker's wish for a checkpoint. Costs an all-reduce between hosts every AGREE_STEPS steps, for
        which nobody waits: its result is read AGREE_STEPS later. The device is not waited for at all.
        """
        if self.store is None:
            return requested(), save_due
        if step % AGREE_STEPS:
            return False, False
        stop = save = False
        if self.vote:
            work, votes = self.vote
            self.device.wait_for_vote(work)
            stop, save = (votes > 0).tolist()
            save = save and not self.met
        votes, self.met = torch.tensor([requested(), save_due], dtype=torch.int32), False
        self.vote = self.device.start_vote(votes), votes
        return stop, save

    # ----- the threads -----
    def _watch(self):
        """Tell the other workers of a SIGTERM here, take note of one there; leave once nobody has anything to lose.
        Give signs of life, and leave where another gives none.

        A worker that has said so and then trains on a little loses nothing but those steps, if the others have said so too.
        """
        said = hurried = False
        looked, rounds, without = time.monotonic() - BEAT_SECONDS, 0, 0
        while not self.closed.wait(POLL_SECONDS):
            store = self.store
            try:
                rounds += 1
                self.asked = rounds if store else None
                if store and store.check(["failed"]):
                    status = int(store.get("failed"))
                    self.asked = None
                    self.leave()
                    os._exit(status)
                if store and not requested() and store.check(["requested"]):
                    _arrive(store.get("requested").decode())
                elif store and requested() and not said:
                    store.set("requested", cause())
                if store and time.monotonic() - looked >= BEAT_SECONDS:
                    looked = time.monotonic()
                    self._look(store)
                if requested() and not hurried:
                    self.hurry()
                    hurried = True
                without = without + 1 if without else 0
                if without * POLL_SECONDS > BEAT_SECONDS * SILENT_LOOKS:
                    self._end_without([self._store_holder()])
                if not requested() or not (said or self.nothing_to_lose):
                    continue
                if store and not said:
                    store.set(f"nothing to lose/{self.device.rank}", "1")
                said = True
                if store and not store.check(
                    [f"nothing to lose/{rank}" for rank in range(self.device.world_size)]
                ):
                    continue
            except RuntimeError:
                # who holds the store is gone: the training's next collective says so, or waits without end
                self.store, self.asked, without = None, None, 1
                continue
            self.asked = None
            unsaved = "" if self.leave() else "what the warning names but "
            _say(
                f"{cause()}: {unsaved}nothing is unsaved; worker {self.device.rank} ends with status {exit_status()}"
            )
            os._exit(exit_status())
        if self.store:
            with contextlib.suppress(
                RuntimeError
            ):  # the others may be at work for long, and wait for no more
                self.store.set(f"beat/{self.device.rank}", "ended")

    def _look(self, store):
        """Give a sign of life, and look for those of the others.

        They are counted, not timed: hosts' clocks differ, and this process may itself have been stopped, as with its
        laptop.
        """
        self.beats += 1
        store.set(f"beat/{self.device.rank}", f"{self.beats} {socket.gethostname()}")
        keys = [f"beat/{rank}" for rank in range(self.device.world_size)]
        if not store.check(keys):  # multi_get would wait for those that have not begun
            return
        for rank, beat in enumerate(text.decode() for text in store.multi_get(keys)):
            self.silent[rank] = (
                0 if beat == "ended" or beat != self.heard.get(rank) else self.silent[rank] + 1
            )
            self.heard[rank] = beat
        if max(self.silent.values()) >= SILENT_LOOKS:
            # the others of its host vanish with it, and may have given their last sign a moment later
            gone = [rank for rank, looks in self.silent.items() if 2 * looks >= SILENT_LOOKS]
            self._end_without([self._name(rank) for rank in gone])

    def _watch_store(self):
        """End this worker when the store answers no more: once its host has vanished a question may never return."""
        asked, looks = None, 0
        while not self.ended.wait(BEAT_SECONDS):
            looks = looks + 1 if self.asked and self.asked == asked else 0
            asked = self.asked
            if looks >= SILENT_LOOKS:
                self._end_without([self._store_holder()], tell=False)

    def _name(self, rank):
        return f"worker {rank} on {self.heard[rank].partition(' ')[2]}"

    def _store_holder(self):
        if self.device.store_is_apart():
            return "the process that started the workers"
        return self._name(0) if 0 in self.heard else f"worker 0 on {os.environ['MASTER_ADDR']}"

    def _end_without(self, silent, tell=True):
        """Leave with status 1 because of workers that give no sign of life; the first to see it says so.
        tell: the others, by the store, which answers."""
        status = self.first_failure(1) if tell else None
        if status is None:
            seconds, who = BEAT_SECONDS * SILENT_LOOKS, ", ".join(silent)
            _say(
                f"error: no sign of life for {seconds:g} s from {who}: gone, or stopped: "
                "run the same command again, it goes on from the last checkpoint"
            )
        self.asked = None
        self.leave()
        os._exit(status or 1)
