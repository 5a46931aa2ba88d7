"""How a run ends early: with a checkpoint and an exit status, within seconds.

Three things end it with exit status 143, whether one worker gets them or all: SIGTERM, SIGHUP, and
on Google Cloud the notice of the metadata server that a host is preempted. Ctrl-C (SIGINT) ends a
run of one process with status 130. In a run of several processes their parent handles Ctrl-C
(workers.py).

A process that compiles or evaluates would come too late if it looked for signals only between two
training steps. So a thread listens. If no worker has anything unsaved, the thread of each worker
ends its process. Otherwise the training loop saves and ends, at a step on which all workers agree.

The same thread ends this worker when another one has failed, or gives no sign of life any more: a
collective may not notice that for minutes, and a collective on a TPU may never notice it.
"""

import contextlib
import http.client
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from collectives import Workers
from utils import UserError, WorkerGone

EXIT_STATUS = 143  # 128 + SIGTERM
# steps between two votes; the result of a vote is read when the next one is due
AGREE_STEPS = 4
POLL_SECONDS = 0.25  # between two looks at the other workers
BEAT_SECONDS = 5  # between two signs of life
# A worker counts as gone after so many looks in a row, BEAT_SECONDS apart, that found no new sign
# of life. With the delays of the looks themselves this is less than a minute.
SILENT_LOOKS = 10
# After another worker is gone: how long to wait for the news that it was ended by SIGTERM.
NEWS_SECONDS = 1
# the address and not the name: away from Google Cloud, looking up the name may take half a minute
METADATA_SERVER = "169.254.169.254"
METADATA_SECONDS = 60  # after which the metadata server answers though nothing has changed
BACK_OFF_SECONDS = 10  # at most, between two requests to a metadata server that fails

_signals: int | None = None  # read end of a pipe: the number of each signal is written into it
_end_requested = threading.Event()
# of the request to end: the signal that it counts as, and what to call it in messages
_signal, _cause = signal.SIGTERM, "SIGTERM"
_ending_signals = {signal.SIGTERM}
_request_lock = threading.Lock()
_exit_immediately = True


# --------------------------------------------------------------------------------------------------
# What ends a run
# --------------------------------------------------------------------------------------------------
def listen() -> None:
    """From now on SIGTERM and SIGHUP end this process with status 143, whatever it is doing.

    They end it at once until disable_immediate_exit() is called or a Preemption is made. After that
    the request is only noted (`requested`), and the Preemption, or the parent process, decides when
    to end.

    SIGHUP comes to the processes of a login right after SIGTERM when a host shuts down. It is left
    alone if this process was started to ignore it (nohup). Call this in the main thread; a second
    call does nothing.

    Python runs a signal's handler in the main thread, between two bytecodes: during a compile this
    is much too late. set_wakeup_fd writes the signal's number into a pipe at once, where another
    thread reads it.
    """
    global _signals
    if _signals is None:
        _signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            _ending_signals.add(signal.SIGHUP)
            signal.signal(signal.SIGHUP, lambda *_: None)
        threading.Thread(target=_read_signals, name="signals", daemon=True).start()


def listen_to_keyboard() -> None:
    """Handle Ctrl-C (SIGINT), too, from now on, unless this process was started to ignore it.

    The first Ctrl-C ends the run with a checkpoint. The second one raises KeyboardInterrupt.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _ending_signals.add(signal.SIGINT)
        signal.signal(
            signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler)
        )


def _read_signals() -> None:
    assert _signals is not None
    while True:
        arrived = _ending_signals.intersection(os.read(_signals, 64))
        if signal.SIGINT in arrived:
            _request_end("SIGINT", signal.SIGINT)
        elif arrived:
            _request_end("SIGTERM" if signal.SIGTERM in arrived else "SIGHUP")


def _request_end(cause: str, counts_as: signal.Signals = signal.SIGTERM) -> None:
    """Note the first request to end, whichever way it comes."""
    global _signal, _cause
    with _request_lock:
        if _end_requested.is_set():
            return
        _signal, _cause = counts_as, cause
        _end_requested.set()
    if _exit_immediately:
        _say(f"{cause}: nothing is unsaved; status {exit_status()}")
        os._exit(exit_status())
    if counts_as == signal.SIGINT:
        _say(
            "interrupted: the run saves a checkpoint and ends, and the same command goes on from "
            "it; Ctrl-C once more ends it without a checkpoint"
        )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and what follows must happen
        print(text, file=sys.stderr, flush=True)


def listen_to_metadata_server() -> None:
    """From now on, on Google Cloud, the notice that this host is preempted counts as SIGTERM.

    Elsewhere this does nothing. Call it in one process of each host. A server that fails is asked
    again and again, without a message.

    The value is `instance/preempted`: https://cloud.google.com/compute/docs/instances/spot (Compute
    Engine gives about 30 s; the pages of Cloud TPU promise none). GCE_METADATA_HOST names another
    server, as for Google's own libraries.
    """
    host = os.environ.get("GCE_METADATA_HOST") or (METADATA_SERVER if _on_google_cloud() else None)
    if host:
        threading.Thread(target=_read_metadata, args=(host,), name="metadata", daemon=True).start()


def _on_google_cloud() -> bool:
    if os.environ.get("PJRT_DEVICE") == "TPU":
        return True
    try:
        with open("/sys/class/dmi/id/product_name") as file:
            return file.read().startswith("Google")
    except OSError:
        return False


def _read_metadata(host: str) -> None:
    """Wait for the notice of preemption, as `_read_signals` waits for a signal."""
    # no value has this ETag: the first answer comes at once, and an earlier notice is not missed
    etag, pause = "0", 1
    while True:
        try:
            value, etag = _metadata(host, etag)
            if value == b"TRUE":
                return _request_end(f"the notice that {socket.gethostname()} is preempted")
            pause = 1  # and not 0: a server that ignores wait_for_change would be flooded
        except (OSError, http.client.HTTPException):  # 503 while it restarts; or no such server
            pause = min(2 * pause, BACK_OFF_SECONDS)
        time.sleep(pause)


def _metadata(host: str, etag: str) -> tuple[bytes, str]:
    """(value, its ETag) of `instance/preempted`, once it changes or METADATA_SECONDS have
    passed."""
    # http.client ignores the settings of a proxy, as it must here
    connection = http.client.HTTPConnection(host, timeout=METADATA_SECONDS + 10)
    with contextlib.closing(connection):
        connection.request(
            "GET",
            "/computeMetadata/v1/instance/preempted?wait_for_change=true"
            f"&last_etag={etag}&timeout_sec={METADATA_SECONDS}",
            headers={"Metadata-Flavor": "Google"},
        )
        answer = connection.getresponse()
        # another server at that address does not know this header
        if answer.status != 200 or answer.getheader("Metadata-Flavor") != "Google":
            raise http.client.HTTPException(f"status {answer.status}")
        return answer.read(16).strip(), answer.getheader("ETag", "0")


def disable_immediate_exit() -> None:
    """From here on a Preemption, or the parent process, decides when this process exits."""
    global _exit_immediately
    _exit_immediately = False


def requested() -> bool:
    """Whether this process, or another worker, has been asked to end."""
    return _end_requested.is_set()


def cause() -> str:
    """What has asked it to end, for messages: the name of a signal, or the notice to a host."""
    return _cause


def exit_status() -> int:
    """Of a process that has been asked to end: 143 or 130."""
    return 128 + _signal


def wait() -> None:
    """Return when this process has been asked to end."""
    _end_requested.wait()


@contextlib.contextmanager
def lost_workers_may_be_preempted() -> Iterator[None]:
    """In this block, the loss of a worker because of a preemption ends this process with status
    143, too.

    Any other WorkerGone is raised.
    """
    try:
        yield
    except WorkerGone:
        time.sleep(NEWS_SECONDS)
        if requested():
            sys.exit(exit_status())
        raise


# --------------------------------------------------------------------------------------------------
# How the training of one worker ends
# --------------------------------------------------------------------------------------------------
class Preemption:
    """Watches over the training of one worker, as a context manager around it.

    folder: has two methods. `hurry()` is called when the run is asked to end. `leave()` is called
    when a thread of this class is about to end the process: it completes what must not be cut off,
    such as an upload, and returns whether everything is saved.

    An exception that leaves the block is reported to the other workers, which then end. If another
    worker has failed before, this one exits with the status of that one.
    """

    def __init__(self, workers: Workers, folder: Any):
        disable_immediate_exit()
        self.workers, self.folder = workers, folder
        # No training is unsaved. True before the first step, and from a checkpoint to the next
        # step.
        self.nothing_unsaved = True
        self.loop_stops = False  # the training loop has been told to save and end
        # the vote that is under way, as start_vote returned it, and its tensor of votes
        self.vote: tuple[Any, torch.Tensor] | None = None
        self.saved_since_vote = False
        self.store = workers.second_store()
        self.last_sign: dict[int, str] = {}  # of each rank: "number host"
        self.silent_looks: dict[int, int] = {}  # of each rank: looks in a row without a new sign
        self.signs_given = 0
        # the number of the request that the store has not answered yet
        self.open_request: int | None = None
        self.closed, self.ended = threading.Event(), threading.Event()
        self.watch = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self.store_watch = threading.Thread(target=self._watch_store, name="store", daemon=True)
        self.watch.start()
        self.store_watch.start()

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, WorkerGone):
                time.sleep(NEWS_SECONDS)
                if requested():
                    sys.exit(exit_status())
                if status := self._report_failure(1):
                    sys.exit(status)  # the first worker has said what there is to say
            elif isinstance(error, Exception):
                self._report_failure(2 if isinstance(error, UserError) else 1)
        finally:
            self._close()

    def _close(self) -> None:
        # a thread that is in the store's C++ code when the interpreter ends would abort the process
        self.closed.set()
        self.watch.join()
        self.ended.set()
        self.store_watch.join()

    def part_from_workers(self) -> None:
        """Wait until every worker has come here, and close the connections between them.

        From here on the silence of another worker is no failure.
        """
        self._say_ended(self.store)
        self.store, self.open_request = None, None
        self.workers.leave()

    def _report_failure(self, status: int) -> int | None:
        """Let the others end with `status`. Returns None, or the status of the worker that has
        failed before this one."""
        try:
            if self.store is None or self.store.add("failures", 1) == 1:
                if self.store:
                    self.store.set("failed", str(status))
                return None
            return int(self.store.get("failed"))
        except RuntimeError:
            return None

    def after_step(self, step: int, save_due: bool) -> tuple[bool, bool]:
        """(stop, save): whether to save and end after `step`, and whether to save.

        Every worker gets the same answer at the same step. save_due: whether this worker wants a
        checkpoint. It costs an all-reduce of 8 bytes between hosts every AGREE_STEPS steps. Nobody
        waits for it: its result is read AGREE_STEPS steps later. The device is not waited for.
        """
        self.nothing_unsaved = False
        if self.store is None:
            self.loop_stops = requested()
            return self.loop_stops, save_due
        if step % AGREE_STEPS:
            return False, False
        stop = save = False
        if self.vote:
            vote, votes = self.vote
            self.workers.wait_for_vote(vote)
            stop, save = (votes > 0).tolist()
            save = save and not self.saved_since_vote
            self.loop_stops = stop
        votes = torch.tensor([requested(), save_due], dtype=torch.int32)
        self.vote, self.saved_since_vote = (self.workers.start_vote(votes), votes), False
        return stop, save

    def saved(self) -> None:
        """A checkpoint of this step has been made, on every worker."""
        self.saved_since_vote = self.nothing_unsaved = True

    # ----- the thread that watches for the end -----
    def _watch(self) -> None:
        """Pass on the request to end, and exit once no worker has anything unsaved. Give and check
        signs of life.

        A worker that has announced "nothing unsaved" may take some more steps until all the others
        have announced it, too. Only these steps are lost then.
        """
        announced = hurried = False
        next_look, requests, store_lost_at = 0.0, 0, None
        while not self.closed.wait(POLL_SECONDS):
            store = self.store
            try:
                requests += 1
                self.open_request = requests if store else None
                if store:
                    self._exit_if_another_failed(store)
                    self._pass_on(store)
                    if time.monotonic() >= next_look:
                        next_look = time.monotonic() + BEAT_SECONDS
                        self._check_signs_of_life(store)
                if requested() and not hurried:
                    self.folder.hurry()
                    hurried = True
                if (
                    store_lost_at
                    and requests - store_lost_at > SILENT_LOOKS * BEAT_SECONDS / POLL_SECONDS
                ):
                    self._exit_without([self._store_holder()])
                if not requested() or self.loop_stops:
                    continue
                if not (announced or self.nothing_unsaved):
                    continue
                if store and not announced:
                    store.set(f"nothing unsaved/{self.workers.rank}", "1")
                announced = True
                if store and not store.check(self._keys("nothing unsaved")):
                    continue
            except RuntimeError:
                # The process that holds the store is gone. The training's next collective fails,
                # and that ends this worker. If the collective hangs instead, _exit_without ends it,
                # above, after the time in which a silent worker counts as gone.
                self.store, self.open_request, store_lost_at = None, None, requests
                continue
            self.open_request = None
            saved = "" if self.folder.leave() else "what the warning names but "
            rank, status = self.workers.rank, exit_status()
            _say(f"{cause()}: {saved}nothing is unsaved; worker {rank} ends with status {status}")
            os._exit(status)
        self._say_ended(self.store)

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(self.workers.world_size)]

    def _exit_if_another_failed(self, store: Any) -> None:
        if store.check(["failed"]):
            status = int(store.get("failed"))
            self.open_request = None
            self.folder.leave()
            os._exit(status)

    def _pass_on(self, store: Any) -> None:
        """Tell the others of a request to end that came here, or take note of one that came
        there."""
        if store.check(["requested"]):
            if not requested():
                _request_end(store.get("requested").decode())
        elif requested():
            store.set("requested", cause())

    def _say_ended(self, store: Any) -> None:
        if store:
            with contextlib.suppress(RuntimeError):  # the others may be at work for long
                store.set(f"beat/{self.workers.rank}", "ended")

    def _check_signs_of_life(self, store: Any) -> None:
        """Give a sign of life, and look for those of the others.

        They are counted, not timed: the clocks of hosts differ, and this process may itself have
        been stopped, as with its laptop.
        """
        self.signs_given += 1
        store.set(f"beat/{self.workers.rank}", f"{self.signs_given} {socket.gethostname()}")
        keys = self._keys("beat")
        if not store.check(keys):  # multi_get would wait for those that have not begun
            return
        for rank, sign in enumerate(text.decode() for text in store.multi_get(keys)):
            is_new = sign == "ended" or sign != self.last_sign.get(rank)
            self.silent_looks[rank] = 0 if is_new else self.silent_looks[rank] + 1
            self.last_sign[rank] = sign
        if max(self.silent_looks.values()) >= SILENT_LOOKS:
            # The workers of one host vanish together, but not all gave their last sign at the same
            # time: so those are named, too, that are silent for half as long.
            silent = [r for r, looks in self.silent_looks.items() if 2 * looks >= SILENT_LOOKS]
            self._exit_without([self._name(rank) for rank in silent])

    # ----- the thread that watches the store -----
    def _watch_store(self) -> None:
        """Exit when the store no longer answers.

        The other thread cannot notice that: if the store's host has vanished, its request may never
        return.
        """
        asked, looks = None, 0
        while not self.ended.wait(BEAT_SECONDS):
            looks = looks + 1 if self.open_request and self.open_request == asked else 0
            asked = self.open_request
            if looks >= SILENT_LOOKS:
                self._exit_without([self._store_holder()], tell=False)

    def _name(self, rank: int) -> str:
        return f"worker {rank} on {self.last_sign[rank].partition(' ')[2]}"

    def _store_holder(self) -> str:
        if self.workers.store_is_apart():
            return "the process that started the workers"
        return self._name(0) if 0 in self.last_sign else f"worker 0 on {os.environ['MASTER_ADDR']}"

    def _exit_without(self, silent: list[str], tell: bool = True) -> None:
        """Exit with status 1 because of workers that give no sign of life.

        Only the first worker that notices it prints the message. tell: tell the others through the
        store, which must still answer.
        """
        status = self._report_failure(1) if tell else None
        if status is None:
            _say(
                f"error: no sign of life for {BEAT_SECONDS * SILENT_LOOKS:g} s from "
                f"{', '.join(silent)}: gone, or stopped: run the same command again, it goes on "
                "from the last checkpoint"
            )
        self.open_request = None
        self.folder.leave()
        os._exit(status or 1)
