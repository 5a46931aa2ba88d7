"""Add 1 to the number in the file `counter` of the folder argv[1] twenty times, beside others."""

import sys

import storage

folder, wins = storage.open_folder(sys.argv[1]), 0
while wins < 20:
    data, token = folder.read_version("counter")
    wins += folder.replace_if("counter", b"%d" % (int(data) + 1), token) is not None
