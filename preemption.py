"""SIGTERM, to one worker or to all: a checkpoint, then exit status 143, within seconds. Ctrl-C (SIGINT) of a run that is one process:
the same with 130; of several, their parent answers it (workers.py).

A signal that is only looked at between training steps is lost on a process that compiles or evaluates. So a thread
listens: while there is nothing to save it ends the process by itself, once every worker has nothing to save; else
the loop saves, at a step on which all workers agree.

The same thread ends this worker when another has failed: a collective may not notice that for minutes.
"""
import os
import signal
import sys
import threading

import torch

EXIT_STATUS = 143               # 128 + SIGTERM
AGREE_STEPS = 4                 # steps between two votes; the result of a vote is read when the next one is due
POLL_SECONDS = 0.25             # between looks at the other workers

_signals = None                 # read end of a pipe into which a signal's number is written as it arrives
_arrived = threading.Event()
_which = signal.SIGTERM         # what arrived, once it has
_heeded = {signal.SIGTERM}
_at_once = True                 # nothing here would be lost, and nobody else ends this process


def listen():
    """From now on SIGTERM ends this process with status 143, whatever it is doing: at once, until let_others_end_it() or a
    Preemption takes care of it. To be called in the main thread; more than once is fine.

    Python runs a signal's handler in the main thread, between two bytecodes: during a compile that is much too late.
    The number that set_wakeup_fd writes is there at once, for any thread.
    """
    global _signals
    if _signals is None:
        _signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=_read_signals, name="signals", daemon=True).start()


def listen_to_keyboard():
    """From now on Ctrl-C, too, unless this process was told to ignore it; a second one is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _heeded.add(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler))


def _read_signals():
    global _which
    while True:
        come = _heeded.intersection(os.read(_signals, 64))
        if come and not _arrived.is_set():
            _which = come.pop()
            _arrived.set()
            if _at_once:
                print(f"{signal_name()}: nothing is unsaved; status {exit_status()}", file=sys.stderr, flush=True)
                os._exit(exit_status())
            if _which == signal.SIGINT:
                print("interrupted: it saves and ends; once more to kill it", file=sys.stderr, flush=True)


def let_others_end_it():
    """From now on somebody else ends this process after a SIGTERM: the workers it waits for, or a Preemption."""
    global _at_once
    _at_once = False


def requested():
    """Whether this process, or a fellow worker's, has received a signal to end."""
    return _arrived.is_set()


def signal_name():
    """Of what has come: "SIGTERM" or "SIGINT"."""
    return signal.Signals(_which).name


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
        self.vote, self.met = None, False       # (work, votes) under way, and whether a checkpoint has been made since it began
        self.store = device.second_store()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self.thread.start()

    def close(self):
        """Stop listening. A thread that is in the store's C++ code when the interpreter ends would abort the process."""
        self.closed.set()
        self.thread.join()

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

    def _watch(self):
        """Tell the other workers of a SIGTERM here, take note of one there; leave once nobody has anything to lose.

        A worker that has said so and then trains on a little loses nothing but those steps, if the others have said so too.
        """
        said = hurried = False
        while not self.closed.wait(POLL_SECONDS):
            store = self.store
            try:
                if store and store.check(["failed"]):
                    status = int(store.get("failed"))
                    self.leave()
                    os._exit(status)
                if store and not requested() and store.check(["requested"]):
                    _arrived.set()
                elif store and requested() and not said:
                    store.set("requested", "1")
                if requested() and not hurried:
                    self.hurry()
                    hurried = True
                if not requested() or not (said or self.nothing_to_lose):
                    continue
                if store and not said:
                    store.set(f"nothing to lose/{self.device.rank}", "1")
                said = True
                if store and not store.check([f"nothing to lose/{rank}" for rank in range(self.device.world_size)]):
                    continue
            except RuntimeError:        # rank 0, which holds the store, is gone: the training's next collective says so
                self.store = None
                continue
            unsaved = "" if self.leave() else "what the warning names but "
            print(f"{signal_name()}: {unsaved}nothing is unsaved; worker {self.device.rank} ends with status {exit_status()}", file=sys.stderr, flush=True)
            os._exit(exit_status())
