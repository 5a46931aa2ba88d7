"""A command that has nothing to save, and gets SIGINT, and then SIGTERM."""

import os
import signal
import time

import preemption

preemption.listen()
preemption.listen_to_keyboard()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
